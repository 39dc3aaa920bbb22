"""What an observer hears of `generate` calls, and what is left of it afterwards."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_models import BOS, PAD, left_padded, prompts, tiny_model
from torch import Tensor, nn
from transformers import ContinuousBatchingConfig, GenerationConfig

from dspa.errors import InvalidInputError
from dspa.online.hooks.generate import observe_generate

IDS, MASK = torch.tensor([[PAD, BOS, 9], [BOS, 7, 8]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
ALL = torch.ones(2, 3)
SHORT: dict[str, Any] = {"max_new_tokens": 2, "do_sample": False}


class Recorder:
    """Writes down what it hears."""

    def __init__(self, refuses: bool = False, fails: bool = False) -> None:
        self.refuses, self.fails = refuses, fails
        self.events: list[tuple[Tensor | None, Tensor] | str] = []

    def generate_begins(self, running: Any, token_ids: Tensor | None, attention_mask: Tensor) -> None:
        if self.refuses:
            raise InvalidInputError("refused")
        self.events.append((token_ids, attention_mask))

    def generate_ends(self, running: Any, new_tokens: int | None) -> None:
        self.new_tokens = new_tokens
        self.events.append("end")
        if self.fails:
            raise RuntimeError("on purpose")

    def draft_begins(self, running: Any) -> None:
        self.events.append("draft")

    def draft_ends(self, running: Any) -> None:
        self.events.append("end of draft")

    def labels_passed(self, labels: Tensor | None) -> None:
        self.events.append("labels" if labels is not None else "end of labels")


@pytest.mark.parametrize(
    ("args", "kwargs", "expected_ids", "expected_mask"),
    [
        ((), {"input_ids": IDS, "attention_mask": MASK}, IDS, MASK),
        ((IDS,), {"attention_mask": MASK}, IDS, MASK),
        ((), {"inputs": IDS, "attention_mask": MASK}, IDS, MASK),
        ((), {"input_ids": IDS}, IDS, MASK),  # the padding id of the model's generation_config
        ((), {"input_ids": IDS, "attention_mask": None}, IDS, MASK),
        ((), {"input_ids": IDS, "pad_token_id": 9}, IDS, (IDS != 9).long()),
        ((), {"input_ids": IDS, "pad_token_id": 50}, IDS, ALL),
        ((), {"input_ids": IDS, "eos_token_id": PAD}, IDS, ALL),  # padding that ends sequences is not told apart
        ((), {"input_ids": IDS, "eos_token_id": [5, PAD]}, IDS, ALL),
        ((), {"input_ids": IDS, "eos_token_id": [5, 6]}, IDS, MASK),
        ((IDS, GenerationConfig(pad_token_id=8, **SHORT)), {}, IDS, (IDS != 8).long()),
        ((), {"inputs": IDS, "generation_config": GenerationConfig(pad_token_id=8, **SHORT)}, IDS, (IDS != 8).long()),
        ((), {"inputs_embeds": torch.zeros(2, 3, 24, dtype=torch.float64)}, None, ALL),
        ((), {"inputs_embeds": torch.zeros(2, 3, 24, dtype=torch.float64), "attention_mask": MASK}, None, MASK),
        ((), {}, torch.tensor([[BOS]]), torch.ones(1, 1)),
        ((), {"bos_token_id": 5}, torch.tensor([[5]]), torch.ones(1, 1)),
    ],
)
def test_the_prompt_is_the_one_generate_uses(
    args: tuple[Any, ...], kwargs: dict[str, Any], expected_ids: Tensor | None, expected_mask: Tensor
) -> None:
    model: Any = tiny_model("llama")
    options = {} if len(args) > 1 or "generation_config" in kwargs else SHORT
    masks: list[Tensor | None] = []
    hook = model.model.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    expected = model.generate(*args, **kwargs, **options)
    hook.remove()
    recorder = Recorder()
    handle = observe_generate(model, recorder)
    assert torch.equal(model.generate(*args, **kwargs, **options), expected)
    handle.remove()
    (ids, attention_mask), end = recorder.events
    assert end == "end"
    assert isinstance(attention_mask, Tensor)
    assert attention_mask.tolist() == expected_mask.tolist()
    seen = torch.ones_like(attention_mask) if masks[0] is None else masks[0]  # generate may drop a mask without a zero
    assert attention_mask.tolist() == seen.tolist()  # what the model itself was given
    assert (None if ids is None else ids.tolist()) == (None if expected_ids is None else expected_ids.tolist())  # type: ignore[union-attr]


def test_generate_is_its_old_self_when_nobody_listens() -> None:
    model: Any = tiny_model()
    first, second = observe_generate(model, Recorder()), observe_generate(model, Recorder())
    assert "generate" in vars(model)
    first.remove()
    assert "generate" in vars(model)
    second.remove()
    assert "generate" not in vars(model)


def test_every_observer_hears_every_call() -> None:
    model: Any = tiny_model()
    recorders = [Recorder(), Recorder()]
    handles = [observe_generate(model, recorder) for recorder in recorders]
    model.generate(**left_padded(prompts((4,))), **SHORT)
    handles[0].remove()
    model.generate(**left_padded(prompts((4,))), **SHORT)
    assert [len(recorder.events) for recorder in recorders] == [2, 4]


def test_an_observer_that_refuses_stops_the_call_and_the_others_hear_its_end() -> None:
    model: Any = tiny_model()
    recorders = [Recorder(), Recorder(refuses=True), Recorder()]
    for recorder in recorders:
        observe_generate(model, recorder)
    with pytest.raises(InvalidInputError, match="refused"):
        model.generate(**left_padded(prompts((4,))), **SHORT)
    assert [len(recorder.events) for recorder in recorders] == [2, 0, 0]
    assert recorders[0].events[-1] == "end"


@pytest.mark.parametrize(
    ("inputs", "count"),
    [
        ({"input_ids": IDS, "attention_mask": MASK}, 2),
        ({"inputs_embeds": torch.zeros(2, 3, 24, dtype=torch.float64)}, 2),
        ({}, 2),
    ],
)
@pytest.mark.parametrize("as_record", [True, False])
def test_the_number_of_new_columns_is_heard(inputs: dict[str, Any], count: int, as_record: bool) -> None:
    model, recorder = tiny_model("llama"), Recorder()
    observe_generate(model, recorder)
    model.generate(**inputs, **SHORT, return_dict_in_generate=as_record)  # type: ignore[operator]
    assert recorder.new_tokens == count


def test_a_draft_by_the_model_itself_is_heard_as_such() -> None:
    model, recorder = tiny_model("llama"), Recorder()
    observe_generate(model, recorder)
    model.generate(IDS[1:], **SHORT, assistant_early_exit=2)  # type: ignore[operator]
    assert recorder.events.count("end") == 1
    assert recorder.events.count("draft") == recorder.events.count("end of draft") >= 1


def test_an_error_of_generate_is_passed_on() -> None:
    model: Any = tiny_model()
    recorder = Recorder()
    observe_generate(model, recorder)
    with pytest.raises(ValueError, match="num_beams"):
        model.generate(**left_padded(prompts((4,))), num_beams=2, num_return_sequences=3, max_new_tokens=2)
    assert recorder.events[-1] == "end"
    assert recorder.new_tokens is None


class Wrapper(nn.Module):
    """Something around a transformers model, as adapters are."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def generate(self, **kwargs: Any) -> Any:
        return self.inner.generate(**kwargs)  # type: ignore[operator]


