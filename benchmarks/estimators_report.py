"""Table and figure of files that `estimators.py` wrote, one for each organism.

python benchmarks/estimators_report.py benchmarks/results/organism/estimators_seed*.json [--png docs/estimators.png]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspa.util.estimate import NORMAL_95, Estimate
from dspa.util.files import write_atomically
from dspa.util.report_parts import new_figure, png_bytes

Row = dict[str, Any]
ROWS = (
    ("mean_difference, published", "mean difference, published strength"),
    ("ridge, published", "ridge, published strength"),
    ("mean_difference, chosen", "mean difference, chosen on validation"),
    ("ridge, chosen", "ridge, chosen on validation"),
    ("ridge, control", "control: ridge, lists of other prompts"),
)
PUBLISHED = "ablate 0.2"


def draws_of(report: Row, count: int) -> list[Row]:
    return [draw for key, draw in report["draws"].items() if key.split("/")[0] == str(count)]


def counts_of(report: Row) -> list[int]:
    return sorted({int(key.split("/")[0]) for key in report["draws"]})


def gains(row: Row) -> NDArray[np.float64]:
    """By prompt."""
    return np.array(row["gains"].split(), dtype=np.float64)


def over_draws(samples: NDArray[np.float64]) -> Estimate:
    """The mean of `[draws, prompts]`; its interval is of other draws and of other prompts: the variances of the means
    over draws and over prompts, added."""
    draws, prompts = samples.shape
    variance = samples.mean(axis=0).var(ddof=1) / prompts
    if draws > 1:
        variance += samples.mean(axis=1).var(ddof=1) / draws
    return Estimate(float(samples.mean()), float(NORMAL_95 * np.sqrt(variance)))


def gain_of(draws: Sequence[Row], name: str) -> Estimate:
    return over_draws(np.stack([gains(draw[name]) for draw in draws]))


def advantage(draws: Sequence[Row], setting: str) -> Estimate:
    """Of ridge over the mean difference, paired by draw and prompt."""
    pairs = [gains(draw[f"ridge, {setting}"]) - gains(draw[f"mean_difference, {setting}"]) for draw in draws]
    return over_draws(np.stack(pairs))


def share(report: Row, draws: Sequence[Row], name: str) -> float:
    """Of the gain of true-kind lists at the same strengths."""
    strengths = [PUBLISHED if name.endswith("published") else draw[name]["strength"] for draw in draws]
    reached = sum(draw[name]["gain"] for draw in draws)
    return reached / sum(report["ceiling"][strength]["gain"] for strength in strengths)


def table(report: Row) -> list[str]:
    """Gain by estimator and number of triples."""
    counts = counts_of(report)
    heads = [f"N = {count} ({len(draws_of(report, count))})" for count in counts]
    lines = ["| setting | " + " | ".join(heads) + " |", "|---" * (len(counts) + 1) + "|"]
    for name, label in ROWS:
        cells = []
        for count in counts:
            draws = draws_of(report, count)
            estimate = gain_of(draws, name)
            part = "" if name.endswith("control") else f", {share(report, draws, name):.0%}"
            cells.append(f"{estimate.mean:+.2f} ± {estimate.half_width:.2f}{part}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for setting, label in (("published", "published strength"), ("chosen", "chosen on validation")):
        found = [advantage(draws_of(report, count), setting) for count in counts]
        cells = [f"{each.mean:+.2f} ± {each.half_width:.2f}" for each in found]
        lines.append(f"| ridge over mean difference, {label} | " + " | ".join(cells) + " |")
    for name, label in (ROWS[2], ROWS[3]):
        means = [_means(draws_of(report, count), name) for count in counts]
        lines.append(f"| malformed %, perplexity: {label} | " + " | ".join(means) + " |")
    return lines


def _means(draws: Sequence[Row], name: str) -> str:
    malformed, perplexity = (np.mean([draw[name][field] for draw in draws]) for field in ("malformed", "perplexity"))
    return f"{100 * malformed:.1f}, {perplexity:.2f}"


def figure(reports: dict[str, Row]) -> bytes:
    """A panel for each organism: the gain against the number of triples."""
    drawn = new_figure((4.8 * len(reports) + 3, 4.2))
    for index, (title, report) in enumerate(reports.items()):
        axes: Any = drawn.add_subplot(1, len(reports), index + 1)
        counts = counts_of(report)
        for (name, label), style in zip(ROWS, ("C0o--", "C1s--", "C0o-", "C1s-", "C7.-"), strict=True):
            found = [gain_of(draws_of(report, count), name) for count in counts]
            axes.errorbar(
                counts,
                [each.mean for each in found],
                [each.half_width for each in found],
                fmt=style,
                capsize=2,
                label=label,
            )
        axes.axhline(
            report["ceiling"][PUBLISHED]["gain"],
            color="0.6",
            linewidth=1,
            linestyle=":",
            label="ceiling, published strength",
        )
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.set_xlabel("preference triples")
        axes.set_title(title)
        if index == 0:
            axes.set_ylabel("gain in reward over unsteered")
        if index == len(reports) - 1:
            axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    return png_bytes(drawn)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--png", type=Path)
    options = parser.parse_args(arguments)
    reports = {file.stem.split("_")[-1]: json.loads(file.read_text()) for file in options.files}
    for title, report in reports.items():
        setup = report["setup"]
        print(f"\n{title}: {setup['prompts']} prompts; draws in brackets\n")
        print("\n".join(table(report)))
        ceilings = {name: round(row["gain"], 2) for name, row in report["ceiling"].items()}
        print(f"\nceilings: {ceilings}; unsteered malformed {100 * report['unsteered']['malformed']:.1f} %")
    if options.png:
        write_atomically(options.png, figure(reports))


if __name__ == "__main__":
    main()
