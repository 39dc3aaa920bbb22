"""What an observer hears of the passes of a model, and what hooks leave behind."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from naive_generation import is_clean
from tiny_models import Family, left_padded, prompts, tiny_model
from torch import Tensor
from transformers import DynamicCache, StaticCache

from dspa.errors import InvalidInputError
from dspa.methods.policy import Policy
from dspa.online.hooks.forward import ModelHooks, hooks_of
from dspa.transformers_model import decoder_stack


class Recorder:
    """Records its calls, and adds a number to what one layer returns."""

    differentiable = False
    call: object | None = None
    policies: Mapping[str, Policy] = {}

    def __init__(self, added: float = 0.0, in_place: bool = True) -> None:
        self.added, self.in_place = added, in_place
        self.events: list[Any] = []
        self.caches: list[tuple[object | None, object | None]] = []  # before and after each pass

    def pass_begins(
        self, tokens: Tensor, mask: Tensor | None, cache_length: int | Tensor, has_cache: bool, cache: object | None
    ) -> None:
        shape = None if mask is None else tuple(mask.shape)
        self.events.append((tuple(tokens.shape), shape, int(cache_length), has_cache))
        self.passed = cache

    def pass_ends(self, cache: object | None, hidden: Tensor) -> None:
        self.caches.append((self.passed, cache))

    def layer_computed(self, layer: int, hidden: Tensor) -> Tensor | None:
        self.events.append(layer)
        if self.in_place:
            hidden += self.added
            return None
        return hidden + self.added


def hooked(model: torch.nn.Module, *recorders: Recorder, layers: set[int]) -> ModelHooks:
    hooks = hooks_of(decoder_stack(model))
    for recorder in recorders:
        hooks.add(recorder, layers)
    return hooks


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])  # gpt2 hands its ids on by position
def test_passes_and_layers_are_heard_in_order(family: Family) -> None:
    model, recorder = tiny_model(family), Recorder()
    hooks = hooked(model, recorder, layers={3, 1})
    batch = left_padded(prompts((5, 3)))
    with torch.no_grad():
        model(**batch, use_cache=False)
        model(inputs_embeds=model.get_input_embeddings()(batch["input_ids"]), use_cache=False)
    hooks.remove(recorder)
    model(**batch)
    first, *layers = recorder.events[:3]
    assert first[0] == (2, 5)
    assert first[2:] == (0, False)
    assert layers == [1, 3]
    assert recorder.events[3][0] == (2, 5, 24)
    assert len(recorder.events) == 6
    assert is_clean(model)


@pytest.mark.parametrize("static", [False, True])
def test_how_much_is_in_the_cache(static: bool) -> None:
    model, recorder = tiny_model("llama"), Recorder()
    cache = StaticCache(config=model.config, max_cache_len=16) if static else DynamicCache(config=model.config)
    hooked(model, recorder, layers=set())
    with torch.no_grad():
        for width in (4, 1, 2):
            model(torch.ones(1, width, dtype=torch.int64), past_key_values=cache)
    assert [events[2:] for events in recorder.events] == [(0, True), (4, True), (5, True)]


@pytest.mark.parametrize("in_place", [True, False])
def test_edits_of_several_observers_add_up(in_place: bool) -> None:
    model = tiny_model("llama")
    seen: list[Tensor] = []
    decoder_stack(model).layers[3].register_forward_pre_hook(lambda module, args: seen.append(args[0].clone()))
    ids = torch.tensor(prompts((4,)))
    with torch.no_grad():
        model(ids)
        hooked(model, Recorder(1.0, in_place), Recorder(2.0, in_place), layers={2})
        model(ids)
    torch.testing.assert_close(seen[1], seen[0] + 3)


def test_layers_are_untapped_when_their_last_observer_goes() -> None:
    model, first, second = tiny_model("llama"), Recorder(), Recorder()
    hooks = hooked(model, first, layers={1, 2})
    hooks.add(second, {2})
    layers = decoder_stack(model).layers
    hooks.remove(first)
    assert ["forward" in vars(layer) for layer in layers] == [False, False, True, False]
    hooks.remove(second)
    assert is_clean(model)
    assert hooks_of(decoder_stack(model)) is hooks  # kept, for models that were compiled with them


def test_a_copy_has_taps_of_its_own() -> None:
    model = tiny_model("llama")
    hooks = hooked(model, Recorder(), layers={1})
    twin = copy.deepcopy(model)
    assert hooks_of(decoder_stack(twin)) is not hooks
    assert hooks_of(decoder_stack(twin)).number != hooks.number


@pytest.mark.parametrize("as_record", [True, False])
def test_which_cache(as_record: bool) -> None:
    """Also where the model makes it by itself."""
    model, recorder = tiny_model("llama"), Recorder()
    hooked(model, recorder, layers=set())
    ids, own = torch.tensor(prompts((4,))), DynamicCache(config=model.config)
    made = model(ids, return_dict=as_record)
    model(ids, past_key_values=own)
    model(ids, use_cache=False)
    assert recorder.caches == [(None, made.past_key_values if as_record else made[1]), (own, own), (None, None)]


def test_a_call_without_input_gets_the_models_own_error() -> None:
    model, messages = tiny_model("llama"), []
    for recorders in ([], [Recorder()]):
        hooked(model, *recorders, layers=set())
        with pytest.raises(ValueError, match="exactly one of input_ids or inputs_embeds") as error:
            model(attention_mask=torch.ones(1, 3))
        messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_packed_requests_are_refused() -> None:
    model = tiny_model("llama")
    hooked(model, Recorder(), layers={1})
    with pytest.raises(InvalidInputError, match="continuous batching packs the tokens of many requests"):
        model(torch.ones(1, 4, dtype=torch.int64), cu_seq_lens_q=torch.tensor([0, 2, 4]))
