"""DSPA and FSRL together, on the organism's validation prompts: what neither paper has.

    python benchmarks/beyond_both.py --out benchmarks/results/organism/beyond_both.json

Every variant that was tried has a row; nothing is chosen. All are fitted and trained on the same triples. The file is
written after every variant; what it holds already is not computed again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gated_adapter import Direction, GatedPolicy, signs_of, train_gated
from head_to_head import Bench, dspa_policy, training_options
from organism_runs import kept_adapter
from torch import Tensor
from validation_study import opened, study

import dspa
from dspa.kernels import AdapterWeights, EditList
from dspa.methods.fsrl.pairs import EditedTokens
from dspa.methods.fsrl.training import train
from dspa.methods.policy import Policy
from dspa.methods.split_model import SplitModel
from dspa.methods.steering_policy import SteeringPolicy
from dspa.organism import OUTPUT_LAYER
from dspa.organism.demo import Candidate
from dspa.organism.evaluation import Estimate, Measurement, Setting, measure, prompt_densities
from dspa.sae.encode import encoder_input
from dspa.util.files import write_atomically

OPTIONS: dict[str, Any] = {"learning_rate": 1e-3, "l1": 0.01}  # FSRL's in the head to head
GATED: dict[str, Any] = {"learning_rate": 1e-3, "l1": 0.0}  # at most 32 latents can act as it is
DSPA = Candidate("ge", "both", 0.3)  # the head to head's choice at every number of triples
RIDGE = 1.0  # in units of the mean square of a component of the states
FIRING = 32  # latents of a token that an adapter made from the map moves on average: as many as DSPA's lists name


@dataclass(frozen=True, eq=False)
class Variant:
    """What is measured.

    Attributes:
        policy: the policy.
        below: a policy that edits before it.
    """

    policy: Policy | None
    below: Policy | None = None


class Variants:
    """The variants by name, each made when it is asked for; what they share is made once, adapters once for all runs
    with the folder `adapters`."""

    def __init__(self, bench: Bench, triples: int, adapters: Path) -> None:
        self.bench, self.count, self.adapters = bench, triples, adapters
        self.triples = bench.triples(triples)
        self.dspa, _ = dspa_policy(bench, triples, DSPA)
        self.options = replace(training_options(bench, triples, **OPTIONS), edit_positions="all")
        self._made: dict[str, Any] = {}

    def names(self) -> dict[str, Callable[[], Variant]]:
        fsrl, added = self.fsrl, self.on_top
        return {
            "unsteered": lambda: Variant(None),
            "DSPA": lambda: Variant(self.dspa),
            "FSRL": lambda: Variant(fsrl()),
            "FSRL behind DSPA's gates": lambda: Variant(GatedPolicy(self.dspa, fsrl().adapter, "free")),
            "DSPA, and FSRL after it": lambda: Variant(fsrl(), below=self.dspa),
            "FSRL, and DSPA after it": lambda: Variant(self.dspa, below=fsrl()),
            "adapter from the map": lambda: Variant(self.from_map(1.0)),
            "adapter from the map, twice as strong": lambda: Variant(self.from_map(2.0)),
            "FSRL begun at the adapter from the map": lambda: Variant(self.trained_from_map()),
            "trained behind the gates, direction by the list": lambda: Variant(self.gated("signed")),
            "the same behind the gates of other prompts": lambda: Variant(self.gated("signed", others=True)),
            "the same, half as strong": lambda: Variant(replace(self.gated("signed"), strength=0.5)),
            "the same, a quarter as strong": lambda: Variant(replace(self.gated("signed"), strength=0.25)),
            "DSPA, alpha 0.5": lambda: Variant(self.dspa.with_options(alpha=0.5)),
            "DSPA, alpha 0.8": lambda: Variant(self.dspa.with_options(alpha=0.8)),
            "trained behind the gates": lambda: Variant(self.gated("free")),
            "DSPA, and FSRL trained after it": lambda: Variant(added(), below=self.dspa),
        }

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self._made:
            self._made[name] = make()
        return self._made[name]

    def adapter(self, name: str, make: Callable[[], AdapterWeights]) -> AdapterWeights:
        return self.once(name, lambda: kept_adapter(self.adapters / name, self.bench.output_sae, make))

    def policy(self, adapter: AdapterWeights, **options: Any) -> dspa.FsrlPolicy:
        return dspa.FsrlPolicy(adapter, self.bench.output_sae, OUTPUT_LAYER, model=self.dspa.model, **options)

    def lists(self) -> EditList:
        """DSPA's list for the prompt of each triple."""

        def make() -> EditList:
            prompts = [triple.prompt for triple in self.bench.drawn[: self.count]]
            return self.dspa.select(prompt_densities(self.bench.model, self.bench.tokenizer, prompts, self.dspa))

        return self.once("lists", make)

    def trained(self, initial: AdapterWeights | None = None) -> AdapterWeights:
        bench = self.bench
        result = train(bench.model, self.triples, bench.output_sae, OUTPUT_LAYER, self.options, initial=initial)
        return result.policy.adapter

    def fsrl(self) -> dspa.FsrlPolicy:
        return self.policy(self.adapter("fsrl", self.trained))

    def gated(self, direction: Direction, *, others: bool = False) -> GatedPolicy:
        """An adapter trained behind the gates.

        Args:
            direction: see `gated_adapter`.
            others: whether each prompt is then answered behind the gates of another one.
        """

        def make() -> AdapterWeights:
            lists = self.lists()
            options = replace(training_options(self.bench, self.count, **GATED), edit_positions="from_last_prompt")
            return train_gated(self.bench.model, self.triples.triples, self.dspa, lists, options, direction=direction)

        adapter = self.adapter(f"gated-{direction}", make)
        gates: SteeringPolicy = self.dspa
        return OtherPromptsGates(gates, adapter, direction) if others else GatedPolicy(gates, adapter, direction)

    def on_top(self) -> dspa.FsrlPolicy:
        """An adapter trained on states that DSPA has edited."""

        def make() -> AdapterWeights:
            options = replace(self.options, edit_positions="from_last_prompt")
            return train_gated(
                self.bench.model, self.triples.triples, self.dspa, self.lists(), options, direction=None, on_top=True
            )

        return self.policy(self.adapter("on-top", make), edit_positions="from_last_prompt")

    def from_map(self, scale: float) -> dspa.FsrlPolicy:
        """The conditional map, read from the states that the adapter sees: ridge regression of the signs of DSPA's
        lists, thresholds such that `FIRING` latents of a token move, strength such that they move as far as DSPA moves
        a latent, `alpha` times the largest activation."""
        return self.policy(self.map_adapter(), scale=scale)

    def map_adapter(self) -> AdapterWeights:
        make = lambda: regressed(self.bench, self.triples.triples, self.dspa, self.lists())  # noqa: E731
        return self.adapter("from-map", make)

    def trained_from_map(self) -> dspa.FsrlPolicy:
        return self.policy(self.adapter("trained-from-map", lambda: self.trained(self.map_adapter())))


