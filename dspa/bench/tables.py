"""Measured rows as tables."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from dspa.bench.measurements import Column, Interval, Row
from dspa.bench.operations import READ, READ_ADAPTER
from dspa.util.report_parts import Table

COLUMNS = ("row", "measured", "value", "GB/s", "of read bandwidth", "reference / it")


def group_tables(rows: Sequence[Row]) -> Iterator[Table]:
    """A table for each group of rows. Failed rows stand in it as failed, without a number."""
    for group in dict.fromkeys(row.group for row in rows):
        cells = [line for row in rows if row.group == group for line in _row_cells(row)]
        note = (
            "Medians with quartiles for times, 95 % intervals for what is estimated, plain numbers for what is counted."
        )
        left_out = dict.fromkeys(row.left_out for row in rows if row.group == group and row.left_out)
        note += "".join(f" Left out: {text}." for text in left_out)
        used = [i for i in range(len(COLUMNS)) if i < 3 or any(line[i] for line in cells)]
        kept = tuple(tuple(line[i] for i in used) for line in cells)
        yield Table(group, note, tuple(COLUMNS[i] for i in used), kept, ("measured",))


def _row_cells(row: Row) -> Iterator[tuple[str, ...]]:
    if row.failed is not None:
        yield (row.name, f"FAILED: {row.failed}", "", "", "", "")
        return
    read = row.column(READ) or row.column(READ_ADAPTER)
    bandwidth = None if read is None else read.bandwidth
    for column in row.columns:
        speed = column.bandwidth
        yield (
            row.name,
            column.name,
            _value(column),
            f"{speed:.3g}" if speed else "",
            f"{speed / bandwidth:.0%}" if speed and bandwidth else "",
            f"{digits(1 / column.relative.value)}x" if column.relative else "",
        )


def _value(column: Column) -> str:
    measured = column.measured
    if column.spread is not None:
        low, high = map(digits, column.spread)
        return f"{digits(measured.value)} {column.unit} ({low} to {high})"
    return f"{interval_text(measured)} {column.unit}".strip()


def interval_text(interval: Interval) -> str:
    """A value with its interval, or alone where it has none."""
    if interval.low == interval.high:
        return digits(interval.value)
    return f"{digits(interval.value)} ({digits(interval.low)} to {digits(interval.high)})"


def digits(value: float) -> str:
    """Three significant digits, without an exponent as long as it can be read."""
    return f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"
