"""The CPU modes are one function: the same bits by every way, at any number of threads, in any batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from kernel_cases import (
    KINDS,
    LOW_PRECISION,
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

from dspa.kernels import EditList, SaeWeights, StepMode, TokenStats, available, token_step
from dspa.kernels.token_step.cpu import quantized_encoder_of, scratch_of, work_of
from dspa.sae.encode import encode

pytestmark = pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}")

SHORTCUTS: tuple[StepMode, ...] = ("lazy", "screened")
WIDE = (199, 3001)  # more than one block of rows, neither a multiple of anything


@pytest.fixture
def two_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


def run(
    rows: Tensor, sae: SaeWeights, edits: EditList, alpha: float | Tensor, mode: StepMode
) -> tuple[Tensor, TokenStats]:
    hidden, stats = rows.clone(), TokenStats.zeros(len(rows), sae.d_sae)
    token_step(hidden, sae, edits, alpha, None, stats, mode=mode, backend="cpu")
    return hidden, stats


def assert_same(sae: SaeWeights, rows: Tensor, edits: EditList, alpha: float | Tensor) -> tuple[int, int]:
    """All modes against dense; how many rows were edited, and for how many `lazy` needed the maximum."""
    expected, dense = run(rows, sae, edits, alpha, "dense")
    needed = 0
    for mode in SHORTCUTS:
        written, stats = run(rows, sae, edits, alpha, mode)
        assert same_bits(written, expected), f"{mode} differs in rows {(written != expected).any(-1).nonzero()}"
        for name in ("seen", "edited", "nonfinite", "latent_edits"):
            assert torch.equal(getattr(stats, name), getattr(dense, name)), name
        known = stats.maximum_known.bool()
        assert torch.equal(stats.maximum[known], dense.maximum[known])
        assert stats.maximum[~known].isnan().all()
        needed = int(known.sum())
    return int(dense.edited.sum()), needed


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_random_tokens(kind: Kind, dtype: torch.dtype) -> None:
    """With the next test, more than 10,000 tokens."""
    sae = make_sae(kind, 37, 300, dtype, seed=3)
    edited = needed = 0
    for seed in range(3):
        rows = (normal(generator(seed), 64, 37) * 2).to(LOW_PRECISION[seed])
        edits = edit_list(*random_lists(sae, 64, 8, seed), 8)
        if seed:  # what the method does by default, and what lets a pass be avoided
            edits.signs.fill_(-1)
        alpha = torch.rand(64, generator=generator(seed)) * 1.5
        edited, needed = (a + b for a, b in zip((edited, needed), assert_same(sae, rows, edits, alpha), strict=True))
    assert edited > 50
    assert 0 < needed < 3 * 64


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.normalization == "none"], ids=str)
def test_tokens_on_the_boundary(kind: Kind, dtype: torch.dtype) -> None:
    """Small integers: activations sit on thresholds, ranks are tied, and `f == alpha * M_t` happens all the time."""
    sae = make_integer_sae(kind, 24, 260, dtype, seed=5)
    on_the_boundary = 0
    for seed, alpha in enumerate((0.0, 0.25, 0.5, 1.0, 2.0)):
        rows = integers(generator(seed), -1, 1, 64, 24).to(dtype)
        edits = edit_list(*random_lists(sae, 64, 10, seed), 10)
        if seed % 2:
            edits.signs.fill_(-1)
        assert_same(sae, rows, edits, alpha)
        f = encode(rows, sae)
        listed = f.gather(1, edits.latents.long())[edits.valid()]
        step = (f.amax(1, keepdim=True) * alpha).expand(edits.latents.shape)[edits.valid()]
        on_the_boundary += int(((listed == step) & (listed > 0)).sum())
    assert on_the_boundary > 0


@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("gated", "layer_norm")], ids=str)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_threads_do_not_change_the_bits(kind: Kind, dtype: torch.dtype, two_threads: None) -> None:
    sae = make_sae(kind, *WIDE, dtype, seed=7)
    rows = (normal(generator(8), 5, WIDE[0]) * 2).to(dtype)
    edits = edit_list(*random_lists(sae, 5, 12, 9), 12)
    for mode in ("dense", *SHORTCUTS):
        torch.set_num_threads(2)
        parallel, _ = run(rows, sae, edits, 0.2, mode)
        torch.set_num_threads(1)
        alone, _ = run(rows, sae, edits, 0.2, mode)
        assert same_bits(parallel, alone)


@pytest.mark.product
@pytest.mark.parametrize("kind", [Kind(), Kind("topk", rescaled=True)], ids=str)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("batch", [2, 3, 4, 5, 8, 17, 64])
def test_the_batch_does_not_change_the_bits(kind: Kind, dtype: torch.dtype, batch: int) -> None:
    sae = make_sae(kind, *WIDE, dtype, seed=7)
    rows = (normal(generator(batch), batch, WIDE[0]) * 2).to(dtype)
    edits = edit_list(*random_lists(sae, batch, 12, batch), 12)
    together, _ = run(rows, sae, edits, 0.2, "dense")
    for row in {0, 1, batch // 2, batch - 1}:
        only = edits.rows(torch.tensor([row]))
        assert same_bits(run(rows[row : row + 1], sae, only, 0.2, "dense")[0], together[row : row + 1])


def test_no_pass_where_no_listed_latent_is_active() -> None:
    sae = replace(make_sae(Kind(), *WIDE, torch.bfloat16, seed=7), threshold=torch.full((WIDE[1],), 1e9))
    rows = normal(generator(8), 3, WIDE[0]).bfloat16()
    run(rows, sae, edit_list([[]] * 3, [list(range(16))] * 3, 16), 0.2, "lazy")
    work = work_of(sae)
    assert (work.tokens, work.active, work.passes, work.maximum_needed) == (3, 0, 0, 0)
    assert work.encoder_bytes == 3 * 16 * WIDE[0] * 2


def test_recent_argmax_latents_save_the_pass() -> None:
    """A latent that towers above all others is remembered, and from then on proves the edit by itself."""
    plain = make_sae(Kind("relu"), *WIDE, torch.float32, seed=7)
    towering = plain.b_enc.clone()
    towering[1234] = 1e3
    sae = replace(plain, b_enc=towering)
    edits = edit_list([[]] * 2, [list(range(16))] * 2, 16)
    for seed in range(4):
        run(normal(generator(seed), 2, WIDE[0]).float(), sae, edits, 0.2, "lazy")
        assert int(scratch_of(sae).recent_argmax[0]) == 1234
    work = work_of(sae)
    assert (work.tokens, work.active, work.passes, work.maximum_needed) == (8, 8, 2, 0)


@pytest.mark.product
@pytest.mark.parametrize("outlier", [0.0, 100.0])
@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("gated")], ids=str)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_screening_rules_most_rows_out(kind: Kind, dtype: torch.dtype, outlier: float) -> None:
    """Also where one coordinate towers above the others, as it does in residual streams."""
    plain = make_sae(kind, *WIDE, dtype, seed=7)
    sae = replace(plain, k=20) if kind.activation == "topk" else plain
    rows = (normal(generator(1), 8, WIDE[0]) * 2).to(dtype)
    rows[:, 5] += outlier
    largest = encode(rows, sae).topk(6).indices.tolist()  # active, and the edit needs M_t
    edits = edit_list(largest, [[]] * 8, 6)
    written, _ = run(rows, sae, edits, 0.3, "screened")
    work = work_of(sae)
    assert work.maximum_needed == work.passes == 8
    assert 0 < work.rescored_pairs < 0.05 * work.screened_pairs
    assert work.encoder_bytes < WIDE[1] * 224 + 8 * (6 + 0.05 * WIDE[1]) * WIDE[0] * dtype.itemsize
    assert same_bits(written, run(rows, sae, edits, 0.3, "dense")[0])


def test_codes_are_not_used_where_scores_may_fall() -> None:
    plain = make_sae(Kind("gated"), 37, 300, torch.float32, seed=3)
    assert plain.magnitude_scale is not None
    sae = replace(plain, magnitude_scale=-plain.magnitude_scale)
    assert quantized_encoder_of(sae) is None
    rows = (normal(generator(0), 8, 37) * 2).float()
    assert_same(sae, rows, edit_list(*random_lists(sae, 8, 8, 0), 8), 0.2)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e15, 1e30])
def test_screening_at_the_ends_of_float32(scale: float) -> None:
    plain = make_sae(Kind("relu"), 37, 300, torch.float32, seed=3)
    sae = replace(plain, b_enc=plain.b_enc * scale)
    rows = (normal(generator(0), 8, 37) * scale).float()
    edits = edit_list(*random_lists(sae, 8, 8, 0), 8)
    expected, _ = run(rows, sae, edits, 0.2, "dense")
    assert same_bits(run(rows, sae, edits, 0.2, "screened")[0], expected)


def test_recent_argmax_latents_never_change_the_result() -> None:
    sae = make_sae(Kind(), *WIDE, torch.bfloat16, seed=7)
    rows = (normal(generator(1), 8, WIDE[0]) * 2).bfloat16()
    edits = edit_list([[]] * 8, random_lists(sae, 8, 12, 2)[1], 12)
    expected, _ = run(rows, sae, edits, 0.3, "dense")
    for recent_argmax in (-1, WIDE[1], 2**31 - 1, 17):  # none, nonsense, nonsense, one that is listed now and then
        scratch_of(sae).recent_argmax.fill_(recent_argmax)
        assert same_bits(run(rows, sae, edits, 0.3, "lazy")[0], expected)
