"""A report of `dspa bench` for the terminal and as one self-contained HTML page."""

from __future__ import annotations

import html
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dspa.bench.adapter import EAGER_ADAPTER
from dspa.bench.generation import GenerationCost
from dspa.bench.measurements import Column, Row
from dspa.bench.operations import DELTA, EAGER, EAGER_DENSITY, PRODUCT
from dspa.bench.report import BenchReport
from dspa.bench.tables import digits, group_tables, interval_text
from dspa.util.report_parts import COLORS, Table, html_figure, html_page, new_figure, svg_element

if TYPE_CHECKING:
    from rich.console import Console

LARGEST_RATIO = 50.0  # of the times in a chart whose axis is linear: beyond it the short bars cannot be seen
EXPLANATIONS = {
    "token_step": "Time of editing one token in each row of the batch, the caches emptied before each sample. This "
    "package is blue, plain torch orange; reading the encoder once, which a full pass cannot beat, is green.",
    "encode_density": "Time of counting the active latents of a prompt. The matrix product alone computes the scores "
    "and counts nothing.",
    "adapter_step": "Time of FSRL's edit of one token in each row of the batch, with a random adapter of which 0.7 % "
    "of the latents fire. Reading its weight once is green.",
}


def tables(report: BenchReport) -> Iterator[Table]:
    """Every table, in the order they are shown."""
    yield from group_tables(report.rows)
    if report.token_costs:
        yield _cost_table(report)
    if report.generation is not None:
        yield _generation_table(report.generation)


def _cost_table(report: BenchReport) -> Table:
    rows = tuple(
        (cost.name, f"{cost.bytes_read / 1e6:.3g}", digits(cost.predicted), digits(cost.measured))
        for cost in report.token_costs
    )
    note = (
        f"Predicted: bytes read of the encoder, at the measured {report.read_bandwidth:.3g} GB/s. What is measured "
        "beyond that is arithmetic and the call itself."
    )
    return Table("Cost of a steered token", note, ("", "MB read", "predicted ms", "measured ms"), rows)


def _generation_table(cost: GenerationCost) -> Table:
    rows = (
        ("step of the model alone", interval_text(cost.unsteered)),
        ("step, steered", interval_text(cost.steered)),
        ("added by steering, measured", interval_text(cost.added)),
        ("added by steering, predicted", "-" if cost.predicted is None else digits(cost.predicted)),
    )
    note = (
        f"Medians of {cost.steps} steps each with 95 % intervals, greedy, batch 1. Predicted from the "
        f"{cost.bytes_per_token / 1e6:.3g} MB of the encoder that a token read; Python's own time is not in it."
    )
    return Table(f"A generated token of {cost.model}", note, ("", "ms"), rows)


def print_report(console: Console, report: BenchReport) -> None:
    """Prints the tables."""
    console.print(report.subject, style="bold", highlight=False, markup=False)
    for table in tables(report):
        table.print(console)
    console.print(_footer(report), style="dim", highlight=False, markup=False)


def to_html(report: BenchReport) -> str:
    """One page that needs no other file.

    Raises:
        InvalidInputError: if matplotlib is not installed.
    """
    body = [
        "<h1>Speed of dspa on this machine</h1>",
        f"<p>{html.escape(report.subject)}. Results were checked before they were timed, and the ways were timed in "
        "turn.</p>",
    ]
    charts = [
        html_figure(_bars(row), f"{row.name}. {EXPLANATIONS.get(row.group, '')}".strip())
        for row in report.rows
        if row.failed is None
    ]
    body.append(f'<div class="charts">{"".join(charts)}</div>')
    body += [table.to_html() for table in tables(report)]
    body.append(f'<p class="note">{html.escape(_footer(report))}</p>')
    return html_page("Speed of dspa", body)


def _footer(report: BenchReport) -> str:
    return f"{report.machine}; dspa {report.provenance.dspa}, commit {report.provenance.commit}"


def _bars(row: Row) -> str:
    """A horizontal bar for each column, with its quartiles, its time, and how many times faster than the reference."""
    figure = new_figure((7.2, 1.4 + 0.36 * len(row.columns)))
    axes: Any = figure.add_subplot()
    times = [column.measured.value for column in row.columns]
    longest, shortest = max(times), min(times)
    logarithmic = longest > LARGEST_RATIO * shortest
    if logarithmic:
        axes.set_xscale("log")
    for y, column in enumerate(row.columns):
        time = column.measured.value
        low, high = column.spread or (time, time)
        axes.barh(y, time, xerr=[[time - low], [high - time]], color=_color(column), height=0.66, ecolor="0.35")
        ratio = f", {digits(1 / column.relative.value)}x" if column.relative and column.name != row.reference else ""
        end = max(time, high)
        axes.text(
            1.06 * end if logarithmic else end + 0.012 * longest,
            y,
            f"{digits(time)} ms{ratio}",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(range(len(row.columns)), [column.name for column in row.columns], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(*((shortest / 2, longest * (longest / shortest) ** 0.4) if logarithmic else (0, 1.3 * longest)))
    scale = "ms, logarithmic" if logarithmic else "ms"
    axes.set_xlabel(f"{scale}; median with quartiles; x: times faster than {row.reference}", fontsize=8)
    axes.set_title(row.group, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    return svg_element(figure)


def _color(column: Column) -> str:
    if column.name.startswith("read "):
        return COLORS[2]
    return COLORS[1] if column.name.startswith((EAGER, DELTA, PRODUCT, EAGER_DENSITY, EAGER_ADAPTER)) else COLORS[0]
