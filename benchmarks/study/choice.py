"""Which setting of a method counts: the best on validation prompts, by the same number of tries for each."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from validation_choice import best_within

from dspa.util.files import write_atomically
from study.evaluation import Measurement, measure
from study.fits import Material
from study.methods import METHODS, UNSTEERED, file_name, tries
from study.prompts import load
from study.settings import Run, Task

BROKEN_ALLOWANCE = 0.05  # so many more answers than the unsteered model's may break, as on the organism
SEED_OF_VALIDATION = 10**6


@dataclass(frozen=True)
class Choice:
    """What validation found of a method.

    Attributes:
        index: of the setting that counts.
        setting: in words.
        notes: of every setting its mean reward, the share of broken answers (`malformed`) and the perplexity.
    """

    index: int
    setting: str
    notes: list[dict[str, Any]]


def choose(run: Run, task: Task) -> None:
    """Measures every setting of every method that was not measured yet, and chooses.

    An answer counts as broken as well if it is less likely, per token, than every answer of the unsteered model.
    """
    material = Material.load(run, task)
    folder = run.tries / task
    prompts = load(run, "validation")
    settings = run.settings

    def measured(method: str, index: int, attempt: Any) -> Measurement:
        file = folder / "answers" / f"{index}-{file_name(method)}"
        if not file.is_file() or Measurement.read(file).setting != attempt.setting:
            seed = settings.seed + SEED_OF_VALIDATION
            measure(material, method, attempt, prompts, seed=seed, scored=len(prompts)).save(file)
        return Measurement.read(file)

    unsteered = measured(UNSTEERED, 0, tries(material, UNSTEERED)[0])
    largest = float(unsteered.losses.max())
    allowed = unsteered.broken(largest) + BROKEN_ALLOWANCE
    for method in METHODS:
        found = [measured(method, index, attempt) for index, attempt in enumerate(tries(material, method))]
        notes = [
            {
                "setting": each.setting,
                "reward": float(each.rewards.mean()),
                "malformed": each.broken(largest),
                "perplexity": each.perplexity().mean,
            }
            for each in found
        ]
        index = best_within(notes, allowed)
        record = {"index": index, "setting": found[index].setting, "notes": notes}
        write_atomically(folder / file_name(method), json.dumps(record, indent=1).encode())


def chosen(run: Run, task: Task, method: str) -> Choice:
    """What `choose` wrote."""
    return Choice(**json.loads((run.tries / task / file_name(method)).read_text()))
