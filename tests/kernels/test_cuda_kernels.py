"""The CUDA kernels, run on the CPU by the shim: the tests of every backend, and what only these kernels have."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import equations
import pytest
import rounding_bounds
import test_adapter_step
import test_encode_density
import test_lookup
import test_token_step
import torch
from adapter_cases import VERSIONS, Version, adapt, make_adapter, untrained_adapter
from cuda_shim import build, coverage
from cuda_shim.backend import DENSITY_BYTES, NAME, last_error, machine, operations, register
from kernel_cases import (
    KINDS,
    LOW_PRECISION,
    Backend,
    Kind,
    as_equations,
    decodable,
    dense_map,
    edit_list,
    exact,
    generator,
    integers,
    make_integer_sae,
    make_sae,
    normal,
    random_lists,
    same_bits,
    step,
)
from test_encode_density import count, cuts
from test_token_step import run_and_check
from torch import Tensor

from dspa.kernels import (
    EditKind,
    EditList,
    SaeWeights,
    StepMode,
    TokenStats,
    encode_density,
    lookup,
    token_step,
    token_step_with_lookup,
)
from dspa.kernels.adapter_step.arguments import adapter_arguments, row_arguments
from dspa.kernels.backends.cuda import too_wide
from dspa.kernels.native import encoder_arguments
from dspa.kernels.token_step import scratch as step_scratch
from dspa.kernels.token_step.arguments import counter_arguments
from dspa.kernels.token_step.cuda import scratch_of, scratch_words
from dspa.kernels.token_step.scratch import LEAST_ROWS

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler to build the shim with")

if build.compiler() is not None:
    register()


@pytest.fixture(scope="session")
def backend() -> Backend:
    """In the place of the fixture of this name that goes through all backends."""
    return Backend(NAME, "cpu")


# ---- the tests of every backend --------------------------------------------------------------------------------------

for of_all in (test_token_step, test_encode_density, test_lookup, test_adapter_step):
    for test_name in [name for name in dir(of_all) if name.startswith("test_")]:
        named = f"test_{of_all.__name__.removeprefix('test_')}_{test_name.removeprefix('test_')}"
        if "backend" in getattr(of_all, test_name).__code__.co_varnames:
            globals()[named] = getattr(of_all, test_name)


# ---- loads of 16 bytes, and inputs of more than one chunk ------------------------------------------------------------


@pytest.mark.product
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=test_token_step.name)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("batch", "d_model"), [(1, 8), (1, 264), (3, 40), (9, 520)])
def test_rows_of_whole_16_bytes(backend: Backend, batch: int, d_model: int, kind: Kind, dtype: torch.dtype) -> None:
    sae = make_sae(kind, d_model, 61, dtype, seed=d_model)
    rows = (normal(generator(batch), batch, d_model) * 2).bfloat16()
    lists = random_lists(sae, batch, 8, seed=batch)
    dense = run_and_check(rows, sae, *lists, 0.2, backend, mode="dense", room=8)
    assert same_bits(run_and_check(rows, sae, *lists, 0.2, backend, mode="lazy", room=8), dense)


@pytest.mark.parametrize("moved", [("W_enc", "W_dec"), ("W_enc",), ("W_dec",)], ids=" and ".join)
@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("relu", "layer_norm")], ids=str)
def test_where_weights_lie_changes_no_bit(backend: Backend, kind: Kind, moved: tuple[str, ...]) -> None:
    """Rows that do not begin at a multiple of 16 bytes are read one number at a time, with the same sums."""
    sae = make_sae(kind, 264, 61, torch.bfloat16, seed=0)
    assert sae.W_dec is not None
    shifted = {}
    for name in moved:
        matrix = getattr(sae, name)
        memory = torch.empty(matrix.numel() + 1, dtype=matrix.dtype)
        shifted[name] = memory[1:].view(matrix.shape).copy_(matrix)
    rows = normal(generator(1), 5, 264).bfloat16() * 2
    edits = edit_list(*random_lists(sae, 5, 8, seed=2), 8)
    for mode in ("dense", "lazy"):
        found = [
            step(rows, weights, edits, 0.2, backend=backend, mode=mode) for weights in (sae, replace(sae, **shifted))
        ]
        assert same_bits(found[0], found[1])


def test_columns_of_hidden_may_be_strided(backend: Backend) -> None:
    sae = make_sae(Kind(), 40, 61, torch.bfloat16, seed=0)
    rows = (normal(generator(1), 3, 40) * 2).bfloat16()
    edits = edit_list(*random_lists(sae, 3, 8, seed=2), 8)
    expected = step(rows, sae, edits, 0.2, backend=backend)
    columns = rows.T.contiguous()
    token_step(columns.T, sae, edits, 0.2, backend=NAME)
    assert same_bits(columns.T.contiguous(), expected)


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=test_token_step.name)
@pytest.mark.parametrize("kind", [Kind(), Kind(subtract_b_dec=True)], ids=str)
def test_where_hidden_states_lie_changes_no_bit(backend: Backend, kind: Kind, dtype: torch.dtype) -> None:
    """Rows that are whole 16 bytes are loaded so, others one number at a time. One row is not finite."""
    sae = make_sae(kind, 40, 61, torch.bfloat16, seed=0)
    rows = (normal(generator(1), 9, 40) * 2).to(dtype)
    rows[4, 33] = torch.inf
    edits = edit_list(*random_lists(sae, 9, 8, seed=2), 8)
    expected = step(rows, sae, edits, 0.2, backend=backend)
    assert same_bits(expected[4], rows[4])
    assert not same_bits(expected[:4], rows[:4])
    strided, shifted = torch.zeros(9, 41, dtype=dtype)[:, :40], torch.zeros(361, dtype=dtype)[1:].view(9, 40)
    for elsewhere in (torch.zeros(9, 40, dtype=dtype), strided, shifted):
        elsewhere.copy_(rows)
        token_step(elsewhere, sae, edits, 0.2, backend=NAME)
        assert same_bits(elsewhere.contiguous(), expected)


@pytest.mark.product
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=test_token_step.name)
@pytest.mark.parametrize("version", VERSIONS, ids=str)
@pytest.mark.parametrize(("batch", "d_model"), [(1, 8), (1, 264), (3, 40), (9, 520)])
def test_adapters_of_whole_16_bytes(
    backend: Backend, batch: int, d_model: int, version: Version, dtype: torch.dtype
) -> None:
    sae = make_sae(Kind(), d_model, 131, dtype, seed=d_model)
    rows = (normal(generator(batch), batch, d_model) * 2).bfloat16()
    test_adapter_step.run_and_check(rows, sae, make_adapter(version, sae, torch.bfloat16, seed=1), backend)


@pytest.mark.parametrize("kind", [Kind(), Kind("relu", "layer_norm", compact=True)], ids=str)
@pytest.mark.parametrize("moved", [("weight", "W_enc", "W_dec"), ("weight",), ("W_enc",), ("W_dec",)], ids=" and ".join)
def test_where_adapters_lie_changes_no_bit(backend: Backend, kind: Kind, moved: tuple[str, ...]) -> None:
    sae = make_sae(kind, 264, 131, torch.bfloat16, seed=0)
    adapter = make_adapter(Version(), sae, torch.bfloat16, seed=1)
    rows = (normal(generator(1), 5, 264) * 2).bfloat16()
    expected = adapt(rows, sae, adapter, backend=backend)

    def shifted(matrix: Tensor) -> Tensor:
        memory = torch.empty(matrix.numel() + 1, dtype=matrix.dtype)
        return memory[1:].view(matrix.shape).copy_(matrix)

    if "weight" in moved:
        adapter = replace(adapter, weight=shifted(adapter.weight))
    if "W_enc" in moved:
        sae = replace(sae, W_enc=shifted(sae.W_enc))
    if "W_dec" in moved:
        assert sae.W_dec is not None
        sae = replace(sae, W_dec=shifted(sae.W_dec))
    assert same_bits(adapt(rows, sae, adapter, backend=backend), expected)
    assert not same_bits(expected, rows)


def test_latents_without_a_decoder_are_ignored() -> None:
    """On a GPU the dispatcher does not look for them."""
    sae = make_sae(Kind(compact=True), 40, 131, torch.bfloat16, seed=0)
    adapter = make_adapter(Version(), sae, torch.bfloat16, seed=1)
    firing = replace(adapter, threshold=torch.where(adapter.threshold.isinf(), 0.5, adapter.threshold))
    assert sae.decoder_rows is not None
    masked = replace(firing, threshold=torch.where(sae.decoder_rows < 0, torch.inf, firing.threshold))
    rows = (normal(generator(1), 3, 40) * 2).bfloat16()
    written = []
    for given in (firing, masked):
        written.append(rows.clone())
        rest = (*adapter_arguments(given), *row_arguments(None, None), None, None, None)
        operations().adapter_step(written[-1], *encoder_arguments(sae), sae.W_dec, sae.decoder_rows, *rest)
    assert same_bits(*written)
    assert not same_bits(written[0], rows)


# ---- blocks, clusters and the order in which they run ----------------------------------------------------------------

MACHINES = {
    "one block at a time": {"clusters_at_a_time": 1},
    "one processor": {"processors": 1},
    "more blocks than rows of W_enc": {"processors": 40, "clusters_at_a_time": 9},
    "clusters of two": {"cluster": 2},
    "clusters of four, one at a time": {"cluster": 4, "processors": 6, "clusters_at_a_time": 1},
    "no clusters": {"cluster": 4, "compute_capability": 8},
    "begun early": {"early_launch": True, "cluster": 2},
    "begun early, before sm_90": {"early_launch": True, "compute_capability": 8},
    "shared memory for one row": {"shared_limit": 24 * 1024},
    "a warp for a block": {"threads": 32},
    **{f"order {seed}": {"seed": 100 + seed, "clusters_at_a_time": 4} for seed in range(6)},
}


@pytest.mark.long
@pytest.mark.parametrize("changes", MACHINES.values(), ids=MACHINES)
def test_who_runs_when_changes_no_bit(backend: Backend, changes: dict[str, Any]) -> None:
    for kind, mode in itertools.product((Kind(), Kind("topk"), Kind("gated", subtract_b_dec=True)), ("dense", "lazy")):
        sae = make_sae(kind, 520, 61, torch.bfloat16, seed=0)
        rows = (normal(generator(1), 11, 520) * 2).bfloat16()
        edits = edit_list(*random_lists(sae, 11, 8, seed=2), 8)
        enabled = torch.tensor([True] * 9 + [False, True])
        found, counters = [], []
        for given in ({}, changes):
            stats = TokenStats.zeros(11, 61)
            with machine(**given):
                found.append(step(rows, sae, edits, 0.2, backend=backend, enabled=enabled, stats=stats, mode=mode))
            counters.append(torch.cat([counter.double() for counter in counter_arguments(stats)]).nan_to_num(-1))
        assert same_bits(found[0], found[1])
        assert torch.equal(counters[0], counters[1])
        assert not same_bits(found[0], rows)


@pytest.mark.long
@pytest.mark.parametrize("changes", MACHINES.values(), ids=MACHINES)
def test_who_runs_when_changes_no_bit_of_an_adapter_step(backend: Backend, changes: dict[str, Any]) -> None:
    sae = make_sae(Kind("gated", subtract_b_dec=True), 520, 131, torch.bfloat16, seed=0)
    rows = (normal(generator(1), 11, 520) * 2).bfloat16()
    enabled = torch.tensor([True] * 9 + [False, True])
    for adapter in (make_adapter(Version(), sae, torch.bfloat16, 1), untrained_adapter(sae, torch.bfloat16, 1)):
        found, counters = [], []
        for given in ({}, changes):
            stats = TokenStats.zeros(11, 131)
            with machine(**given):
                found.append(adapt(rows, sae, adapter, backend=backend, enabled=enabled, stats=stats))
            counters.append(torch.cat([getattr(stats, name) for name in test_adapter_step.COUNTERS]))
        assert same_bits(found[0], found[1])
        assert torch.equal(counters[0], counters[1])
        assert not same_bits(found[0], rows)


def test_the_scratch_is_zero_between_steps(backend: Backend) -> None:
    sae = make_sae(Kind("topk"), 40, 61, torch.bfloat16, seed=0)
    rows = (normal(generator(1), 11, 40) * 2).bfloat16()
    edits = edit_list(*random_lists(sae, 11, 8, seed=2), 8)
    for mode in ("dense", "lazy"):
        step(rows, sae, edits, 0.2, backend=backend, mode=mode)
        scratch = scratch_of(sae, 11, 8)
        assert not scratch[: len(scratch) - LEAST_ROWS * 8].any()  # the scores of the lists stay
    assert scratch_of(sae, 5, 8) is scratch


def test_batches_share_their_scratch(backend: Backend) -> None:
    sae = make_sae(Kind("topk"), 40, 61, torch.bfloat16, seed=0)
    rows = (normal(generator(1), LEAST_ROWS + 3, 40) * 2).bfloat16()
    edits = edit_list(*random_lists(sae, len(rows), 8, seed=2), 8)
    expected = step(rows, sae, edits, 0.2, backend=backend)
    for batch in (1, 17, LEAST_ROWS, LEAST_ROWS + 3, 2):
        given = edits.rows(torch.arange(batch))
        assert same_bits(step(rows[:batch], sae, given, 0.2, backend=backend), expected[:batch])
    found = [scratch_of(sae, batch, 8) for batch in (1, LEAST_ROWS, LEAST_ROWS + 1, 2 * LEAST_ROWS)]
    assert len({scratch.data_ptr() for scratch in found}) == 2


def test_each_stream_has_its_scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, found = make_sae(Kind(), 40, 61, torch.bfloat16, seed=0), []
    monkeypatch.setattr(step_scratch, "runs_on_streams", lambda _: True)
    for stream in (7, 8, 7):
        monkeypatch.setattr(step_scratch, "stream_of", lambda _, stream=stream: stream)
        found.append(scratch_of(sae, 3, 8).data_ptr())
    assert found[0] == found[2] != found[1]


def test_too_little_scratch_is_refused() -> None:
    sae = make_sae(Kind(), 40, 64, torch.bfloat16, seed=0)
    before, lists, after = step_arguments(sae)
    for words in (scratch_words(2, 6), scratch_words(3, 6) + 1):
        work = torch.zeros(words, dtype=torch.int32)
        with pytest.raises(RuntimeError, match="work"):
            operations().token_step(*before, *lists, *after, None, None, None, work, "lazy")


def test_a_model_too_wide_is_refused(backend: Backend) -> None:
    sae = make_sae(Kind(), 520, 61, torch.bfloat16, seed=0)
    with machine(shared_limit=4 * 1024), pytest.raises(RuntimeError, match="token_step could not be launched"):
        token_step(torch.zeros(1, 520).bfloat16(), sae, EditList.empty(1, 4), 0.2, backend=NAME)


@pytest.mark.parametrize("d_model", [1000, 1024])  # rows of 2000 bytes are aligned as well, an odd address is not
@pytest.mark.parametrize("odd", [False, True])
def test_what_auto_chooses_is_launched(backend: Backend, d_model: int, odd: bool) -> None:
    """Whatever the shared memory of a GPU: where "auto" takes these kernels, they have room for the longest list."""
    sae = make_sae(Kind(), d_model, 61, torch.bfloat16, seed=0)
    if odd:
        W = torch.zeros(61 * d_model + 1, dtype=torch.bfloat16)[1:].view(61, d_model)
        sae = replace(sae, W_enc=W.copy_(sae.W_enc))
    limits = range(8 * 1024, 64 * 1024, 4 * 1024)
    launched = [limit for limit in limits if too_wide(sae, limit) is None]
    assert 0 < len(launched) < len(limits)
    for batch in (1, 9):
        with machine(shared_limit=launched[0]):
            rows = torch.zeros(batch, d_model).bfloat16()
            token_step(rows, sae, EditList.empty(batch, 256), 0.2, backend=NAME)


def test_a_pass_that_may_stop_early(backend: Backend) -> None:
    """One latent is so large that every listed one vanishes, whatever comes after it."""
    sae = make_sae(Kind("relu"), 40, 400, torch.bfloat16, seed=0)
    bias = sae.b_enc.clone()
    bias[3] = 1e4
    sae = replace(sae, b_enc=bias)
    rows = (normal(generator(1), 9, 40) * 2).bfloat16()
    ablate = [list(range(10, 18))] * 9
    stats = TokenStats.zeros(9, 400)
    written = step(rows, sae, edit_list([[]] * 9, ablate, 8), 0.2, backend=backend, stats=stats, mode="lazy")
    assert same_bits(written, step(rows, sae, edit_list([[]] * 9, ablate, 8), 0.2, backend=backend, mode="dense"))
    assert stats.edited.all()
    assert not stats.maximum_known.any()


def test_entries_out_of_bounds_are_ignored(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists on a device are not checked, as that would wait for it; what is not there must not be read either."""
    monkeypatch.setattr(EditList, "check", lambda edits, sae: None)
    sae = make_sae(Kind("relu", compact=True), 40, 61, torch.bfloat16, seed=0)
    assert sae.decoder_rows is not None
    missing = int((sae.decoder_rows < 0).nonzero()[0])
    present = [int(latent) for latent in (sae.decoder_rows >= 0).nonzero()[:3]]
    rows = (normal(generator(1), 1, 40) * 2).bfloat16()
    expected = step(rows, sae, edit_list([[]], [present], 6), 0.2, backend=backend)
    wrong = edit_list([[]], [[*present, -1, 61, missing]], 6)
    assert same_bits(step(rows, sae, wrong, 0.2, backend=backend), expected)
    beyond = sae.decoder_rows.clone()
    beyond[missing] = len(sae.decoder_rows)
    assert same_bits(step(rows, replace(sae, decoder_rows=beyond), wrong, 0.2, backend=backend), expected)
    without_sign = edit_list([[]], [[*present, decodable(sae)[-1]]], 6)
    without_sign.signs[0, 3] = 0
    assert same_bits(step(rows, sae, without_sign, 0.2, backend=backend), expected)
    wrong.counts[0] = 1000
    assert same_bits(step(rows, sae, wrong, 0.2, backend=backend), expected)
    wrong.counts[0] = -1
    assert same_bits(step(rows, sae, wrong, 0.2, backend=backend), rows)


