"""The GPU backends at real shapes, on a GPU: against float64, for races, under graph replay and compilation.

`make gpu` runs them. Its dry run sets DSPA_GPU_DRY_RUN=1: toy shapes on the CPU through Triton's interpreter, so that
the tests themselves are known to run; what only a GPU has is skipped there by name.
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import (
    KINDS,
    Backend,
    Kind,
    counted,
    edit_list,
    fresh_stats,
    generator,
    make_sae,
    normal,
    random_lists,
    same_bits,
    step,
)
from torch import Tensor

from dspa.bench.cases import Case, Shape
from dspa.kernels import EditList, SaeWeights, StepMode, TokenStats, available, encode_density, token_step
from dspa.kernels.backends.registry import operations_for
from dspa.sae.encode import encode, encoder_input

DRY_RUN = os.environ.get("DSPA_GPU_DRY_RUN") == "1"
DEVICE = "cpu" if DRY_RUN else "cuda"
ON_A_GPU = pytest.mark.skipif(DRY_RUN, reason="needs a GPU: this is a dry run")
SHAPES = [(32, 199), (48, 256)] if DRY_RUN else [(2304, 16384), (3584, 16384), (4096, 65536)]  # d_model, d_sae
BATCHES = (1, 3) if DRY_RUN else (1, 16, 64)
REPEATS = 3 if DRY_RUN else 200
FEW_KINDS = (Kind(), Kind("topk"), Kind("gated", subtract_b_dec=True), Kind("jumprelu", "layer_norm", True))
ALPHA = 0.2

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not DRY_RUN and not torch.cuda.is_available(), reason="no NVIDIA GPU was found"),
]


def gpu_backends() -> list[object]:
    names = ("triton",) if DRY_RUN else ("triton", "cuda")
    status = available()
    return [
        pytest.param(
            Backend(name, DEVICE),
            id=name,
            marks=[] if status.get(name) == "available" else pytest.mark.skip(reason=f"{name}: {status.get(name)}"),
        )
        for name in names
    ]


@pytest.fixture(params=gpu_backends(), scope="module")
def gpu(request: pytest.FixtureRequest) -> Backend:
    return request.param


def rounding(sae: SaeWeights) -> float:
    """By how much a score of an SAE from `make_sae` can be off. Tensor cores add 16 terms at a time to a float32 sum,
    which they may truncate: 2^-22 of the terms' magnitudes, which add up to at most the norm of a row of weights, about
    1, times that of an input, about sqrt(d_model)."""
    scale = 1.0 if sae.magnitude_scale is None else max(1.0, float(sae.magnitude_scale.max()))
    return scale * (sae.d_model / 16 + 16) * 2**-22 * sae.d_model**0.5


@lru_cache(maxsize=1)
def sae_on_device(kind: Kind, d_model: int, d_sae: int, dtype: torch.dtype, seed: int) -> SaeWeights:
    """Made where it is used, as a CPU takes seconds for it. Kept for the next test, which may want the same."""
    with torch.device(DEVICE):
        return make_sae(kind, d_model, d_sae, dtype, seed)


def in_float64(sae: SaeWeights) -> SaeWeights:
    return replace(sae, **{name: t.double() for name, t in sae.tensors().items() if t.is_floating_point()})


def active_lists(sae: SaeWeights, hidden: Tensor, k: int, seed: int) -> EditList:
    """Half of each row's list is active there, so that edits happen; the rest is drawn from all latents. For none does
    rounding decide whether it is active."""
    rng = np.random.default_rng(seed)
    precise, rows = in_float64(sae), hidden.double().to(DEVICE)
    augment, ablate = [], []
    for active, decided in zip((encode(rows, precise) > 0).cpu(), ~near_a_border(precise, rows).cpu(), strict=True):
        chosen = rng.permutation((active & decided).nonzero().flatten().numpy())[: k // 2].tolist()
        others = [j for j in rng.permutation(decided.nonzero().flatten().numpy())[:k].tolist() if j not in chosen]
        both = rng.permutation([*chosen, *others[: k - len(chosen)]]).tolist()
        augment.append(both[: k // 4])
        ablate.append(both[k // 4 :])
    return edit_list(augment, ablate, k)


def near_a_border(sae: SaeWeights, hidden: Tensor) -> Tensor:
    """`[B, d_sae]`: whether a latent is within rounding of where it starts to be active."""
    x, _ = encoder_input(hidden, sae)
    product = x @ sae.W_enc.T
    z = product + sae.b_enc
    border = sae.threshold.clamp(min=0).expand_as(z)
    if sae.activation == "topk":
        assert sae.k is not None
        last_in, first_out = z.topk(sae.k + 1, dim=1).values[:, -2:].split(1, dim=1)
        border = ((last_in + first_out) / 2).clamp(min=0).expand_as(z)
    distance = (z - border).abs()
    if sae.magnitude_scale is not None and sae.magnitude_bias is not None:
        distance = torch.minimum(distance, (sae.magnitude_scale * product + sae.magnitude_bias).abs())
    return distance < rounding(sae)


@pytest.mark.product
@pytest.mark.parametrize("batch", BATCHES)  # in turn first: they have one SAE
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
@pytest.mark.parametrize(("d_model", "d_sae"), SHAPES)
def test_against_float64(gpu: Backend, batch: int, d_model: int, d_sae: int, kind: Kind, dtype: torch.dtype) -> None:
    """The edit, M_t and the counters agree with float64 on upcast inputs."""
    sae = sae_on_device(kind, d_model, d_sae, dtype, 1)
    hidden = normal(generator(2), batch, d_model).to(dtype)
    lists = active_lists(sae, hidden, 32, seed=3)
    stats = fresh_stats(batch, d_sae, DEVICE)
    written = step(hidden, sae, lists, ALPHA, backend=gpu, stats=stats, mode="dense")
    for mode in ("lazy", "screened"):
        assert same_bits(step(hidden, sae, lists, ALPHA, backend=gpu, mode=mode), written), mode

    expected, precise = hidden.double().to(DEVICE), in_float64(sae)
    exact_stats = TokenStats.zeros(batch, d_sae, DEVICE)
    token_step(expected, precise, lists.to(DEVICE), ALPHA, stats=exact_stats, backend="reference")
    assert exact_stats.edited.all()
    assert precise.W_dec is not None
    listed = precise.W_dec[lists.latents.long().to(DEVICE)].abs().sum(dim=1)
    allowed = torch.finfo(dtype).eps * expected.abs() + (1 + ALPHA) * rounding(sae) * listed  # each of them, and M_t
    assert ((written.to(DEVICE) - expected).abs() <= allowed).all()
    found = counted(stats, batch, d_sae)
    torch.testing.assert_close(found.maximum, exact_stats.maximum.cpu(), rtol=0, atol=rounding(sae))
    assert torch.equal(found.edited, exact_stats.edited.cpu())


@pytest.mark.parametrize("mode", ["dense", "lazy", "screened"])
@pytest.mark.parametrize("kind", [Kind(), Kind("topk")], ids=str)
def test_the_same_bits_every_time(gpu: Backend, kind: Kind, mode: StepMode) -> None:
    """A race would show as a moving result; scratch that is not reset, as a wrong second one."""
    d_model, d_sae = SHAPES[0]
    sae = sae_on_device(kind, d_model, d_sae, torch.bfloat16, 4)
    hidden = normal(generator(5), BATCHES[-1], d_model).bfloat16()
    lists = active_lists(sae, hidden, 32, seed=6).to(DEVICE)
    first = hidden.to(DEVICE)
    token_step(first, sae, lists, ALPHA, mode=mode, backend=gpu.name)
    for _ in range(REPEATS):
        again = hidden.to(DEVICE)
        token_step(again, sae, lists, ALPHA, mode=mode, backend=gpu.name)
        assert same_bits(again, first)


@ON_A_GPU
def test_rows_that_are_settled_while_their_pass_runs(gpu: Backend) -> None:
    """The maxima rise while programs look at them; the warps of one have to decide alike."""
    case = Case(Shape(3584, 65536, torch.bfloat16, 4), gpu.name, DEVICE)
    expected = case.step("all certainly zero", "dense")
    for _ in range(REPEATS):
        assert same_bits(case.step("all certainly zero", "lazy"), expected)
        assert same_bits(case.step("all certainly zero", "screened"), expected)


@pytest.mark.parametrize("massive", [1.0, 300.0])
@pytest.mark.parametrize("kind", [Kind(), Kind("gated", subtract_b_dec=True), Kind("relu", "layer_norm")], ids=str)
@pytest.mark.parametrize(("d_model", "d_sae"), SHAPES)
def test_screening_changes_no_bit(gpu: Backend, d_model: int, d_sae: int, kind: Kind, massive: float) -> None:
    """Of rows whose edit shows M_t, also where some channels of the residual stream are massive."""
    sae = sae_on_device(kind, d_model, d_sae, torch.bfloat16, 20)
    for seed, batch in enumerate((*BATCHES, *BATCHES)):
        hidden = normal(generator(21 + seed), batch, d_model)
        hidden[:, 3:d_model:300] *= massive
        rows = hidden.bfloat16().to(DEVICE)
        lists = edit_list([[int(latent)] for latent in encode(rows, sae).argmax(dim=1)], [[]] * batch, k=2).to(DEVICE)
        expected, stats = rows.clone(), TokenStats.zeros(batch, d_sae, DEVICE)
        token_step(expected, sae, lists, ALPHA, None, stats, mode="dense", backend=gpu.name)
        found, screened = rows.clone(), TokenStats.zeros(batch, d_sae, DEVICE)
        token_step(found, sae, lists, ALPHA, None, screened, mode="screened", backend=gpu.name)
        assert same_bits(found, expected)
        assert screened.maximum_known.all()
        assert torch.equal(screened.maximum, stats.maximum)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_does_not_depend_on_its_batch(gpu: Backend, kind: Kind) -> None:
    d_model, d_sae = SHAPES[0]
    sae = sae_on_device(kind, d_model, d_sae, torch.bfloat16, 7)
    batch = BATCHES[-1]
    hidden = normal(generator(8), batch, d_model).bfloat16()
    lists = edit_list(*random_lists(sae, batch, 32, seed=9), k=32)
    together = step(hidden, sae, lists, ALPHA, backend=gpu)
    for row in (0, batch // 2, batch - 1):
        alone = step(hidden[row : row + 1], sae, lists.rows(torch.tensor([row])), ALPHA, backend=gpu)
        assert same_bits(alone, together[row : row + 1])


@pytest.mark.parametrize("mode", ["dense", "lazy"])
@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("gated")], ids=str)
def test_tiles_of_more_tokens_have_the_same_bits(gpu: Backend, kind: Kind, mode: StepMode) -> None:
    """The batches on both sides of where the tile of a pass grows, and where it takes a second pass."""
    d_model, d_sae = SHAPES[0]
    sae = sae_on_device(kind, d_model, d_sae, torch.bfloat16, 20)
    batches = (1, 3, 4) if DRY_RUN else (1, 16, 17, 32, 33, 64, 65)
    hidden = normal(generator(21), batches[-1], d_model).bfloat16()
    lists = active_lists(sae, hidden, 32, seed=22)
    together = step(hidden, sae, lists, ALPHA, backend=gpu, mode=mode)
    assert not same_bits(together, hidden)
    for batch in batches:
        some = step(hidden[:batch], sae, lists.rows(torch.arange(batch)), ALPHA, backend=gpu, mode=mode)
        assert same_bits(some, together[:batch]), batch


@ON_A_GPU
@pytest.mark.parametrize("mode", ["dense", "lazy", "screened"])
def test_graph_replay_reads_what_the_buffers_hold(gpu: Backend, mode: StepMode) -> None:
    """One capture; then other hidden states, lists and flags in the same buffers."""
    d_model, d_sae = SHAPES[0]
    sae = sae_on_device(Kind(), d_model, d_sae, torch.bfloat16, 10)
    batch = 4
    rows = normal(generator(11), 6 * batch, d_model).bfloat16().to(DEVICE).split(batch)
    hidden, lists = rows[0].clone(), active_lists(sae, rows[0].cpu(), 32, seed=12).to(DEVICE)
    enabled, stats = torch.ones(batch, dtype=torch.bool, device=DEVICE), TokenStats.zeros(batch, d_sae, DEVICE)

    def run() -> None:
        token_step(hidden, sae, lists, ALPHA, enabled, stats, mode=mode, backend=gpu.name)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for number, given in enumerate(rows):
        hidden.copy_(given)
        lists.copy_(active_lists(sae, given.cpu(), 32, seed=number).to(DEVICE))
        enabled.copy_(torch.tensor([number % 2 == 0, True, number % 3 == 0, True]))
        seen = stats.seen.clone()
        graph.replay()
        expected = given.clone()
        token_step(expected, sae, lists, ALPHA, enabled, mode=mode, backend=gpu.name)
        assert same_bits(hidden, expected)
        assert torch.equal(stats.seen - seen, enabled.long())


def test_compiles_without_a_graph_break(gpu: Backend) -> None:
    d_model, d_sae = SHAPES[0]
    sae = sae_on_device(Kind(), d_model, d_sae, torch.bfloat16, 13)
    hidden = normal(generator(14), 2, d_model).bfloat16().to(DEVICE)
    lists = active_lists(sae, hidden.cpu(), 32, seed=15).to(DEVICE)

    def edited(given: Tensor) -> Tensor:
        state = given * 2
        token_step(state, sae, lists, ALPHA, mode="lazy", backend=gpu.name)
        return state + 1

    compiled = torch.compile(edited, fullgraph=True)  # by inductor, in a dry run as well
    assert same_bits(compiled(hidden), edited(hidden))


@ON_A_GPU
def test_steps_of_a_static_cache_are_compiled_and_captured(gpu: Backend) -> None:
    """transformers does both, in a trial run and a capture during which nothing may be made that stays."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import dspa
    from dspa.bench.generation import worst_case_policy

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "vocab_size": 512}
    model: Any = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **sizes))
    model.eval().to(DEVICE)
    policy = worst_case_policy(model, 1, 1024, DEVICE)
    prompt, new = torch.arange(2, 34, device=DEVICE)[None], 8
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
    found = []
    for cache in ({}, {"cache_implementation": "static"}, {"cache_implementation": "static"}):
        torch.compiler.reset()
        with dspa.steer(model, policy, backend=gpu.name) as steering:
            found.append(model.generate(prompt, **options, **cache))
        assert steering.summary().tokens_edited == new
    assert all(torch.equal(found[0], other) for other in found[1:])


