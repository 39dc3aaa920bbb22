"""Keeps the rows of a run, in pytest-benchmark's JSON file and for the table at the end."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from history.records import Run
from history.report import print_run
from organism_runs import organism
from record import ROWS, Record

from dspa.bench.report import machine
from dspa.organism.demo import Organism


@pytest.fixture(scope="session")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Organism:
    """The organism with its densities: collected once for all rows."""
    return organism(tmp_path_factory.mktemp("organism"))


@pytest.fixture
def record(benchmark: Any) -> Record:
    return Record(benchmark)


@pytest.hookimpl
def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["dspa"] = machine()


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if ROWS:
        from rich.console import Console

        terminalreporter.section("measured")
        print_run(Console(file=sys.__stdout__, width=160), Run("this run", "", "", machine(), tuple(ROWS)))