# ---- lists longer than a warp ----------------------------------------------------------------------------------------

SHAPES = {"one row": (1, 40), "a tile": (3, 40), "not aligned": (3, 37)}  # batch and d_model: each its own kernel


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=test_token_step.name)
@pytest.mark.parametrize(("batch", "d_model"), SHAPES.values(), ids=SHAPES)
def test_long_lists(backend: Backend, batch: int, d_model: int, dtype: torch.dtype) -> None:
    sae = make_sae(Kind("relu"), d_model, 200, dtype, seed=0)
    rows = (normal(generator(1), batch, d_model) * 2).bfloat16()
    augment, ablate = [list(range(80))] * batch, [list(range(80, 150))] * batch
    dense = run_and_check(rows, sae, augment, ablate, 0.2, backend, mode="dense")
    assert same_bits(run_and_check(rows, sae, augment, ablate, 0.2, backend, mode="lazy"), dense)
    nothing = [list[int]()] * batch
    vanish = run_and_check(rows, sae, nothing, ablate, 2.0, backend, mode="dense")
    assert same_bits(run_and_check(rows, sae, nothing, ablate, 2.0, backend, mode="lazy"), vanish)
    with machine(bulk_copies=True):
        assert same_bits(run_and_check(rows, sae, augment, ablate, 0.2, backend, mode="dense"), dense)
        assert same_bits(run_and_check(rows, sae, nothing, ablate, 2.0, backend, mode="dense"), vanish)


