"""The GPU backends at real shapes, on a GPU: against float64, for races, under graph replay and compilation.

`make gpu` runs them. Its dry run sets DSPA_GPU_DRY_RUN=1: toy shapes on the CPU through Triton's interpreter, so that
the tests themselves are known to run; what only a GPU has is skipped there by name.
"""

from __future__ import annotations

import os
from dataclasses import fields, replace

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

from dspa.kernels import EditList, SaeWeights, StepMode, TokenStats, available, encode_density, token_step
from dspa.kernels.encode import encode, encoder_input
from dspa.kernels.registry import operations_for

DRY_RUN = os.environ.get("DSPA_GPU_DRY_RUN") == "1"
DEVICE = "cpu" if DRY_RUN else "cuda"
ON_A_GPU = pytest.mark.skipif(DRY_RUN, reason="needs a GPU: this is a dry run")
SHAPES = [(32, 199), (48, 256)] if DRY_RUN else [(2304, 16384), (3584, 16384), (4096, 65536)]  # d_model, d_sae
BATCHES = (1, 3) if DRY_RUN else (1, 16, 64)
REPEATS = 3 if DRY_RUN else 200
FEW_KINDS = (Kind(), Kind("topk"), Kind("gated", subtract_b_dec=True), Kind("jumprelu", "layer_norm", True))
ALPHA = 0.2
ROUNDING = 1e-5
"""No score of these SAEs, of unit size, is further off in float32 sums."""

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


def on_device(sae: SaeWeights) -> SaeWeights:
    return sae.to(DEVICE)


