"""Tables and the figure of a file that `head_to_head.py` wrote.

python benchmarks/head_to_head_report.py benchmarks/results/organism/head_to_head.json [--png docs/head_to_head.png]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspa.organism.evaluation import Estimate
from dspa.organism.language import KINDS
from dspa.util.files import write_atomically
from dspa.util.report_parts import new_figure, png_bytes

Row = dict[str, Any]


def rewards(row: Row) -> NDArray[np.int64]:
    return np.array(row["preferred"]) - np.array(row["dispreferred"])


def gain(row: Row, unsteered: Row) -> Estimate:
    """The paired difference of rewards to the unsteered model."""
    return Estimate.from_samples(rewards(row) - rewards(unsteered))


def text(estimate: Estimate, sign: bool = True) -> str:
    return f"{estimate.mean:{'+' if sign else ''}.2f} ± {estimate.half_width:.2f}"


def counts_of(report: Row) -> list[int]:
    return sorted({row["triples"] for row in report["rows"].values() if row["triples"]})


def methods_of(report: Row) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in report["rows"].values() if row["triples"]))


def gains_table(report: Row) -> list[str]:
    """Gain by method and number of triples."""
    rows, counts = report["rows"], counts_of(report)
    lines = ["| method | " + " | ".join(f"N = {count}" for count in counts) + " |", "|---" * (len(counts) + 1) + "|"]
    for method in methods_of(report):
        found = [rows.get(f"{method} @ {count}") for count in counts]
        cells = ["-" if row is None else text(gain(row, rows["unsteered"])) for row in found]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def details_table(report: Row, count: int) -> list[str]:
    """What else was measured at one number of triples."""
    unsteered = report["rows"]["unsteered"]
    columns = ("setting chosen on validation", "reward", "malformed %", "perplexity", "align, s", "trained", "tokens/s")
    lines = ["| method | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    rows = [row for row in report["rows"].values() if row["triples"] == count]
    for row in [unsteered, *rows]:
        malformed = 100 * np.array(row["malformed"], dtype=float)
        cells = [
            row.get("chosen") or "-",
            text(Estimate.from_samples(rewards(row))),
            f"{malformed.mean():.1f}",
            f"{row['perplexity'][0]:.2f} ± {row['perplexity'][1]:.2f}",
            f"{row['seconds']:.0f}" if row.get("seconds") else "-",
            f"{row['trained']}" if row.get("trained") else "0",
            f"{row['tokens_per_second']:.0f}",
        ]
        lines.append(f"| {row['method']} | " + " | ".join(cells) + " |")
    return lines


def kinds_table(report: Row, count: int) -> list[str]:
    """Gain by kind of prompt, of methods without their controls."""
    unsteered = report["rows"]["unsteered"]
    rows = [r for r in report["rows"].values() if r["triples"] == count and not r["method"].startswith("control")]
    lines = ["| kind | " + " | ".join(row["method"] for row in rows) + " |", "|---" * (len(rows) + 1) + "|"]
    kind_of = np.array(unsteered["kinds"])
    for index, kind in enumerate(KINDS):
        at = kind_of == index
        gains = [Estimate.from_samples((rewards(row) - rewards(unsteered))[at]) for row in rows]
        lines.append(f"| {kind} | " + " | ".join(text(each) for each in gains) + " |")
    return lines


def draw(report: Row, png: Path) -> None:
    """Gain against the number of triples."""
    figure = new_figure((8, 4.5))
    axes: Any = figure.add_subplot()
    rows, counts = report["rows"], counts_of(report)
    methods = methods_of(report)
    for index, method in enumerate(methods):
        found = [(count, rows[f"{method} @ {count}"]) for count in counts if f"{method} @ {count}" in rows]
        gains = [gain(row, rows["unsteered"]) for _, row in found]
        axes.errorbar(
            [count * (1 + 0.012 * (index - len(methods) / 2)) for count, _ in found],
            [each.mean for each in gains],
            yerr=[each.half_width for each in gains],
            label=method,
            color=f"C{index % 10}",
            linestyle=":" if method.startswith("control") else "-",
            marker="o" if index < 10 else "s",
            markersize=3,
            elinewidth=0.8,
        )
    axes.set_xscale("log")
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("preference triples")
    axes.set_ylabel("gain in reward over unsteered")
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    write_atomically(png, png_bytes(figure))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path)
    parser.add_argument("--png", type=Path, help="the figure")
    options = parser.parse_args(arguments)
    report = json.loads(options.report.read_text())
    print("\n".join(gains_table(report)))
    for count in counts_of(report):
        print(f"\nN = {count}\n")
        print("\n".join(details_table(report, count)))
        print()
        print("\n".join(kinds_table(report, count)))
    if options.png is not None:
        draw(report, options.png)


if __name__ == "__main__":
    main()
