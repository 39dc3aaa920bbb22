"""The CUDA kernels, run on the CPU by the shim: the tests of every backend, and what only these kernels have."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import equations
import pytest
import test_encode_density
import test_lookup
import test_token_step
import torch
from cuda_shim import build
from cuda_shim.backend import DENSITY_BYTES, NAME, machine, operations, register
from kernel_cases import (
    KINDS,
    LOW_PRECISION,
    Backend,
    Kind,
    as_equations,
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
    lookup,
    token_step,
    token_step_with_lookup,
)
from dspa.kernels.native import encoder_arguments
from dspa.kernels.token_step.cpu import counters_of
from dspa.kernels.token_step.cuda import scratch_of

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler to build the shim with")

if build.compiler() is not None:
    register()


@pytest.fixture(scope="session")
def backend() -> Backend:
    """In the place of the fixture of this name that goes through all backends."""
    return Backend(NAME, "cpu")


# ---- the tests of every backend --------------------------------------------------------------------------------------

for of_all in (test_token_step, test_encode_density, test_lookup):
    for test_name in [name for name in dir(of_all) if name.startswith("test_")]:
        named = f"test_{of_all.__name__.removeprefix('test_')}_{test_name.removeprefix('test_')}"
        if "backend" in getattr(of_all, test_name).__code__.co_varnames:
            globals()[named] = getattr(of_all, test_name)


# ---- loads of 16 bytes, and inputs of more than one chunk ------------------------------------------------------------


@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=test_token_step.name)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize(("batch", "d_model"), [(1, 8), (1, 264), (3, 40), (9, 520)])
def test_rows_of_whole_16_bytes(backend: Backend, batch: int, d_model: int, kind: Kind, dtype: torch.dtype) -> None:
    sae = make_sae(kind, d_model, 61, dtype, seed=d_model)
    rows = (normal(generator(batch), batch, d_model) * 2).bfloat16()
    lists = random_lists(sae, batch, 8, seed=batch)
    dense = run_and_check(rows, sae, *lists, 0.2, backend, mode="dense", room=8)
    assert same_bits(run_and_check(rows, sae, *lists, 0.2, backend, mode="lazy", room=8), dense)


@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("relu", "layer_norm")], ids=str)
def test_where_weights_lie_changes_no_bit(backend: Backend, kind: Kind) -> None:
    """Rows that do not begin at a multiple of 16 bytes are read one number at a time, with the same sums."""
    sae = make_sae(kind, 264, 61, torch.bfloat16, seed=0)
    assert sae.W_dec is not None
    shifted = {}
    for name, matrix in (("W_enc", sae.W_enc), ("W_dec", sae.W_dec)):
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


# ---- blocks, clusters and the order in which they run ----------------------------------------------------------------

MACHINES = {
    "one block at a time": {"clusters_at_a_time": 1},
    "one processor": {"processors": 1},
    "more blocks than rows of W_enc": {"processors": 40, "clusters_at_a_time": 9},
    "clusters of two": {"cluster": 2},
    "clusters of four, one at a time": {"cluster": 4, "processors": 6, "clusters_at_a_time": 1},
    "no clusters": {"cluster": 4, "compute_capability": 8},
    "shared memory for one row": {"shared_limit": 24 * 1024},
    "a warp for a block": {"threads": 32},
    **{f"order {seed}": {"seed": 100 + seed, "clusters_at_a_time": 4} for seed in range(6)},
}


@pytest.mark.parametrize("changes", MACHINES.values(), ids=MACHINES)
def test_who_runs_when_changes_no_bit(backend: Backend, changes: dict[str, int]) -> None:
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
            counters.append(torch.cat([counter.double() for counter in counters_of(stats)]).nan_to_num(-1))
        assert same_bits(found[0], found[1])
        assert torch.equal(counters[0], counters[1])
        assert not same_bits(found[0], rows)


def test_the_scratch_is_zero_between_steps(backend: Backend) -> None:
    sae = make_sae(Kind("topk"), 40, 61, torch.bfloat16, seed=0)
    rows = (normal(generator(1), 11, 40) * 2).bfloat16()
    edits = edit_list(*random_lists(sae, 11, 8, seed=2), 8)
    for mode in ("dense", "lazy"):
        step(rows, sae, edits, 0.2, backend=backend, mode=mode)
        scratch = scratch_of(sae, rows, 8, operations())
        assert not scratch[: len(scratch) - 11 * 8].any()  # the scores of the lists stay
    assert scratch_of(sae, rows, 8, operations()) is scratch


def test_a_model_too_wide_is_refused(backend: Backend) -> None:
    sae = make_sae(Kind(), 520, 61, torch.bfloat16, seed=0)
    with machine(shared_limit=4 * 1024), pytest.raises(RuntimeError, match="token_step could not be launched"):
        token_step(torch.zeros(1, 520).bfloat16(), sae, EditList.empty(1, 4), 0.2, backend=NAME)


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


def test_entries_out_of_bounds_are_ignored(backend: Backend) -> None:
    """The device cannot refuse a list as the CPU does; it must not read what is not there either."""
    sae = make_sae(Kind("relu", compact=True), 40, 61, torch.bfloat16, seed=0)
    assert sae.decoder_rows is not None
    missing = int((sae.decoder_rows < 0).nonzero()[0])
    present = [int(latent) for latent in (sae.decoder_rows >= 0).nonzero()[:3]]
    rows = (normal(generator(1), 1, 40) * 2).bfloat16()
    expected = step(rows, sae, edit_list([[]], [present], 6), 0.2, backend=backend)
    wrong = edit_list([[]], [[*present, -1, 61, missing]], 6)
    assert same_bits(step(rows, sae, wrong, 0.2, backend=backend), expected)
    wrong.counts[0] = 1000
    assert same_bits(step(rows, sae, wrong, 0.2, backend=backend), expected)
    wrong.counts[0] = -1
    assert same_bits(step(rows, sae, wrong, 0.2, backend=backend), rows)


# ---- one launch with the lookup --------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("hidden_dtype", LOW_PRECISION, ids=test_token_step.name)
@pytest.mark.parametrize("sae_dtype", LOW_PRECISION, ids=test_token_step.name)
@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("gated", subtract_b_dec=True)], ids=str)
def test_tiles_count_exactly(backend: Backend, kind: Kind, hidden_dtype: torch.dtype, sae_dtype: torch.dtype) -> None:
    for number, (tokens, d_model, d_sae) in enumerate(TILES):
        sae = make_integer_sae(kind, d_model, d_sae, sae_dtype, seed=number)
        rows = integers(generator(number), -3, 3, tokens, d_model).to(hidden_dtype)
        offsets = cuts(tokens, 5, seed=number)
        expected = equations.encode_density(exact(rows), offsets, as_equations(sae))
        assert (count(rows, offsets, sae, backend).numpy() == expected).all()


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


# ---- the operations as torch sees them -------------------------------------------------------------------------------


def step_arguments(sae: SaeWeights) -> tuple[tuple[object, ...], tuple[object, ...], tuple[object, ...]]:
    """What comes before the lists, the lists, and what comes after them."""
    rows = normal(generator(1), 3, sae.d_model).bfloat16()
    edits = edit_list(*random_lists(sae, 3, 6, 2), 6)
    strength = (0.2, torch.full((3,), 0.2), torch.tensor([True, False, True]))
    return (
        (rows, *encoder_arguments(sae), sae.W_dec, sae.decoder_rows),
        (edits.latents, edits.signs, edits.counts),
        (*strength, *counters_of(TokenStats.zeros(3, sae.d_sae))),
    )


def test_operations_pass_opcheck() -> None:
    found = operations()
    sae = make_sae(Kind("gated", "layer_norm"), 40, 64, torch.bfloat16, seed=0)
    before, lists, after = step_arguments(sae)
    work = scratch_of(sae, torch.zeros(3, 40), 6, found)
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


def test_default_tuning_is_restored() -> None:
    with machine(density_bytes=1, cluster=2), pytest.raises(RuntimeError, match="threads must be"):
        operations().set_cuda_tuning(33, 1, DENSITY_BYTES)


@pytest.mark.slow
def test_the_copy_engine_gives_the_same_results() -> None:
    """All tests of this file, with the kernels that an sm_90 GPU would run if it were built with DSPA_BULK_COPIES."""
    command = [sys.executable, "-m", "pytest", __file__, "-q", "-x", "-p", "no:cacheprovider"]
    environment = {**os.environ, "DSPA_SHIM_FLAGS": "-DDSPA_BULK_COPIES"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:]
