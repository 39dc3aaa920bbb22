"""Builds, tests and measures the GPU kernels on the machine at hand: `make gpu`.

    python benchmarks/gpu.py              needs an NVIDIA GPU, torch, triton, transformers, numpy and pytest
    python benchmarks/gpu.py --dry-run    the whole script at toy shapes through Triton's interpreter, on any machine

Writes `benchmarks/results/DATE-COMMIT-gpu.json`, `.md` and `.png`. Exit code 0 if everything passed, 1 if a test or a
check failed (the report then says so), 2 if there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TEST_SECONDS = 200
BUILD_SECONDS = 120
ALL_SECONDS = 520
REAL_SHAPES = "tests/kernels/test_gpu.py"
SANITIZED = "tests/kernels/test_cuda_gpu.py"


@dataclass(frozen=True)
class Step:
    """A command that was run before measuring."""

    name: str
    passed: bool
    summary: str


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Build, test and measure the GPU kernels.")
    parser.add_argument("--dry-run", action="store_true", help="toy shapes through the interpreter; needs no GPU")
    parser.add_argument(
        "--out", type=Path, help="folder of the report; default: benchmarks/results, or a temporary one"
    )
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS, help="for everything; rows beyond it are named")
    parser.add_argument("--rounds", type=int, default=30, help="samples of each column")
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
    steps = [run_tests(True)] if chosen.dry_run else [build(), run_tests(False)]

    from gpu_report import Failure, write_report
    from gpu_rows import REAL, TOY, Rows
    from gpu_timing import Ceilings, Sampler

    from dspa.bench_records import Row, Run
    from dspa.flops_report import Provenance
    from dspa.kernels import available
    from dspa.kernels.gpu_architecture import architecture

    status = available()
    backends = tuple(name for name in ("triton", "cuda") if status.get(name) == "available")
    if not backends:
        print(f"make gpu: no GPU backend is available: {status}", file=sys.stderr)
        return 1
    sampler = Sampler("cpu" if chosen.dry_run else "cuda", 3 if chosen.dry_run else chosen.rounds)
    ceilings = Ceilings.measure(sampler)
    rows: list[Row] = []
    failures: list[Failure] = []
    skipped = 0
    for make_row in Rows(sampler, TOY if chosen.dry_run else REAL, backends).all():
        if time.monotonic() > end:
            skipped += 1
            continue
        try:
            rows.append(make_row())
            print(rows[-1].name, rows[-1].failed or "", flush=True)
        except Exception as error:  # one row's trouble must not cost the others
            failures.append(
                Failure(len(rows), f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
            )
            print(f"row failed: {failures[-1].reason}", flush=True)
        if not chosen.dry_run:
            torch.cuda.empty_cache()
    commit = Provenance.here().commit
    now = datetime.now(timezone.utc)
    run = Run(
        name=f"{now:%Y%m%d-%H%M}-{commit[:7]}-{'dry-run' if chosen.dry_run else 'gpu'}",
        time=now.isoformat(timespec="seconds"),
        commit=commit,
        machine=machine(chosen.dry_run),
        rows=tuple(rows),
    )
    if not chosen.dry_run:
        steps.append(sanitize(end, "cuda" in backends))
    default = Path(tempfile.mkdtemp(prefix="dspa-dry-run-")) if chosen.dry_run else ROOT / "benchmarks" / "results"
    device = None if chosen.dry_run else architecture(torch.device("cuda"))
    written = write_report(run, ceilings, steps, failures, skipped, chosen.out or default, architecture=device)
    print(f"report: {written}")
    failed = [step.name for step in steps if not step.passed] + [row.name for row in rows if row.failed is not None]
    print(f"failed: {', '.join(failed) or 'nothing'}; rows that raised: {len(failures)}; rows without time: {skipped}")
    return 1 if failed or failures else 0


def build() -> Step:
    """The CUDA extension for this GPU alone, where nvcc is."""
    command = ["env", "DSPA_CUDA=require", sys.executable, "setup.py", "build_ext", "--inplace"]
    return run_step("build", command, BUILD_SECONDS, optional=True)


def run_tests(dry_run: bool) -> Step:
    """Every test marked gpu; for a dry run those at real shapes, made toy ones, which carry the mark in any case."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    if not dry_run and importlib.util.find_spec("xdist"):
        command += ["-n", "8"]  # most of the time goes into compiling kernels, on the CPU
    return run_step("tests", [*command, REAL_SHAPES if dry_run else "tests"], TEST_SECONDS)


def sanitize(end: float, has_cuda: bool) -> Step:
    """memcheck and racecheck on the small shapes, where compute-sanitizer is installed and time is left."""
    from shutil import which

    tool, left = which("compute-sanitizer"), end + 20 - time.monotonic()
    if not has_cuda or tool is None or left < 20:
        reason = (
            "no CUDA backend"
            if not has_cuda
            else "compute-sanitizer is not installed"
            if tool is None
            else "no time left"
        )
        return Step("compute-sanitizer", True, f"not run: {reason}")
    tests = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-k", "clusters or graph", SANITIZED]
    steps = [
        run_step(check, [tool, "--tool", check, "--error-exitcode", "9", *tests], left / 2)
        for check in ("memcheck", "racecheck")
    ]
    return Step("compute-sanitizer", all(step.passed for step in steps), "; ".join(step.summary for step in steps))


def run_step(name: str, command: Sequence[str], seconds: float, *, optional: bool = False) -> Step:
    """Runs a command in the repository; what did not end in time has not passed, unless it is optional."""
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
        lines = (done.stdout + done.stderr).strip().splitlines()
        passed, last = done.returncode == 0, lines[-1] if lines else "no output"
        if not passed:
            print("\n".join(lines[-60:]), flush=True)
    except subprocess.TimeoutExpired:
        passed, last = False, f"not done after {seconds:.0f} s"
    summary = f"{re.sub(r'=+', '', last).strip()} ({time.monotonic() - started:.0f} s)"
    print(f"{name}: {summary}", flush=True)
    return Step(name, passed or optional, summary)


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
