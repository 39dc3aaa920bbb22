"""`make gpu` where there is no GPU: one clear line, or the whole script at toy shapes."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from history.records import Run, read_run

from dspa.bench.adapter import EAGER_ADAPTER
from dspa.bench.cases import Case, Shape

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "DSPA_"))}
    environment |= {"OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, env=environment)


# What `make gpu` may not ask for, as a plugin of pytest, or a module that Python itself imports, that hides it.
HIDDEN = """
import sys
NAMES = ("sae_lens", "datasets", "pyarrow", "pytest_timeout", "pytest_benchmark", "xdist")
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in NAMES:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
"""
# The versions of a machine with an H100 on which `make gpu` has run. Its torch, 2.11 for CUDA 13, and its Python, 3.12,
# cannot be had without gigabytes. Its numpy is newer than this triton's interpreter can work with.
OF_A_GPU_MACHINE = ("triton==3.6.0", "transformers==5.17.0", "huggingface_hub==1.33.0", "numpy==2.3.5")


@pytest.mark.long
def test_the_tests_for_a_gpu_ask_for_little(tmp_path: Path) -> None:
    """They are found where only what `make gpu` asks for is installed."""
    (tmp_path / "hide_packages.py").write_text(HIDDEN)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "hide_packages",
        "-q",
        "--collect-only",
        "-m",
        "gpu",
        "tests/kernels",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "test_gpu.py" in done.stdout
    assert "error" not in done.stdout


@pytest.mark.long
def test_what_hangs_is_stopped_with_all_it_started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    gpu = importlib.import_module("gpu")
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    step = gpu.run_step("a step", ["sh", "-c", f"(sleep 60; echo late) > {pipe} & sleep 60"], 5.0, late="not done")
    assert step.state == "not done"
    os.set_blocking(read, True)
    assert os.read(read, 1) == b"", "what it had started went on; the pipe ends with the last process that holds it"
    os.close(read)
    assert gpu.run_step("a step", ["sh", "-c", "exit 3"], 5.0).state == "failed"
    assert gpu.run_step("a step", ["true"], 1.0).state == "not done"


@pytest.mark.long
def test_a_row_that_hangs_ends_the_run_with_a_report(tmp_path: Path) -> None:
    program = f"""
import sys, threading, time
sys.path[:0] = [{str(SCRIPT.parent)!r}]
import gpu
from gpu_report import Report
from gpu_timing import Ceilings
from history.records import Run
from pathlib import Path
run = Run("hung", "2026-01-01T00:00:00", "0" * 40, "a GPU", ())
with gpu.watchdog(time.monotonic() + 1, Report(run, Ceilings(1.0, 1.0, 1.0), [], Path({str(tmp_path)!r}), "sm_90")):
    threading.Event().wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "the row hangs" in (tmp_path / "hung.md").read_text()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    assert importlib.import_module("gpu").main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err == "make gpu: no NVIDIA GPU was found; run it on a machine with one, or make gpu DRY_RUN=1\n"


GPU_ROWS = ("token_step", "encode_density", "adapter_step", "generate")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that makes, on the PYTHONPATH, an environment like that of a GPU machine: other versions, and less."""
    folder = tmp_path_factory.mktemp("packages")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*command, *OF_A_GPU_MACHINE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (folder / "sitecustomize.py").write_text(HIDDEN)
    return folder


@pytest.mark.packaging
def test_dry_run_goes_through_every_step_and_claims_nothing(packages: Path, tmp_path: Path) -> None:
    done = run(
        "--dry-run", "--seconds", "3600", "--out", str(tmp_path),
        PYTHONPATH=str(packages), PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = tmp_path.glob("*-dry-run.json")
    found = read_run(record)
    assert found.machine.startswith("DRY RUN")
    assert "triton 3.6.0, transformers 5.17.0" in found.machine
    assert {row.group for row in found.rows} == {f"{name}, GPU" for name in GPU_ROWS}
    assert [row.failed for row in found.rows if row.failed] == []
    details = json.loads(record.read_text())
    assert details["failures"] == []
    assert details["rows_without_time"] == 0
    assert [step["state"] for step in details["steps"]] == ["passed", "passed"]
    text = record.with_suffix(".md").read_text()
    assert "DRY RUN" in text
    assert "Budgets" not in text
    assert record.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.parametrize("compute_capability", [8, 9])
def test_shapes_of_launches(compute_capability: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The rows that only the CUDA backend has, on the shim of its kernels: a GPU before sm_90 has fewer shapes."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "kernels"))
    from cuda_shim import backend, build  # pyright: ignore[reportMissingImports]

    if build.compiler() is None:
        pytest.skip("there is no C++ compiler to build the shim with")
    from gpu_report import roofline  # pyright: ignore[reportMissingImports]
    from gpu_rows import TOY, Rows  # pyright: ignore[reportMissingImports]
    from gpu_timing import Ceilings, Sampler  # pyright: ignore[reportMissingImports]

    backend.register()
    library = backend.operations()
    rows = Rows(Sampler("cpu", 3), TOY, (backend.NAME,), backend.NAME, library)
    with backend.machine(compute_capability=compute_capability):
        launches = rows.step_launches("toy", Shape(48, 256, torch.bfloat16, 1))
        density = rows.encode_density("toy", 48, 16)
        adapter = rows.adapter_step("toy", Shape(48, 256, torch.bfloat16, 2))
    assert [row.failed for row in (launches, density, adapter)] == [None] * 3
    assert [column.name for column in adapter.columns] == [EAGER_ADAPTER, backend.NAME]
    names = [column.name for column in launches.columns]
    assert names[:2] == ["256 threads", "128 threads"]
    assert len(names) == (2 if compute_capability == 8 else 16)
    assert ("128 threads, clusters of 4, bulk copies" in names) == (compute_capability == 9)
    assert (density.column(f"{backend.NAME}, by warps") is not None) == (compute_capability == 9)
    run = Run("", "", "", "a GPU", (launches, density))
    assert roofline(run, Ceilings(1, 1, 1)).startswith(b"\x89PNG")


def test_a_shape_that_changes_the_result_is_a_failed_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from gpu_rows import TOY, Rows  # pyright: ignore[reportMissingImports]
    from gpu_timing import Sampler  # pyright: ignore[reportMissingImports]

    class Library:
        """Whose launches of 128 threads are wrong."""

        threads = 256

        def set_cuda_tuning(self, threads: int, *_: object) -> None:
            self.threads = threads

        def has_bulk_copies(self) -> bool:
            return False

    library, right = Library(), Case.step
    monkeypatch.setattr(Case, "step", lambda *call: right(*call) + (library.threads == 128))
    row = Rows(Sampler("cpu", 3), TOY, ("reference",), "reference", library).step_launches(
        "toy", Shape(48, 256, torch.bfloat16, 1)
    )
    assert row.failed == "128 threads: another result than 256 threads"