def test_the_model_inside_a_wrapper_is_observed() -> None:
    wrapper, recorder = Wrapper(tiny_model()), Recorder()
    handle = observe_generate(wrapper, recorder)
    wrapper.generate(**left_padded(prompts((4,))), **SHORT)
    assert len(recorder.events) == 2
    handle.remove()
    assert "generate" not in vars(wrapper.inner)


def test_a_later_replacement_of_generate_is_left_alone() -> None:
    model: Any = tiny_model()
    recorder = Recorder()
    handle = observe_generate(model, recorder)
    observed = model.generate

    def replacement(*args: Any, **kwargs: Any) -> Any:
        return observed(*args, **kwargs)

    model.generate = replacement
    handle.remove()
    assert model.generate is replacement
    model.generate(**left_padded(prompts((4,))), **SHORT)
    model.generate(**left_padded(prompts((4,))), **SHORT, guidance_scale=1.5)  # refused only while it was observed
    assert recorder.events == []


def test_a_later_replacement_of_a_refused_method_is_no_longer_refused() -> None:
    model: Any = tiny_model()
    handle = observe_generate(model, Recorder())
    refused = model.init_continuous_batching
    with pytest.raises(InvalidInputError, match="continuous batching packs"):
        refused()
    handle.remove()
    assert type(refused(continuous_batching_config=ContinuousBatchingConfig())).__name__ == "ContinuousBatchingManager"


def test_every_observer_hears_the_end_also_when_one_raises_there() -> None:
    model: Any = tiny_model()
    recorders = [Recorder(fails=True), Recorder(), Recorder(fails=True)]
    for recorder in recorders:
        observe_generate(model, recorder)
    with pytest.raises(RuntimeError, match="on purpose"):
        model.generate(**left_padded(prompts((4,))), **SHORT)
    assert [recorder.events[-1] for recorder in recorders] == ["end"] * 3


def test_a_model_without_generate_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="Linear has no generate method; pass a causal language model"):
        observe_generate(nn.Linear(2, 2), Recorder())


def test_the_observed_method_still_looks_like_generate() -> None:
    model: Any = tiny_model()
    doc = model.generate.__doc__
    observe_generate(model, Recorder())
    assert model.generate.__name__ == "generate"
    assert model.generate.__doc__ == doc
    assert copy.copy(model.generation_config).pad_token_id == PAD
