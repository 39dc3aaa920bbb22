"""Estimators of the conditional map against the number of triples, on the organism (docs/results.md).

For every number of triples and every draw of them: each estimator at the published strength, and at the strength that
is chosen on validation prompts, by the same number of tries; for ridge, the control with lists of prompts of other
kinds; gains over the unsteered model on held-out prompts, paired by prompt. One JSON file for each organism, written
after each draw, so that a run that was interrupted goes on where it stopped: rows that are missing are measured. All
numbers of triples and all organisms have a draw before the next one begins. The gains of single prompts are kept, for
intervals over draws and prompts (`estimators_report.py`).

    python benchmarks/estimators.py --out estimators.json --triples 10,25,50,100,250,600 --draws 5
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from dspa.kernels import EditList
from dspa.methods.agreement import cross_validated_agreement
from dspa.methods.conditional_map import ConditionalDifferenceMap
from dspa.methods.controls import lists_of_other_prompts
from dspa.methods.static_policy import StaticPolicy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.offline.density_subset import DensitySubset
from dspa.organism import DATA
from dspa.organism.demo import MALFORMED_ALLOWANCE, DemoOptions, Organism, load_organism
from dspa.organism.evaluation import (
    Estimate,
    Measurement,
    Setting,
    measure,
    prompt_densities,
    true_kind_lists,
)
from dspa.organism.language import Prompt, draw_prompts
from dspa.util.files import write_atomically

STRENGTHS: tuple[dict[str, Any], ...] = (
    {"edit": "ablate", "alpha": 0.2},  # the published one
    {"edit": "ablate", "alpha": 0.5},
    {"edit": "both", "alpha": 0.2},
    {"edit": "both", "alpha": 0.3},
)
ESTIMATORS = ("mean_difference", "ridge")
CONTROLLED = "ridge"


@dataclass(frozen=True, eq=False)
class Study:
    """What all draws share.

    Attributes:
        organism: with the densities of all of its triples.
        heldout, validation: prompts.
        unsteered, unsteered_validation: what the model does by itself.
    """

    organism: Organism
    heldout: Sequence[Prompt]
    validation: Sequence[Prompt]
    unsteered: Measurement
    unsteered_validation: Measurement
    seed: int
    neutral_texts: int

    def measured(self, policies: dict[str, Any], *, validation: bool = False) -> dict[str, Measurement]:
        """Responses under each policy, by name."""
        found = measure(
            self.organism.model,
            self.organism.tokenizer,
            self.validation if validation else self.heldout,
            [Setting(name, policy) for name, policy in policies.items()],
            seed=self.seed + (10**6 if validation else 0),
            neutral_texts=2 if validation else self.neutral_texts,
        )
        return {measurement.setting: measurement for measurement in found}

    def row(self, measurement: Measurement) -> dict[str, Any]:
        """The gain over the unsteered model with its interval, and by prompt; and what it costs."""
        gains = measurement.rewards - self.unsteered.rewards
        gain = Estimate.from_samples(gains)
        return {
            "gain": gain.mean,
            "half_width": gain.half_width,
            "malformed": float(measurement.malformed.mean()),
            "perplexity": measurement.perplexity().mean,
            "gains": " ".join(str(each) for each in gains),
        }


def measure_draw(study: Study, store: DensitySubset, found: dict[str, dict[str, Any]]) -> None:
    """Adds the rows of every estimator, fitted on the triples of a store, that are not there yet."""
    for name in ESTIMATORS:
        tries = policies(study, store, name)
        published = next(iter(tries))
        settings: dict[str, Any] = {}
        if f"{name}, published" not in found or f"{name}, chosen" not in found:
            chosen = best_on_validation(study, tries)
            settings = {"published": tries[published], "chosen": tries[chosen]}
        else:
            chosen = found[f"{name}, chosen"]["strength"]
        if name == CONTROLLED and f"{name}, control" not in found:
            settings["control"] = control(study, tries[chosen])
        for setting, measurement in (study.measured(settings) if settings else {}).items():
            found[f"{name}, {setting}"] = study.row(measurement) | {"strength": chosen}
        if "agreement" not in found[f"{name}, chosen"]:
            options: Any = {"estimator": name, "edit": "both", "folds": min(5, store.run.triple_count)}
            found[f"{name}, chosen"]["agreement"] = cross_validated_agreement(store, **options).mean


def policies(study: Study, store: DensitySubset, estimator: Any) -> dict[str, SteeringPolicy]:
    """By strength, the published one first."""
    found: dict[str, SteeringPolicy] = {}
    for strength in STRENGTHS:
        # The published gate at the published strength, and elsewhere the one that does better on the organism.
        gate: Any = "ge" if strength == STRENGTHS[0] else "positive_ge"
        fitted = ConditionalDifferenceMap.fit(store, estimator=estimator, gate_rule=gate)
        policy = SteeringPolicy(fitted, study.organism.input_sae, study.organism.output_sae, **strength)
        found[f"{strength['edit']} {strength['alpha']}"] = policy
    return found


def best_on_validation(study: Study, tries: dict[str, SteeringPolicy]) -> str:
    """The highest reward among those that break few responses; the published strength if all break too many."""
    validated = study.measured(tries, validation=True)
    allowed = study.unsteered_validation.malformed.mean() + MALFORMED_ALLOWANCE
    sound = [each for each in tries if validated[each].malformed.mean() <= allowed] or [next(iter(tries))]
    return max(sound, key=lambda each: validated[each].rewards.mean())


def control(study: Study, policy: SteeringPolicy) -> StaticPolicy:
    """Every prompt with the list of one of another kind."""
    densities = prompt_densities(study.organism.model, study.organism.tokenizer, study.heldout, policy)
    kinds = [prompt.kind for prompt in study.heldout]
    return StaticPolicy.with_edits(policy, lists_of_other_prompts(policy.select(densities), kinds, study.seed))


def ceilings(study: Study) -> dict[str, dict[str, float]]:
    """Lists from the mean difference of each prompt's true kind over all triples, at every strength."""
    fitted = ConditionalDifferenceMap.fit(study.organism.store)
    settings: dict[str, StaticPolicy] = {}
    for strength in STRENGTHS:
        policy = SteeringPolicy(fitted, study.organism.input_sae, study.organism.output_sae, **strength)
        lists: EditList = true_kind_lists(study.organism.store, study.organism.triple_kinds, study.heldout, policy)
        settings[f"{strength['edit']} {strength['alpha']}"] = StaticPolicy.with_edits(policy, lists)
    return {name: study.row(measurement) for name, measurement in study.measured(settings).items()}


