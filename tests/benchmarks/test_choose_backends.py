"""From a GPU report to the table that says which backend "auto" asks first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dspa.bench.measurements import Column, Interval, Row
from dspa.kernels.backends.measured import FASTEST

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "choose_backends.py"


def row(name: str, **milliseconds: float) -> Row:
    """A row with a column of each name; _ stands for ", dense"."""
    columns = [
        Column(name.replace("_", ", dense"), "ms", Interval.exactly(value)) for name, value in milliseconds.items()
    ]
    return Row(name, "token_step, GPU", tuple(columns))


ROWS = [
    row("Gemma-2-2B, 2304x16384-bfloat16-batch1", triton_=1.0, cuda_=0.5, triton=9.0),
    row("Gemma-2-2B, 2304x16384-bfloat16-batch64", triton_=1.0, cuda_=1.5),
    row("Gemma-2-2B, 2304x16384-top64-bfloat16-batch1", triton_=1.0, cuda_=1.1),
    row("Gemma-2-9B, 3584x65536-bfloat16-batch1", triton_=1.0),
    row("Gemma-2-2B, 2304x16384-bfloat16, 128 tokens", triton=1.0, cuda=3.0),
    row("Gemma-2-2B, 2304x16384-bfloat16, 1024 tokens", triton=2.0, cuda=1.0),
    row("gemma-2-2b, dynamic cache, eager", unsteered=1.0, triton=1.0, cuda=0.5),
]


def choose(folder: Path, architecture: str | None) -> subprocess.CompletedProcess[str]:
    record = {
        "datetime": "2026-01-01T00:00:00",
        "commit_info": {"id": "0" * 40, "dirty": False},
        "machine_info": {"dspa": "a GPU"},
        "architecture": architecture,
        "benchmarks": [{"extra_info": row.as_json()} for row in ROWS],
    }
    (folder / "report.json").write_text(json.dumps(record))
    command = [sys.executable, str(SCRIPT), str(folder / "report.json"), "--out", str(folder / "table.py")]
    return subprocess.run(command, capture_output=True, text=True)


def test_the_faster_one_of_each_operation_and_sae_is_written_down(tmp_path: Path) -> None:
    done = choose(tmp_path, "sm_90")
    assert done.returncode == 0, done.stderr
    written: dict[str, object] = {}
    exec((tmp_path / "table.py").read_text(), written)
    assert written["FASTEST"] == FASTEST | {
        "sm_90": {
            "token_step": {(2304, 16384, False): "cuda", (2304, 16384, True): "triton"},
            "encode_density": {(2304, 16384, False): "triton"},
        }
    }
    for check in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *check, str(tmp_path / "table.py")], check=True)


def test_a_dry_run_chooses_nothing(tmp_path: Path) -> None:
    done = choose(tmp_path, None)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "names no architecture" in done.stderr
    assert not (tmp_path / "table.py").exists()


@pytest.mark.skipif(bool(FASTEST), reason="there are measurements")
def test_nothing_is_claimed_before_it_was_measured() -> None:
    results = SCRIPT.parent / "results"
    assert not list(results.glob("*-gpu.json")), "there is a report; run benchmarks/choose_backends.py on it"