@pytest.mark.product
@pytest.mark.parametrize("what", ["product", "value", "maximum", "difference"])
@pytest.mark.parametrize("mode", ["dense", "lazy"])
@pytest.mark.parametrize(("batch", "d_model"), SHAPES.values(), ids=SHAPES)
def test_an_overflow_leaves_the_row_alone(
    backend: Backend, batch: int, d_model: int, mode: StepMode, what: str
) -> None:
    """Of the products of inputs, of the activations of a latent in the list or of one that is not, or of the edit. The
    last row is so small that nothing overflows."""
    latent = 150 if what == "maximum" else 3
    sae = make_sae(Kind("relu"), d_model, 200, torch.bfloat16, seed=0)
    W_enc, norm = torch.zeros(200, d_model).bfloat16(), torch.ones(200)
    W_enc[:, 0] = 1
    if what == "value":
        norm[latent] = 3e38
    else:
        W_enc[latent, 0] = 3e38
    sae = replace(sae, W_enc=W_enc, decoder_norm=norm, b_enc=torch.zeros(200))
    rows = torch.zeros(batch + 1, d_model).bfloat16()
    rows[:, 0] = 1.0 if what == "difference" else 100.0
    rows[-1, 0] = 1e-30
    edits = edit_list([list(range(100))] * (batch + 1), [[]] * (batch + 1), 100)
    for first, last in ((0, batch), (batch, batch + 1)):
        given = EditList(edits.latents[first:last], edits.signs[first:last], edits.counts[first:last])
        stats = TokenStats.zeros(last - first, 200)
        written = step(rows[first:last], sae, given, 1.0, backend=backend, stats=stats, mode=mode)
        overflows = last == batch
        assert same_bits(written, rows[first:last]) == overflows
        assert stats.nonfinite.tolist() == [int(overflows)] * (last - first)
        assert stats.edited.tolist() == [int(not overflows)] * (last - first)