@ON_A_GPU
def test_weights_beyond_two_to_the_31st(gpu: Backend) -> None:
    """The last latents of an encoder whose offsets do not fit 32 bits."""
    d_model, d_sae = 4096, 2**19 + 2**12
    W = torch.zeros(d_sae, d_model, dtype=torch.bfloat16, device=DEVICE)
    ones = torch.ones(d_sae, device=DEVICE)
    W[-1], W[-2] = 2**-6, 2**-7
    sae = SaeWeights(W_enc=W, W_dec=W, b_enc=0 * ones, threshold=ones, activation="jumprelu")
    hidden = torch.ones(2, d_model, dtype=torch.bfloat16, device=DEVICE)
    lists = EditList.from_lists([[], []], [[d_sae - 2], []], DEVICE)
    stats = TokenStats.zeros(2, d_sae, DEVICE)
    token_step(hidden, sae, lists, 0.25, stats=stats, mode="dense", backend=gpu.name)
    assert stats.maximum.tolist() == [64.0, 64.0]
    assert hidden[0].float().cpu().unique().tolist() == [1 - 16 / 128]  # 32 becomes 32 - 0.25 * 64
    assert hidden[1].float().cpu().unique().tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("gated", subtract_b_dec=True)], ids=str)
def test_density_against_float64(gpu: Backend, kind: Kind, dtype: torch.dtype) -> None:
    """Counts differ from the exact ones by gates within rounding of their border only."""
    d_model, d_sae = SHAPES[0]
    tokens = 40 if DRY_RUN else 1000
    sae = sae_on_device(kind, d_model, d_sae, dtype, 16)
    hidden = normal(generator(17), tokens, d_model).to(dtype).to(DEVICE)
    offsets = torch.tensor([0, 0, tokens // 3, tokens - 1, tokens], device=DEVICE)
    found = encode_density(hidden, offsets, sae, backend=gpu.name)
    again = encode_density(hidden, offsets, sae, backend=gpu.name)
    assert torch.equal(found, again)
    expected = encode_density(hidden.double(), offsets, in_float64(sae), backend="reference")
    difference = (found.long() - expected.long()).abs()
    assert difference.sum() <= 2e-4 * expected.sum(), f"{int(difference.sum())} of {int(expected.sum())} gates differ"
    assert int(difference.max()) <= 2


@ON_A_GPU
def test_density_never_holds_the_activations(gpu: Backend) -> None:
    d_model, d_sae, tokens = 2304, 16384, 8192
    sae = sae_on_device(Kind(), d_model, d_sae, torch.bfloat16, 18)
    hidden = normal(generator(19), tokens, d_model).bfloat16().to(DEVICE)
    offsets = torch.tensor([0, tokens], device=DEVICE)
    encode_density(hidden, offsets, sae, backend=gpu.name)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    encode_density(hidden, offsets, sae, backend=gpu.name)
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 64 * d_sae


def test_auto_picks_a_gpu_backend(gpu: Backend) -> None:
    """On a GPU; in a dry run the tensors are on the CPU, where it must not."""
    hidden = torch.zeros(1, 32, dtype=torch.bfloat16, device=DEVICE)
    chosen = operations_for("auto", "token_step", (hidden,), sae_on_device(Kind(), 32, 64, torch.bfloat16, 0))
    names = [name for name in ("triton", "cuda") if available().get(name) == "available"]
    assert any(chosen is operations_for(name, "token_step", (hidden,)) for name in names) != DRY_RUN