class OtherPromptsGates(GatedPolicy):
    """The control: each prompt of a batch gets the gates of the one before it."""

    def select(self, density: Tensor) -> EditList:
        lists = super().select(density)
        return lists.rows(torch.arange(lists.batch).roll(1))


@torch.no_grad()
def regressed(bench: Bench, triples: Sequence[Any], policy: SteeringPolicy, lists: EditList) -> AdapterWeights:
    """See `Variants.from_map`."""
    sae, split = policy.output_sae, SplitModel(bench.model, policy.output_layer)
    edited, signs = EditedTokens("all", ()), signs_of(lists, sae.d_sae).double()
    d_model = sae.d_model
    square, cross = torch.zeros(d_model + 1, d_model + 1).double(), torch.zeros(d_model + 1, sae.d_sae).double()
    states: list[Tensor] = []
    largest: list[Tensor] = []
    for index, triple in enumerate(triples):
        for response in (triple.chosen, triple.rejected):
            ids = torch.tensor([[*triple.prompt, *response]])
            on = torch.tensor(edited.of(triple.prompt, response))
            hidden = split.states(ids, torch.ones_like(ids))[0, on]
            x, _ = encoder_input(hidden, sae)
            with_one = torch.cat([x.double(), torch.ones(len(x), 1).double()], dim=1)
            square += with_one.T @ with_one
            cross += with_one.sum(dim=0)[:, None] * signs[index]
            states.append(x)
            largest.append(sae.encode(hidden).amax(dim=1))
    penalty = RIDGE * float(square[:d_model, :d_model].diagonal().mean())
    ridge = penalty * torch.eye(d_model + 1).double()
    ridge[-1, -1] = 0.0  # not of the bias
    solved = torch.linalg.solve(square + ridge, cross).float()
    weight, bias = solved[:-1].T.contiguous(), solved[-1].contiguous()
    sample = torch.cat(states)[::16]
    y = (sample @ weight.T + bias).abs()
    threshold = float(y.flatten().kthvalue(y.numel() - FIRING * len(y)).values)
    mean = float((y - threshold).relu().sum() / (y > threshold).sum())
    scale = policy.alpha * float(torch.cat(largest).mean()) / mean
    thresholds = torch.full((sae.d_sae,), threshold * scale)
    return AdapterWeights(weight=weight * scale, bias=bias * scale, threshold=thresholds)


def measured(bench: Bench, variant: Variant, prompts: Sequence[Any]) -> Measurement:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this model is steered already")  # two policies are meant
        below = nullcontext() if variant.below is None else dspa.steer(bench.model, variant.below)
        with below:
            seed = bench.settings.seed + 2 * 10**6
            setting = Setting("", variant.policy)
            (found,) = measure(bench.model, bench.tokenizer, prompts, [setting], seed=seed, neutral_texts=2)
    return found


def run(bench: Bench, triples: int, out: Path, adapters: Path) -> dict[str, Any]:
    report = opened(out, bench, triples)
    rows = report["rows"]
    variants = Variants(bench, triples, adapters)
    for name, make in variants.names().items():
        if name in rows:
            continue
        found = measured(bench, make(), bench.validation())
        rows[name] = {
            "rewards": found.rewards.tolist(),
            "malformed": found.malformed.astype(int).tolist(),
        }
        write_atomically(out, json.dumps(report).encode())
        print(f"{name}: {found.rewards.mean():+.3f}, malformed {found.malformed.mean():.3f}", flush=True)
    return report


def table(report: dict[str, Any]) -> list[str]:
    """Gains over unsteered and over DSPA, paired by prompt."""
    rows = {name: np.array(row["rewards"]) for name, row in report["rows"].items()}
    lines = ["| variant | gain | over DSPA | malformed % |", "|---|---|---|---|"]
    for name, rewards in rows.items():
        cells = [
            "-" if name == base else _text(Estimate.from_samples(rewards - rows[base]))
            for base in ("unsteered", "DSPA")
        ]
        malformed = 100 * np.mean(report["rows"][name]["malformed"])
        lines.append(f"| {name} | {cells[0]} | {cells[1] if name != 'unsteered' else '-'} | {malformed:.1f} |")
    return lines


def _text(estimate: Estimate) -> str:
    return f"{estimate.mean:+.2f} ± {estimate.half_width:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    study(__doc__, run, table, arguments)


if __name__ == "__main__":
    main()