# ---- weights brought by the copy engine ------------------------------------------------------------------------------

# Of d_model 520 in bfloat16, in blocks of two warps: a stage is 2080 bytes.
RINGS = {
    "four stages": {},
    "clusters of two": {"cluster": 2},
    "one block at a time": {"clusters_at_a_time": 1, "processors": 1},
    "more blocks than rows of W_enc": {"processors": 40, "clusters_at_a_time": 9},
    "three stages, one row of the batch": {"shared_limit": 12 * 1024},
    "no room": {"shared_limit": 9 * 1024},
    "before sm_90": {"compute_capability": 8},
    **{f"order {seed}": {"seed": 300 + seed, "clusters_at_a_time": 4} for seed in range(3)},
}


@pytest.mark.parametrize("changes", RINGS.values(), ids=RINGS)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=test_token_step.name)
def test_bulk_copies_change_no_bit(backend: Backend, dtype: torch.dtype, changes: dict[str, Any]) -> None:
    for kind, mode in itertools.product((Kind(), Kind("topk"), Kind("gated", subtract_b_dec=True)), ("dense", "lazy")):
        sae = make_sae(kind, 520, 61, dtype, seed=0)
        batch = 3 if "shared_limit" in changes else 1
        rows = (normal(generator(1), batch, 520) * 2).bfloat16()
        edits = edit_list(*random_lists(sae, batch, 8, seed=2), 8)
        expected = step(rows, sae, edits, 0.2, backend=backend, mode=mode)
        assert not same_bits(expected, rows)
        infinite = torch.full_like(rows, torch.inf)  # no pass is needed, though copies are under way
        with machine(bulk_copies=True, **changes):
            assert same_bits(step(rows, sae, edits, 0.2, backend=backend, mode=mode), expected)
            assert same_bits(step(infinite, sae, edits, 0.2, backend=backend, mode=mode), infinite)


