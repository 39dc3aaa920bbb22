"""The Triton kernels compile for GPUs that are not here, within their registers and memory."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from kernel_cases import LOW_PRECISION

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

import triton_compile

from dspa.kernels.triton_common import configurations as triton_configurations
from dspa.kernels.triton_common.configurations import ENCODE_DENSITY, TOKEN_STEP
from dspa.kernels.triton_common.table import Tile, listed_architecture, tile_of

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 64 * 1024}  # of a program
FEWEST_REGISTERS = 16
TUNING = Path(__file__).parents[2] / "benchmarks" / "tune_triton.py"
KERNELS = {
    "token_step_kernel", "count_gates", "write_scores", "count_largest", "lookup_kernel", "fire", "change", "decode",
}  # fmt: skip


def compiled(*options: str) -> list[dict[str, object]]:
    """What compiling in a process of its own, where kernels are not interpreted, reports."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, triton_compile.__file__, *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(kernels: list[dict[str, object]], architecture: str) -> None:
    assert kernels
    for kernel in kernels:
        assert kernel["stack_bytes"] == 0, f"registers are spilled: {kernel}"
        assert int(str(kernel["registers"])) > FEWEST_REGISTERS, f"the compiler took it for empty: {kernel}"
        assert int(str(kernel["shared_bytes"])) <= SHARED_MEMORY[architecture], kernel


@pytest.fixture(scope="module")
def spanning() -> list[dict[str, object]]:
    """All dtypes at all table entries, on sm_90 every pair of them; the other settings take turns."""
    return compiled()


@pytest.mark.compilers
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_kernels_compile_without_spills(architecture: str, spanning: list[dict[str, object]]) -> None:
    check([kernel for kernel in spanning if kernel["architecture"] == architecture], architecture)


@pytest.mark.compilers
def test_the_loops_of_a_token_step_load_ahead(spanning: list[dict[str, object]]) -> None:
    """No round of the pass, or of the products of single latents, begins to load only what it needs itself."""
    steps = [k for k in spanning if k["kernel"] == "token_step_kernel" and str(k["architecture"]).startswith("sm_")]
    assert steps
    for step in steps:
        assert {"tile_products", "products_of"} <= set(step["copying_ahead"]), step  # pyright: ignore[reportArgumentType]
    plain = [k for k in steps if k["architecture"] == "sm_90" and k["is_plain"]]
    assert plain
    assert all(k["multiplying_ahead"] for k in plain)


@pytest.mark.compilers
def test_every_kernel_is_compiled(spanning: list[dict[str, object]]) -> None:
    assert {str(kernel["kernel"]) for kernel in spanning} == KERNELS


@pytest.mark.compilers
def test_exact_factors_are_multiplied_where_copies_put_them(spanning: list[dict[str, object]]) -> None:
    """On sm_90 `encode_density` in one dtype of 16 bits makes no detour by registers, and copies go on meanwhile."""
    case = next(
        case
        for case in triton_compile.spanning_cases("sm_90")
        if case.hidden == case.weights != torch.float32 and case.normalization == "none" and not case.subtract_b_dec
    )
    found = [
        kernel
        for kernel in spanning
        if (kernel["case"], kernel["architecture"]) == (str(case), "sm_90")
        and kernel["kernel"] in ("count_gates", "write_scores")
    ]
    assert len(found) == 1
    assert int(str(found[0]["products_from_shared"])) >= 4
    assert int(str(found[0]["copies_ahead"])) >= 2


def test_every_dtype_and_every_pair_of_settings_is_compiled() -> None:
    cases = {architecture: list(triton_compile.spanning_cases(architecture)) for architecture in SHARED_MEMORY}
    for architecture, of_architecture in cases.items():
        dtypes = {(case.hidden, case.weights, case.shape) for case in of_architecture}
        each = {(one, one, shape) for one in LOW_PRECISION for shape in triton_compile.entries(architecture)}
        every = set(itertools.product(LOW_PRECISION, LOW_PRECISION, triton_compile.entries(architecture)))
        assert dtypes == (every if architecture == "sm_90" else each)
    every = list(triton_compile.every_case("sm_90"))
    for one, other in itertools.combinations([field.name for field in fields(triton_compile.Case)], 2):
        pairs, possible = (
            {(getattr(case, one), getattr(case, other)) for case in chosen}
            for chosen in (itertools.chain(*cases.values()), every)
        )
        assert pairs >= possible, (one, other)


@pytest.mark.slow
@pytest.mark.timeout(4 * 3600)
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_every_combination_compiles_without_spills(architecture: str) -> None:
    """Minutes to an hour each: all activations, normalisations, dtypes and modes at all table entries."""
    found = compiled("--architecture", architecture, "--every-combination")
    assert {str(kernel["kernel"]) for kernel in found} == KERNELS
    check(found, architecture)


@pytest.mark.parametrize(
    ("architecture", "listed"),
    [
        ("sm_80", "sm_80"),
        ("sm_86", "sm_80"),
        ("sm_90", "sm_90"),
        ("sm_103", "sm_100"),
        ("sm_120", "sm_100"),
        ("sm_75", "sm_80"),
        ("gfx942", "gfx942"),
        ("gfx950", "gfx942"),
    ],
)
def test_an_architecture_uses_the_entry_of_its_ancestor(architecture: str, listed: str) -> None:
    assert listed_architecture(architecture) == listed


def test_a_shape_uses_the_entry_of_the_nearest() -> None:
    small, large = TOKEN_STEP["sm_80"][2304, 16384][0], TOKEN_STEP["sm_80"][3584, 65536][0]
    assert small != large
    for shape, sizes in (
        ((2304, 16384), small),
        ((2048, 24576), small),
        ((4096, 65536), large),
        ((3584, 131072), large),
    ):
        assert tile_of("token_step", "sm_80", *shape, False) == Tile(*sizes)


def test_entries_are_block_sizes() -> None:
    for table in (TOKEN_STEP, ENCODE_DENSITY):
        assert set(table) == set(SHARED_MEMORY)
        for of_shape in table.values():
            for sizes in of_shape.values():
                for tile in (Tile(*pair) for pair in sizes):
                    assert all(size & (size - 1) == 0 for size in tile[:4]), tile
                    assert min(tile.tokens, tile.model) >= 16, tile
    assert all(Tile(*s).tokens == 16 for t in TOKEN_STEP.values() for pair in t.values() for s in pair)


@pytest.mark.long
def test_tuning_without_a_gpu_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, str(TUNING)], capture_output=True, text=True)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert "no GPU was found" in done.stderr


@pytest.mark.long
def test_tuning_can_be_tried_without_a_gpu() -> None:
    before = Path(triton_configurations.__file__).read_bytes()
    done = subprocess.run([sys.executable, str(TUNING), "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 2
    assert Path(triton_configurations.__file__).read_bytes() == before
