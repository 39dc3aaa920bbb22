"""The CUDA kernels under ThreadSanitizer and AddressSanitizer: on real threads, several blocks at a time."""

from __future__ import annotations

import subprocess

import pytest
from cuda_shim import build

pytestmark = [
    pytest.mark.compilers,
    pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler"),
]

THREADS = ("-O1", "-g1", "-fsanitize=thread")
ADDRESSES = ("-O0", "-g1", "-fsanitize=address")
UNDEFINED = ("-O0", "-g1", "-fsanitize=undefined", "-fno-sanitize-recover=all")
STEPS = (
    "threshold 5 37 step",
    "topk 5 37 step",
    "threshold 9 40 step",
    "threshold 1 40 step in bulk",
    "threshold 5 37 adapt",
    "threshold 9 40 adapt",
)  # activation, rows, d_model: see kernel_runs.cpp
COUNTS = ("threshold 5 37 count", "threshold 9 40 count", "topk 5 37 count")
BY_WARPGROUPS = "topk 9 328 count by warpgroups"


def run(flags: tuple[str, ...], arguments: str) -> subprocess.CompletedProcess[str]:
    built = build.program("kernel_runs", flags)
    return subprocess.run([str(built), *arguments.split(maxsplit=3)], capture_output=True, text=True, timeout=500)


def check(flags: tuple[str, ...], arguments: str) -> None:
    done = run(flags, arguments)
    assert done.returncode == 0, done.stdout + done.stderr[:5000]


@pytest.mark.parametrize("arguments", STEPS)
def test_no_races(arguments: str) -> None:
    check(THREADS, arguments)


def test_no_races_in_products_of_warpgroups() -> None:
    check(THREADS, "threshold 9 72 count by warpgroups")


def test_the_races_would_be_found() -> None:
    """The same where the atomics order nothing."""
    done = run(THREADS, "threshold 5 37 unordered")
    assert done.returncode != 0
    assert "data race" in done.stderr


@pytest.mark.parametrize("arguments", [*STEPS, *COUNTS, "threshold 9 328 count by warpgroups"])
def test_no_access_out_of_bounds(arguments: str) -> None:
    check(ADDRESSES, arguments)


@pytest.mark.parametrize("arguments", COUNTS)
def test_no_races_in_counting(arguments: str) -> None:
    check(THREADS, arguments)


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [*STEPS, *COUNTS, BY_WARPGROUPS])
def test_nothing_undefined(arguments: str) -> None:
    check(ADDRESSES, arguments)
    check(UNDEFINED, arguments)
