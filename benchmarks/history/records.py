"""What a run of the benchmarks measured, as pytest-benchmark's JSON files keep it, and what moved between two runs."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

from dspa.bench.measurements import Better, Column, Interval, Row
from dspa.errors import CorruptFileError, DspaError

RUN_TO_RUN = 0.05
"""By so much, relative times of unchanged code differed between two runs: memory lies elsewhere each time. The samples
of one run cannot show that, so it is added to the interval of a change."""


@dataclass(frozen=True)
class Run:
    """One benchmark run.

    Attributes:
        name: of its file.
        time: when it was made, ISO 8601.
        commit: of the checkout, with "and changes" if there were any.
        machine: processor, threads, versions.
        rows: what was measured.
    """

    name: str
    time: str
    commit: str
    machine: str
    rows: tuple[Row, ...]

    def row(self, name: str) -> Row | None:
        return next((row for row in self.rows if row.name == name), None)


@dataclass(frozen=True)
class Change:
    """How one quantity differs between two runs.

    Attributes:
        row, column, unit: which quantity.
        before, after: its values; relative ones if both runs have them.
        factor: after / before, with its 95 % confidence interval.
        better: which direction is an improvement.
    """

    row: str
    column: str
    unit: str
    before: Interval
    after: Interval
    factor: Interval
    better: Better

    @property
    def moved(self) -> bool:
        """Whether no change at all lies outside the interval."""
        return not self.factor.low <= 1 <= self.factor.high

    @property
    def improved(self) -> bool:
        return self.moved and (self.factor.value < 1) == (self.better == "lower")


def read_run(path: Path) -> Run:
    """The run in a JSON file of pytest-benchmark.

    Raises:
        DspaError: if the file cannot be read.
        CorruptFileError: if it is not a benchmark run of this package.
    """
    try:
        record = json.loads(path.read_text())
    except OSError as error:
        raise DspaError(f"{path} cannot be read ({error.strerror}); pass the JSON file of a benchmark run") from error
    except ValueError as error:
        raise CorruptFileError(f"{path} is not JSON ({error}); run make bench again") from error
    try:
        commit = record["commit_info"]
        rows = [Row.from_json(b["extra_info"]) for b in record["benchmarks"] if "columns" in b["extra_info"]]
        return Run(
            name=path.stem,
            time=record["datetime"],
            commit=f"{commit['id'][:10]}{' and changes' if commit['dirty'] else ''}",
            machine=str(record["machine_info"]["dspa"]),
            rows=tuple(rows),
        )
    except (KeyError, TypeError) as error:
        raise CorruptFileError(
            f"{path} is not a run of this package's benchmarks ({error!r}); run make bench"
        ) from error


def compare(before: Run, after: Run) -> list[Change]:
    """Every quantity that both runs have, in the order of the later one. Rows that failed have none.

    Times are compared by their ratio to the reference of their row, measured in turn with it: two runs meet different
    moments of a machine, or different machines, and only the ratio survives that.
    """
    changes = []
    for row in after.rows:
        earlier = before.row(row.name)
        for column in row.columns if earlier is not None else ():
            old = earlier.column(column.name) if earlier is not None else None
            if old is not None and column.name != row.reference:
                changes.append(_change(row.name, old, column))
    return changes


def _change(row: str, old: Column, new: Column) -> Change:
    relative = old.relative is not None and new.relative is not None
    before = old.relative if relative and old.relative else old.measured
    after = new.relative if relative and new.relative else new.measured
    factor = _factor(before, after)
    if relative:
        factor = replace(factor, low=factor.low / (1 + RUN_TO_RUN), high=factor.high * (1 + RUN_TO_RUN))
    return Change(row, new.name, "x" if relative else new.unit, before, after, factor, new.better)


def _factor(before: Interval, after: Interval) -> Interval:
    """after / before; errors of the two are independent and add up in squares, on a logarithmic scale.

    Where a sign or a zero forbids a quotient, 1 lies inside unless the two intervals are disjoint.
    """
    if min(before.low, after.low) <= 0:
        apart = after.low > before.high or after.high < before.low
        value = after.value / before.value if before.value else math.inf if after.value else 1.0
        return Interval.exactly(value) if apart else Interval(value, min(value, 1.0), max(value, 1.0))
    value = after.value / before.value
    down = math.hypot(math.log(after.value / after.low), math.log(before.high / before.value))
    up = math.hypot(math.log(after.high / after.value), math.log(before.value / before.low))
    return Interval(value, value * math.exp(-down), value * math.exp(up))
