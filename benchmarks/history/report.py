"""Benchmark runs as tables, as what moved between two of them, and as a page with their history."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dspa.bench.measurements import Column, Interval, Row
from dspa.bench.tables import group_tables, interval_text
from dspa.util.report_parts import COLORS, Table, html_figure, html_page, new_figure, svg_element
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
    """The history of the runs, from the earliest to the latest, as one page that needs no other file.

    Raises:
        InvalidInputError: if matplotlib is not installed.
    """
    latest = runs[-1]
    history = Table(
        "Runs",
        "From the earliest to the latest; the number stands below the charts.",
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
    body = [
        "<h1>Benchmarks of dspa</h1>",
        "<p>Every number was checked before it was timed, and every time was taken in turn with its reference. Charts "
        "show times as multiples of that reference, so that runs on a fast and a slow day can be compared; lower is "
        "faster. Bars are 95 % intervals.</p>",
        history.to_html(),
    ]
    tables = {table.title: table for table in run_tables(latest)}
    for group in tables:
        body.append(f"<h2>{html.escape(group)}</h2>")
        rows = [row for row in latest.rows if row.group == group and row.failed is None]
        charts = [_chart(row, columns, runs) for row in rows for columns in _by_unit(row)]
        body.append(f'<div class="charts">{"".join(charts)}</div>')
        body.append(tables[group].to_html())
    return html_page("Benchmarks of dspa", body)


def _by_unit(row: Row) -> list[list[Column]]:
    """The columns of a row that can share an axis; the reference, always 1, is none of them."""
    units: dict[str, list[Column]] = {}
    for column in row.columns:
        if column.name != row.reference:
            units.setdefault("relative" if column.relative else column.unit, []).append(column)
    return list(units.values())


def _chart(row: Row, columns: Sequence[Column], runs: Sequence[Run]) -> str:
    figure = new_figure((7.2, 3.4))
    axes: Any = figure.add_subplot()
    for index, column in enumerate(columns):
        points = [(i, _plotted(found)) for i, run in enumerate(runs, 1) if (found := _find(run, row.name, column.name))]
        numbers, values = [i for i, _ in points], [interval.value for _, interval in points]
        errors = [[abs(v.value - v.low) for _, v in points], [abs(v.high - v.value) for _, v in points]]
        style = "-" if index < len(COLORS) else "--"
        color = COLORS[index % len(COLORS)]
        axes.errorbar(
            numbers, values, errors, label=column.name, color=color, linestyle=style, marker="o", ms=3, lw=1.2
        )
    axes.set_xticks(range(1, len(runs) + 1))
    axes.set_xlabel("run")
    if columns[0].relative:
        axes.set_yscale("log")
        axes.set_ylabel(f"time / {row.reference}")
    else:
        axes.set_ylabel(columns[0].unit)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes.spines[["top", "right"]].set_visible(False)
    return html_figure(svg_element(figure), row.name)


def _plotted(column: Column) -> Interval:
    return column.relative or column.measured


def _find(run: Run, row: str, column: str) -> Column | None:
    found = run.row(row)
    return None if found is None else found.column(column)
