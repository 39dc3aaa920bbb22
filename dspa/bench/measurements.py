"""Measured quantities: a value with its interval, the columns of a row, and rows."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

Better = Literal["lower", "higher"]
NORMAL_95 = 1.959964


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % confidence interval; all three are the same where a value is counted and has no noise."""

    value: float
    low: float
    high: float

    @classmethod
    def exactly(cls, value: float) -> Interval:
        return cls(value, value, value)

    @classmethod
    def around_median(cls, samples: Sequence[float]) -> Interval:
        """The median, with the order statistics that enclose it in 95 % of cases whatever the distribution.

        Both ends are the extremes where there are fewer than six samples.
        """
        ordered, count = sorted(samples), len(samples)
        rank = max(0, math.floor(count / 2 - NORMAL_95 * math.sqrt(count) / 2 - 0.5))
        return cls(statistics.median(ordered), ordered[rank], ordered[count - 1 - rank])


@dataclass(frozen=True)
class Column:
    """One quantity of a row.

    Attributes:
        name: what was measured.
        unit: such as "ms", "bytes", "x".
        measured: the value, for a time the median over rounds.
        better: which direction is an improvement.
        spread: first and third quartile over rounds, for a time.
        relative: for a time, its ratio to the row's reference column in the same round: what the machine did to both
            drops out.
        rounds: how often it was measured.
        bytes_read: of the encoder, where that is what takes the time.
    """

    name: str
    unit: str
    measured: Interval
    better: Better = "lower"
    spread: tuple[float, float] | None = None
    relative: Interval | None = None
    rounds: int = 1
    bytes_read: int | None = None

    @property
    def bandwidth(self) -> float | None:
        """GB/s; None where only a few rows are read and the time is not spent on that."""
        read = self.bytes_read
        return read / self.measured.value / 1e6 if self.unit == "ms" and read and read > 1 << 23 else None


@dataclass(frozen=True)
class Row:
    """Quantities that belong together.

    Attributes:
        name: unique within a run.
        group: the table it stands in.
        columns: what was measured; empty for a row that failed.
        reference: the column whose times the others are divided by.
        failed: why the check of its results failed, else None.
        left_out: what was not timed because a single call takes too long, and how long.
    """

    name: str
    group: str
    columns: tuple[Column, ...]
    reference: str | None = None
    failed: str | None = None
    left_out: str = ""

    def column(self, name: str) -> Column | None:
        return next((column for column in self.columns if column.name == name), None)

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> Row:
        columns = tuple(_column(column) for column in record["columns"])
        return replace(cls(**{**record, "columns": ()}), columns=columns)


def _column(record: dict[str, Any]) -> Column:
    values = dict(record)
    values["measured"] = Interval(**record["measured"])
    values["relative"] = None if record["relative"] is None else Interval(**record["relative"])
    values["spread"] = None if record["spread"] is None else (record["spread"][0], record["spread"][1])
    return Column(**values)