def test_what_a_gpu_has() -> None:
    found = operations()
    for compute_capability in (8, 9):
        with machine(compute_capability=compute_capability):
            assert found.has_bulk_copies() == found.has_warpgroup_products() == (compute_capability == 9)


# ---- one launch with the lookup --------------------------------------------------------------------------------------


@pytest.mark.product
@pytest.mark.parametrize("cluster", [1, 2])
@pytest.mark.parametrize("mode", ["dense", "lazy"])
@pytest.mark.parametrize("values", [torch.float32, torch.float64], ids=test_token_step.name)
def test_lookup_in_the_step_is_lookup_and_step(mode: StepMode, values: torch.dtype, cluster: int) -> None:
    rng = generator(0)
    sae = make_sae(Kind("topk"), 40, 61, torch.bfloat16, seed=1)
    conditional_map = dense_map(integers(rng, -3, 3, 30, 61).to(values))
    density = torch.rand(11, 30, generator=rng)
    rows = (normal(rng, 11, 40) * 2).bfloat16()
    enabled = torch.tensor([True, False] * 5 + [True])
    for edit, guard in itertools.product(("ablate", "augment", "both"), (False, True)):
        lists = lookup(density, conditional_map, 5, 3, edit, sign_guard=guard, backend=NAME)
        expected = rows.clone()
        token_step(expected, sae, lists, 0.2, enabled, mode=mode, backend=NAME)
        written = rows.clone()
        with machine(cluster=cluster):
            found = token_step_with_lookup(
                written,
                sae,
                density,
                conditional_map,
                0.2,
                enabled,
                k_prompt=5,
                k_diff=3,
                edit=edit,
                sign_guard=guard,
                mode=mode,
                backend=NAME,
            )
        assert same_bits(written, expected)
        for name in ("latents", "signs", "counts"):
            assert torch.equal(getattr(found, name), getattr(lists, name))


@pytest.mark.product
@pytest.mark.parametrize("edit", ["ablate", "augment", "both"])
@pytest.mark.parametrize("density", [torch.float32, torch.float64], ids=test_token_step.name)
@pytest.mark.parametrize("values", [torch.float32, torch.float64], ids=test_token_step.name)
def test_lookup_has_the_bits_of_the_reference(density: torch.dtype, values: torch.dtype, edit: EditKind) -> None:
    rng = generator(0)
    A = normal(rng, 200, 150).to(values) * (torch.rand(200, 150, generator=rng) < 0.2)
    A[:, 7] = -0.0
    x = torch.rand(6, 200, generator=rng).to(density)
    x[0, 3], x[1, 5:9], x[2] = torch.nan, -torch.inf, 0
    for k_prompt, k_diff, guard in ((32, 16, False), (32, 16, True), (200, 150, False), (1, 0, False), (0, 3, True)):
        found = [
            lookup(x, dense_map(A), k_prompt, k_diff, edit, sign_guard=guard, backend=name)
            for name in ("reference", NAME)
        ]
        for name in ("latents", "signs", "counts"):
            assert torch.equal(getattr(found[0], name), getattr(found[1], name))


# ---- encode_density: tiles -------------------------------------------------------------------------------------------

# d_model is a multiple of 8, so that the tensor cores are used: for bfloat16, and for float16 where inputs are exact.
TILES = [(3, 8, 37), (130, 40, 129), (9, 72, 260)]


@pytest.mark.product
@pytest.mark.parametrize("hidden_dtype", LOW_PRECISION, ids=test_token_step.name)
@pytest.mark.parametrize("sae_dtype", LOW_PRECISION, ids=test_token_step.name)
@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("gated", subtract_b_dec=True)], ids=str)
@pytest.mark.parametrize("shape", TILES, ids=str)
def test_tiles_count_exactly(
    backend: Backend, shape: tuple[int, int, int], kind: Kind, hidden_dtype: torch.dtype, sae_dtype: torch.dtype
) -> None:
    tokens, d_model, d_sae = shape
    sae = make_integer_sae(kind, d_model, d_sae, sae_dtype, seed=tokens)
    rows = integers(generator(tokens), -3, 3, tokens, d_model).to(hidden_dtype)
    offsets = cuts(tokens, 5, seed=tokens)
    expected = equations.encode_density(exact(rows), offsets, as_equations(sae))
    assert (count(rows, offsets, sae, backend).numpy() == expected).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=test_token_step.name)
@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("gated")], ids=str)
def test_each_kernel_of_tiles_counts_exactly(backend: Backend, kind: Kind, dtype: torch.dtype) -> None:
    test_tiles_count_exactly(backend, (130, 40, 129), kind, dtype, dtype)


@pytest.mark.parametrize("last_bit", [2.0**-7, 2.0**-15, 2.0**-23], ids=["first", "second", "third"])
def test_each_piece_of_an_input_counts(backend: Backend, last_bit: float) -> None:
    """An input whose last bit, which only one of its pieces has, puts it above half of the thresholds."""
    sae = make_integer_sae(Kind(), 8, 40, torch.bfloat16, seed=0)
    W_enc = torch.zeros(40, 8).bfloat16()
    W_enc[:, 5] = 1
    below = 1.0 + 2.0**-8  # the bit in between makes the second piece begin there
    threshold = torch.tensor([below, below + last_bit]).repeat(20)
    sae = replace(sae, W_enc=W_enc, b_enc=torch.zeros(40), threshold=threshold)
    rows = torch.zeros(3, 8)
    rows[:, 5] = below + last_bit
    assert count(rows, [0, 3], sae, backend).tolist() == [[3, 0] * 20]


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=test_token_step.name)
def test_three_pieces_are_a_whole_float(backend: Backend, hidden_dtype: torch.dtype) -> None:
    """Products of bfloat16 weights with inputs of 24 bits, on the tensor cores, decide gates as float32 would."""
    sae = make_sae(Kind("jumprelu", "layer_norm", subtract_b_dec=True), 72, 260, torch.bfloat16, seed=0)
    rows = (normal(generator(1), 40, 72) * 3).to(hidden_dtype)
    rows[3] = 3e38  # its leading piece must not be rounded up to Inf
    least, most = test_encode_density.rounding_bounds.density_range(
        exact(rows), [0, 40], as_equations(sae), test_encode_density.rounding_bounds.UNIT_ROUNDOFF[torch.float32]
    )
    counts = count(rows, [0, 40], sae, backend).numpy()
    assert ((least <= counts) & (counts <= most)).all()


