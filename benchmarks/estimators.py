"""Estimators of the conditional map against the number of triples, on the organism (docs/results.md).

For every number of triples and every draw of them: each estimator at the published strength, and at the strength that
is chosen on validation prompts, by the same number of tries; the control with lists of other prompts; gains over the
unsteered model on held-out prompts, paired by prompt. One JSON file, written after each draw, so that a run that was
interrupted goes on where it stopped. The gains of single prompts are kept, for intervals over draws and prompts
(`estimators_report.py`).

    python benchmarks/estimators.py --out estimators.json --triples 10,25,50,100,250,600 --draws 5
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from dspa.kernels import EditList
from dspa.methods.agreement import cross_validated_agreement
from dspa.methods.conditional_map import ConditionalDifferenceMap
from dspa.methods.static_policy import StaticPolicy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.offline.density_subset import DensitySubset
from dspa.organism import DATA
from dspa.organism.demo import MALFORMED_ALLOWANCE, DemoOptions, Organism, load_organism
from dspa.organism.evaluation import (
    Estimate,
    Measurement,
    Setting,
    lists_of_other_prompts,
    measure,
    prompt_densities,
    true_kind_lists,
)
from dspa.organism.language import Prompt, draw_prompts

STRENGTHS: tuple[dict[str, Any], ...] = (
    {"edit": "ablate", "alpha": 0.2},  # the published one
    {"edit": "ablate", "alpha": 0.5},
    {"edit": "both", "alpha": 0.2},
    {"edit": "both", "alpha": 0.3},
)
ESTIMATORS = ("mean_difference", "ridge")


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


def one_draw(study: Study, store: DensitySubset) -> dict[str, dict[str, Any]]:
    """The rows of every estimator, fitted on the triples of a store."""
    organism, found = study.organism, dict[str, dict[str, Any]]()
    for name in ESTIMATORS:
        tries: dict[str, SteeringPolicy] = {}
        for strength in STRENGTHS:
            # The published gate at the published strength, and elsewhere the one that does better on the organism.
            gate: Any = "ge" if strength == STRENGTHS[0] else "positive_ge"
            estimator: Any = name
            fitted = ConditionalDifferenceMap.fit(store, estimator=estimator, gate_rule=gate)
            policy = SteeringPolicy(fitted, organism.input_sae, organism.output_sae, **strength)
            tries[f"{strength['edit']} {strength['alpha']}"] = policy
        validated = study.measured(tries, validation=True)
        allowed = study.unsteered_validation.malformed.mean() + MALFORMED_ALLOWANCE
        published = next(iter(tries))
        sound = [each for each in tries if validated[each].malformed.mean() <= allowed] or [published]
        chosen = max(sound, key=lambda each: validated[each].rewards.mean())
        settings: dict[str, Any] = {"published": tries[published], "chosen": tries[chosen]}
        settings["control"] = control(study, tries[chosen])
        measured = study.measured(settings)
        for setting, measurement in measured.items():
            found[f"{name}, {setting}"] = study.row(measurement) | {"strength": chosen}
        estimator: Any = name
        agreement = cross_validated_agreement(store, estimator=estimator, folds=min(5, store.run.triple_count))
        found[f"{name}, chosen"]["agreement"] = agreement.mean
    return found


def control(study: Study, policy: SteeringPolicy) -> StaticPolicy:
    """Every prompt with the list of another one."""
    densities = prompt_densities(study.organism.model, study.organism.tokenizer, study.heldout, policy)
    return StaticPolicy.with_edits(policy, lists_of_other_prompts(policy.select(densities), study.seed))


def ceilings(study: Study) -> dict[str, dict[str, float]]:
    """Lists from the mean difference of each prompt's true kind over all triples, at every strength."""
    fitted = ConditionalDifferenceMap.fit(study.organism.store)
    settings: dict[str, StaticPolicy] = {}
    for strength in STRENGTHS:
        policy = SteeringPolicy(fitted, study.organism.input_sae, study.organism.output_sae, **strength)
        lists: EditList = true_kind_lists(study.organism.store, study.organism.triple_kinds, study.heldout, policy)
        settings[f"{strength['edit']} {strength['alpha']}"] = StaticPolicy.with_edits(policy, lists)
    return {name: study.row(measurement) for name, measurement in study.measured(settings).items()}


def main(
    out: Annotated[Path, typer.Option(help="The JSON file; one that exists is continued.")],
    triples: Annotated[str, typer.Option(help="Numbers of triples, by commas.")] = "10,25,50,100,250,600",
    draws: Annotated[int, typer.Option(help="Draws of triples for each number.")] = 5,
    data: Annotated[Path, typer.Option(help="Folder of an organism.")] = DATA,
    prompts: Annotated[int, typer.Option(help="Held-out prompts.")] = 600,
    validation_prompts: Annotated[int, typer.Option(help="Validation prompts.")] = 120,
    neutral_texts: Annotated[int, typer.Option(help="Neutral texts that are scored.")] = 240,
    seed: Annotated[int, typer.Option(help="Of prompts, draws and sampling noise.")] = 0,
) -> None:
    """Measure what does not stand in the file yet."""
    numbers = [int(each) for each in triples.split(",")]
    setup: dict[str, Any] = {
        "prompts": prompts,
        "validation_prompts": validation_prompts,
        "neutral_texts": neutral_texts,
        "seed": seed,
    }
    setup["data"] = data.name
    record = json.loads(out.read_text()) if out.exists() else {"setup": setup, "draws": {}}
    if record["setup"] != setup:
        raise SystemExit(f"{out} was measured with {record['setup']}; expected {setup}: pass another --out")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with (data / "triples.jsonl").open() as lines:
            everything = sum(1 for _ in lines)
        organism = load_organism(DemoOptions(data=data, triples=everything), folder, progress=True)
        study = unsteered_study(organism, prompts, validation_prompts, neutral_texts, seed)
        record.setdefault("unsteered", study.row(study.unsteered))
        if "ceiling" not in record:
            record["ceiling"] = ceilings(study)
        for draw in range(draws):
            order = np.random.default_rng([seed, draw]).permutation(everything)
            for number in numbers:
                key = f"{number}/{draw}"
                if key in record["draws"] or number > everything or (number == everything and draw):
                    continue
                store = DensitySubset.from_store(organism.store, order[:number].tolist())
                record["draws"][key] = one_draw(study, store)
                out.write_text(json.dumps(record, indent=1))
                gains = {name: round(row["gain"], 2) for name, row in record["draws"][key].items()}
                print(key, gains, flush=True)


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
