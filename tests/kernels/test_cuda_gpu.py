"""The CUDA kernels on a GPU: real shapes, launch shapes, repeated runs and replayed graphs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    Kind,
    edit_list,
    generator,
    integers,
    make_integer_sae,
    make_sae,
    normal,
    random_lists,
    same_bits,
)
from torch import Tensor

from dspa.kernels import EditList, SaeWeights, StepMode, available, encode_density, token_step

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(available()["cuda"] != "available", reason=f"backend cuda: {available()['cuda']}"),
]

MODES: tuple[StepMode, ...] = ("dense", "lazy")
KINDS = (Kind(), Kind("topk"), Kind("gated", "layer_norm"))
REAL = [(2304, 16384), (3584, 16384), (4096, 65536)]  # Gemma-2-2B and 9B, Qwen3-8B


def real_sae(d_model: int, d_sae: int, dtype: torch.dtype = torch.bfloat16) -> SaeWeights:
    """Random weights, made on the GPU; about every sixth latent is active."""
    rng = torch.Generator("cuda").manual_seed(0)

    def matrix() -> Tensor:
        values = torch.randn(d_sae, d_model, generator=rng, device="cuda", dtype=dtype)
        return values / math.sqrt(d_model)

    threshold = torch.ones(d_sae, device="cuda")
    return SaeWeights(W_enc=matrix(), W_dec=matrix(), b_enc=threshold * 0, threshold=threshold, activation="jumprelu")


def real_rows(batch: int, d_model: int) -> Tensor:
    return torch.randn(batch, d_model, generator=torch.Generator("cuda").manual_seed(1), device="cuda").bfloat16()


def lists(batch: int, d_sae: int) -> EditList:
    every = d_sae // 16
    return EditList.from_lists([[]] * batch, [[b % every + every * i for i in range(16)] for b in range(batch)], "cuda")


def step(rows: Tensor, sae: SaeWeights, edits: EditList, mode: StepMode) -> Tensor:
    written = rows.clone()
    token_step(written, sae, edits, 0.2, mode=mode, backend="cuda")
    return written


@pytest.mark.parametrize(("d_model", "d_sae"), REAL)
@pytest.mark.parametrize("batch", [1, 4, 16, 64])
def test_real_shapes_are_within_rounding(d_model: int, d_sae: int, batch: int) -> None:
    """Against float64 on the same weights: one rounding to bfloat16, and float32 sums, which are off by less than 1e-4.
    Rows with a listed latent so close to its threshold may go either way."""
    sae, rows, edits = real_sae(d_model, d_sae), real_rows(batch, d_model), lists(batch, d_sae)
    wide = replace(sae, **{name: tensor.double() for name, tensor in sae.tensors().items()})
    exact = rows.double()
    token_step(exact, wide, edits, 0.2, backend="reference")
    z = torch.stack([wide.W_enc[edits.latents[b].long()] @ rows[b].double() for b in range(batch)])
    decided = ((z - 1).abs() > 1e-4).all(dim=1)
    assert decided.double().mean() > 0.9
    for mode in MODES:
        difference = (step(rows, sae, edits, mode).double() - exact).abs()
        assert (difference <= exact.abs() * 2.0**-8 + 1e-4)[decided].all()
        assert same_bits(step(rows, sae, edits, mode), step(rows, sae, edits, "dense"))


DENSITY_BYTES = 64 << 20


@pytest.fixture
def restored() -> Iterator[None]:
    yield
    torch.ops.dspa.set_cuda_tuning(256, 1, DENSITY_BYTES)


@pytest.fixture(params=[False, True], ids=["by warps", "by warpgroups"])
def products(request: pytest.FixtureRequest, restored: None) -> None:
    """encode_density multiplies by warps, and by warpgroups where this GPU has them."""
    if request.param and not torch.ops.dspa.has_warpgroup_products():
        pytest.skip("no products of warpgroups: this GPU is not sm_90, or the library was not built for sm_90a")
    torch.ops.dspa.set_cuda_tuning(256, 1, DENSITY_BYTES, warpgroup_products=request.param)


@pytest.mark.parametrize("cluster", [1, 2, 4, 8])
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.usefixtures("restored")
def test_clusters_change_no_bit(kind: Kind, cluster: int) -> None:
    sae = make_sae(kind, 520, 999, torch.bfloat16, seed=0).to("cuda")
    rows = (normal(generator(1), 19, 520) * 2).bfloat16().cuda()
    edits = edit_list(*random_lists(sae.to("cpu"), 19, 12, seed=2), 12).to("cuda")
    expected = [step(rows, sae, edits, mode) for mode in MODES]
    torch.ops.dspa.set_cuda_tuning(256, cluster, DENSITY_BYTES)
    for mode, bits in zip(MODES, expected, strict=True):
        assert same_bits(step(rows, sae, edits, mode), bits)


@pytest.mark.parametrize("cluster", [1, 4])
@pytest.mark.parametrize(("d_model", "d_sae"), REAL)
@pytest.mark.usefixtures("restored")
def test_bulk_copies_change_no_bit(d_model: int, d_sae: int, cluster: int) -> None:
    if not torch.ops.dspa.has_bulk_copies():
        pytest.skip("no bulk copies: this GPU, or what the library was built for, is before sm_90")
    sae, rows, edits = real_sae(d_model, d_sae), real_rows(1, d_model), lists(1, d_sae)
    for kind in (sae, replace(sae, activation="topk", k=64, threshold=sae.b_enc)):
        expected = [step(rows, kind, edits, mode) for mode in MODES]
        torch.ops.dspa.set_cuda_tuning(256, cluster, DENSITY_BYTES, bulk_copies=True)
        for _ in range(50):
            for mode, bits in zip(MODES, expected, strict=True):
                assert same_bits(step(rows, kind, edits, mode), bits)
        torch.ops.dspa.set_cuda_tuning(256, 1, DENSITY_BYTES)


@pytest.mark.parametrize("bulk_copies", [False, True])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.usefixtures("restored")
def test_early_launches_change_no_bit(mode: StepMode, bulk_copies: bool) -> None:
    """Each step begins while the one before it ends, alone and in a replayed graph, and reads what that one wrote."""
    sae, rows, edits = real_sae(2304, 16384), real_rows(3, 2304), lists(3, 16384)
    single = EditList(edits.latents[:1], edits.signs[:1], edits.counts[:1])
    for hidden, listed in ((rows, edits), (rows[:1], single)):
        expected = [hidden.clone()]
        for _ in range(20):
            expected.append(step(expected[-1], sae, listed, mode))
        torch.ops.dspa.set_cuda_tuning(256, 1, DENSITY_BYTES, bulk_copies=bulk_copies, early_launch=True)
        written = hidden.clone()
        for _ in range(20):
            token_step(written, sae, listed, 0.2, mode=mode, backend="cuda")
        assert same_bits(written, expected[-1])
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            token_step(written, sae, listed, 0.2, mode=mode, backend="cuda")
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(10):
                token_step(written, sae, listed, 0.2, mode=mode, backend="cuda")
        written.copy_(hidden)
        for _ in range(2):
            graph.replay()
        assert same_bits(written, expected[-1])
        torch.ops.dspa.set_cuda_tuning(256, 1, DENSITY_BYTES)


@pytest.mark.parametrize("mode", MODES)
def test_a_thousand_runs_are_the_same(mode: StepMode) -> None:
    sae, rows, edits = real_sae(2304, 16384), real_rows(9, 2304), lists(9, 16384)
    expected = step(rows, sae, edits, mode)
    differing = torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(1000):
        differing += (step(rows, sae, edits, mode) != expected).sum()
    assert int(differing) == 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_replayed_graph_is_the_step(kind: Kind, mode: StepMode) -> None:
    sae = make_sae(kind, 520, 999, torch.bfloat16, seed=0).to("cuda")
    rows = (normal(generator(1), 9, 520) * 2).bfloat16().cuda()
    edits = edit_list(*random_lists(sae.to("cpu"), 9, 12, seed=2), 12).to("cuda")
    enabled = torch.ones(9, dtype=torch.bool, device="cuda")
    fixed = rows.clone()

    def run() -> None:
        token_step(fixed, sae, edits, 0.2, enabled, mode=mode, backend="cuda")

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()  # the scratch of this stream is made outside of the capture
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    for on in (True, False, True):
        enabled.fill_(on)
        fixed.copy_(rows)
        graph.replay()
        assert same_bits(fixed, step(rows, sae, edits, mode) if on else rows)


@pytest.mark.usefixtures("products")
def test_counting_real_shapes() -> None:
    sae, rows = real_sae(2304, 16384), real_rows(1000, 2304)
    offsets = torch.tensor([0, 1, 400, 1000], device="cuda")
    counts = encode_density(rows, offsets, sae, backend="cuda")
    z = rows.double() @ sae.W_enc.double().T
    for segment, (start, end) in enumerate([(0, 1), (1, 400), (400, 1000)]):
        part = z[start:end]
        assert (counts[segment] >= (part > 1 + 1e-3).sum(dim=0)).all()
        assert (counts[segment] <= (part > 1 - 1e-3).sum(dim=0)).all()
    for _ in range(100):
        assert torch.equal(encode_density(rows, offsets, sae, backend="cuda"), counts)


@pytest.mark.parametrize(
    ("hidden_dtype", "sae_dtype"),
    [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("gated", subtract_b_dec=True)], ids=str)
@pytest.mark.usefixtures("products")
def test_counting_exactly(kind: Kind, hidden_dtype: torch.dtype, sae_dtype: torch.dtype) -> None:
    """Sums of small integers are exact, in whatever order: every count agrees."""
    for number, (tokens, d_model, d_sae) in enumerate([(3, 8, 37), (130, 72, 300), (1000, 520, 999)]):
        sae = make_integer_sae(kind, d_model, d_sae, sae_dtype, seed=number).to("cuda")
        rows = integers(generator(number), -3, 3, tokens, d_model).to(hidden_dtype).cuda()
        offsets = torch.tensor([0, 0, tokens // 3, tokens - 1, tokens], device="cuda")
        wide = {name: tensor.double() for name, tensor in sae.tensors().items() if tensor.is_floating_point()}
        expected = encode_density(rows.double(), offsets, replace(sae, **wide), backend="reference")
        assert torch.equal(encode_density(rows, offsets, sae, backend="cuda"), expected)
