"""The timing of `dspa.bench`, for as long as this suite measures a row."""

from __future__ import annotations

import os
from collections.abc import Sequence

import dspa.bench.timing
from dspa.bench.measurements import Column
from dspa.bench.timing import Way, time_column

__all__ = ["Way", "time_column", "timed"]

SECONDS = float(os.environ.get("DSPA_BENCH_SECONDS", "1.5"))  # per row
SECONDS_A_CALL = (
    0.5  # a baseline that takes longer is timed in float32 alone; 16 bits are that slow without instructions
)


def timed(ways: Sequence[Way], reference: str, *, seconds: float = SECONDS, at_least: int = 5) -> tuple[Column, ...]:
    """See `dspa.bench.timing.timed`."""
    return dspa.bench.timing.timed(ways, reference, seconds=seconds, at_least=at_least)