@dataclass(frozen=True, eq=False)
class Report:
    """A file with what was measured of an organism."""

    file: Path
    study: Study
    record: dict[str, Any]

    @classmethod
    def open(cls, file: Path, study: Study, setup: dict[str, Any]) -> Report:
        record = json.loads(file.read_text()) if file.exists() else {"setup": setup, "draws": {}}
        if record["setup"] != setup:
            raise SystemExit(f"{file} was measured with {record['setup']}; expected {setup}: pass another --out")
        record.setdefault("unsteered", study.row(study.unsteered))
        if "ceiling" not in record:
            record["ceiling"] = ceilings(study)
        return cls(file, study, record)

    def measure(self, count: int, draw: int) -> None:
        """Measures what is missing of a draw."""
        store, everything = self.study.organism.store, self.study.organism.store.run.triple_count
        if count > everything or (count == everything and draw):
            return
        order = np.random.default_rng([self.study.seed, draw]).permutation(everything)
        rows = self.record["draws"].setdefault(f"{count}/{draw}", {})
        measure_draw(self.study, DensitySubset.from_store(store, order[:count].tolist()), rows)
        write_atomically(self.file, json.dumps(self.record, indent=1).encode())
        gains = {name: round(row["gain"], 2) for name, row in rows.items()}
        print(f"{self.file.name} {count}/{draw}", gains, flush=True)


def main(
    out: Annotated[
        list[Path], typer.Option(help="The JSON file, one for each organism; one that exists is continued.")
    ],
    data: Annotated[list[Path], typer.Option(help="Folder of an organism, in the order of --out.")] = [DATA],  # noqa: B006
    triples: Annotated[str, typer.Option(help="Numbers of triples, by commas.")] = "10,25,50,100,250,600",
    draws: Annotated[int, typer.Option(help="Draws of triples for each number.")] = 5,
    prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 600,
    validation_prompts: Annotated[int, typer.Option(help="Validation prompts.")] = 120,
    neutral_texts: Annotated[int, typer.Option(help="Neutral texts that are scored.")] = 240,
    seed: Annotated[int, typer.Option(help="Of prompts, draws and sampling noise.")] = 0,
) -> None:
    """Measure what does not stand in the files yet."""
    if len(out) != len(data):
        raise SystemExit(f"there are {len(out)} --out and {len(data)} --data; expected one for each")
    with ExitStack() as stack:
        reports = []
        for file, source in zip(out, data, strict=True):
            setup = {
                "prompts": prompts,
                "validation_prompts": validation_prompts,
                "neutral_texts": neutral_texts,
                "seed": seed,
                "data": source.name,
            }
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            with (source / "triples.jsonl").open() as lines:
                everything = sum(1 for _ in lines)
            organism = load_organism(DemoOptions(data=source, triples=everything), folder, progress=False)
            study = unsteered_study(organism, prompts, validation_prompts, neutral_texts, seed)
            reports.append(Report.open(file, study, setup))
        for draw in range(draws):
            for count in triples.split(","):
                for report in reports:
                    report.measure(int(count), draw)


def unsteered_study(organism: Organism, prompts: int, validation_prompts: int, neutral_texts: int, seed: int) -> Study:
    """The prompts, and the unsteered model on them."""
    heldout = draw_prompts(np.random.default_rng(seed), "heldout", prompts)
    validation = draw_prompts(np.random.default_rng(seed + 1), "validation", validation_prompts)
    measured = [
        measure(
            organism.model,
            organism.tokenizer,
            each,
            [Setting("unsteered", None)],
            seed=seed + more,
            neutral_texts=texts,
        )[0]
        for each, more, texts in ((heldout, 0, neutral_texts), (validation, 10**6, 2))
    ]
    return Study(organism, heldout, validation, measured[0], measured[1], seed, neutral_texts)


if __name__ == "__main__":
    typer.run(main)
