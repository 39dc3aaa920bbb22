"""Timing several things in turn, so that whatever else the machine does meets all of them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from token_step_case import Column


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one column."""

    name: str
    median: float
    low: float
    high: float
    rounds: int
    bytes_read: int | None

    def as_json(self) -> dict[str, object]:
        return asdict(self)


class Rounds:
    """Times of each column, one after the other in every round."""

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = columns
        self.milliseconds: list[list[float]] = [[] for _ in columns]
        for column in columns:  # compiles, reads the weights, fills the scratch
            column.run()
            column.run()

    def run_one(self) -> None:
        for column, times in zip(self.columns, self.milliseconds, strict=True):
            start = time.perf_counter()
            for _ in range(column.repeats):
                column.run()
            times.append((time.perf_counter() - start) / column.repeats * 1e3)

    def run_for(self, seconds: float, at_least: int = 5) -> None:
        end = time.perf_counter() + seconds
        rounds = 0
        while rounds < at_least or time.perf_counter() < end:
            self.run_one()
            rounds += 1

    def timings(self) -> list[Timing]:
        """Medians, with the quartiles as spread."""
        answer = []
        for column, times in zip(self.columns, self.milliseconds, strict=True):
            low, median, high = statistics.quantiles(times, n=4)
            answer.append(Timing(column.name, median, low, high, len(times), column.bytes_read))
        return answer
