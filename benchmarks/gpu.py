"""Builds, tests and measures the GPU kernels on the machine at hand: `make gpu`.

    python benchmarks/gpu.py              needs an NVIDIA GPU, torch, triton, transformers, numpy and pytest
    python benchmarks/gpu.py --dry-run    the whole script at toy shapes through Triton's interpreter, on any machine

Writes `benchmarks/results/DATE-COMMIT-gpu.json`, `.md` and `.png`. Exit code 0 if nothing failed (what there was no
time or tool for is named), 1 if a test or a check failed (the report then says so), 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BUILD_SECONDS = 240
FIRST_ROW_SECONDS = 90
TEST_SECONDS = 200
ALL_SECONDS = 560
TEST_PROCESSES = 4  # each holds weights, and float64 copies of them, on the GPU
SECONDS_AFTER_ROWS = 90  # for the tests at small shapes and the sanitizer
SECONDS_OF_GRACE = 20  # for a row that was begun in time
REAL_SHAPES = ("tests/kernels/test_gpu.py", "tests/kernels/test_cuda_gpu.py")
SMALL_SHAPES = "tests/kernels"
SANITIZED = "tests/kernels/test_cuda_gpu.py"

State = Literal["passed", "failed", "not done"]


@dataclass(frozen=True)
class Step:
    """What was done beside measuring.

    Attributes:
        name: what.
        state: "not done" is what there was no time or no tool for.
        summary: its last words, or why it was not done.
    """

    name: str
    state: State
    summary: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build, test and measure the GPU kernels.")
    parser.add_argument("--dry-run", action="store_true", help="toy shapes through the interpreter; needs no GPU")
    parser.add_argument(
        "--out", type=Path, help="folder of the report; default: benchmarks/results, or a temporary one"
    )
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS, help="for everything; rows beyond it are named")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each column")
    parser.add_argument("--commit", help="of a copy without its history; default: that of the checkout")
    parser.add_argument("--first-row", action="store_true", help="only print dense and lazy at the first shape")
    chosen = parser.parse_args(arguments)
    end = time.monotonic() + chosen.seconds
    if chosen.dry_run:
        os.environ.update(TRITON_INTERPRET="1", DSPA_GPU_DRY_RUN="1")
    sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

    try:
        import torch
    except ImportError:
        print(f"make gpu: {sys.executable} has no torch; name another with make gpu PYTHON=...", file=sys.stderr)
        return 2
    if not chosen.dry_run and not (torch.cuda.is_available() and torch.version.cuda):
        print("make gpu: no NVIDIA GPU was found; run it on a machine with one, or make gpu DRY_RUN=1", file=sys.stderr)
        return 2
    if chosen.first_row:
        return print_first_row(chosen.dry_run, chosen.rounds)
    steps = prepare(chosen.dry_run)

    from gpu_report import Failure, Report
    from gpu_rows import REAL, TOY, Rows
    from gpu_timing import Ceilings, Sampler
    from history.records import Run

    from dspa.kernels import available
    from dspa.kernels.gpu_architecture import architecture
    from dspa.util.provenance import Provenance

    status, backends = available(), gpu_backends()
    if not backends:
        print(f"make gpu: no GPU backend is available: {status}", file=sys.stderr)
        return 1
    sampler = Sampler("cpu" if chosen.dry_run else "cuda", 3 if chosen.dry_run else chosen.rounds)
    commit = chosen.commit or Provenance.here().commit
    now = datetime.now(timezone.utc)
    report = Report(
        run=Run(
            name=f"{now:%Y%m%d-%H%M}-{commit[:7]}-{'dry-run' if chosen.dry_run else 'gpu'}",
            time=now.isoformat(timespec="seconds"),
            commit=commit,
            machine=machine(chosen.dry_run),
            rows=(),
        ),
        ceilings=Ceilings.measure(sampler),
        steps=steps,
        folder=chosen.out or (Path(tempfile.mkdtemp(prefix="dspa-dry-run-")) if chosen.dry_run else RESULTS),
        architecture=None if chosen.dry_run else architecture(torch.device("cuda")),
        not_built=tuple(f"{name}, {status.get(name)}" for name in ("triton", "cuda") if name not in backends),
    )
    with watchdog(end + SECONDS_OF_GRACE, report):
        for make_row in Rows(sampler, TOY if chosen.dry_run else REAL, backends).all():
            if time.monotonic() > end - SECONDS_AFTER_ROWS:
                report.skipped += 1
                continue
            try:
                report.add(make_row())
                print(report.run.rows[-1].name, report.run.rows[-1].failed or "", flush=True)
            except Exception as error:  # one row's trouble must not cost the others
                first_line = (str(error).splitlines() or [""])[0]
                report.fail(Failure(len(report.run.rows), f"{type(error).__name__}: {first_line}"))
                print(f"row failed: {report.failures[-1].reason}", flush=True)
            if not chosen.dry_run:
                torch.cuda.empty_cache()
    if not chosen.dry_run:
        steps.append(sanitize("cuda" in backends, end - time.monotonic()))
        steps.append(small_shapes(end + SECONDS_OF_GRACE - time.monotonic()))
    print(f"report: {report.write(plot=True)}")
    failed = [step.name for step in steps if step.state == "failed"]
    failed += [row.name for row in report.run.rows if row.failed is not None]
    not_done = [step.name for step in steps if step.state == "not done"]
    print(
        f"failed: {', '.join(failed) or 'nothing'}; rows that raised: {len(report.failures)}; "
        f"not done: {', '.join(not_done) or 'nothing'}; rows without time: {report.skipped}"
    )
    return 1 if failed or report.failures else 0


@contextlib.contextmanager
def watchdog(end: float, report: Any) -> Iterator[None]:
    """Within it, a row that hangs, a kernel that waits forever say, ends the whole process with the report so far."""

    def stop() -> None:
        from gpu_report import Failure

        report.fail(Failure(len(report.run.rows), "not done in time: the row hangs, and ended the run"))
        print(f"a row hangs; report: {report.write()}", flush=True)
        os._exit(1)

    timer = threading.Timer(max(1.0, end - time.monotonic()), stop)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def prepare(dry_run: bool) -> list[Step]:
    """Everything before the rows. The first figures, of Triton, come while the CUDA kernels are compiled."""
    if dry_run:
        return [first_row("first row", dry_run), real_shapes(dry_run)]
    with ThreadPoolExecutor(1) as pool:
        building = pool.submit(build)
        steps = [first_row("first row, before the build", dry_run)]
        steps.append(building.result())
    if steps[-1].state == "passed":
        steps.append(first_row("first row", dry_run))
    return [*steps, real_shapes(dry_run)]


def first_row(name: str, dry_run: bool) -> Step:
    """The most important figures, in a process of its own: even a run that is cut off has printed them."""
    command = [sys.executable, str(Path(__file__).resolve()), "--first-row", *(["--dry-run"] if dry_run else [])]
    return run_step(name, command, FIRST_ROW_SECONDS if not dry_run else ALL_SECONDS)


def print_first_row(dry_run: bool, rounds: int) -> int:
    """Prints one line of times; 1 if a check of the results failed."""
    from gpu_rows import REAL, TOY, Rows
    from gpu_timing import Sampler

    backends = gpu_backends()
    sampler = Sampler("cpu" if dry_run else "cuda", 3 if dry_run else rounds)
    row = Rows(sampler, TOY if dry_run else REAL, backends).first()
    times = [
        f"{column.name} {column.measured.value * 1e3 if column.unit == 'ms' else column.measured.value:.1f} us"
        for column in row.columns
    ]
    print(f"{row.name}: {row.failed or '; '.join(times)}")
    return int(row.failed is not None)


def gpu_backends() -> tuple[str, ...]:
    """The GPU backends that can run here."""
    from dspa.kernels import available

    status = available()
    return tuple(name for name in ("triton", "cuda") if status.get(name) == "available")


def build() -> Step:
    """The CUDA extension for this GPU alone, where nvcc is."""
    sys.path.insert(0, str(ROOT / "csrc"))
    from compile_cuda import find_nvcc

    if find_nvcc() is None:
        return Step("build", "not done", "there is no nvcc, and so no CUDA backend")
    command = ["env", "DSPA_BUILD=require", "DSPA_CUDA=require", sys.executable, "setup.py", "build_ext", "--inplace"]
    return run_step("build", command, BUILD_SECONDS)


def real_shapes(dry_run: bool) -> Step:
    """The tests that are about a GPU, at real shapes; for a dry run made toy ones."""
    command = pytest_command("-m", "gpu", *(REAL_SHAPES[:1] if dry_run else ("--all-cases", *REAL_SHAPES)))
    if not dry_run and importlib.util.find_spec("xdist"):
        command += ["-n", str(TEST_PROCESSES)]  # most of the time goes into compiling kernels, on the CPU
    return run_step("tests at real shapes", command, TEST_SECONDS if not dry_run else ALL_SECONDS)


def small_shapes(seconds: float) -> Step:
    """The tests of every backend, on the GPU backends, as far as there is time: each variant is compiled anew."""
    command = pytest_command("-m", "gpu", "--all-cases", SMALL_SHAPES, *(f"--ignore={file}" for file in REAL_SHAPES))
    if importlib.util.find_spec("xdist"):
        command += ["-n", str(TEST_PROCESSES)]
    return run_step("tests at small shapes", command, seconds, late="not done")


def pytest_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]


def sanitize(has_cuda: bool, seconds: float) -> Step:
    """memcheck and racecheck on the small shapes, where compute-sanitizer is installed and time is left."""
    tool = shutil.which("compute-sanitizer")
    if not has_cuda or tool is None:
        reason = "compute-sanitizer is not installed" if has_cuda else "there is no CUDA backend"
        return Step("compute-sanitizer", "not done", reason)
    tests = pytest_command("-x", "-m", "gpu", "-k", "clusters or graph", SANITIZED)
    steps = [
        run_step(check, [tool, "--tool", check, "--error-exitcode", "9", *tests], seconds / 3, late="not done")
        for check in ("memcheck", "racecheck")
    ]
    states = {step.state for step in steps}
    state: State = "failed" if "failed" in states else "not done" if "not done" in states else "passed"
    return Step("compute-sanitizer", state, "; ".join(step.summary for step in steps))


def run_step(name: str, command: Sequence[str], seconds: float, *, late: State = "failed") -> Step:
    """Runs a command in the repository; `late` is its state if it is stopped after so many seconds."""
    if seconds < 5:
        return Step(name, "not done", "no time was left")
    started = time.monotonic()
    with tempfile.TemporaryFile("w+") as output:  # not a pipe: what the command leaves running would hold it open
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, start_new_session=True)
        try:
            state: State = "passed" if process.wait(seconds) == 0 else "failed"
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with all that it has started
            process.wait()
            state = late
        output.seek(0)
        lines = output.read().replace(f"{ROOT}/", "").strip().splitlines() or ["no output"]
    if state == "failed":
        told = [line for line in lines if line.startswith(("E  ", "FAILED", "ERROR"))]  # pytest's, which logs may drown
        print("\n".join([*told[:40], *lines[-60:]]), flush=True)
    summary = f"{re.sub(r'=+', '', lines[-1]).strip()} ({time.monotonic() - started:.0f} s of {seconds:.0f})"
    print(f"{name}: {state}: {summary}", flush=True)
    return Step(name, state, summary)


def machine(dry_run: bool) -> str:
    """The device, its driver and the versions that matter."""
    import torch
    import transformers
    import triton

    versions = (
        f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {triton.__version__}, "
        f"transformers {transformers.__version__}, Python {platform.python_version()}"
    )
    if dry_run:
        return f"DRY RUN through Triton's interpreter on a CPU: no time in it means anything; {versions}"
    driver = "unknown"
    with contextlib.suppress(OSError, subprocess.SubprocessError, IndexError):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    return f"{torch.cuda.get_device_name()}, driver {driver}, {versions}"


if __name__ == "__main__":
    sys.exit(main())
