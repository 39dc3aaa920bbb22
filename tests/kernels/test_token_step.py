"""token_step against the equations: exactly where arithmetic is exact, within rounding bounds elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace

import equations
import numpy as np
import pytest
import rounding_bounds
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    KINDS,
    LOW_PRECISION,
    MODES,
    Backend,
    Kind,
    as_equations,
    counted,
    decodable,
    dense_map,
    distinct_modes,
    edit_list,
    exact,
    fresh_stats,
    generator,
    integers,
    make_integer_sae,
    make_sae,
    normal,
    poisoned_view,
    random_lists,
    same_bits,
    seeds,
    step,
    with_threshold,
)
from torch import Tensor

from dspa.errors import BackendUnavailableError, InvalidInputError
from dspa.kernels import EditList, SaeWeights, StepMode, TokenStats, lookup, token_step, token_step_with_lookup

INTEGER_KINDS = tuple(kind for kind in KINDS if kind.normalization == "none")
DTYPE_PAIRS = [(hidden, weights) for hidden in LOW_PRECISION for weights in LOW_PRECISION]
SHAPES = [(1, 1, 1), (2, 1, 37), (5, 37, 199), (3, 199, 513), (4, 64, 37)]  # B, d_model, d_sae


def name(value: object) -> str:
    return str(value).removeprefix("torch.")


def check_step(
    rows: Tensor,
    written: Tensor,
    sae: SaeWeights,
    augment: list[list[int]],
    ablate: list[list[int]],
    alpha: Sequence[float],
    stats: TokenStats,
    *,
    u: float,
    dense: bool = False,
) -> None:
    """Every row, M_t and counter of one call, within the rounding bounds.

    Args:
        stats: what the call added, see `counted`.
        u: unit roundoff of the accumulation.
        dense: whether M_t must be known for every finite row.
    """
    given = as_equations(sae)
    least, most = np.zeros(sae.d_sae, dtype=int), np.zeros(sae.d_sae, dtype=int)
    for b in range(len(rows)):
        h, out, maximum = exact(rows[b]), exact(written[b]), float(stats.maximum[b])
        assert int(stats.seen[b]) == 1
        if not np.isfinite(equations.sae_input(h, given).x).all():
            assert same_bits(rows[b], written[b])
            assert (int(stats.edited[b]), int(stats.nonfinite[b]), int(stats.maximum_known[b])) == (0, 1, 0)
            assert np.isnan(maximum)
            continue
        possible = rounding_bounds.worlds(h, given, augment[b], ablate[b], alpha[b], u, rows.dtype)
        edited = int(stats.edited[b])
        agreeing = [
            world
            for world in possible
            if rounding_bounds.matches(world, h, out, maximum) and bool(world.changed) == bool(edited)
        ]
        nearest = min(possible, key=lambda world: float(np.abs(out - world.row).max()))
        assert agreeing, (
            f"row {b}: off by {np.abs(out - nearest.row)} where {nearest.radius} is allowed; M_t is {maximum}, exactly "
            f"{nearest.maximum}; edited {edited}, expected {sorted(nearest.changed)}"
        )
        assert int(stats.nonfinite[b]) == 0
        assert int(stats.maximum_known[b]) == (not np.isnan(maximum))
        assert float(stats.maximum_sum[b]) == (0 if np.isnan(maximum) else maximum)
        assert not (dense and np.isnan(maximum))
        for latent in set().union(*(world.changed for world in agreeing)):
            most[latent] += 1
            least[latent] += all(latent in world.changed for world in agreeing)
    assert (least <= stats.latent_edits.numpy()).all()
    assert (stats.latent_edits.numpy() <= most).all()


def run_and_check(
    rows: Tensor,
    sae: SaeWeights,
    augment: list[list[int]],
    ablate: list[list[int]],
    alpha: float | Tensor,
    backend: Backend,
    *,
    mode: StepMode | None = None,
    garbage: int = 0,
    room: int | None = None,
) -> Tensor:
    batch = len(rows)
    longest = max((len(up) + len(down) for up, down in zip(augment, ablate, strict=True)), default=0)
    edits = edit_list(augment, ablate, longest + 2 if room is None else room, garbage)
    stats = fresh_stats(batch, sae.d_sae, backend.device)
    written = step(rows, sae, edits, alpha, backend=backend, stats=stats, mode=mode)
    precise = torch.float64 in (rows.dtype, sae.dtype)
    alphas = [float(a) for a in alpha] if isinstance(alpha, Tensor) else [alpha] * batch
    check_step(
        rows,
        written,
        sae,
        augment,
        ablate,
        alphas,
        counted(stats, batch, sae.d_sae),
        u=rounding_bounds.UNIT_ROUNDOFF[torch.float64 if precise else torch.float32],
        dense=mode == "dense",
    )
    return written


# ---- against the equations -------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    batch=st.integers(1, 4),
    d_model=st.integers(1, 24),
    d_sae=st.integers(1, 48),
    k=st.integers(0, 12),
    alpha=st.sampled_from([0.0, 0.05, 0.2, 0.5, 1.0, 2.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_float64_equals_the_equations(
    float64_backend: Backend, kind: Kind, batch: int, d_model: int, d_sae: int, k: int, alpha: float, seed: int
) -> None:
    sae = make_sae(kind, d_model, d_sae, torch.float64, seed)
    rows = normal(generator(seed + 1), batch, d_model) * 3
    augment, ablate = random_lists(sae, batch, k, seed)
    stats = fresh_stats(batch, d_sae)
    written = step(
        rows,
        sae,
        edit_list(augment, ablate, k + 1, garbage=d_sae - 1),
        alpha,
        backend=float64_backend,
        stats=stats,
        mode="dense",
    )
    added, given_sae = counted(stats, batch, d_sae), as_equations(sae)
    latent_edits = np.zeros(d_sae, dtype=np.int64)
    for b in range(batch):
        expected = equations.token_step(exact(rows[b]), given_sae, augment[b], ablate[b], alpha)
        scale = max(np.abs(expected.row).max(), np.abs(exact(rows[b])).max())
        assert np.abs(exact(written[b]) - expected.row).max() <= 1e-12 * scale
        assert np.isclose(float(added.maximum[b]), expected.maximum, rtol=1e-12, atol=0, equal_nan=True)
        assert bool(added.edited[b]) == bool(expected.changed)
        assert bool(added.nonfinite[b]) == (not expected.finite)
        latent_edits[expected.changed] += 1
    assert (added.latent_edits.numpy() == latent_edits).all()


@pytest.mark.product
@pytest.mark.parametrize(("hidden_dtype", "sae_dtype"), DTYPE_PAIRS, ids=name)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_low_precision_is_within_rounding(
    backend: Backend, kind: Kind, hidden_dtype: torch.dtype, sae_dtype: torch.dtype
) -> None:
    for number, (batch, d_model, d_sae) in enumerate(SHAPES):
        sae = make_sae(kind, d_model, d_sae, sae_dtype, seed=number)
        rows = (normal(generator(100 + number), batch, d_model) * 3).to(hidden_dtype)
        augment, ablate = random_lists(sae, batch, min(d_sae, 12), seed=number)
        run_and_check(rows, sae, augment, ablate, 0.2, backend, mode="dense", garbage=decodable(sae)[-1])


@pytest.mark.product
@pytest.mark.parametrize(("hidden_dtype", "sae_dtype"), DTYPE_PAIRS, ids=name)
@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_exact_arithmetic_gives_exact_results(
    backend: Backend, kind: Kind, hidden_dtype: torch.dtype, sae_dtype: torch.dtype
) -> None:
    """Thresholds that are met exactly, tied ranks and clamps that meet 0: one right answer, to the last bit."""
    for number, (batch, d_model, d_sae) in enumerate([(2, 1, 1), (6, 5, 37), (3, 37, 199)]):
        sae = make_integer_sae(kind, d_model, d_sae, sae_dtype, seed=number)
        rows = integers(generator(number), -3, 3, batch, d_model).to(hidden_dtype)
        augment, ablate = random_lists(sae, batch, min(d_sae, 16), seed=number)
        given_sae = as_equations(sae)
        for alpha in (0.25, 1.0, 2.0):
            stats = fresh_stats(batch, d_sae, backend.device)
            edits = edit_list(augment, ablate, min(d_sae, 16) + 1)
            written = step(rows, sae, edits, alpha, backend=backend, stats=stats, mode="dense")
            added, latent_edits = counted(stats, batch, d_sae), np.zeros(d_sae, dtype=np.int64)
            for b in range(batch):
                expected = equations.token_step(exact(rows[b]), given_sae, augment[b], ablate[b], alpha)
                assert torch.equal(written[b], torch.from_numpy(expected.row).to(hidden_dtype))
                assert float(added.maximum[b]) == expected.maximum
                assert bool(added.edited[b]) == bool(expected.changed)
                latent_edits[expected.changed] += 1
            assert (added.latent_edits.numpy() == latent_edits).all()


@pytest.mark.product
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Kind(), Kind("relu"), Kind("gated"), Kind("topk")], ids=str)
def test_gates_on_the_boundary(backend: Backend, kind: Kind, mode: StepMode | None) -> None:
    """Thresholds at the float32 value that z has on some token: either side is right, a value in between is not."""
    batch, d_model, d_sae = 4, 37, 24
    sae = make_sae(kind, d_model, d_sae, torch.float32, seed=1)
    rows = normal(generator(2), batch, d_model).float()
    given_sae = as_equations(sae)
    z = np.array([equations.pre_activation(equations.products(exact(row), given_sae), given_sae) for row in rows])
    if kind.activation == "jumprelu":
        sae = with_threshold(sae, torch.from_numpy(z[np.arange(d_sae) % batch, np.arange(d_sae)]))
    elif kind.activation == "topk":  # two copies of every latent: every rank is a tie
        sae = replace(sae, W_enc=sae.W_enc[::2].repeat_interleave(2, 0), b_enc=sae.b_enc[::2].repeat_interleave(2), k=5)
    else:
        sae = replace(sae, b_enc=(sae.b_enc - torch.from_numpy(z[np.arange(d_sae) % batch, np.arange(d_sae)])).float())
    ablate = [list(range(b, b + 12, 3)) for b in range(batch)]
    augment = [list(range(b + 1, b + 13, 6)) for b in range(batch)]
    run_and_check(rows, sae, augment, ablate, 0.2, backend, mode=mode)


@pytest.mark.parametrize("batch", [1, 2, 3, 7, 8, 16, 33, 64])
def test_batches(backend: Backend, batch: int) -> None:
    sae = make_sae(Kind(), 37, 53, torch.bfloat16, seed=batch)
    rows = (normal(generator(batch), batch, 37) * 2).bfloat16()
    augment, ablate = random_lists(sae, batch, 8, seed=batch)
    run_and_check(rows, sae, augment, ablate, 0.2, backend, mode="dense")


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_only_the_edit_is_added(float64_backend: Backend, kind: Kind) -> None:
    """h - decode(f), the SAE's reconstruction error, is what it was: decode(f') - decode(f) was added."""

    @settings(max_examples=15, deadline=None)
    @given(seed=st.integers(0, 2**32 - 1), alpha=st.floats(0.01, 3))
    def check(seed: int, alpha: float) -> None:
        sae = make_sae(kind, 9, 21, torch.float64, seed)
        rows = normal(generator(seed), 2, 9) * 2
        augment, ablate = random_lists(replace(sae, decoder_rows=sae.decoder_rows), 2, 10, seed)
        written = step(rows, sae, edit_list(augment, ablate, 10), alpha, backend=float64_backend)
        given_sae = as_equations(sae)
        if given_sae.W_dec is not None:  # the decoder rows that are missing decode what is not edited: any will do
            given_sae = replace(given_sae, W_dec=np.nan_to_num(given_sae.W_dec, nan=0.5))
        for b in range(2):
            h = exact(rows[b])
            edit = equations.token_step(h, given_sae, augment[b], ablate[b], alpha)
            error = h - equations.decode(edit.f, h, given_sae)
            kept = exact(written[b]) - equations.decode(edit.f_edited, h, given_sae)
            assert np.abs(kept - error).max() <= 1e-12 * max(1.0, np.abs(exact(written[b])).max(), np.abs(error).max())

    check()


# ---- what is not edited ----------------------------------------------------------------------------------------------


def test_alpha_zero_keeps_every_bit(backend: Backend) -> None:
    sae = make_sae(Kind(), 37, 64, torch.bfloat16, seed=0)
    rows = normal(generator(1), 6, 37).bfloat16()
    augment, ablate = random_lists(sae, 6, 16, seed=2)
    for alpha in (0.0, torch.zeros(6)):
        for mode in distinct_modes(backend):
            stats = fresh_stats(6, 64, backend.device)
            edits = edit_list(augment, ablate, 16)
            written = step(rows, sae, edits, alpha, backend=backend, stats=stats, mode=mode)
            added = counted(stats, 6, 64)
            assert same_bits(written, rows)
            assert not added.edited.any()
            assert not added.latent_edits.any()
            assert (added.seen == 1).all()


def test_negative_zero_keeps_its_sign(backend: Backend) -> None:
    """-0.0 + 0.0 is 0.0: a row that nothing changes must not be written at all."""
    sae = with_threshold(make_sae(Kind(), 8, 16, torch.float32, seed=0), torch.full((16,), 1e9))
    rows = torch.full((2, 8), -0.0)
    written = step(rows, sae, edit_list([[1], []], [[2], []], 3), 0.2, backend=backend)
    assert same_bits(written, rows)


@pytest.mark.product
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("activation", ["jumprelu", "gated", "topk"])
def test_rows_where_nothing_is_active(backend: Backend, activation: str, mode: StepMode | None) -> None:
    sae = make_sae(Kind(activation), 37, 40, torch.float32, seed=0)  # pyright: ignore[reportArgumentType]
    sae = replace(sae, b_enc=torch.full((40,), -1e4))
    rows = normal(generator(1), 3, 37).half()
    stats = fresh_stats(3, 40, backend.device)
    edits = edit_list([[1, 2]] * 3, [[3, 4, 5]] * 3, 6)
    written = step(rows, sae, edits, 0.5, backend=backend, stats=stats, mode=mode)
    added = counted(stats, 3, 40)
    assert same_bits(written, rows)
    assert not added.edited.any()
    assert not added.latent_edits.any()
    assert ((added.maximum == 0) | (added.maximum.isnan() & torch.tensor(mode != "dense"))).all()


@pytest.mark.product
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("k", [0, 1, 5])
def test_empty_lists(backend: Backend, k: int, mode: StepMode | None) -> None:
    sae = make_sae(Kind(), 37, 40, torch.bfloat16, seed=0)
    rows = normal(generator(1), 3, 37).bfloat16()
    stats = fresh_stats(3, 40, backend.device)
    edits = edit_list([[]] * 3, [[]] * 3, k, garbage=7)
    written = step(rows, sae, edits, 0.5, backend=backend, stats=stats, mode=mode)
    assert same_bits(written, rows)
    check_step(
        rows,
        written,
        sae,
        [[]] * 3,
        [[]] * 3,
        [0.5] * 3,
        counted(stats, 3, 40),
        u=rounding_bounds.UNIT_ROUNDOFF[torch.float32],
        dense=mode == "dense",
    )


def test_padding_is_ignored(backend: Backend) -> None:
    """What lies behind the counts, valid latents and signs included, changes no bit."""
    sae = make_sae(Kind("relu"), 37, 40, torch.float32, seed=0)
    rows = normal(generator(1), 4, 37)
    rows = rows.float()
    augment, ablate = [[0], [], [1, 2], []], [[3, 4], [5], [], []]
    plain = step(rows, sae, edit_list(augment, ablate, 9, garbage=0), 0.2, backend=backend)
    for garbage in (1, 3, 20, 39):
        assert same_bits(step(rows, sae, edit_list(augment, ablate, 9, garbage), 0.2, backend=backend), plain)
    assert same_bits(plain[3], rows[3])


def test_padding_without_a_decoder_is_ignored(backend: Backend) -> None:
    """Padding names latent 0; where its decoder row is missing or its norm is 0, nothing may come of it."""
    sae = make_sae(Kind("topk", rescaled=True), 8, 12, torch.float32, seed=0)
    assert sae.decoder_norm is not None
    norm = sae.decoder_norm.clone()
    norm[0] = 0
    sae = replace(sae, decoder_norm=norm, k=12)
    rows = normal(generator(1), 3, 8).float() * 3
    augment, ablate = [[1, 2], [3], []], [[4, 5], [0, 6, 7, 8, 9], []]
    assert run_and_check(rows, sae, augment, ablate, 0.2, backend, room=7).isfinite().all()


@pytest.mark.parametrize("mode", MODES)
def test_disabled_rows_are_left_alone(backend: Backend, mode: StepMode | None) -> None:
    sae = make_sae(Kind(), 37, 40, torch.bfloat16, seed=0)
    rows = (normal(generator(1), 5, 37) * 3).bfloat16()
    rows[4, 0] = torch.nan
    augment, ablate = [[0, 1, 2]] * 5, [list(range(3, 20))] * 5
    enabled = torch.tensor([True, False, True, False, False])
    edits, stats = edit_list(augment, ablate, 20), fresh_stats(5, 40, backend.device)
    written = step(rows, sae, edits, 0.2, backend=backend, enabled=enabled, stats=stats, mode=mode)
    every = step(rows, sae, edits, 0.2, backend=backend, mode=mode)
    assert same_bits(written[enabled], every[enabled])
    assert same_bits(written[~enabled], rows[~enabled])
    added = counted(stats, 5, 40)
    for counter in (added.seen, added.edited):
        assert counter.tolist() == [1, 0, 1, 0, 0]
    assert not added.nonfinite.any()
    assert not added.maximum_known[~enabled].any()
    assert not added.maximum_sum[~enabled].any()
    assert (added.maximum[~enabled] == 0.125).all()
    none = fresh_stats(5, 40, backend.device)
    off = torch.zeros(5, dtype=torch.bool)
    assert same_bits(step(rows, sae, edits, 0.2, backend=backend, enabled=off, stats=none, mode=mode), rows)
    for field in fields(TokenStats):
        assert torch.equal(getattr(none, field.name).cpu(), getattr(fresh_stats(5, 40), field.name))


@pytest.mark.product
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("gated", "layer_norm")], ids=str)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name)
def test_nonfinite_rows_are_left_alone(backend: Backend, dtype: torch.dtype, kind: Kind, mode: StepMode | None) -> None:
    sae = make_sae(kind, 37, 40, dtype, seed=0)
    rows = (normal(generator(1), 7, 37) * 3).to(dtype)
    clean = rows.clone()
    bad = {1: torch.nan, 3: torch.inf, 4: -torch.inf, 6: torch.nan}
    for row, value in bad.items():
        rows[row, row * 5] = value
    rows[6] = torch.nan
    augment, ablate = [[0, 1, 2]] * 7, [list(range(3, 15))] * 7
    edits, stats = edit_list(augment, ablate, 17), fresh_stats(7, 40, backend.device)
    written = step(rows, sae, edits, 0.2, backend=backend, stats=stats, mode=mode)
    good = [row for row in range(7) if row not in bad]
    assert same_bits(written[list(bad)], rows[list(bad)])
    assert same_bits(written[good], step(clean, sae, edits, 0.2, backend=backend, mode=mode)[good])
    added = counted(stats, 7, 40)
    assert added.nonfinite.tolist() == [int(row in bad) for row in range(7)]
    assert not added.edited[list(bad)].any()
    assert added.maximum[list(bad)].isnan().all()
    assert not added.maximum_known[list(bad)].any()


def test_zero_vector_without_a_norm_is_nonfinite(backend: Backend) -> None:
    sae = make_sae(Kind("relu", "constant_norm_rescale"), 37, 40, torch.float32, seed=0)
    rows = normal(generator(1), 3, 37).float()
    rows[1] = 0
    run_and_check(rows, sae, [[0, 1]] * 3, [[2, 3, 4]] * 3, 0.2, backend, mode="dense")


def test_constant_row_under_layer_norm(backend: Backend) -> None:
    sae = make_sae(Kind("relu", "layer_norm"), 16, 40, torch.float32, seed=0)
    rows = torch.full((2, 16), 2.0)
    assert run_and_check(rows, sae, [[0, 1]] * 2, [[2, 3, 4]] * 2, 0.2, backend, mode="dense").isfinite().all()


@pytest.mark.product
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_activations_that_overflow_are_nonfinite(backend: Backend, dtype: torch.dtype, mode: StepMode | None) -> None:
    """A finite hidden state whose activations are not: the row must not be filled with NaN."""
    plain = make_sae(Kind("relu"), 8, 16, dtype, seed=0)
    sae = replace(plain, W_enc=torch.full((16, 8), 2.0).to(dtype))
    rows = normal(generator(0), 3, 8).to(dtype)
    rows[0] = torch.full((8,), 3e38).to(dtype)  # z is Inf
    rows[1] = rows[0] * torch.tensor([-1.0, 1.0]).repeat(4).to(dtype)  # z is NaN or anything
    stats = fresh_stats(3, 16, backend.device)
    edits = edit_list([[0, 1]] * 3, [[2, 3]] * 3, 4)
    written = step(rows, sae, edits, 0.2, backend=backend, stats=stats, mode=mode)
    assert same_bits(written[:2], rows[:2])
    assert counted(stats, 3, 16).nonfinite.tolist() == [1, 1, 0]
    assert not counted(stats, 3, 16).edited[:2].any()
    assert same_bits(written[2:], step(rows[2:], sae, edit_list([[0, 1]], [[2, 3]], 4), 0.2, backend=backend))


@pytest.mark.product
@pytest.mark.parametrize("normalization", ["constant_norm_rescale", "layer_norm"])
@pytest.mark.parametrize("size", [1e-30, 1e25], ids=str)
def test_norms_out_of_range_do_no_harm(backend: Backend, normalization: str, size: float) -> None:
    """A norm that overflows or vanishes in float32: the edit is finite, or the row is left alone and counted."""
    sae = make_sae(Kind("relu", normalization), 8, 16, torch.float32, seed=0)  # pyright: ignore[reportArgumentType]
    sae = replace(sae, b_enc=torch.ones(16))
    rows = (normal(generator(0), 2, 8) * size).float()
    stats = fresh_stats(2, 16, backend.device)
    written = step(rows, sae, edit_list([[0, 1]] * 2, [[2, 3]] * 2, 4), 0.2, backend=backend, stats=stats)
    left = counted(stats, 2, 16).nonfinite.bool()
    assert written.isfinite().all()
    assert same_bits(written[left], rows[left])
    reach = float(rows.abs().max()) * 100  # the edit of a normalised row is of the row's own size
    assert ((written - rows).abs() <= reach).all()


@pytest.mark.long
def test_weights_beyond_two_to_the_31st(backend: Backend) -> None:
    """The last latents of an encoder and a decoder whose offsets do not fit 32 bits; most of the memory is never
    touched, and so never taken."""
    if backend.name == "reference":
        pytest.skip("the reference makes float32 of all weights, which takes 9 GB")
    d_model, d_sae = 4096, 2**19 + 64
    W = torch.from_numpy(np.zeros((d_sae, d_model), np.uint16)).view(torch.bfloat16)
    W[-1], W[-2] = 2**-6, 2**-7
    zeros = torch.zeros(d_sae)
    sae = SaeWeights(W_enc=W, W_dec=W, b_enc=zeros, threshold=zeros + 1, activation="jumprelu")
    rows = torch.ones(2, d_model, dtype=torch.bfloat16)
    written = step(rows, sae, edit_list([[], []], [[d_sae - 1], [d_sae - 2]], 1), 1.0, backend=backend, mode="lazy")
    assert [row.float().unique().tolist() for row in written] == [[0.0], [0.75]]  # f is 64 and 32, and vanishes


# ---- alpha, stats, modes ---------------------------------------------------------------------------------------------


@pytest.mark.product
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("alpha", [0.05, 0.2, 1.0, 1.5, 3.0])
@pytest.mark.parametrize("kind", [Kind(), Kind("topk", rescaled=True)], ids=str)
def test_alpha(backend: Backend, kind: Kind, alpha: float, mode: StepMode | None) -> None:
    sae = make_sae(kind, 37, 40, torch.float16, seed=0)
    rows = (normal(generator(1), 4, 37) * 2).half()
    augment, ablate = random_lists(sae, 4, 20, seed=3)
    run_and_check(rows, sae, augment, ablate, alpha, backend, mode=mode)


@pytest.mark.product
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=name)
@pytest.mark.parametrize("mode", MODES)
def test_alpha_per_row(backend: Backend, dtype: torch.dtype, mode: StepMode | None) -> None:
    sae = make_sae(Kind(), 37, 40, torch.float32, seed=0)
    rows = (normal(generator(1), 5, 37) * 2).float()
    alpha = torch.tensor([0.0, 0.2, 0.5, 1.0, 2.5], dtype=dtype)
    ablate = [list(range(20))] * 5
    written = run_and_check(rows, sae, [[30, 31]] * 5, ablate, alpha, backend, mode=mode)
    assert same_bits(written[0], rows[0])
    alone = step(rows[3:4], sae, edit_list([[30, 31]], ablate[:1], 24), 1.0, backend=backend, mode=mode)
    assert same_bits(written[3:4], alone)


def test_ablating_with_alpha_one_empties_the_list(float64_backend: Backend) -> None:
    sae = make_sae(Kind(), 16, 20, torch.float64, seed=0)
    rows = normal(generator(1), 3, 16) * 3
    written = step(rows, sae, edit_list([[]] * 3, [list(range(20))] * 3, 20), 1.0, backend=float64_backend)
    given_sae = as_equations(replace(sae, b_dec=torch.zeros(16, dtype=torch.float64)))
    for b in range(3):
        h = exact(rows[b])
        removed = equations.decode(equations.encode(h, given_sae), h, given_sae)
        assert np.allclose(exact(written[b]), h - removed, rtol=0, atol=1e-12)


def test_stats_add_up(backend: Backend) -> None:
    """Several tokens through the same counters."""
    sae = make_sae(Kind(), 37, 40, torch.float32, seed=0)
    edits = edit_list([[0, 1]] * 3, [[2, 3, 4]] * 3, 5)
    total, parts = TokenStats.zeros(3, 40, backend.device), []
    for seed in range(4):
        rows = normal(generator(seed), 3, 37).float() * 2
        single = TokenStats.zeros(3, 40, backend.device)
        for stats in (total, single):
            step(rows, sae, edits, 0.2, backend=backend, stats=stats, mode="dense")
        parts.append(single)
    for counter in ("seen", "edited", "nonfinite", "maximum_sum", "maximum_known", "latent_edits"):
        expected = sum(getattr(part, counter) for part in parts)
        assert isinstance(expected, Tensor)
        assert torch.equal(getattr(total, counter), expected)
    assert torch.equal(total.maximum, parts[-1].maximum)
    assert total.latent_edits.sum() > 0


def test_stats_do_not_change_the_rows(backend: Backend) -> None:
    sae = make_sae(Kind(), 37, 40, torch.float32, seed=0)
    rows = normal(generator(1), 3, 37).float() * 2
    edits = edit_list([[0, 1]] * 3, [[2, 3, 4]] * 3, 5)
    for mode in distinct_modes(backend):
        stats = TokenStats.zeros(3, 40, backend.device)
        assert same_bits(
            step(rows, sae, edits, 0.2, backend=backend, stats=stats, mode=mode),
            step(rows, sae, edits, 0.2, backend=backend, mode=mode),
        )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_modes_agree_bit_for_bit(backend: Backend, kind: Kind) -> None:
    for seed in seeds(backend):
        dtype = LOW_PRECISION[seed % 3]
        sae = make_sae(kind, 37, 129, dtype, seed)
        rows = (normal(generator(seed), 6, 37) * 3).bfloat16()
        augment, ablate = random_lists(sae, 6, 24, seed)
        if seed % 2:
            augment = [[] for _ in augment]
        edits = edit_list(augment, ablate, 24)
        alpha = (0.2, 0.05, 0.9, 1.3)[seed % 4]
        dense_stats = TokenStats.zeros(6, 129, backend.device)
        dense = step(rows, sae, edits, alpha, backend=backend, stats=dense_stats, mode="dense")
        for mode in distinct_modes(backend):
            stats = TokenStats.zeros(6, 129, backend.device)
            assert same_bits(step(rows, sae, edits, alpha, backend=backend, stats=stats, mode=mode), dense)
            for counter in ("seen", "edited", "nonfinite", "latent_edits"):
                assert torch.equal(getattr(stats, counter), getattr(dense_stats, counter)), counter
            known = ~stats.maximum.isnan()
            assert torch.equal(stats.maximum[known], dense_stats.maximum[known])
            assert torch.equal(stats.maximum_known.bool(), known)
            assert torch.equal(stats.maximum_sum, stats.maximum.nan_to_num())


@pytest.mark.product
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_row_depends_on_nothing_else_in_the_batch(backend: Backend, kind: Kind, mode: StepMode | None) -> None:
    sae = make_sae(kind, 67, 129, torch.bfloat16, seed=5)
    rows = (normal(generator(6), 19, 67) * 3).to(torch.float32 if mode == "dense" else torch.bfloat16)
    augment, ablate = random_lists(sae, 19, 12, seed=7)
    edits = edit_list(augment, ablate, 12)
    whole = step(rows, sae, edits, 0.2, backend=backend, mode=mode)
    assert same_bits(step(rows, sae, edits, 0.2, backend=backend, mode=mode), whole), "a second run differs"
    for index in (torch.tensor([3]), torch.tensor([0]), torch.arange(18, -1, -1), torch.tensor([1, 5, 9, 2, 17])):
        part = step(rows[index], sae, edits.rows(index), 0.2, backend=backend, mode=mode)
        assert same_bits(part, whole[index])
    poisoned = rows.clone()
    poisoned[::2] = torch.nan
    assert same_bits(step(poisoned, sae, edits, 0.2, backend=backend, mode=mode)[1::2], whole[1::2])


def test_room_behind_the_lists_changes_no_bit(backend: Backend) -> None:
    """The longest list of a batch sets the room that `EditList.from_lists` leaves; other rows must not see it."""
    sae = make_sae(Kind("relu"), 67, 129, torch.float32, seed=5)
    rows = normal(generator(6), 4, 67).float() * 3
    augment, ablate = [[0, 1], [2], [3, 4, 5], []], [[6, 7, 8], [9, 10, 11, 12, 13], [14], [15]]
    tight = step(rows, sae, EditList.from_lists(augment, ablate), 0.2, backend=backend)
    for room in (6, 7, 8, 16, 19, 33, 64):
        assert same_bits(step(rows, sae, edit_list(augment, ablate, room), 0.2, backend=backend), tight), room


@pytest.mark.long
@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("relu", "layer_norm")], ids=str)
def test_the_number_of_threads_changes_no_bit(backend: Backend, kind: Kind) -> None:
    sae = make_sae(kind, 131, 1500, torch.bfloat16, seed=5)
    rows = normal(generator(6), 5, 131).bfloat16()
    edits = edit_list([[0, 1]] * 5, [list(range(2, 18))] * 5, 18)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(step(rows.float(), sae, edits, 0.2, backend=backend))
    torch.set_num_threads(1)
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])


def test_no_rows(backend: Backend) -> None:
    sae = make_sae(Kind(), 8, 16, torch.float32, seed=0)
    stats = fresh_stats(0, 16, backend.device)
    written = step(torch.zeros(0, 8), sae, edit_list([], [], 4), 0.2, backend=backend, stats=stats)
    assert written.shape == (0, 8)
    assert not counted(stats, 0, 16).latent_edits.any()


def test_contiguous_rows_give_the_same_bits(backend: Backend) -> None:
    sae = make_sae(Kind("jumprelu", "layer_norm"), 199, 129, torch.float32, seed=5).to(backend.device)
    rows = normal(generator(6), 5, 199).float()
    edits = edit_list([[0, 1]] * 5, [list(range(2, 18))] * 5, 18)
    strided = step(rows, sae, edits, 0.2, backend=backend)
    contiguous = rows.to(backend.device).clone()
    token_step(contiguous, sae, edits.to(backend.device), 0.2, backend=backend.name)
    assert same_bits(contiguous, strided)


def test_with_lookup_is_lookup_then_step(backend: Backend) -> None:
    rng = generator(0)
    sae = make_sae(Kind(), 37, 40, torch.bfloat16, seed=1).to(backend.device)
    conditional_map = dense_map(integers(rng, -3, 3, 30, 40).float()).to(backend.device)
    density = torch.rand(4, 30, generator=rng).to(backend.device)
    rows = (normal(rng, 4, 37) * 2).bfloat16()
    expected_lists = lookup(density, conditional_map, 5, 3, "both", backend=backend.name)
    expected = rows.to(backend.device).clone()
    token_step(expected, sae, expected_lists, 0.2, backend=backend.name)
    view, _ = poisoned_view(rows, backend.device)
    stats = TokenStats.zeros(4, 40, backend.device)
    lists = token_step_with_lookup(
        view,
        sae,
        density,
        conditional_map,
        0.2,
        stats=stats,
        k_prompt=5,
        k_diff=3,
        edit="both",
        backend=backend.name,
    )
    assert same_bits(view, expected)
    assert torch.equal(lists.counts, expected_lists.counts)
    for row in range(4):
        assert lists.augmented(row) == expected_lists.augmented(row)
        assert lists.ablated(row) == expected_lists.ablated(row)
    assert (stats.seen == 1).all()


# ---- what is refused -------------------------------------------------------------------------------------------------

SAE = make_sae(Kind(), 8, 16, torch.float32, seed=0)
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "hidden with three axes": (
        {"hidden": torch.zeros(2, 1, 8)},
        r"hidden is \(2, 1, 8\) .*; expected \[B, d_model = 8\]",
    ),
    "hidden of another width": ({"hidden": torch.zeros(2, 9)}, r"hidden is \(2, 9\)"),
    "hidden of integers": ({"hidden": torch.zeros(2, 8, dtype=torch.int64)}, "hidden is .*torch.int64"),
    "SAE without a decoder": ({"sae": replace(SAE, W_dec=None)}, "no W_dec"),
    "lists for another batch": ({"edits": EditList.empty(3, 4)}, "edit lists are for 3 rows, hidden has 2"),
    "alpha for another batch": ({"alpha": torch.ones(3)}, r"alpha is \(3,\)"),
    "alpha as a column": ({"alpha": torch.ones(2, 1)}, r"alpha is \(2, 1\)"),
    "negative alpha": ({"alpha": -0.1}, "alpha is -0.1; expected a finite float32 >= 0"),
    "alpha infinite": ({"alpha": float("inf")}, "alpha is inf"),
    "alpha infinite in float32": ({"alpha": 1e308}, r"alpha is 1e\+308"),
    "alpha not a number": ({"alpha": "0.2"}, "alpha is '0.2'"),
    "alpha NaN": ({"alpha": float("nan")}, "alpha is nan"),
    "enabled for another batch": ({"enabled": torch.ones(3, dtype=torch.bool)}, r"enabled is \(3,\)"),
    "stats for another batch": ({"stats": TokenStats.zeros(3, 16)}, "stats are for 3 rows and 16 latents"),
    "stats for another width": ({"stats": TokenStats.zeros(2, 15)}, "stats are for 2 rows and 15 latents"),
    "unknown mode": ({"mode": "fast"}, "mode is 'fast'; expected one of dense, lazy, screened"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_named(case: str) -> None:
    change, message = REFUSED[case]
    arguments: dict[str, object] = {
        "hidden": torch.zeros(2, 8),
        "sae": SAE,
        "edits": EditList.empty(2, 4),
        "alpha": 0.2,
        "enabled": None,
        "stats": None,
        "mode": None,
    }
    token_step(**arguments)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInputError, match=message) as raised:
        token_step(**(arguments | change))  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(raised.value)


def test_a_map_for_another_sae_is_named() -> None:
    wider = dense_map(torch.ones(4, 17))
    with pytest.raises(InvalidInputError):
        token_step_with_lookup(torch.zeros(2, 8), SAE, torch.rand(2, 4), wider, 0.2, k_prompt=2, k_diff=17)


def test_unknown_backend_is_named() -> None:
    with pytest.raises(BackendUnavailableError, match="backend 'fastest' is not known; expected auto, reference"):
        token_step(torch.zeros(2, 8), SAE, EditList.empty(2, 4), 0.2, backend="fastest")
