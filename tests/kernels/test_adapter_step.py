"""adapter_step against the equations: exactly where arithmetic is exact, within rounding bounds elsewhere."""

from __future__ import annotations

import math
from dataclasses import fields, replace

import equations
import numpy as np
import pytest
import rounding_bounds
import torch
from adapter_cases import (
    MODES,
    VERSIONS,
    Version,
    adapt,
    as_adapter_equations,
    as_whole_equations,
    make_adapter,
    make_integer_adapter,
    untrained_adapter,
)
from kernel_cases import (
    KINDS,
    LOW_PRECISION,
    Backend,
    Kind,
    counted,
    exact,
    fresh_stats,
    generator,
    integers,
    make_integer_sae,
    make_sae,
    normal,
    same_bits,
)
from torch import Tensor

from dspa.errors import BackendUnavailableError, InvalidInputError
from dspa.kernels import AdapterMode, AdapterWeights, SaeWeights, TokenStats, adapter_step
from dspa.kernels.backends.registry import operations_for

DTYPE_PAIRS = [
    *((dtype, dtype) for dtype in LOW_PRECISION),  # of the residual stream and of the SAE
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.bfloat16),
]
COUNTERS = ("seen", "edited", "nonfinite", "latent_edits")


def name(value: object) -> str:
    return str(value).removeprefix("torch.")


def run_and_check(
    rows: Tensor, sae: SaeWeights, adapter: AdapterWeights, backend: Backend, *, mode: AdapterMode | None = None
) -> Tensor:
    """One call, every row and counter within the rounding bounds."""
    stats = fresh_stats(len(rows), sae.d_sae, backend.device)
    written = adapt(rows, sae, adapter, backend=backend, stats=stats, mode=mode)
    added = counted(stats, len(rows), sae.d_sae)
    given, given_adapter, u = as_whole_equations(sae), as_adapter_equations(adapter), 2.0**-24
    least, most = np.zeros(sae.d_sae, dtype=int), np.zeros(sae.d_sae, dtype=int)
    for b in range(len(rows)):
        h, out = exact(rows[b]), exact(written[b])
        assert int(added.seen[b]) == 1
        if not np.isfinite(equations.sae_input(h, given).x).all():
            assert same_bits(rows[b], written[b])
            assert (int(added.edited[b]), int(added.nonfinite[b])) == (0, 1)
            continue
        worlds = rounding_bounds.adapter_worlds(h, given, given_adapter, u, rows.dtype)
        edited = bool(added.edited[b])
        agreeing = [w for w in worlds if bool(w.changed) == edited and rounding_bounds.matches(w, h, out, math.nan)]
        nearest = min(worlds, key=lambda world: float(np.abs(out - world.row).max()))
        assert agreeing, f"row {b}: off by {np.abs(out - nearest.row)} where {nearest.radius} is allowed"
        assert int(added.nonfinite[b]) == 0
        for latent in set().union(*(world.changed for world in agreeing)):
            most[latent] += 1
            least[latent] += all(latent in world.changed for world in agreeing)
    assert (least <= added.latent_edits.numpy()).all()
    assert (added.latent_edits.numpy() <= most).all()
    return written


@pytest.fixture(scope="session")
def float64_backend(backend: Backend) -> Backend:
    """A backend that serves float64 here. Refusing it is allowed, refusing anything else is not."""
    zeros = torch.zeros(1, 1, dtype=torch.float64, device=backend.device)
    try:
        operations_for(backend.name, "adapter_step", (zeros,))
    except BackendUnavailableError as refusal:
        pytest.skip(str(refusal))
    return backend


