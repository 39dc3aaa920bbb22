"""Collected densities against the published three passes: x alone, x + y+, x + y-, one sequence at a time, in numpy."""

from __future__ import annotations

import functools
import json
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny_collection as tiny
import torch
from tiny_collection import one_thread  # noqa: F401
from torch import Tensor
from transformers import (
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import dspa
from dspa.errors import InvalidInputError, MismatchError
from dspa.offline.density_store import DensityStore
from dspa.offline.preferences import PreferenceTriples
from dspa.sae.autoencoder import SparseAutoencoder

SAES = (tiny.tiny_sae(tiny.D_SAE_IN, 1), tiny.tiny_sae(tiny.D_SAE_OUT, 2))
TRIPLES = tiny.tiny_triples(7, seed=4)


# --- the reference ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expected:
    """Counts `[n, d_sae]` and tokens `[n]` of one part, and how many of its gates are too close to call."""

    counts: tiny.Counts
    tokens: tiny.Counts
    doubtful: tiny.Counts


def hidden_after(model: Any, layer: int, ids: tuple[int, ...]) -> tiny.Matrix:
    """`[T, d_model]` after a decoder layer, by the library's own hidden states, which put the last norm on the last."""
    seen: list[Tensor] = []
    handle = model.model.norm.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        states = model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states
    handle.remove()
    last = layer == model.config.num_hidden_layers - 1
    return (seen[0] if last else states[layer + 1])[0].double().numpy()


def gates(hidden: tiny.Matrix, sae: SparseAutoencoder, rounding: float) -> tuple[Any, Any]:
    """`f > 0` of a JumpReLU SAE (section 1), and where z is within rounding of the gate, both `[T, d_sae]`."""
    assert sae.b_dec is not None
    W, b, theta = sae.W_enc.double().numpy(), sae.b_enc.double().numpy(), sae.threshold.double().numpy()
    x = hidden - sae.b_dec.double().numpy()
    z = x @ W.T + b
    size = np.abs(x) @ np.abs(W).T + np.abs(b)
    edge = np.maximum(theta, 0)
    return (np.maximum(z, 0) > 0) & (z > theta), np.abs(z - edge) <= rounding * size


@functools.cache
def three_passes(
    model: Any, triples: PreferenceTriples, layers: tuple[int, int], rounding: float = 0.0
) -> dict[str, Expected]:
    found: dict[str, list[tuple[Any, int, Any]]] = {"prompt": [], "chosen": [], "rejected": []}
    for triple in triples:
        alone = hidden_after(model, layers[0], triple.prompt)
        kept = [t for t, token in enumerate(triple.prompt) if token not in triples.uncounted_token_ids]
        parts = [("prompt", alone[kept], SAES[0])]
        for name, response, counted in (
            ("chosen", triple.chosen, triple.chosen_counted),
            ("rejected", triple.rejected, triple.rejected_counted),
        ):
            states = hidden_after(model, layers[1], triple.prompt + response)
            parts.append((name, states[len(triple.prompt) : len(triple.prompt) + counted], SAES[1]))
        for name, states, sae in parts:
            active, doubtful = gates(states, sae, rounding)
            found[name].append((active.sum(0), len(states), doubtful.sum(0)))
    return {name: Expected(*[np.array(column) for column in zip(*rows, strict=True)]) for name, rows in found.items()}


# --- the package ------------------------------------------------------------------------------------------------------


def collect(
    folder: Path,
    model: Any,
    triples: PreferenceTriples = TRIPLES,
    layers: tuple[int | None, int | None] = (1, 2),
    pad: int | None = None,
    **options: Any,
) -> DensityStore:
    saes: dict[str, Any] = {"input_sae": SAES[0], "output_sae": SAES[1]} | options
    tokenizer: Any = None if pad is None else SimpleNamespace(pad_token_id=pad)
    return dspa.collect(model, tokenizer, triples, input_layer=layers[0], output_layer=layers[1], out=folder, **saes)


def dense(store: DensityStore, part: str) -> tuple[tiny.Counts, tiny.Counts]:
    """Counts and tokens of a part of all triples."""
    widths = {"prompt": store.run.d_sae_in, "chosen": store.run.d_sae_out, "rejected": store.run.d_sae_out}
    rows, tokens = [], []
    for shard in store.read():
        sparse = shard.part(part)
        for triple in range(len(sparse.tokens)):
            row = np.zeros(widths[part], dtype=np.int64)
            entries = slice(int(sparse.offsets[triple]), int(sparse.offsets[triple + 1]))
            row[sparse.latents[entries].numpy()] = sparse.counts[entries].numpy()
            rows.append(row)
            tokens.append(int(sparse.tokens[triple]))
    return np.array(rows), np.array(tokens)


def assert_as_expected(store: DensityStore, expected: dict[str, Expected]) -> int:
    """Counts agree but for doubtful gates; returns how many of these there were."""
    for name, part in expected.items():
        counts, tokens = dense(store, name)
        assert (tokens == part.tokens).all(), name
        different = np.abs(counts - part.counts) > part.doubtful
        assert not different.any(), (name, np.argwhere(different).tolist())
        assert 0.1 < part.counts.sum() / (part.tokens.sum() * part.counts.shape[1]) < 0.6
    return int(sum(part.doubtful.sum() for part in expected.values()))


# --- against the three passes -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Gemma2ForCausalLM:
    return tiny.tiny_model()


@pytest.mark.parametrize("layers", [(0, 2), (1, 2), (2, 2), (2, 0), (0, 3), (3, 3)], ids=str)
def test_counts_are_those_of_three_passes(tmp_path: Path, model: Gemma2ForCausalLM, layers: tuple[int, int]) -> None:
    assert assert_as_expected(collect(tmp_path, model, layers=layers), three_passes(model, TRIPLES, layers)) == 0


SHAPE: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY,
    "hidden_size": tiny.D_MODEL,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (Gemma3ForCausalLM, Gemma3TextConfig(**SHAPE, sliding_window=4)),
        (LlamaForCausalLM, LlamaConfig(**SHAPE)),
        (Qwen3ForCausalLM, Qwen3Config(**SHAPE)),
    ],
    ids=["gemma3", "llama", "qwen3"],
)
def test_counts_on_other_architectures(tmp_path: Path, model_class: Any, config: Any) -> None:
    torch.manual_seed(0)
    other = model_class(config).double().eval()
    assert assert_as_expected(collect(tmp_path, other, layers=(0, 1)), three_passes(other, TRIPLES, (0, 1))) == 0


