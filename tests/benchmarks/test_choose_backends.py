"""From a GPU report to the table that says which backend "auto" asks first."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import choose_backends  # pyright: ignore[reportMissingImports]
import pytest
from history.records import read_run

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


def write_report(folder: Path, architecture: str | None) -> Path:
    record = {
        "datetime": "2026-01-01T00:00:00",
        "commit_info": {"id": "0" * 40, "dirty": False},
        "machine_info": {"dspa": "a GPU"},
        "architecture": architecture,
        "benchmarks": [{"extra_info": row.as_json()} for row in ROWS],
    }
    path = folder / "20260101-0000-0000000-gpu.json"
    path.write_text(json.dumps(record))
    return path


def choose(report: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """The exit code of `choose_backends.py REPORT --out OUT`."""
    monkeypatch.setattr(sys, "argv", ["choose_backends.py", str(report), "--out", str(out)])
    return choose_backends.main()


def table_of(results: Path) -> dict[str, object]:
    """What the reports in a folder say of each architecture, the latest the last."""
    reports = sorted(results.glob("*-gpu.json"))  # their names begin with their dates
    latest = {json.loads(path.read_text())["architecture"]: choose_backends.fastest(read_run(path)) for path in reports}
    return {architecture: found for architecture, found in latest.items() if any(found.values())}


CHOSEN = {
    "token_step": {(2304, 16384, False): "cuda", (2304, 16384, True): "triton"},
    "encode_density": {(2304, 16384, False): "triton"},
}


def test_the_faster_one_of_each_operation_and_sae_is_written_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert choose(write_report(tmp_path, "sm_90"), tmp_path / "table.py", monkeypatch) == 0
    written: dict[str, object] = {}
    exec((tmp_path / "table.py").read_text(), written)
    assert written["FASTEST"] == FASTEST | {"sm_90": CHOSEN}
    for check in (["check"], ["format", "--check"]):
        subprocess.run([sys.executable, "-m", "ruff", *check, str(tmp_path / "table.py")], check=True)


def test_a_dry_run_chooses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert choose(write_report(tmp_path, None), tmp_path / "table.py", monkeypatch) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "names no architecture" in line
    assert not (tmp_path / "table.py").exists()


def test_the_table_is_what_the_reports_say(tmp_path: Path) -> None:
    write_report(tmp_path, "sm_90")
    assert table_of(tmp_path) == {"sm_90": CHOSEN}
    assert table_of(SCRIPT.parent / "results") == FASTEST, "run benchmarks/choose_backends.py on the latest report"
