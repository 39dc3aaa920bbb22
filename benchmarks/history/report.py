"""Benchmark runs as tables, as what moved between two of them, and as a page with their history."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from dspa.bench.measurements import Column, Interval, Row
from dspa.bench.tables import group_tables, interval_text
from dspa.util.report_parts import COLORS, Table, html_page
from history.records import Change, Run

if TYPE_CHECKING:
    from rich.console import Console

WORDS = ("measured", "change")


def run_tables(run: Run) -> Iterator[Table]:
    """A table for each group of rows of a run."""
    return group_tables(run.rows)


def change_table(before: Run, after: Run, changes: Sequence[Change], *, everything: bool = False) -> Table:
    """What moved beyond its noise, or everything."""
    shown = [change for change in changes if everything or change.moved]
    still = sum(not change.moved for change in changes)
    failed = [row.name for row in after.rows if row.failed is not None]
    note = (
        f"From {before.name} ({before.commit}) to {after.name} ({after.commit}). Factors with 95 % intervals; times "
        f"are compared relative to the reference of their row. {still} of {len(changes)} quantities did not move."
        f"{'' if not failed else ' FAILED: ' + ', '.join(failed) + '.'}"
        f"{'' if before.machine == after.machine else ' The machines differ.'}"
    )
    rows = tuple(
        (
            change.row,
            change.column,
            f"{interval_text(change.before)} {change.unit}",
            f"{interval_text(change.after)} {change.unit}",
            interval_text(change.factor),
            "better" if change.improved else "worse" if change.moved else "as before",
        )
        for change in shown
    )
    return Table("What moved", note, ("row", "measured", "before", "after", "after / before", "change"), rows, WORDS)


def print_run(console: Console, run: Run) -> None:
    """Prints the tables of a run."""
    for table in run_tables(run):
        table.print(console)
    console.print(f"{run.name}: {run.time}, commit {run.commit}, {run.machine}", style="dim", highlight=False)


def to_html(runs: Sequence[Run]) -> str:
    """The latest run and, where there are several, their history from the earliest on, as one page that needs no other
    file."""
    latest = runs[-1]
    history = Table(
        "Runs",
        "From the earliest to the latest, in which order the lines above go from left to right.",
        ("", "time", "commit", "machine", "rows", "failed"),
        tuple(
            (
                str(i),
                run.time[:16],
                run.commit,
                run.machine,
                str(len(run.rows)),
                str(sum(bool(r.failed) for r in run.rows)),
            )
            for i, run in enumerate(runs, 1)
        ),
        ("time", "commit", "machine"),
    )
    several = len(runs) > 1
    body = [
        "<h1>Benchmarks of dspa</h1>",
        "<p>Every number was checked before it was timed, and every time was taken in turn with its reference. Bars "
        f"are those of the latest run, {html.escape(latest.name)}; the reference that a row is compared with is orange."
        + (
            " Below them, how a quantity went over the runs: times as multiples of their reference, so that runs on a "
            "fast and a slow day can be compared; lower is faster."
            if several
            else ""
        )
        + "</p>",
    ]
    tables = {table.title: table for table in run_tables(latest)}
    for group in tables:
        body.append(f"<h2>{html.escape(group)}</h2>")
        for row in (row for row in latest.rows if row.group == group and row.failed is None):
            body.append(f"<h3>{html.escape(row.name)}</h3>")
            body += [_bars(row, columns) for columns in _by_unit(row)]
            lines = [_history(row, column, runs) for column in row.columns if column.name != row.reference]
            if several and any(lines):
                body.append(f'<div class="runs">{"".join(lines)}</div>')
        body.append(tables[group].to_html())
    body.append(history.to_html())
    return html_page("Benchmarks of dspa", body)


def _by_unit(row: Row) -> list[list[Column]]:
    """The columns of a row by their unit: one chart shows one quantity."""
    units: dict[str, list[Column]] = {}
    for column in row.columns:
        units.setdefault(column.unit or column.name, []).append(column)  # without a unit it is a quantity of its own
    return list(units.values())


def _bars(row: Row, columns: Sequence[Column]) -> str:
    """A bar for each column, and its value with the factor over the reference."""
    longest = max(abs(column.measured.value) for column in columns) or 1.0
    lines = []
    for column in columns:
        width = 100 * abs(column.measured.value) / longest
        base = ' class="base"' if column.name == row.reference else ""
        factor = ""
        if column.relative is not None and column.name != row.reference:
            factor = f", {1 / column.relative.value:.3g}x"
        value = f"{column.measured.value:.4g} {column.unit}{factor}"
        lines.append(
            f'<div><span>{html.escape(column.name)}</span><i{base} style="width:{width:.1f}%"></i>'
            f"<b>{html.escape(value)}</b></div>"
        )
    return f'<div class="bars">{"".join(lines)}</div>'


def _history(row: Row, column: Column, runs: Sequence[Run]) -> str:
    """A line over the runs that have a quantity, with its first and last value; nothing for fewer than two."""
    points = [(i, _plotted(found).value) for i, run in enumerate(runs) if (found := _find(run, row.name, column.name))]
    if len(points) < 2:
        return ""
    values = [value for _, value in points]
    low, high = min(values), max(values)
    scale = 30 / (high - low) if high > low else 0.0
    places = [(10 + 180 * i / (len(runs) - 1), 38 - scale * (value - low)) for i, value in points]
    path = " ".join(f"{x:.0f},{y:.1f}" for x, y in places)
    dots = "".join(f'<circle cx="{x:.0f}" cy="{y:.1f}" r="2"/>' for x, y in places)
    unit = f"time / {row.reference}" if column.relative else column.unit
    words = html.escape(f"{column.name}: {values[0]:.3g} to {values[-1]:.3g}" + (f" ({unit})" if unit else ""))
    return (
        f'<figure role="img" aria-label="{words}"><svg viewBox="0 0 200 44" fill="{COLORS[0]}">'
        f'<polyline points="{path}" fill="none" stroke="{COLORS[0]}"/>{dots}</svg>'
        f"<figcaption>{words}</figcaption></figure>"
    )


def _plotted(column: Column) -> Interval:
    return column.relative or column.measured


def _find(run: Run, row: str, column: str) -> Column | None:
    found = run.row(row)
    return None if found is None else found.column(column)
