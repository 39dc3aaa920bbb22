"""Hidden states of the shared-prompt forward pass against whole sequences, one at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny_models as tiny
import torch
from tiny_collection import one_thread  # noqa: F401
from torch import Tensor
from transformers import Lfm2Config, Lfm2ForCausalLM

from dspa.offline.batching import BatchLimits, TripleLengths, plan_groups
from dspa.offline.preferences import PreferenceTriple
from dspa.offline.prefix_forward import SharedPrefixForward
from dspa.transformers_model import decoder_stack, text_config

UNCOUNTED = frozenset({tiny.BOS, 9})


def triples(sizes: list[tuple[int, int, int]], seed: int = 0) -> list[PreferenceTriple]:
    """Prompts begin with BOS; the responses' last token counts in every other triple only."""
    generator = torch.Generator().manual_seed(seed)

    def ids(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, tiny.VOCAB, (length,), generator=generator).tolist())

    return [
        PreferenceTriple((tiny.BOS, *ids(p)), ids(c), ids(r), max(1, c - n % 2), max(1, r - n % 2), f"row {n}")
        for n, (p, c, r) in enumerate(sizes)
    ]


MIXED = triples([(3, 2, 5), (3, 2, 5), (14, 9, 1), (13, 1, 12), (4, 7, 7), (0, 1, 1), (22, 3, 3), (4, 1, 9)])


def plain(model: Any, layer: int, ids: tuple[int, ...]) -> Tensor:
    """`[T, d_model]` after a decoder layer of one whole sequence."""
    seen: list[Tensor] = []

    def hook(module: object, args: object, output: Any) -> None:
        seen.append(output if isinstance(output, Tensor) else output[0])

    handle = decoder_stack(model).layers[layer].register_forward_hook(hook)
    with torch.no_grad():
        model(torch.tensor([ids]), use_cache=False)
    handle.remove()
    return seen[0][0]


def expected(model: Any, layers: tuple[int, int], triple: PreferenceTriple) -> dict[str, Tensor]:
    start = len(triple.prompt)
    kept = [t for t, token in enumerate(triple.prompt) if token not in UNCOUNTED]
    return {
        "prompt": plain(model, layers[0], triple.prompt)[kept],
        "chosen": plain(model, layers[1], triple.prompt + triple.chosen)[start : start + triple.chosen_counted],
        "rejected": plain(model, layers[1], triple.prompt + triple.rejected)[start : start + triple.rejected_counted],
    }


def collected(
    model: Any, layers: tuple[int, int], given: list[PreferenceTriple], limits: BatchLimits, share: bool = True
) -> list[dict[str, Tensor]]:
    forward = SharedPrefixForward(decoder_stack(model), text_config(model), *layers, UNCOUNTED)
    assert forward.shares or not share
    parts: list[dict[str, list[Tensor]]] = [{"prompt": [], "chosen": [], "rejected": []} for _ in given]
    lengths = [TripleLengths(len(t.prompt), len(t.chosen), len(t.rejected)) for t in given]
    with torch.no_grad():
        for group in plan_groups(lengths, limits, share):
            for found in forward.segments(given, group, limits):
                assert len(found.offsets) == len(found.triples) + 1
                assert found.offsets[-1] == len(found.hidden)
                for s, triple in enumerate(found.triples):
                    rows = found.hidden[int(found.offsets[s]) : int(found.offsets[s + 1])]
                    assert len(rows)
                    parts[triple][found.part].append(rows)
    empty = torch.empty(0, text_config(model).hidden_size)
    return [{name: torch.cat(rows) if rows else empty for name, rows in part.items()} for part in parts]


def worst(model: Any, layers: tuple[int, int], given: list[PreferenceTriple], *args: Any) -> float:
    """Largest difference relative to the largest value; shapes must agree: every token came by once, in order."""
    differences = [0.0]
    for triple, found in zip(given, collected(model, layers, given, *args), strict=True):
        for name, hidden in expected(model, layers, triple).items():
            assert found[name].shape == hidden.shape, (triple.source, name)
            if len(hidden):
                differences.append(float((found[name] - hidden).abs().max() / hidden.abs().max()))
    return max(differences)


@pytest.mark.parametrize("chunk", [1, 3, 8, 256])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_every_counted_token_has_its_hidden_state(family: tiny.Family, chunk: int) -> None:
    """With windows of 6 tokens in the families that have one; prompts and responses are longer."""
    model = tiny.tiny_model(family)
    rounding = 2**-18 if family == "gemma2" else 2**-45  # float32 and float64, some layers deep
    assert worst(model, (1, 2), MIXED, BatchLimits(chunk=chunk)) < rounding


@pytest.mark.parametrize("layers", [(0, 3), (3, 3), (2, 0), (0, 0), (2, 2)], ids=str)
@pytest.mark.parametrize(
    "limits", [BatchLimits(), BatchLimits(triples=1), BatchLimits(tokens=70), BatchLimits(chunk=4)]
)
def test_layers_and_limits(layers: tuple[int, int], limits: BatchLimits) -> None:
    assert worst(tiny.tiny_model("gemma3"), layers, MIXED, limits) < 2**-45


def test_without_sharing() -> None:
    assert worst(tiny.tiny_model("mistral"), (1, 2), MIXED, BatchLimits(chunk=5), False) < 2**-45


def test_a_recurrent_state_is_not_shared() -> None:
    config = Lfm2Config(
        vocab_size=tiny.VOCAB,
        hidden_size=tiny.D_MODEL,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention", "conv", "full_attention"],
    )
    model = Lfm2ForCausalLM(config).double().eval()
    assert not SharedPrefixForward(decoder_stack(model), text_config(model), 1, 2, UNCOUNTED).shares
    assert worst(model, (1, 2), MIXED, BatchLimits(), False) < 2**-45


def test_prompts_without_a_counted_token_hand_out_nothing() -> None:
    given = [replace(MIXED[0], prompt=(tiny.BOS, 9, 9)), MIXED[1]]
    found = collected(tiny.tiny_model(), (1, 2), given, BatchLimits())
    assert len(found[0]["prompt"]) == 0
    assert len(found[0]["chosen"]) == given[0].chosen_counted


def test_the_prompt_leaves_the_output_layer_at_its_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the output layer, attention and MLP are not run for the shared part, and no later layer is."""
    model = tiny.tiny_model()
    ran: list[tuple[int, int]] = []
    for number, layer in enumerate(decoder_stack(model).layers):
        layer.mlp.register_forward_pre_hook(  # type: ignore[union-attr, operator]
            lambda module, args, n=number: ran.append((n, args[0].shape[1]))
        )
    collected(model, (1, 2), triples([(9, 4, 4)]), BatchLimits())
    assert ran == [(0, 10), (1, 10), (0, 4), (1, 4), (2, 4)]
