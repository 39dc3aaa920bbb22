"""Tables and figure of files that `estimators.py` wrote, one for each organism.

python benchmarks/estimators_report.py benchmarks/results/organism/estimators_seed*.json [--png docs/estimators.png]

Draws that lack a row yet are left out; of the control, those that lack it.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dspa.util.estimate import NORMAL_95, Estimate
from dspa.util.files import write_atomically
from dspa.util.report_parts import new_figure, png_bytes

Row = dict[str, Any]
ESTIMATORS = ("mean_difference", "ridge")
ROWS = (
    ("mean_difference, published", "mean difference, published strength"),
    ("ridge, published", "ridge, published strength"),
    ("mean_difference, chosen", "mean difference, chosen on validation"),
    ("ridge, chosen", "ridge, chosen on validation"),
    ("ridge, control", "control: ridge, lists of other kinds of prompts"),
)
STYLES = (("C0", "--"), ("C1", "--"), ("C0", "-"), ("C1", "-"), ("C7", "-"))
PUBLISHED = "ablate 0.2"
FEWEST_DRAWS = 4
LARGEST = "both 0.3"  # the strength at which lists by the true kind gain most
STUDENT_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)
"""By degrees of freedom, from 1 to 14."""


def draws_of(report: Row, count: int) -> list[Row]:
    return [draw for key, draw in report["draws"].items() if key.split("/")[0] == str(count) and is_whole(draw)]


def is_whole(draw: Row) -> bool:
    """But for the control."""
    return all(name in draw for name, _ in ROWS[:-1])


def counts_of(report: Row) -> list[int]:
    return sorted({int(key.split("/")[0]) for key, draw in report["draws"].items() if is_whole(draw)})


def gains(row: Row) -> NDArray[np.float64]:
    """By prompt."""
    return np.array(row["gains"].split(), dtype=np.float64)


def over_draws(samples: NDArray[np.float64]) -> Estimate:
    """The mean of `[draws, prompts]`; its interval is of other prompts and, from two draws on, of other draws: the
    squares of both half widths, added. That over draws is of Student's distribution."""
    draws, prompts = samples.shape
    square = NORMAL_95**2 * samples.mean(axis=0).var(ddof=1) / prompts
    if draws > 1:
        square += STUDENT_95[min(draws - 2, len(STUDENT_95) - 1)] ** 2 * samples.mean(axis=1).var(ddof=1) / draws
    return Estimate(float(samples.mean()), float(np.sqrt(square)))


def gain_of(draws: Sequence[Row], name: str) -> Estimate:
    """Over the draws that have the row; NaN where none has."""
    found = [gains(draw[name]) for draw in draws if name in draw]
    return over_draws(np.stack(found)) if found else Estimate(math.nan, math.nan)


def advantage(draws: Sequence[Row], setting: str) -> Estimate:
    """Of ridge over the mean difference, paired by draw and prompt."""
    pairs = [gains(draw[f"ridge, {setting}"]) - gains(draw[f"mean_difference, {setting}"]) for draw in draws]
    return over_draws(np.stack(pairs))


def share(draws: Sequence[Row], name: str, strength: str | None = None) -> Estimate:
    """Of the gain of true-kind lists at the same strengths, or at one for all; the interval is of both gains (delta
    method)."""
    reached = np.stack([gains(draw[name]) for draw in draws])
    own = [PUBLISHED if name.endswith("published") else draw[name]["strength"] for draw in draws]
    strengths = own if strength is None else [strength] * len(draws)
    pairs = zip(draws, strengths, strict=True)
    ceiling = np.stack([gains(draw["ceiling"][strength]) for draw, strength in pairs])
    found = reached.mean() / ceiling.mean()
    rest = over_draws(reached - found * ceiling)
    return Estimate(float(found), float(rest.half_width / ceiling.mean()))


def fewer_over_more(report: Row, setting: str) -> Estimate | None:
    """Ridge with 25 triples over the mean difference with 100, paired by draw and prompt."""
    pairs = []
    for key, draw in report["draws"].items():
        count, number = key.split("/")
        more = report["draws"].get(f"100/{number}", {}).get(f"mean_difference, {setting}")
        if count == "25" and more is not None and f"ridge, {setting}" in draw:
            pairs.append(gains(draw[f"ridge, {setting}"]) - gains(more))
    return over_draws(np.stack(pairs)) if pairs else None


def with_ceilings(report: Row) -> Row:
    """Each draw with the ceilings of its organism."""
    draws = {key: {**draw, "ceiling": report["ceiling"]} for key, draw in report["draws"].items()}
    return {**report, "draws": draws}


def pooled(reports: dict[str, Row]) -> Row:
    """The draws of all organisms, as if they were draws of one: intervals are of other organisms too. The prompts are
    the same."""
    draws = {}
    for title, report in reports.items():
        for key, draw in report["draws"].items():
            count, number = key.split("/")
            draws[f"{count}/{title} {number}"] = draw
    return {"draws": draws}