def test_counts_in_float32_differ_at_most_where_a_gate_is_within_rounding(tmp_path: Path) -> None:
    """Sequences of one batch are rounded otherwise than one at a time: a few float32 ulps of the hidden states."""
    small = tiny.tiny_model(torch.float32)
    triples = tiny.tiny_triples(20, seed=3)
    expected = three_passes(small, triples, (1, 2), rounding=2**-20)
    doubtful = assert_as_expected(collect(tmp_path, small, triples), expected)
    print(f"{doubtful} gates within rounding")
    assert doubtful <= 5  # of 20,000


@pytest.mark.parametrize("per_batch", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("per_shard", [1, 4, 50])
def test_batches_and_shards_do_not_change_the_counts(
    tmp_path: Path, model: Gemma2ForCausalLM, per_batch: int, per_shard: int
) -> None:
    store = collect(tmp_path, model, triples_per_batch=per_batch, triples_per_shard=per_shard)
    assert len(store.shards) == -(-7 // per_shard)
    assert assert_as_expected(store, three_passes(model, TRIPLES, (1, 2))) == 0


@pytest.mark.parametrize("pad", [None, 0, 2, 7, 39])
def test_the_padding_id_does_not_matter(tmp_path: Path, model: Gemma2ForCausalLM, pad: int | None) -> None:
    store = collect(tmp_path, model, pad=pad)
    assert_as_expected(store, three_passes(model, TRIPLES, (1, 2)))
    assert tiny.folder_bytes(collect(tmp_path / "none", model).folder) == {
        name: content for name, content in tiny.folder_bytes(tmp_path).items() if not name.startswith("none")
    }


@pytest.mark.parametrize("uncounted", [(), (2,), (2, 5), (2, 5, 0)], ids=str)
def test_uncounted_ids_are_left_out_of_prompts_only(
    tmp_path: Path, model: Gemma2ForCausalLM, uncounted: tuple[int, ...]
) -> None:
    triples = replace(TRIPLES, uncounted_token_ids=uncounted)
    store = collect(tmp_path, model, triples)
    assert_as_expected(store, three_passes(model, triples, (1, 2)))
    assert dense(store, "prompt")[1].tolist() == [sum(t not in uncounted for t in x.prompt) for x in triples]
    assert dense(store, "chosen")[1].tolist() == [x.chosen_counted for x in triples]
    assert dense(store, "rejected")[1].tolist() == [x.rejected_counted for x in triples]


def test_some_responses_hold_uncounted_ids_and_some_end_before_their_last_token() -> None:
    """What the tests above rely on."""
    assert any(set(triple.chosen[: triple.chosen_counted]) & {2, 5} for triple in TRIPLES)
    assert any(triple.chosen_counted < len(triple.chosen) for triple in TRIPLES)
    assert any(0 in triple.chosen for triple in TRIPLES)
    assert len({len(triple.prompt) for triple in TRIPLES}) > 2


# --- the model is left as it was --------------------------------------------------------------------------------------


def hooks(model: torch.nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_hooks_are_put_back(tmp_path: Path, training: bool, fails: bool) -> None:
    model: Any = tiny.tiny_model()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    expected = three_passes(model, TRIPLES, (1, 2))
    model.train(training)
    model.model.layers[2].eval()  # one that is frozen keeps its own mode
    modes, hooks_before = [module.training for module in model.modules()], hooks(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    if fails:
        handle = model.model.layers[1].mlp.register_forward_hook(lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            collect(tmp_path, model)
        handle.remove()
    else:
        assert_as_expected(collect(tmp_path, model), expected)  # without dropout
    assert [module.training for module in model.modules()] == modes
    assert hooks(model) == hooks_before  # transformers keeps some of its own
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_layers_past_the_last_one_read_are_not_run(tmp_path: Path, model: Gemma2ForCausalLM) -> None:
    ran: list[int] = []
    handles = [
        layer.register_forward_pre_hook(lambda *args, n=number: ran.append(n))
        for number, layer in enumerate(model.model.layers)
    ]
    collect(tmp_path, model, layers=(0, 1), triples_per_batch=7)
    for handle in handles:
        handle.remove()
    assert set(ran) == {0, 1}


def test_an_error_after_some_shards_keeps_them(tmp_path: Path, model: Gemma2ForCausalLM) -> None:
    def fail_later(*args: object) -> None:
        if len(list(tmp_path.glob("densities-*"))) == 2:
            raise RuntimeError("out of memory")

    handle = model.model.layers[0].register_forward_hook(fail_later)
    with pytest.raises(RuntimeError, match="out of memory"):
        collect(tmp_path, model, triples_per_shard=2)
    assert len(DensityStore.open(tmp_path).shards) == 2
    handle.remove()
    assert_as_expected(collect(tmp_path, model, triples_per_shard=2), three_passes(model, TRIPLES, (1, 2)))


def test_a_finished_store_is_not_collected_again(tmp_path: Path, model: Gemma2ForCausalLM) -> None:
    collect(tmp_path, model)
    handle = model.model.layers[0].register_forward_hook(lambda *args: 1 / 0)
    assert collect(tmp_path, model).complete
    handle.remove()


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_triple_beyond_the_context_is_named(tmp_path: Path, model: Gemma2ForCausalLM) -> None:
    fits = replace(TRIPLES[3], prompt=(2,) + (6,) * (tiny.CONTEXT - 6), chosen=(6,) * 5, rejected=(7,))
    fits = replace(fits, chosen_counted=5, rejected_counted=1)
    collect(tmp_path / "fits", model, replace(TRIPLES, triples=(fits,)))
    longer = replace(fits, rejected=(6,) * 6)
    with pytest.raises(
        InvalidInputError, match=r"^prefs\.jsonl:4 is 41 tokens long, the model's context is 40; [^\n]*$"
    ):
        collect(tmp_path / "longer", model, replace(TRIPLES, triples=(TRIPLES[0], longer)))
    assert not (tmp_path / "longer").exists()


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"input_sae": tiny.tiny_sae(8, 0, d_model=15)}, MismatchError, "the input SAE has d_model 15; expected .* 16"),
        ({"output_sae": tiny.tiny_sae(8, 0, d_model=17)}, MismatchError, "the output SAE has d_model 17; .* 16"),
        ({"layers": (4, 2)}, MismatchError, "input layer is 4; this model's layers are 0 to 3"),
        ({"layers": (1, -1)}, MismatchError, "output layer is -1; this model's layers are 0 to 3"),
        ({"layers": (None, 2)}, InvalidInputError, "the input SAE's metadata names no layer; pass input_layer"),
        ({"layers": (1, None)}, InvalidInputError, "the output SAE's metadata names no layer; pass output_layer"),
        (
            {"input_sae": tiny.tiny_sae(8, 0, layer=0)},
            MismatchError,
            "input_layer is 1, but the input SAE was trained on layer 0",
        ),
        ({"triples": replace(TRIPLES, triples=())}, InvalidInputError, "triple_count is 0"),
        ({"triples_per_batch": 0}, InvalidInputError, "triples_per_batch is 0"),
        ({"triples_per_shard": -1}, InvalidInputError, "triples_per_shard is -1"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_written(
    tmp_path: Path, model: Gemma2ForCausalLM, changes: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=rf"^{words}[^\n]*$"):
        collect(tmp_path / "out", model, **changes)
    assert not (tmp_path / "out").exists()


def test_layers_come_from_the_metadata(tmp_path: Path, model: Gemma2ForCausalLM) -> None:
    saes: dict[str, Any] = {
        "input_sae": replace(SAES[0], metadata=tiny.tiny_sae(8, 0, layer=0).metadata),
        "output_sae": replace(SAES[1], metadata=tiny.tiny_sae(8, 0, layer=2).metadata),
    }
    store = collect(tmp_path, model, layers=(None, None), **saes)
    assert (store.run.input_layer, store.run.output_layer) == (0, 2)
    assert_as_expected(store, three_passes(model, TRIPLES, (0, 2)))


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"layers": (0, 2)}, "input_layer"),
        ({"layers": (1, 3)}, "output_layer"),
        ({"input_sae": tiny.tiny_sae(tiny.D_SAE_IN, 5)}, "input_sae"),
        ({"output_sae": tiny.tiny_sae(tiny.D_SAE_OUT, 5)}, "output_sae"),
        ({"triples": tiny.tiny_triples(7, seed=1)}, "triples"),
        ({"triples": replace(TRIPLES, uncounted_token_ids=(2,))}, "triples, uncounted_token_ids"),
        ({"triples_per_shard": 3}, "triples_per_shard"),
        ({"model": tiny.tiny_model(seed=1)}, "model_weights"),
        ({"model": tiny.tiny_model(torch.float32)}, "dtype, model_weights"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_another_runs_folder_is_refused_naming_what_differs(
    tmp_path: Path, model: Gemma2ForCausalLM, changes: dict[str, Any], name: str
) -> None:
    collect(tmp_path, model)
    before = tiny.folder_bytes(tmp_path)
    arguments: dict[str, Any] = {"model": model} | changes
    with pytest.raises(MismatchError, match=rf"different {name}\)"):
        collect(tmp_path, **arguments)
    assert tiny.folder_bytes(tmp_path) == before


def test_where_an_sae_or_a_row_came_from_is_not_another_run(tmp_path: Path, model: Gemma2ForCausalLM) -> None:
    collect(tmp_path, model)
    elsewhere = replace(TRIPLES, triples=tuple(replace(triple, source="b.jsonl:1") for triple in TRIPLES))
    without_decoder = SAES[1].encoder_only()
    assert collect(tmp_path, model, elsewhere, output_sae=without_decoder).complete


# --- NaN and Inf ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_hidden_states_that_are_not_finite_are_counted_and_activate_nothing(
    tmp_path: Path, model: Gemma2ForCausalLM, value: float
) -> None:
    """The last layer read is spoilt at its output, where token 6 went in: no other token sees it."""
    spoilt: list[Tensor] = []

    def spoil(module: torch.nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden[spoilt[-1] == 6, 3] = value
        return output

    handles = [
        model.model.register_forward_pre_hook(
            lambda module, args, kwargs: spoilt.append(kwargs["input_ids"]), with_kwargs=True
        ),
        model.model.layers[2].register_forward_hook(spoil),
    ]
    triples = tiny.tiny_triples(7, seed=5)
    with pytest.warns(UserWarning, match=r"^the hidden states of \d+ tokens held NaN or Inf; [^\n]*$") as caught:
        store = collect(tmp_path, model, triples, layers=(2, 2), triples_per_shard=2)
    assert len(caught) == 1
    for handle in handles:
        handle.remove()
    expected, bad = {name: [] for name in ("prompt", "chosen", "rejected")}, 0
    for triple in triples:
        for name, response, counted, sae in (
            ("prompt", (), 0, SAES[0]),
            ("chosen", triple.chosen, triple.chosen_counted, SAES[1]),
            ("rejected", triple.rejected, triple.rejected_counted, SAES[1]),
        ):
            active, _ = gates(hidden_after(model, 2, triple.prompt + response), sae, 0)
            ids, begin = triple.prompt + response, len(triple.prompt)
            prompt = [t for t in range(begin) if ids[t] not in tiny.UNCOUNTED]
            kept = prompt if name == "prompt" else list(range(begin, begin + counted))
            bad += sum(ids[t] == 6 for t in kept)
            expected[name].append(active[[t for t in kept if ids[t] != 6]].sum(0))
    for name, rows in expected.items():
        assert (dense(store, name)[0] == np.array(rows)).all()
    assert bad > 7  # every prompt holds a 6
    assert store.nonfinite_tokens == bad
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert sum(shard["nonfinite_tokens"] for shard in manifest["shards"]) == bad


def test_no_warning_where_all_is_finite(tmp_path: Path, model: Gemma2ForCausalLM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert collect(tmp_path, model).nonfinite_tokens == 0
