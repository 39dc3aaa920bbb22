"""The shim that runs CUDA kernels on the CPU: it does what CUDA does, and the sanitizers see through it."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from cuda_shim import build, coverage

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")

SANITIZERS = {
    "plain": ("-O1",),
    "threads": ("-O1", "-g1", "-fsanitize=thread"),
    "addresses": ("-O0", "-g1", "-fsanitize=address"),
}


def run(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    built = build.program("shim_test", SANITIZERS[sanitizer])
    return subprocess.run([str(built), *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.long
@pytest.mark.parametrize(("sanitizer", "engine"), [("plain", "fibers"), ("plain", "threads"), ("threads", "threads")])
def test_it_does_what_cuda_does(sanitizer: str, engine: str) -> None:
    done = run(sanitizer, engine)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.long
def test_a_race_is_found() -> None:
    done = run("threads", "race")
    assert done.returncode != 0
    assert "data race" in done.stderr


@pytest.mark.long
def test_an_overrun_of_shared_memory_is_found() -> None:
    done = run("addresses", "overrun")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


@pytest.mark.long
@pytest.mark.parametrize(
    ("mistake", "refusal"),
    [
        ("hidden", "what was not shown to the tensor cores"),
        ("no fence", "a product without a fence"),
        ("other matrices", "matrices that differ in a warpgroup"),
        ("changed", "a matrix that changed while it was multiplied"),
        ("half a warpgroup", "a product of less than a warpgroup"),
    ],
)
def test_products_of_warpgroups_that_a_gpu_would_get_wrong(mistake: str, refusal: str) -> None:
    done = run("plain", mistake)
    assert done.returncode != 0
    assert refusal in done.stderr


# ---- which branches were taken ---------------------------------------------------------------------------------------

# Nobody takes one side of line 3, nor one of line 4, whose condition is constant for one argument of the template. In
# line 5 both sides are taken.
TEMPLATE = """template <bool kFirst>
int chosen(int i) {
  if (i > 5) return 7;
  if (kFirst && i > 1) return 3;
  return i < 1 ? i + 2 : i + 4;
}
int main(int count, char**) {
  return chosen<true>(count - 1) + chosen<true>(count) + chosen<false>(count - 1) + chosen<false>(count) == 0;
}
"""


@pytest.fixture
def counted(tmp_path: Path) -> coverage.Coverage:
    """Of the template above, after one run."""
    if (reason := coverage.unavailable(build.compiler())) is not None:
        pytest.skip(reason)
    (tmp_path / "toy.cpp").write_text(TEMPLATE)
    compiler = str(build.compiler())
    compiling, linking = (*coverage.FLAGS, "-c", "toy.cpp", "-o", "toy.o"), ("--coverage", "toy.o", "-o", "toy")
    for command in ((compiler, *compiling), (compiler, *linking), ("./toy",)):
        subprocess.run(command, cwd=tmp_path, check=True)
    return coverage.read([tmp_path / "toy.gcda"], tmp_path)


def test_a_branch_that_nobody_takes_is_found(counted: coverage.Coverage) -> None:
    assert [text.split(" not")[0] for text in counted.missing()] == [
        "toy.cpp:3: of 2 branches",
        "toy.cpp:4: of 2 branches",
    ]
    assert counted.by_file() == {"toy.cpp": (4, 6)}


def test_instantiations_are_added_up(counted: coverage.Coverage) -> None:
    """What one takes counts for all whose line has as many branches, and for no others."""
    sums = coverage.Coverage()
    place = coverage.Place("a", 1, (1, 1), 2)
    sums.add(place, [3, 0])
    sums.add(coverage.Place("a", 1, (1, 1), 4), [1, 1, 0, 1])
    sums.add(coverage.Place("a", 1, (2, 1), 2), [0, 1])
    assert len(sums.missing()) == 3
    sums.add(place, [0, 2])
    assert sums.taken[place] == [3, 2]
    assert len(sums.missing()) == 2
