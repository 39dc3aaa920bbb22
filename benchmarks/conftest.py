"""Prints the table when a run ends."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from table import markdown

RESULTS: dict[str, list[dict[str, object]]] = {}


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if RESULTS:
        terminalreporter.section("CPU kernels")
        terminalreporter.write_line(machine())
        terminalreporter.write_line(markdown(RESULTS))


def machine() -> str:
    capability = torch.ops.dspa.cpu_capability()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"torch {torch.__version__}, {torch.get_num_threads()} threads, {capability}, load average {load}"


@pytest.hookimpl
def pytest_benchmark_update_machine_info(config: Any, machine_info: dict[str, Any]) -> None:
    machine_info["dspa"] = machine()