# ---- against the equations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [None, 0.1], ids=lambda fraction: "all" if fraction is None else "strongest")
@pytest.mark.parametrize("version", VERSIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_float64_equals_the_form_with_both_reconstructions(
    float64_backend: Backend, kind: Kind, version: Version, fraction: float | None
) -> None:
    fell = 0
    for seed, (batch, d_model, d_sae) in enumerate([(2, 2, 1), (3, 9, 21), (4, 24, 48)]):
        sae = make_sae(kind, d_model, d_sae, torch.float64, seed)
        adapter = make_adapter(version, sae, torch.float64, seed + 1)
        rows = normal(generator(seed + 2), batch, d_model) * 3
        stats = fresh_stats(batch, d_sae)
        written = adapt(rows, sae, adapter, backend=float64_backend, stats=stats, steering_fraction=fraction)
        added, latent_edits = counted(stats, batch, d_sae), np.zeros(d_sae, dtype=np.int64)
        for b in range(batch):
            h = exact(rows[b])
            expected = equations.adapter_step(h, as_whole_equations(sae), as_adapter_equations(adapter), fraction)
            scale = max(np.abs(expected.row).max(), np.abs(h).max())
            assert np.abs(exact(written[b]) - expected.row).max() <= 1e-12 * scale
            assert bool(added.edited[b]) == bool(expected.changed)
            latent_edits[expected.changed] += 1
            fell += int((expected.f_edited < expected.f).sum())
        assert (added.latent_edits.numpy() == latent_edits).all()
        assert (added.seen == 1).all()
        assert not added.nonfinite.any()
        assert not added.maximum_known.any()
    assert fraction or (fell > 0) == (version.activation == "soft_threshold"), (
        "only the two-sided adapter lowers activations"
    )


@pytest.mark.product
@pytest.mark.parametrize(("hidden_dtype", "dtype"), DTYPE_PAIRS, ids=name)
@pytest.mark.parametrize("version", VERSIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_low_precision_is_within_rounding(
    backend: Backend, kind: Kind, version: Version, hidden_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    for number, (batch, d_model, d_sae) in enumerate([(2, 1, 37), (3, 37, 129), (2, 67, 65)]):
        sae = make_sae(kind, d_model, d_sae, dtype, seed=number)
        adapter = make_adapter(version, sae, LOW_PRECISION[number], seed=number + 10)
        rows = (normal(generator(100 + number), batch, d_model) * 3).to(hidden_dtype)
        run_and_check(rows, sae, adapter, backend)


@pytest.mark.product
@pytest.mark.parametrize(("hidden_dtype", "dtype"), DTYPE_PAIRS, ids=name)
@pytest.mark.parametrize("version", VERSIONS, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.normalization == "none"], ids=str)
def test_exact_arithmetic_gives_exact_results(
    backend: Backend, kind: Kind, version: Version, hidden_dtype: torch.dtype, dtype: torch.dtype
) -> None:
    """Thresholds that are met exactly, on both sides, and activations that meet 0: one right answer."""
    for number, (batch, d_model, d_sae) in enumerate([(2, 1, 1), (3, 5, 37), (2, 37, 131)]):
        sae = make_integer_sae(kind, d_model, d_sae, dtype, seed=number)
        adapter = make_integer_adapter(version, sae, dtype, seed=number + 10)
        rows = integers(generator(number), -3, 3, batch, d_model).to(hidden_dtype)
        stats = fresh_stats(batch, d_sae, backend.device)
        written = adapt(rows, sae, adapter, backend=backend, stats=stats)
        added, latent_edits = counted(stats, batch, d_sae), np.zeros(d_sae, dtype=np.int64)
        for b in range(batch):
            expected = equations.adapter_step(exact(rows[b]), as_whole_equations(sae), as_adapter_equations(adapter))
            assert torch.equal(written[b], torch.from_numpy(expected.row).to(hidden_dtype))
            assert bool(added.edited[b]) == bool(expected.changed)
            latent_edits[expected.changed] += 1
        assert (added.latent_edits.numpy() == latent_edits).all()


@pytest.mark.product
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("version", VERSIONS, ids=str)
def test_thresholds_on_the_boundary(backend: Backend, version: Version, mode: AdapterMode | None) -> None:
    """Thresholds at the float32 value that y has on some token: either side is right, a value in between is not."""
    batch, d_model, d_sae = 4, 37, 24
    sae = make_sae(Kind(), d_model, d_sae, torch.float32, seed=1)
    adapter = make_adapter(version, sae, torch.float32, seed=2)
    rows = normal(generator(2), batch, d_model).float()
    y = rows.double() @ adapter.weight.double().T + adapter.bias.double()
    threshold = y.abs()[torch.arange(d_sae) % batch, torch.arange(d_sae)].float()
    run_and_check(rows, sae, replace(adapter, threshold=threshold), backend, mode=mode)


@pytest.mark.parametrize("batch", [1, 2, 7, 65])
def test_batches(backend: Backend, batch: int) -> None:
    sae = make_sae(Kind(), 37, 53, torch.bfloat16, seed=batch)
    adapter = make_adapter(Version(), sae, torch.bfloat16, seed=batch + 1)
    run_and_check((normal(generator(batch), batch, 37) * 2).bfloat16(), sae, adapter, backend)


@pytest.mark.product
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name)
def test_an_untrained_adapter_fires_almost_everywhere(
    backend: Backend, dtype: torch.dtype, mode: AdapterMode | None
) -> None:
    sae = make_sae(Kind(), 67, 400, torch.float32, seed=0)
    adapter = untrained_adapter(sae, torch.float32 if dtype == torch.float16 else dtype, seed=1)
    rows = (normal(generator(2), 3, 67) * 20).to(dtype)
    stats = TokenStats.zeros(3, 400, backend.device)
    adapt(rows, sae, replace(adapter, clip=False), backend=backend, stats=stats, mode=mode)
    assert int(stats.latent_edits.sum()) > 0.95 * 3 * 400
    run_and_check(rows, sae, adapter, backend, mode=mode)


# ---- what is not changed ---------------------------------------------------------------------------------------------


def test_a_row_that_nothing_changes_keeps_its_bits(backend: Backend) -> None:
    """-0.0 + 0.0 is 0.0: such a row must not be written at all. v < 0 does nothing to a latent that is not active."""
    sae = replace(make_sae(Kind(), 8, 16, torch.float32, seed=0), threshold=torch.full((16,), 1e9))
    adapter = make_adapter(Version(), sae, torch.float32, seed=1)
    masked = replace(adapter, threshold=torch.full((16,), math.inf))
    lowering = replace(adapter, bias=torch.full((16,), -1e3), threshold=torch.ones(16))
    rows = torch.full((2, 8), -0.0)
    for unchanging in (masked, lowering):
        stats = fresh_stats(2, 16, backend.device)
        assert same_bits(adapt(rows, sae, unchanging, backend=backend, stats=stats), rows)
        added = counted(stats, 2, 16)
        assert added.seen.tolist() == [1, 1]
        assert not added.edited.any()
        assert not added.latent_edits.any()
    assert not same_bits(adapt(rows, sae, replace(lowering, clip=False), backend=backend), rows)


@pytest.mark.parametrize("mode", MODES)
def test_disabled_rows_are_left_alone(backend: Backend, mode: AdapterMode | None) -> None:
    sae = make_sae(Kind(), 37, 40, torch.bfloat16, seed=0)
    adapter = make_adapter(Version(), sae, torch.bfloat16, seed=1)
    rows = (normal(generator(1), 5, 37) * 3).bfloat16()
    rows[4, 0] = torch.nan
    enabled = torch.tensor([True, False, True, False, False])
    stats = fresh_stats(5, 40, backend.device)
    written = adapt(rows, sae, adapter, backend=backend, enabled=enabled, stats=stats, mode=mode)
    every = adapt(rows, sae, adapter, backend=backend, mode=mode)
    assert same_bits(written[enabled], every[enabled])
    assert same_bits(written[~enabled], rows[~enabled])
    added = counted(stats, 5, 40)
    assert added.seen.tolist() == added.edited.tolist() == [1, 0, 1, 0, 0]
    assert not added.nonfinite.any()
    none = fresh_stats(5, 40, backend.device)
    off = torch.zeros(5, dtype=torch.bool)
    assert same_bits(adapt(rows, sae, adapter, backend=backend, enabled=off, stats=none, mode=mode), rows)
    for field in fields(TokenStats):
        assert torch.equal(getattr(none, field.name).cpu(), getattr(fresh_stats(5, 40), field.name))


@pytest.mark.product
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("version", [Version(), Version("relu", clip=False)], ids=str)
@pytest.mark.parametrize("kind", [Kind(), Kind("gated", "layer_norm"), Kind("relu", "constant_norm_rescale")], ids=str)
def test_nonfinite_rows_are_left_alone(
    backend: Backend, kind: Kind, version: Version, mode: AdapterMode | None
) -> None:
    sae = make_sae(kind, 37, 40, torch.bfloat16, seed=0)
    adapter = make_adapter(version, sae, torch.bfloat16, seed=1)
    rows = (normal(generator(1), 7, 37) * 3).bfloat16()
    clean = rows.clone()
    bad = {1: torch.nan, 3: torch.inf, 4: -torch.inf, 6: torch.nan}
    for row, value in bad.items():
        rows[row, row * 5] = value
    stats = fresh_stats(7, 40, backend.device)
    written = adapt(rows, sae, adapter, backend=backend, stats=stats, mode=mode)
    good = [row for row in range(7) if row not in bad]
    assert same_bits(written[list(bad)], rows[list(bad)])
    assert same_bits(written[good], adapt(clean, sae, adapter, backend=backend, mode=mode)[good])
    added = counted(stats, 7, 40)
    assert added.nonfinite.tolist() == [int(row in bad) for row in range(7)]
    assert added.edited.tolist() == [int(row not in bad) for row in range(7)]


@pytest.mark.product
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("where", ["weight", "weight without a threshold", "encoder", "encoder bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name)
def test_products_that_overflow_are_nonfinite(
    backend: Backend, dtype: torch.dtype, where: str, mode: AdapterMode | None
) -> None:
    """A finite hidden state with an infinite y, or an infinite activation that the clip needs; masked, no harm."""
    sae = make_sae(Kind("relu"), 8, 16, dtype, seed=0)
    threshold = torch.ones(16)
    adapter = make_adapter(Version(), sae, dtype, seed=1)
    if where.startswith("weight"):
        weight = adapter.weight.clone()
        weight[5] = 3e38
        if where == "weight without a threshold":
            threshold[5] = 0.0
        adapter = replace(adapter, weight=weight)
    else:
        bias, W_enc, b_enc = adapter.bias.clone(), sae.W_enc.clone(), sae.b_enc.clone()
        bias[5], W_enc[5] = -1e3, 3e38
        if where == "encoder bias":  # the product is finite, and so is the bias; their sum is not
            W_enc[5], b_enc[5] = 1.5e37, 3e38
        adapter, sae = replace(adapter, bias=bias), replace(sae, W_enc=W_enc, b_enc=b_enc)
    adapter = replace(adapter, threshold=threshold)
    rows = (normal(generator(0), 2, 8) * 0.5).to(dtype)
    rows[0] = 2.0
    rows[1] = 2.0**-120
    stats = fresh_stats(2, 16, backend.device)
    written = adapt(rows, sae, adapter, backend=backend, stats=stats, mode=mode)
    assert same_bits(written[0], rows[0])
    added = counted(stats, 2, 16)
    assert added.nonfinite.tolist() == [1, 0]
    assert not added.edited[0]
    threshold = threshold.index_fill(0, torch.tensor([5]), math.inf)
    masked = fresh_stats(2, 16, backend.device)
    written = adapt(rows, sae, replace(adapter, threshold=threshold), backend=backend, stats=masked, mode=mode)
    assert not counted(masked, 2, 16).nonfinite.any()
    assert written.isfinite().all()


# ---- modes, batches, counters ----------------------------------------------------------------------------------------


@pytest.mark.product
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", [Kind(), Kind("gated", "layer_norm"), Kind("relu", "constant_norm_rescale")], ids=str)
def test_a_row_depends_on_nothing_else_in_the_batch(backend: Backend, kind: Kind, mode: AdapterMode | None) -> None:
    sae = make_sae(kind, 67, 129, torch.bfloat16, seed=5)
    adapter = make_adapter(Version(), sae, torch.bfloat16, seed=6)
    rows = (normal(generator(6), 19, 67) * 3).to(torch.float32 if mode == "dense" else torch.bfloat16)
    whole = adapt(rows, sae, adapter, backend=backend, mode=mode)
    assert same_bits(adapt(rows, sae, adapter, backend=backend, mode=mode), whole), "a second run differs"
    for index in (torch.tensor([3]), torch.arange(18, -1, -1), torch.tensor([1, 5, 9, 2, 17])):
        assert same_bits(adapt(rows[index], sae, adapter, backend=backend, mode=mode), whole[index])
    poisoned = rows.clone()
    poisoned[::2] = torch.nan
    assert same_bits(adapt(poisoned, sae, adapter, backend=backend, mode=mode)[1::2], whole[1::2])


def test_stats_add_up_and_change_no_row(backend: Backend) -> None:
    sae = make_sae(Kind(), 37, 40, torch.float32, seed=0)
    adapter = make_adapter(Version(), sae, torch.float32, seed=1)
    total, parts = TokenStats.zeros(3, 40, backend.device), []
    for seed in range(3):
        rows = normal(generator(seed), 3, 37).float() * 2
        single = TokenStats.zeros(3, 40, backend.device)
        written = [adapt(rows, sae, adapter, backend=backend, stats=stats) for stats in (total, single, None)]
        assert same_bits(written[0], written[2])
        assert same_bits(written[1], written[2])
        parts.append(single)
    for counter in COUNTERS:
        expected = sum(getattr(part, counter) for part in parts)
        assert isinstance(expected, Tensor)
        assert torch.equal(getattr(total, counter), expected)
    assert total.latent_edits.sum() > 0


def test_no_rows(backend: Backend) -> None:
    sae = make_sae(Kind(), 8, 16, torch.float32, seed=0)
    stats = fresh_stats(0, 16, backend.device)
    adapter = make_adapter(Version(), sae, torch.float32, seed=1)
    assert adapt(torch.zeros(0, 8), sae, adapter, backend=backend, stats=stats).shape == (0, 8)
    assert not counted(stats, 0, 16).latent_edits.any()


def test_contiguous_rows_give_the_same_bits(backend: Backend) -> None:
    sae = make_sae(Kind("jumprelu", "layer_norm"), 199, 129, torch.float32, seed=5)
    adapter = make_adapter(Version(), sae, torch.float32, seed=6)
    rows = normal(generator(6), 5, 199).float()
    contiguous = rows.to(backend.device).clone()
    adapter_step(contiguous, sae.to(backend.device), adapter.to(backend.device), backend=backend.name)
    assert same_bits(contiguous, adapt(rows, sae, adapter, backend=backend))


# ---- what is refused -------------------------------------------------------------------------------------------------

SAE = make_sae(Kind(), 8, 16, torch.float32, seed=0)
ADAPTER = make_adapter(Version(), SAE, torch.float32, seed=1)
COMPACT = make_sae(Kind(compact=True), 8, 16, torch.float32, seed=0)
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "hidden with three axes": (
        {"hidden": torch.zeros(2, 1, 8)},
        r"hidden is \(2, 1, 8\) .*; expected \[B, d_model = 8\]",
    ),
    "hidden of integers": ({"hidden": torch.zeros(2, 8, dtype=torch.int64)}, "hidden is .*torch.int64"),
    "SAE without a decoder": ({"sae": replace(SAE, W_dec=None)}, "no W_dec"),
    "adapter for another SAE": (
        {"sae": make_sae(Kind(), 8, 15, torch.float32, seed=0)},
        r"weight is \(16, 8\); expected .* \(15, 8\)",
    ),
    "latents without a decoder": ({"sae": COMPACT}, "latent [0-9]+ may fire, but has no row in W_dec; mask it"),
    "enabled for another batch": ({"enabled": torch.ones(3, dtype=torch.bool)}, r"enabled is \(3,\)"),
    "stats for another batch": ({"stats": TokenStats.zeros(3, 16)}, "stats are for 3 rows and 16 latents"),
    "no fraction": ({"steering_fraction": 0.0}, r"steering_fraction is 0.0; expected a number in \(0, 1\]"),
    "a fraction above one": ({"steering_fraction": 1.5}, "steering_fraction is 1.5"),
    "a fraction that is no number": ({"steering_fraction": "x"}, "steering_fraction is 'x'"),
    "a fraction that is a switch": ({"steering_fraction": True}, "steering_fraction is True"),
    "hidden that is no tensor": ({"hidden": [[0.0] * 8]}, "hidden is a list; expected a tensor"),
    "enabled elsewhere": (
        {"enabled": torch.ones(2, dtype=torch.bool, device="meta")},
        "enabled is on meta; expected cpu",
    ),
    "adapter elsewhere": ({"adapter": ADAPTER.to("meta")}, "adapter is on meta; expected cpu"),
    "stats elsewhere": ({"stats": TokenStats.zeros(2, 16, "meta")}, "stats is on meta; expected cpu"),
    "unknown mode": ({"mode": "lazy"}, "mode is 'lazy'; expected one of dense, screened"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_named(case: str) -> None:
    change, message = REFUSED[case]
    arguments: dict[str, object] = {"hidden": torch.zeros(2, 8), "sae": SAE, "adapter": ADAPTER}
    adapter_step(**arguments)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInputError, match=message) as raised:
        adapter_step(**(arguments | change))  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(raised.value)


BAD_WEIGHTS: dict[str, tuple[dict[str, object], str]] = {
    "activation": ({"activation": "gelu"}, "activation 'gelu' is not known; expected one of soft_threshold, relu"),
    "one axis": ({"weight": torch.zeros(16)}, r"weight is \(16,\)"),
    "transposed": ({"weight": torch.zeros(8, 16).T}, r"weight is \(16, 8\) torch.float32 \(not contiguous\)"),
    "bias of another width": ({"bias": torch.zeros(15)}, r"bias is \(15,\) torch.float32; expected \(16,\)"),
    "bias elsewhere": ({"bias": torch.zeros(16, device="meta")}, "bias is on meta; expected cpu"),
    "bfloat16 threshold": ({"threshold": torch.zeros(16).bfloat16()}, "threshold is .*bfloat16; expected .*float32"),
}


@pytest.mark.parametrize("case", BAD_WEIGHTS)
def test_bad_weights_are_named(case: str) -> None:
    change, message = BAD_WEIGHTS[case]
    with pytest.raises(InvalidInputError, match=message):
        replace(ADAPTER, **change)


@pytest.mark.parametrize("ranks", ["topk with the clip", "steering_fraction"])
def test_what_ranks_all_latents_is_refused(backend: Backend, ranks: str) -> None:
    """All but the reference refuse it when they are named, and "auto" goes on to the reference."""
    sae = make_sae(Kind("topk"), 8, 16, torch.float32, seed=0) if ranks == "topk with the clip" else SAE
    fraction = 0.25 if ranks == "steering_fraction" else None
    rows = normal(generator(2), 3, 8).float() * 3
    reference, auto = rows.clone(), rows.clone()
    adapter_step(reference, sae, ADAPTER, steering_fraction=fraction, backend="reference")
    adapter_step(auto, sae, ADAPTER, steering_fraction=fraction)
    assert same_bits(auto, reference)
    if backend.name != "reference":
        with pytest.raises(BackendUnavailableError, match="has to rank all latents of a row; use backend='auto'"):
            adapt(rows, sae, ADAPTER, backend=backend, steering_fraction=fraction)
