"""What a tuning found: the settings, the choice, and what it is worth on examples that the choice did not see."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dspa.errors import InvalidInputError
from dspa.tuning.objective import Guard
from dspa.tuning.ranking import AgreementRanking
from dspa.tuning.scoring import Floats
from dspa.tuning.settings import TunedSetting
from dspa.util.estimate import Estimate
from dspa.util.files import write_atomically
from dspa.util.report_parts import COLORS, Table, new_figure, png_bytes

if TYPE_CHECKING:
    from rich.console import Console

SHOWN = 12  # settings of the printed table


@dataclass(frozen=True)
class TunedRow:
    """A setting's values; intervals are 95 %.

    Attributes:
        setting: the setting.
        examples: on how many examples it was evaluated.
        gain: what is maximised, over the unsteered model: the sum of its parts.
        margin, reward: the parts; None where they are not part of it.
        kl: on neutral text, nats per token.
        perplexity: on neutral text, as a multiple of the unsteered model's.
        allowed: whether it keeps the guard.
    """

    setting: TunedSetting
    examples: int
    gain: Estimate
    margin: Estimate | None
    reward: Estimate | None
    kl: Estimate
    perplexity: Estimate
    allowed: bool

    @classmethod
    def from_values(cls, setting: TunedSetting, values: Mapping[str, Floats], guard: Guard) -> TunedRow:
        parts = {name: values[name] for name in ("margin", "reward") if name in values}
        total = np.sum(list(parts.values()), axis=0)
        kl, loss = Estimate.from_samples(values["kl"]), Estimate.from_samples(values["loss"])
        ratio = math.exp(loss.mean)
        return cls(
            setting=setting,
            examples=len(total),
            gain=Estimate.from_samples(total),
            margin=Estimate.from_samples(parts["margin"]) if "margin" in parts else None,
            reward=Estimate.from_samples(parts["reward"]) if "reward" in parts else None,
            kl=kl,
            perplexity=Estimate(ratio, ratio * loss.half_width),
            allowed=kl.mean <= guard.max_kl and ratio <= guard.max_perplexity,
        )


@dataclass(frozen=True)
class TuningReport:
    """What `dspa.tune` returns.

    Attributes:
        chosen: the setting.
        why: one sentence.
        guard: what settings were allowed to do to neutral text.
        choosing: every setting, on as many of the choosing examples as it reached.
        reported: the chosen setting and the policy's own, on the examples that the choice did not see.
        choosing_examples, reporting_examples: how many there are.
        cost: examples evaluated to choose, of all settings together.
        full_grid_cost: what evaluating every setting on all of them costs.
        ranking: how far every way to make lists agrees with triples that were left out, by which those that were tried
            were chosen; None where nothing was ranked.
        why_not_ranked: why nothing was.
    """

    chosen: TunedSetting
    why: str
    guard: Guard
    choosing: tuple[TunedRow, ...]
    reported: tuple[TunedRow, ...]
    choosing_examples: int
    reporting_examples: int
    cost: int
    full_grid_cost: int
    ranking: AgreementRanking | None = None
    why_not_ranked: str = ""

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def tables(self) -> list[Table]:
        """The reported settings, the best of those that were tried, and the ranking by which they were chosen."""
        best = sorted(self.choosing, key=lambda row: (-row.examples, not row.allowed, -row.gain.mean))
        rows = [(*_cells(row), str(row.examples), "" if row.allowed else "guard") for row in best[:SHOWN]]
        columns = ("setting", "gain", "KL, nats", "perplexity, times")
        left = len(best) - len(rows)
        return [
            Table(
                f"On {self.reporting_examples} examples that the choice did not see",
                "Gain over the unsteered model with 95 % intervals; the chosen setting first, then the policy's own.",
                columns,
                tuple(_cells(row) for row in self.reported),
            ),
            Table(
                f"Tried, on up to {self.choosing_examples} examples",
                f"{self.cost} evaluations of examples; the full grid has {self.full_grid_cost}."
                + (f" And {left} more settings." if left > 0 else ""),
                (*columns, "examples", "refused by"),
                tuple(rows),
            ),
            *(() if self.ranking is None else (self.ranking.table(),)),
        ]

    def print(self, console: Console) -> None:
        for table in self.tables():
            table.print(console)
        if self.why_not_ranked:
            console.print(f"Not ranked by agreement: {self.why_not_ranked}.", highlight=False, soft_wrap=True)
        console.print(f"Chosen: {self.why}.", highlight=False, soft_wrap=True)

    def draw(self, png: Path) -> bool:
        """Draws gain against damage, with the settings that no other beats in both joined by a line; False where
        matplotlib is missing."""
        try:
            figure = new_figure((8, 5))
        except InvalidInputError:
            return False
        axes: Any = figure.add_subplot()
        full = [row for row in self.choosing if row.examples == self.choosing_examples]
        partial = [row for row in self.choosing if row.examples < self.choosing_examples]
        for rows, color, label in (
            (partial, "0.75", "stopped early"),
            (full, COLORS[0], f"on all {self.choosing_examples} examples"),
            (self.reported, COLORS[1], f"on {self.reporting_examples} examples not seen"),
        ):
            if rows:
                axes.errorbar(
                    [row.kl.mean for row in rows],
                    [row.gain.mean for row in rows],
                    yerr=[row.gain.half_width for row in rows],
                    fmt="o",
                    markersize=4,
                    linewidth=0.8,
                    color=color,
                    label=label,
                )
        front = pareto_front(self.choosing)
        axes.plot([row.kl.mean for row in front], [row.gain.mean for row in front], color="0.4", linewidth=0.8)
        largest = max(row.kl.mean for row in (*self.choosing, *self.reported))
        if self.guard.max_kl <= 1.2 * largest:  # a limit far from every setting would only press them together
            axes.axvline(self.guard.max_kl, color=COLORS[4], linestyle="--", linewidth=0.8, label="the guard's KL")
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set_xlabel("damage: KL to the unsteered model on neutral text, nats per token")
        axes.set_ylabel("gain over the unsteered model")
        axes.set_title("Gain against damage, 95 % intervals", loc="left")
        figure.legend(frameon=False, loc="outside lower center", ncols=2)
        write_atomically(png, png_bytes(figure))
        return True


def pareto_front(rows: tuple[TunedRow, ...]) -> list[TunedRow]:
    """Those that no other beats in both gain and KL, by rising KL."""
    front: list[TunedRow] = []
    for row in sorted(rows, key=lambda row: (row.kl.mean, -row.gain.mean)):
        if not front or row.gain.mean > front[-1].gain.mean:
            front.append(row)
    return front


def _cells(row: TunedRow) -> tuple[str, str, str, str]:
    def number(estimate: Estimate, sign: str = "") -> str:
        return f"{estimate.mean:{sign}.4f} ± {estimate.half_width:.4f}"

    return str(row.setting), number(row.gain, "+"), number(row.kl), number(row.perplexity)
