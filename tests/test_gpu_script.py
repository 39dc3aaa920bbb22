"""`make gpu` where there is no GPU: one clear line, or the whole script at toy shapes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dspa.bench_records import read_run

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("TRITON_", "DSPA_"))}
    environment["OMP_NUM_THREADS"] = "1"
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=500, env=environment
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_in_one_line() -> None:
    done = run()
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "make gpu: no NVIDIA GPU was found; run it on a machine with one, or make gpu DRY_RUN=1\n"


def test_dry_run_goes_through_every_step_and_claims_nothing(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    done = run("--dry-run", "--out", str(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = tmp_path.glob("*-dry-run.json")
    found = read_run(record)
    assert found.machine.startswith("DRY RUN")
    assert {row.group for row in found.rows} == {"token_step, GPU", "encode_density, GPU", "generate, GPU"}
    assert [row.failed for row in found.rows if row.failed] == []
    details = json.loads(record.read_text())
    assert details["failures"] == []
    assert details["rows_without_time"] == 0
    assert [step["passed"] for step in details["steps"]] == [True]
    text = record.with_suffix(".md").read_text()
    assert "DRY RUN" in text
    assert "Budgets" not in text
    assert record.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
