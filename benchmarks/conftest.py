"""Keeps the rows of a run, in pytest-benchmark's JSON file and for the table at the end."""

from __future__ import annotations

import platform
import sys
from typing import Any

import pytest
import torch
from record import ROWS, Record

from dspa.bench_records import Run
from dspa.bench_report import print_run
from dspa.kernels import available


@pytest.fixture
def record(benchmark: Any) -> Record:
    return Record(benchmark)


def machine() -> str:
    """What the numbers depend on beside the code."""
    processor = "no C++ library"
    if available()["cpu"] == "available":
        processor = torch.ops.dspa.cpu_capability()
    return (
        f"{processor_name()}, {torch.get_num_threads()} threads, {processor}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )


def processor_name() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.machine()


@pytest.hookimpl
def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["dspa"] = machine()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if ROWS:
        from rich.console import Console

        terminalreporter.section("measured")
        print_run(Console(file=sys.__stdout__, width=160), Run("this run", "", "", machine(), tuple(ROWS)))
