"""What the demo measured: as records, as tables on the terminal, and as a chart."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dspa.errors import InvalidInputError
from dspa.methods.list_overlap import Overlap
from dspa.organism.evaluation import Estimate, Measurement
from dspa.organism.language import KINDS

if TYPE_CHECKING:
    from rich.console import Console

UNSTEERED = "unsteered"
STATIC = "static list, published strength"
PUBLISHED_50 = "published setting, percentile 50"
PUBLISHED_90 = "published setting, percentile 90"
CHOSEN = "chosen on validation"
CONTROL = "control: lists of other prompts"
CEILING = "ceiling: lists of the true kind"


@dataclass(frozen=True)
class Row:
    """A row of the table; intervals are 95 %.

    `gain` is the paired difference of rewards to the unsteered model, None in the unsteered row.
    """

    setting: str
    reward: Estimate
    gain: Estimate | None
    preferred: Estimate
    dispreferred: Estimate
    malformed: Estimate
    perplexity: Estimate
    tokens_per_second: Estimate

    @classmethod
    def from_measurement(cls, measurement: Measurement, unsteered: Measurement) -> Row:
        same = measurement is unsteered
        return cls(
            setting=measurement.setting,
            reward=Estimate.from_samples(measurement.rewards),
            gain=None if same else Estimate.from_samples(measurement.rewards - unsteered.rewards),
            preferred=Estimate.from_samples(measurement.preferred),
            dispreferred=Estimate.from_samples(measurement.dispreferred),
            malformed=Estimate.from_samples(measurement.malformed.astype(float)),
            perplexity=measurement.perplexity(),
            tokens_per_second=Estimate.from_samples(measurement.tokens_per_second),
        )


@dataclass(frozen=True)
class OverlapRow:
    """How much sets of latents overlap between prompts, for one setting and one kind of set."""

    sets: str
    overlap: Overlap


@dataclass(frozen=True)
class KindGain:
    """Gain over unsteered on the prompts of one kind."""

    setting: str
    kind: str
    gain: Estimate


@dataclass(frozen=True)
class DemoReport:
    """Everything the demo measured."""

    triples: int
    prompts: int
    chosen: str
    rows: tuple[Row, ...]
    overlaps: tuple[OverlapRow, ...]
    kinds: tuple[KindGain, ...]
    published_over_static: Estimate
    share_of_ceiling: float

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def print_report(console: Console, report: DemoReport) -> None:
    """Prints the tables."""
    from rich.table import Table

    def number(estimate: Estimate | None, digits: int = 2, sign: bool = False, percent: bool = False) -> str:
        if estimate is None:
            return "-"
        scale = 100 if percent else 1
        value = f"{estimate.mean * scale:{'+' if sign else ''}.{digits}f}"
        return f"{value} ± {estimate.half_width * scale:.{digits}f}"

    table = Table(title=f"{report.prompts} held-out prompts, {report.triples} triples; 95 % intervals")
    titles = (
        "setting",
        "reward",
        "gain (paired)",
        "preferred",
        "dispreferred",
        "malformed %",
        "perplexity",
        "tokens/s",
    )
    for title in titles:
        table.add_column(title, justify="left" if title == "setting" else "right", no_wrap=title == "setting")
    for row in report.rows:
        table.add_row(
            row.setting,
            number(row.reward, sign=True),
            number(row.gain, sign=True),
            number(row.preferred),
            number(row.dispreferred),
            number(row.malformed, 1, percent=True),
            number(row.perplexity),
            number(row.tokens_per_second, 0),
        )
    console.print(table)
    console.print(f"{CHOSEN}: {report.chosen}.")
    console.print(
        f"Published setting at percentile 90 over the static list: {number(report.published_over_static, sign=True)}; "
        f"share of the ceiling's gain: {report.share_of_ceiling:.0%}."
    )
    overlaps = Table(title="Overlap between prompts (mean Jaccard)")
    for title in ("sets", "within a kind", "across kinds"):
        overlaps.add_column(title, justify="left" if title == "sets" else "right")
    for row in report.overlaps:
        overlaps.add_row(row.sets, f"{row.overlap.within_kind:.2f}", f"{row.overlap.across_kinds:.2f}")
    console.print(overlaps)


def draw_gains(report: DemoReport, png: Path) -> None:
    """A bar chart of the gain over unsteered by kind of prompt, with 95 % intervals.

    Raises:
        InvalidInputError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidInputError("matplotlib is not installed; install it with: pip install 'dspa[plot]'") from error
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes: Any = figure.add_subplot()
    settings = list(dict.fromkeys(gain.setting for gain in report.kinds))
    width = 0.8 / len(settings)
    for position, (setting, color) in enumerate(zip(settings, ("0.7", "tab:blue", "tab:orange"), strict=True)):
        bars = [gain for gain in report.kinds if gain.setting == setting]
        axes.bar(
            np.arange(len(bars)) + (position - (len(settings) - 1) / 2) * width,
            [bar.gain.mean for bar in bars],
            width,
            yerr=[bar.gain.half_width for bar in bars],
            label=setting,
            color=color,
            error_kw={"elinewidth": 0.8},
        )
    axes.set_xticks(np.arange(len(KINDS)), KINDS, rotation=30, ha="right")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_ylabel("gain in reward over unsteered")
    axes.set_title(f"Gain by kind of prompt, {report.prompts} held-out prompts, 95 % intervals")
    figure.legend(frameon=False, loc="outside lower center", ncols=len(settings))  # beside the bars, off the whiskers
    figure.savefig(png, dpi=120)