@pytest.mark.parametrize("kind", [Kind(), Kind("topk")], ids=str)
def test_a_few_tokens_at_a_time(backend: Backend, kind: Kind) -> None:
    sae = make_sae(kind, 40, 61, torch.bfloat16, seed=0)
    rows = normal(generator(1), 300, 40).bfloat16()
    whole = count(rows, [0, 100, 290], sae, backend)
    with machine(density_bytes=1):
        assert torch.equal(count(rows, [0, 100, 290], sae, backend), whole)
    if sae.k is not None:
        assert (whole.sum(dim=1) == torch.tensor([100, 190]) * sae.k).all()  # more than k are positive everywhere


# ---- products of warpgroups ------------------------------------------------------------------------------------------

# Less than a tile of 256 tokens by a pair's 256 latents; more than one of both; a depth that goes round the ring.
WARPGROUP_TILES = [(3, 8, 37), (260, 72, 300), (9, 328, 130)]
PIECES = [  # an input is one number of 16 bits, if nothing is subtracted from it, or three
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float32, torch.bfloat16),
]


@pytest.mark.product
@pytest.mark.parametrize(("hidden_dtype", "sae_dtype"), PIECES, ids=test_token_step.name)
@pytest.mark.parametrize("kind", test_encode_density.INTEGER_KINDS, ids=str)
@pytest.mark.parametrize("shape", WARPGROUP_TILES, ids=str)
def test_warpgroups_count_exactly(
    backend: Backend, shape: tuple[int, int, int], kind: Kind, hidden_dtype: torch.dtype, sae_dtype: torch.dtype
) -> None:
    tokens, d_model, d_sae = shape
    sae = make_integer_sae(kind, d_model, d_sae, sae_dtype, seed=tokens)
    rows = integers(generator(tokens), -3, 3, tokens, d_model).to(hidden_dtype)
    offsets = cuts(tokens, 5, seed=tokens)
    expected = equations.encode_density(exact(rows), offsets, as_equations(sae))
    with machine(warpgroup_products=True):
        assert (count(rows, offsets, sae, backend).numpy() == expected).all()
        in_place = encode_density(rows, torch.tensor(offsets), sae, backend=NAME)
        assert (in_place.numpy() == expected).all()


@pytest.mark.long
@pytest.mark.parametrize(("hidden_dtype", "sae_dtype"), PIECES, ids=test_token_step.name)
@pytest.mark.parametrize("kind", [Kind(), *(kind for kind in KINDS if kind.normalization != "none")], ids=str)
def test_warpgroups_count_within_rounding(
    backend: Backend, kind: Kind, hidden_dtype: torch.dtype, sae_dtype: torch.dtype
) -> None:
    """Tokens that are not finite, empty segments and tokens of no segment among them."""
    sae = make_sae(kind, 136, 290, sae_dtype, seed=3)
    rows = (normal(generator(4), 140, 136) * 3).to(hidden_dtype)
    finite_rows, offsets = exact(rows), [2, 2, 60, 61, 61, 133, 138]
    for row, value in ((0, torch.nan), (59, torch.inf), (60, -torch.inf), (137, torch.nan), (139, torch.nan)):
        rows[row, row % 136] = value
    kept = [row for row in range(140) if row not in (0, 59, 60, 137, 139)]
    shifted = [sum(row < offset for row in kept) for offset in offsets]
    least, most = rounding_bounds.density_range(
        finite_rows[kept], shifted, as_equations(sae), rounding_bounds.UNIT_ROUNDOFF[torch.float32]
    )
    with machine(warpgroup_products=True):
        counts = count(rows, offsets, sae, backend)
        assert torch.equal(encode_density(rows, torch.tensor(offsets), sae, backend=NAME), counts)
    assert ((least <= counts.numpy()) & (counts.numpy() <= most)).all()
    with machine(warpgroup_products=True, seed=9, clusters_at_a_time=1):
        assert torch.equal(count(rows, offsets, sae, backend), counts)


@pytest.mark.parametrize("by_warpgroups", [False, True])
def test_large_products_are_told_from_inputs_that_are_not_finite(backend: Backend, by_warpgroups: bool) -> None:
    """Both leave sums that are not finite: the latter activate nothing."""
    sae = make_sae(Kind(), 16, 130, torch.bfloat16, seed=3)
    rows = normal(generator(4), 258, 16).bfloat16()
    rows[[7, 255, 257]] = 3e38 * sae.W_enc[0].sign()
    z = exact(rows) @ exact(sae.W_enc).T + exact(sae.b_enc)
    active = (z > exact(sae.threshold)) & (z > 0)
    assert active[[7, 255, 257], 0].all()
    rows[[8, 254], 3] = torch.inf
    active[[8, 254]] = False
    with machine(warpgroup_products=by_warpgroups):
        counts = encode_density(rows, torch.tensor([0, 7, 8, 258]), sae, backend=NAME)
    for segment, (start, end) in enumerate([(0, 7), (7, 8), (8, 258)]):
        difference = counts[segment].numpy() - active[start:end].sum(axis=0)
        assert (difference == 0).mean() > 0.95  # but for gates that rounding decides
        assert difference[0] == 0


