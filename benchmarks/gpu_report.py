"""The GPU report: JSON that `dspa bench` reads, Markdown, and a roofline."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from gpu_rows import COMPILED, NEEDS_MAXIMUM, PRODUCT, UNSTEERED
from gpu_timing import Ceilings
from history.records import Run
from history.report import run_tables
from launch_model import H100, Mode, predict

from dspa.bench.measurements import Column, Row
from dspa.bench.operations import READ
from dspa.bench.tables import digits
from dspa.errors import InvalidInputError
from dspa.util.report_parts import COLORS, Table, new_figure, png_bytes

MODELLED: tuple[tuple[Mode, str], ...] = (("dense", "triton, dense"), ("lazy", "triton, lazy, needs M_t"))
LEAST_BANDWIDTH = 0.85
LEAST_OF_READ = 0.85
MOST_LAZY = 1.1
LEAST_SPEEDUP = 3.0
MOST_OVER_PRODUCT = 1.3
LEAST_TOKENS = 0.99


@dataclass(frozen=True)
class Failure:
    """A row that raised an error before it had a result.

    Attributes:
        after: how many rows were there by then.
        reason: the error.
    """

    after: int
    reason: str


@dataclass
class Report:
    """What a run of `make gpu` has found so far; kept on disk from the first row on.

    Attributes:
        run: the rows, and where and when they were measured.
        ceilings: what the GPU does at most.
        steps: what was done beside measuring.
        folder: where the files go.
        architecture: of the GPU; None for a dry run, whose times are held against no budget.
        not_built: the GPU backends that could not be measured, each with the reason.
        failures: rows that raised an error.
        skipped: rows that there was no time for.
    """

    run: Run
    ceilings: Ceilings
    steps: list[Any]
    folder: Path
    architecture: str | None
    not_built: tuple[str, ...] = ()
    failures: list[Failure] = field(default_factory=list[Failure])
    skipped: int = 0

    def add(self, row: Row) -> None:
        self.run = replace(self.run, rows=(*self.run.rows, row))
        self.write()

    def fail(self, failure: Failure) -> None:
        self.failures.append(failure)
        self.write()

    def write(self, *, plot: bool = False) -> str:
        """Writes the files and returns what they are called, without their endings."""
        self.folder.mkdir(parents=True, exist_ok=True)
        stem = self.folder / self.run.name
        commit, _, changes = self.run.commit.partition(" ")
        record = {
            "datetime": self.run.time,
            "commit_info": {"id": commit, "dirty": bool(changes)},
            "machine_info": {"dspa": self.run.machine},
            "architecture": self.architecture,
            "not_built": list(self.not_built),
            "benchmarks": [{"extra_info": row.as_json()} for row in self.run.rows],
            "ceilings": asdict(self.ceilings),
            "steps": [asdict(step) for step in self.steps],
            "failures": [asdict(failure) for failure in self.failures],
            "rows_without_time": self.skipped,
        }
        stem.with_suffix(".json").write_text(json.dumps(record, indent=1))
        stem.with_suffix(".md").write_text(markdown(self))
        if plot:
            try:
                stem.with_suffix(".png").write_bytes(roofline(self.run, self.ceilings))
            except InvalidInputError as error:  # matplotlib is not asked for
                print(f"no plot: {error}")
        return str(stem)


def markdown(report: Report) -> str:
    """Machine, steps, budgets met and missed, and every row."""
    run, ceilings = report.run, report.ceilings
    lines = [
        f"# GPU report{''.join(f'; not measured: {backend}' for backend in report.not_built)}",
        "",
        f"{run.machine}. {run.time}, commit {run.commit}.",
        "",
        f"Measured in the same run: copy {digits(ceilings.copy_gb_per_s)} GB/s (read plus written), read "
        f"{digits(ceilings.read_gb_per_s)} GB/s, bf16 matrix product {digits(ceilings.matrix_tflop_per_s)} TFLOP/s. "
        "Times are replays of a captured graph with the L2 cache emptied, every column in turn, unless a name says "
        "otherwise.",
        "",
    ]
    lines += [f"- {step.name}: {step.state.upper()}; {step.summary}" for step in report.steps]
    lines += [f"- row {failure.after + 1} raised: {failure.reason}" for failure in report.failures]
    lines += [f"- {report.skipped} rows had no time left" if report.skipped else "- every row was reached", ""]
    if report.architecture is not None:
        lines.append(budget_table(run, ceilings).to_markdown())
    if report.architecture == H100.architecture:
        lines.append(prediction_table(run).to_markdown())
    lines += [table.to_markdown() for table in run_tables(run)]
    return "\n".join(lines)


def budget_table(run: Run, ceilings: Ceilings) -> Table:
    """Every budget with every row that it is about."""
    rows = []
    for row in run.rows:
        for what, value, limit, at_least in _budgets(row, ceilings):
            met = value >= limit if at_least else value <= limit
            rows.append(
                (row.name, what, f"{value:.3g}", f"{'>=' if at_least else '<='} {limit}", "met" if met else "missed")
            )
    return Table(
        "Budgets",
        "Each from the medians of one row.",
        ("row", "budget", "measured", "asked", ""),
        tuple(rows),
        ("budget",),
    )


def prediction_table(run: Run) -> Table:
    """What `launch_model` predicts for an H100 beside what was measured, for the launches that it knows."""
    rows = []
    for row in run.rows:
        shape = re.search(r"(\d+)x(\d+)-bfloat16-batch(\d+)$", row.name)
        if shape is None or row.group != "token_step, GPU":
            continue
        d_model, d_sae, batch = map(int, shape.groups())
        for mode, name in MODELLED:
            column = row.column(name)
            if column is None:
                continue
            expected = predict(H100, d_model, d_sae, batch, mode)
            measured = column.measured.value * 1e3
            times = (f"{time:.1f} us" for time in (expected.floor, expected.total, measured))
            rows.append((row.name, name, *times, f"{expected.floor / measured:.2f}"))
    return Table(
        "Predicted and measured",
        "The model is benchmarks/launch_model.py with the constants of an H100; the floor only reads W_enc.",
        ("row", "launch", "floor", "predicted", "measured", "floor / measured"),
        tuple(rows),
    )


def _budgets(row: Row, ceilings: Ceilings) -> Iterator[tuple[str, float, float, bool]]:
    compiled, product, read = row.column(COMPILED), row.column(PRODUCT), row.column(READ)
    for column in row.columns:
        time = column.measured.value
        if column.name.endswith(", dense") and "batch1" in row.name.split("-")[-1:]:
            if column.bandwidth:
                yield (
                    f"{column.name}: share of copy bandwidth",
                    column.bandwidth / ceilings.copy_gb_per_s,
                    LEAST_BANDWIDTH,
                    True,
                )
            if read is not None:
                yield (
                    f"{column.name}: {READ}, over it",
                    read.measured.value / time,
                    LEAST_OF_READ,
                    True,
                )
            lazy = row.column(column.name.replace(", dense", f", lazy, {NEEDS_MAXIMUM}"))
            if lazy is not None:
                yield f"{lazy.name}: over dense", lazy.measured.value / time, MOST_LAZY, False
            if compiled is not None:
                yield f"{column.name}: times faster than compiled", compiled.measured.value / time, LEAST_SPEEDUP, True
        if product is not None and column.unit == "ms" and column is not product and ", 1024 tokens" in row.name:
            yield f"{column.name}: over the bare product", time / product.measured.value, MOST_OVER_PRODUCT, False
        if row.reference == UNSTEERED and column.name != UNSTEERED and column.relative is not None:
            yield f"{column.name}: steered / unsteered tokens/s", 1 / column.relative.value, LEAST_TOKENS, True


def roofline(run: Run, ceilings: Ceilings) -> bytes:
    """Every full pass over an encoder: FLOP/s against FLOPs per byte, under what the machine does at most.

    Raises:
        InvalidInputError: if matplotlib is not installed.
    """
    figure = new_figure((7.6, 5.0))
    axes: Any = figure.add_subplot()
    intensities = [2.0**power for power in range(-1, 11)]
    roof = [min(i * ceilings.read_gb_per_s / 1e3, ceilings.matrix_tflop_per_s) for i in intensities]
    axes.plot(intensities, roof, color="#55606e", label="read bandwidth, matrix product")
    points: dict[str, list[tuple[float, float]]] = {}
    for row in run.rows:
        batch = _batch(row)
        for column in row.columns:
            if batch and column.bytes_read and "warm" not in column.name:
                points.setdefault(column.name, []).append(_point(column, batch))
    for index, (name, values) in enumerate(points.items()):
        axes.scatter(*zip(*values, strict=True), s=14, label=name, color=COLORS[index % len(COLORS)])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("FLOPs per byte of W_enc")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(run.machine.split(",")[0], fontsize=9)
    axes.legend(fontsize=7)
    return png_bytes(figure)


def _batch(row: Row) -> int:
    """0 for a row that is not one of token_step."""
    _, found, batch = row.name.rpartition("-batch")
    return int(batch) if found else 0


def _point(column: Column, batch: int) -> tuple[float, float]:
    """bf16 weights: two FLOPs for each of an element's two bytes and each row of the batch."""
    assert column.bytes_read is not None
    flops = column.bytes_read * batch
    return float(batch), flops / column.measured.value / 1e9