def table(report: Row) -> list[str]:
    """Gain by estimator and number of triples."""
    counts = counts_of(report)
    heads = [f"N = {count} ({len(draws_of(report, count))})" for count in counts]
    lines = ["| setting | " + " | ".join(heads) + " |", "|---" * (len(counts) + 1) + "|"]
    drawn = [draws_of(report, count) for count in counts]
    for name, label in ROWS:
        cells = []
        for count in counts:
            draws = draws_of(report, count)
            estimate, measured = gain_of(draws, name), sum(name in draw for draw in draws)
            few = f" ({measured})" if measured < len(draws) else ""
            cells.append(_cell(estimate, measured) + few)
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    for setting, label in (("published", "published strength"), ("chosen", "chosen on validation")):
        cells = [_cell(advantage(draws, setting), len(draws)) for draws in drawn]
        lines.append(f"| ridge over mean difference, {label} | " + " | ".join(cells) + " |")
    for name, label in ROWS[:4]:
        cells = [_percent(share(draws, name), len(draws)) for draws in drawn]
        lines.append(f"| % of the ceiling: {label} | " + " | ".join(cells) + " |")
    for name, label in ROWS[2:4]:
        cells = [_percent(share(draws, name, LARGEST), len(draws)) for draws in drawn]
        lines.append(f"| % of the largest ceiling: {label} | " + " | ".join(cells) + " |")
    for name, label in (ROWS[2], ROWS[3]):
        means = [_means(draws_of(report, count), name) for count in counts]
        lines.append(f"| malformed %, perplexity: {label} | " + " | ".join(means) + " |")
    return lines


def _cell(estimate: Estimate, draws: int) -> str:
    """Without an interval where two or three draws leave it to Student's table."""
    few = 1 < draws < FEWEST_DRAWS
    return f"{estimate.mean:+.2f}" + ("" if few else f" ± {estimate.half_width:.2f}")


def _percent(estimate: Estimate, draws: int) -> str:
    few = 1 < draws < FEWEST_DRAWS
    return f"{100 * estimate.mean:.0f}" + ("" if few else f" ± {100 * estimate.half_width:.0f}")


def by_draw(report: Row, setting: str) -> list[str]:
    """Ridge over the mean difference in each draw, with intervals of prompts alone."""
    lines = []
    for count in counts_of(report):
        found = [advantage([draw], setting) for draw in draws_of(report, count)]
        lines.append(f"N = {count}: " + ", ".join(f"{each.mean:+.2f} ± {each.half_width:.2f}" for each in found))
    return lines


def agreements(report: Row) -> list[str]:
    """Of lists with differences of triples of other folds; how often the estimator that agrees more gains more."""
    lines = []
    for count in counts_of(report):
        draws = [
            draw for draw in draws_of(report, count) if all("agreement" in draw[f"{e}, chosen"] for e in ESTIMATORS)
        ]
        means = [np.mean([draw[f"{each}, chosen"]["agreement"] for draw in draws]) for each in ESTIMATORS]
        right = sum(
            (draw["ridge, chosen"]["agreement"] > draw["mean_difference, chosen"]["agreement"])
            == (draw["ridge, chosen"]["gain"] > draw["mean_difference, chosen"]["gain"])
            for draw in draws
        )
        lines.append(f"N = {count}: {means[0]:.2f}, {means[1]:.2f}; names the better in {right} of {len(draws)}")
    return lines


def _means(draws: Sequence[Row], name: str) -> str:
    malformed, perplexity = (np.mean([draw[name][field] for draw in draws]) for field in ("malformed", "perplexity"))
    return f"{100 * malformed:.1f}, {perplexity:.2f}"


def figure(reports: dict[str, Row]) -> bytes:
    """A panel for each organism: the gain against the number of triples, each draw and their mean."""
    drawn = new_figure((4.8 * len(reports) + 3, 4.2))
    for index, (title, report) in enumerate(reports.items()):
        axes: Any = drawn.add_subplot(1, len(reports), index + 1)
        counts = counts_of(report)
        for (name, label), (color, line) in zip(ROWS, STYLES, strict=True):
            means = [gain_of(draws_of(report, count), name).mean for count in counts]
            axes.plot(counts, means, color=color, linestyle=line, label=label)
            for count in counts:
                found = [draw[name]["gain"] for draw in draws_of(report, count) if name in draw]
                axes.plot([count] * len(found), found, color=color, marker="o", markersize=3, linestyle="none")
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
    reports = {file.stem.split("_")[-1]: with_ceilings(json.loads(file.read_text())) for file in options.files}
    for title, report in (reports | ({"all": pooled(reports)} if len(reports) > 1 else {})).items():
        print(f"\n{title}; draws in brackets\n")
        print("\n".join(table(report)))
        for setting in ("published", "chosen"):
            print(f"\nridge over mean difference by draw, {setting}\n" + "\n".join(by_draw(report, setting)))
            if (found := fewer_over_more(report, setting)) is not None:
                print(f"ridge with 25 over mean difference with 100: {found.mean:+.2f} ± {found.half_width:.2f}")
        print("\nagreement of mean difference, of ridge\n" + "\n".join(agreements(report)))
        if title == "all":
            continue
        ceilings = {name: round(row["gain"], 2) for name, row in report["ceiling"].items()}
        print(f"\nceilings: {ceilings}; unsteered malformed {100 * report['unsteered']['malformed']:.1f} %")
    if options.png:
        write_atomically(options.png, figure(reports))


if __name__ == "__main__":
    main()