@pytest.mark.parametrize("by_warpgroups", [False, True])
@pytest.mark.parametrize("view", ["contiguous", "columns", "row stride", "address", "one row"])
def test_hidden_states_of_any_strides(backend: Backend, view: str, by_warpgroups: bool) -> None:
    """Those that cannot be copied 16 bytes at a time are written to scratch first."""
    sae = make_integer_sae(Kind(), 16, 37, torch.bfloat16, seed=1)
    numbers = integers(generator(1), -3, 3, 6, 48).bfloat16()
    rows = {
        "contiguous": numbers[:, :16],
        "columns": numbers[:, ::3],
        "row stride": numbers.flatten()[: 6 * 20].view(6, 20)[:, :16],
        "address": numbers[:, 1:17],
        "one row": numbers[:1, :16].expand(6, 16),
    }[view]
    offsets = torch.tensor([0, 2, 6])
    with machine(warpgroup_products=by_warpgroups):
        counts = encode_density(rows, offsets, sae, backend=NAME)
    assert torch.equal(counts, encode_density(rows, offsets, sae, backend="reference"))


@pytest.mark.long
@pytest.mark.parametrize("kind", [Kind(), Kind("topk")], ids=str)
def test_warpgroups_with_a_few_tokens_at_a_time(backend: Backend, kind: Kind) -> None:
    sae = make_sae(kind, 40, 61, torch.bfloat16, seed=0)
    rows = normal(generator(1), 300, 40).bfloat16()
    with machine(warpgroup_products=True):
        whole = count(rows, [0, 100, 290], sae, backend)
        outside = count(rows, [0, 100, 200], sae, backend)  # a tile has no token of a segment
    assert torch.equal(outside[0], whole[0])
    with machine(warpgroup_products=True, density_bytes=1):
        assert torch.equal(count(rows, [0, 100, 290], sae, backend), whole)


def test_which_products_are_by_warpgroups(backend: Backend) -> None:
    """Those kernels, and no others, need more shared memory than this."""
    sae = make_sae(Kind(), 40, 61, torch.bfloat16, seed=0)
    unaligned = make_sae(Kind(), 37, 61, torch.bfloat16, seed=0)
    single = make_sae(Kind(), 40, 61, torch.float32, seed=0)
    rows = normal(generator(1), 9, 40).bfloat16()
    with machine(shared_limit=128 * 1024, warpgroup_products=True):
        with pytest.raises(RuntimeError, match="encode_density could not be launched"):
            count(rows, [0, 9], sae, backend)
        count(rows[:, :37], [0, 9], unaligned, backend)
        count(rows, [0, 9], single, backend)
    with machine(shared_limit=128 * 1024):
        expected = count(rows, [0, 9], sae, backend)
    with machine(shared_limit=128 * 1024, warpgroup_products=True, compute_capability=8):
        assert torch.equal(count(rows, [0, 9], sae, backend), expected)


# ---- calls of CUDA that fail -----------------------------------------------------------------------------------------


def calls_that_fail(run: Callable[[], object], most: int = 15, **changes: Any) -> list[int]:
    """Which of the first calls of CUDA have to succeed for an operation to do so, each on a device of its own."""
    found: list[int] = []
    for call in range(1, most + 1):
        with machine(processors=100 + call, calls_to_failure=call, **changes):
            try:
                run()
            except RuntimeError as error:
                if "could not be launched: unknown error" not in str(error):
                    raise
                found.append(call)
        assert last_error() == 0, "others would take the error for their own"
    return found


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=test_token_step.name)
def test_token_step_says_which_call_failed(backend: Backend, dtype: torch.dtype) -> None:
    sae = make_sae(Kind(), 40, 61, dtype, seed=0)
    rows = (normal(generator(1), 1, 40) * 2).bfloat16()
    edits = edit_list(*random_lists(sae, 1, 8, seed=2), 8)
    expected = step(rows, sae, edits, 0.2, backend=backend)

    def run() -> None:
        assert same_bits(step(rows, sae, edits, 0.2, backend=backend), expected)

    # The device, its shared memory, once more for the kernel, what it may have, three properties; the launch.
    assert calls_that_fail(run) == list(range(1, 10))
    # Without an answer to whether there are bulk copies, the third call, it goes on without them.
    assert calls_that_fail(run, bulk_copies=True) == [1, 2, *range(4, 11)]
    # How many clusters run at a time is one more.
    assert calls_that_fail(run, cluster=2) == list(range(1, 11))


@pytest.mark.long
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=test_token_step.name)
@pytest.mark.parametrize("d_model", [37, 40])
def test_adapter_step_says_which_call_failed(backend: Backend, d_model: int, dtype: torch.dtype) -> None:
    sae = make_sae(Kind(), d_model, 61, dtype, seed=0)
    adapter = make_adapter(Version(), sae, dtype, seed=1)
    rows = (normal(generator(1), 1, d_model) * 2).bfloat16()
    expected = adapt(rows, sae, adapter, backend=backend)

    def run() -> None:
        assert same_bits(adapt(rows, sae, adapter, backend=backend), expected)

    # The device and its shared memory, where rows are whole 16 bytes. For each kernel the same, what it may have, three
    # properties, and the launch.
    aligned = d_model * dtype.itemsize % 16 == 0
    calls = calls_that_fail(run, most=2 * aligned + 3 * 7 + 2)
    assert calls == list(range(1, 2 * aligned + 3 * 7 + 1))


@pytest.mark.long
@pytest.mark.parametrize("kind", [Kind(), Kind("topk")], ids=str)
def test_encode_density_says_which_call_failed(backend: Backend, kind: Kind) -> None:
    sae = make_sae(kind, 40, 61, torch.bfloat16, seed=0)
    rows = normal(generator(1), 30, 40).bfloat16()
    expected = count(rows, [0, 20], sae, backend)

    def run() -> None:
        assert torch.equal(count(rows, [0, 20], sae, backend), expected)

    # One for each launch, and six before that of the products.
    launches = 3 if sae.k is not None else 2
    assert calls_that_fail(run) == list(range(1, launches + 7))
    # And four for what the copy engine needs to know of two matrices.
    assert calls_that_fail(run, warpgroup_products=True) == list(range(2, launches + 12))