def active_lists(sae: SaeWeights, hidden: Tensor, k: int, seed: int) -> EditList:
    """Half of each row's list is active there, so that edits happen; the rest is drawn from all latents."""
    rng = np.random.default_rng(seed)
    augment, ablate = [], []
    active = encode(hidden.to(DEVICE), on_device(sae)).cpu() > 0
    for row in active:
        chosen = rng.permutation(row.nonzero().flatten().numpy())[: k // 2].tolist()
        others = [j for j in rng.permutation(sae.d_sae)[:k].tolist() if j not in chosen][: k - len(chosen)]
        both = rng.permutation([*chosen, *others]).tolist()
        augment.append(both[: k // 4])
        ablate.append(both[k // 4 :])
    return edit_list(augment, ablate, k)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", FEW_KINDS, ids=str)
@pytest.mark.parametrize(("d_model", "d_sae"), SHAPES)
def test_against_float64(gpu: Backend, d_model: int, d_sae: int, kind: Kind, dtype: torch.dtype, batch: int) -> None:
    """The edit agrees with float64 on upcast inputs, but for rows with a gate or rank within rounding of its border."""
    sae = make_sae(kind, d_model, d_sae, dtype, seed=1)
    hidden = normal(generator(2), batch, d_model).to(dtype)
    lists = active_lists(sae, hidden, 32, seed=3)
    stats = fresh_stats(batch, d_sae, DEVICE)
    written = step(hidden, sae, lists, ALPHA, backend=gpu, stats=stats, mode="dense")
    lazily = step(hidden, sae, lists, ALPHA, backend=gpu, mode="lazy")
    assert same_bits(lazily, written)

    doubled = {name: t.double() for name, t in sae.tensors().items() if t.is_floating_point()}
    expected, precise = hidden.double().to(DEVICE), on_device(replace(sae, **doubled))
    exact_stats = TokenStats.zeros(batch, d_sae, DEVICE)
    token_step(expected, precise, lists.to(DEVICE), ALPHA, stats=exact_stats, backend="reference")
    decided = ~near_a_border(precise, hidden.double().to(DEVICE), lists.to(DEVICE)).cpu()
    assert decided.double().mean() > 0.5, "the case is too close to its borders to say anything"
    assert precise.W_dec is not None
    listed = (
        precise.W_dec[lists.latents.long().to(DEVICE)].abs().sum(dim=1)
    )  # every activation off by ROUNDING, M_t too
    allowed = torch.finfo(dtype).eps * expected.abs() + (1 + ALPHA) * ROUNDING * listed
    assert ((written.to(DEVICE) - expected).abs() <= allowed).cpu()[decided].all()
    found = counted(stats, batch, d_sae)
    torch.testing.assert_close(found.maximum[decided], exact_stats.maximum.cpu()[decided], rtol=0, atol=ROUNDING)
    assert torch.equal(found.edited[decided], exact_stats.edited.cpu()[decided])


def near_a_border(sae: SaeWeights, hidden: Tensor, lists: EditList) -> Tensor:
    """`[B]`: whether a listed latent is within rounding of where it starts to be active."""
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
    return ((distance.gather(1, lists.latents.long()) < ROUNDING) & lists.valid()).any(dim=1)


@pytest.mark.parametrize("mode", ["dense", "lazy"])
@pytest.mark.parametrize("kind", [Kind(), Kind("topk")], ids=str)
def test_the_same_bits_every_time(gpu: Backend, kind: Kind, mode: StepMode) -> None:
    """A race would show as a moving result; scratch that is not reset, as a wrong second one."""
    d_model, d_sae = SHAPES[0]
    sae = on_device(make_sae(kind, d_model, d_sae, torch.bfloat16, seed=4))
    hidden = normal(generator(5), BATCHES[-1], d_model).bfloat16()
    lists = active_lists(sae, hidden, 32, seed=6).to(DEVICE)
    first = hidden.to(DEVICE)
    token_step(first, sae, lists, ALPHA, mode=mode, backend=gpu.name)
    for _ in range(REPEATS):
        again = hidden.to(DEVICE)
        token_step(again, sae, lists, ALPHA, mode=mode, backend=gpu.name)
        assert same_bits(again, first)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_does_not_depend_on_its_batch(gpu: Backend, kind: Kind) -> None:
    d_model, d_sae = SHAPES[0]
    sae = make_sae(kind, d_model, d_sae, torch.bfloat16, seed=7)
    batch = BATCHES[-1]
    hidden = normal(generator(8), batch, d_model).bfloat16()
    lists = edit_list(*random_lists(sae, batch, 32, seed=9), k=32)
    together = step(hidden, sae, lists, ALPHA, backend=gpu)
    for row in (0, batch // 2, batch - 1):
        alone = step(hidden[row : row + 1], sae, lists.rows(torch.tensor([row])), ALPHA, backend=gpu)
        assert same_bits(alone, together[row : row + 1])


@ON_A_GPU
@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_graph_replay_reads_what_the_buffers_hold(gpu: Backend, mode: StepMode) -> None:
    """One capture; then other hidden states, lists and flags in the same buffers."""
    d_model, d_sae = SHAPES[0]
    sae = on_device(make_sae(Kind(), d_model, d_sae, torch.bfloat16, seed=10))
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
    sae = on_device(make_sae(Kind(), d_model, d_sae, torch.bfloat16, seed=13))
    hidden = normal(generator(14), 2, d_model).bfloat16().to(DEVICE)
    lists = active_lists(sae, hidden.cpu(), 32, seed=15).to(DEVICE)

    def edited(given: Tensor) -> Tensor:
        state = given * 2
        token_step(state, sae, lists, ALPHA, mode="lazy", backend=gpu.name)
        return state + 1

    compiled = torch.compile(edited, fullgraph=True, backend="aot_eager" if DRY_RUN else "inductor")
    assert same_bits(compiled(hidden), edited(hidden))


@ON_A_GPU
def test_weights_beyond_two_to_the_31st(gpu: Backend) -> None:
    """The last latents of an encoder whose offsets do not fit 32 bits."""
    d_model, d_sae = 4096, 2**19 + 2**12
    W = torch.zeros(d_sae, d_model, dtype=torch.bfloat16, device=DEVICE)
    ones = torch.ones(d_sae, device=DEVICE)
    W[-1], W[-2] = 2**-6, 2**-7
    sae = SaeWeights(W_enc=W, W_dec=W, b_enc=0 * ones, threshold=ones, activation="jumprelu")
    hidden = torch.ones(2, d_model, dtype=torch.bfloat16, device=DEVICE)
    lists = EditList.of([[], []], [[d_sae - 2], []], DEVICE)
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
    sae = on_device(make_sae(kind, d_model, d_sae, dtype, seed=16))
    hidden = normal(generator(17), tokens, d_model).to(dtype).to(DEVICE)
    offsets = torch.tensor([0, 0, tokens // 3, tokens - 1, tokens], device=DEVICE)
    found = encode_density(hidden, offsets, sae, backend=gpu.name)
    again = encode_density(hidden, offsets, sae, backend=gpu.name)
    assert torch.equal(found, again)
    doubled = {name: t.double() for name, t in sae.tensors().items() if t.is_floating_point()}
    expected = encode_density(hidden.double(), offsets, replace(sae, **doubled), backend="reference")
    difference = (found.long() - expected.long()).abs()
    assert difference.sum() <= 2e-4 * expected.sum(), f"{int(difference.sum())} of {int(expected.sum())} gates differ"
    assert int(difference.max()) <= 2


@ON_A_GPU
def test_density_never_holds_the_activations(gpu: Backend) -> None:
    d_model, d_sae, tokens = 2304, 16384, 8192
    sae = on_device(make_sae(Kind(), d_model, d_sae, torch.bfloat16, seed=18))
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
    chosen = operations_for("auto", "token_step", (hidden,), on_device(make_sae(Kind(), 32, 64, torch.bfloat16, 0)))
    ours = operations_for(gpu.name, "token_step", (hidden,))
    triton = operations_for("triton", "token_step", (hidden,))
    assert (chosen is triton) != DRY_RUN
    assert {field.name for field in fields(ours)} == {field.name for field in fields(triton)}
