"""Keeps the rows of a run, in pytest-benchmark's JSON file and for the table at the end."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dspa.bench_records import Column, Row, Run
from dspa.bench_report import print_run
from dspa.kernels import available

ROWS: list[Row] = []


class Record:
    """Checks the results of a row, then measures it, and keeps what came of it."""

    def __init__(self, benchmark: Any) -> None:
        self._benchmark = benchmark

    def __call__(
        self,
        name: str,
        group: str,
        measure: Callable[[], tuple[Column, ...]],
        *,
        check: Callable[[], None] | None = None,
        reference: str | None = None,
    ) -> None:
        """A row whose check fails is kept as failed, without a number, and fails the run.

        Args:
            name, group, reference: see `Row`.
            measure: gives the columns.
            check: raises AssertionError if a result is wrong; None where `measure` counts and does not time.
        """
        try:
            if check is not None:
                check()
            row = Row(name, group, measure(), reference)
        except AssertionError as failure:
            row = Row(name, group, (), reference, failed=(str(failure).strip() or "check failed").splitlines()[0])
        ROWS.append(row)
        self._benchmark.extra_info.update(row.as_json())
        self._benchmark.pedantic(
            lambda: None, rounds=1
        )  # pytest-benchmark keeps the record; the columns are what counts
        if row.failed is not None:
            pytest.fail(f"{name}: {row.failed}")


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