# ---- the operations as torch sees them -------------------------------------------------------------------------------


def step_arguments(sae: SaeWeights) -> tuple[tuple[object, ...], tuple[object, ...], tuple[object, ...]]:
    """What comes before the lists, the lists, and what comes after them."""
    rows = normal(generator(1), 3, sae.d_model).bfloat16()
    edits = edit_list(*random_lists(sae, 3, 6, 2), 6)
    strength = (0.2, torch.full((3,), 0.2), torch.tensor([True, False, True]))
    return (
        (rows, *encoder_arguments(sae), sae.W_dec, sae.decoder_rows),
        (edits.latents, edits.signs, edits.counts),
        (*strength, *counter_arguments(TokenStats.zeros(3, sae.d_sae))),
    )


@pytest.mark.long
def test_operations_pass_opcheck() -> None:
    found = operations()
    sae = make_sae(Kind("gated", "layer_norm"), 40, 64, torch.bfloat16, seed=0)
    before, lists, after = step_arguments(sae)
    adapter = make_adapter(Version(), sae, torch.bfloat16, seed=1)
    rest = (*adapter_arguments(adapter), *row_arguments(None, TokenStats.zeros(3, 64)), None, None, None)
    torch.library.opcheck(found.adapter_step.default, (*before, *rest))
    work = scratch_of(sae, 3, 6)
    torch.library.opcheck(found.token_step.default, (*before, *lists, *after, None, None, None, work, "lazy"))
    A = dense_map(integers(generator(0), -3, 3, 30, 64).float())
    looked_up = (torch.rand(3, 30), A.row_offsets, A.columns, A.values, 5, 3, "both", False)
    torch.library.opcheck(found.token_step_with_lookup.default, (*before, *looked_up, *lists, *after, work, "dense"))


def test_compiles_as_one_graph() -> None:
    sae = make_sae(Kind(), 40, 64, torch.bfloat16, seed=0)
    edits = edit_list(*random_lists(sae, 3, 8, 2), 8)
    run = partial(token_step, sae=sae, edits=edits, stats=TokenStats.zeros(3, 64), backend=NAME)

    def block(hidden: Tensor, alpha: Tensor) -> Tensor:
        hidden = hidden * 2
        run(hidden, alpha=alpha)
        return hidden + 1

    rows, alpha = normal(generator(1), 3, 40).bfloat16(), torch.full((3,), 0.2)
    expected = block(rows, alpha)
    assert same_bits(torch.compile(block, fullgraph=True, backend="aot_eager")(rows, alpha), expected)


def test_a_graph_may_follow_inference_mode() -> None:
    """What is kept between steps is no tensor of that mode."""
    sae = make_sae(Kind(), 40, 64, torch.bfloat16, seed=0)
    rows, edits = normal(generator(1), 3, 40).bfloat16(), edit_list(*random_lists(sae, 3, 8, 2), 8)
    expected = rows.clone()
    with torch.inference_mode():
        token_step(expected, sae, edits, 0.2, backend=NAME)

    def block(hidden: Tensor) -> Tensor:
        hidden = hidden * 1
        token_step(hidden, sae, edits, 0.2, backend=NAME)
        return hidden

    assert same_bits(torch.compile(block, fullgraph=True, backend="aot_eager")(rows), expected)


@pytest.mark.long
def test_one_graph_serves_every_batch() -> None:
    sae = make_sae(Kind(), 40, 64, torch.bfloat16, seed=0)
    rows, edits = normal(generator(1), 14, 40).bfloat16(), edit_list(*random_lists(sae, 14, 8, 2), 8)

    def block(hidden: Tensor, lists: EditList) -> Tensor:
        hidden = hidden * 2
        token_step(hidden, sae, lists, 0.2, backend=NAME)
        return hidden

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    for batch in range(2, 15):  # more than the recompilations that torch allows
        lists = edits.rows(torch.arange(batch))
        assert same_bits(compiled(rows[:batch], lists), block(rows[:batch], lists))


def test_default_tuning_is_restored() -> None:
    with machine(density_bytes=1, cluster=2), pytest.raises(RuntimeError, match="threads must be"):
        operations().set_cuda_tuning(33, 1, DENSITY_BYTES)


# ---- branches, by all of the above -----------------------------------------------------------------------------------

# For the shim, ptx.cuh is another file.
WITHOUT_BRANCHES = {"adapter_step.cu", "encode_density.cu", "lookup.cu", "token_step.cu", "operations.h", "ptx.cuh"}
RUN_AND_COUNT = """
import json, sys
from pathlib import Path
import pytest
from cuda_shim import build
arguments = ["-q", "-x", "-p", "no:cacheprovider", *sys.argv[2:]]
code = pytest.main(arguments) or pytest.main(["--remaining-cases", *arguments])
if build.counts_branches():
    taken = build.branches_taken(Path(sys.argv[1]))
    found = {"files": list(taken.by_file()), "missing": taken.missing()}
    Path(sys.argv[1], "branches.json").write_text(json.dumps(found))
sys.exit(code)
"""


@pytest.mark.compilers
def test_every_branch_of_the_kernels_is_taken(tmp_path: Path) -> None:
    """By the other tests of this file, with every pair of parameters, in a process that counts nothing else."""
    command = [sys.executable, "-c", RUN_AND_COUNT, str(tmp_path), __file__]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
    if (reason := coverage.unavailable(build.compiler())) is not None:
        pytest.skip(reason)
    taken = json.loads((tmp_path / "branches.json").read_text())
    assert {path.name for path in (build.CSRC / "cuda").iterdir()} - set(taken["files"]) <= WITHOUT_BRANCHES
    assert not taken["missing"], "\n".join(taken["missing"])
