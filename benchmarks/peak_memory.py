"""The most memory that a function takes beyond what was there before it, in a process of its own (Linux)."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspa.bench.measurements import Column, Interval

STATUS = Path("/proc/self/status")
PROCESSES = 2
IMPORTED = (
    "transformers",
    "dspa.sae.sae_lens",
    "dspa.offline.collection",
    "dspa.organism.demo",
    "dspa.bench.operations",
)
"""What the server of processes imports once; each process would take seconds for it."""


def peak_column(
    name: str, prepare: Callable[..., Callable[[], object]], *arguments: Any, processes: int = PROCESSES
) -> Column:
    """MiB of resident memory at the peak of what `prepare(*arguments)` returns, above those at its start. The interval
    is the range of the processes.

    Args:
        name: of the column.
        prepare: a function of a module; it loads what is needed, warms it up, and returns what is measured.
        processes: how many.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    peaks = []
    for _ in range(processes):
        with context.Pool(1) as pool:
            peaks.append(pool.apply(_measure, (prepare, arguments)) / 2**20)
    return Column(name, "MiB", Interval.around_median(peaks), rounds=processes)


def _measure(prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...]) -> int:
    run = prepare(*arguments)
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    before = _kibibytes("VmRSS")
    run()
    return (_kibibytes("VmHWM") - before) * 1024


def _kibibytes(field: str) -> int:
    return next(int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
