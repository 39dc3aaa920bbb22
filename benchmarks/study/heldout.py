"""The held-out prompts: read here and nowhere else, and only once all settings are chosen.

The first reading writes `heldout_opened.json`: the settings that were chosen on validation prompts, the sizes, and the
commit. A later reading with other settings is refused, so that nothing can be chosen by what was found here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from dspa.methods.list_overlap import Overlap, list_sets
from dspa.methods.steering_policy import SteeringPolicy
from dspa.util.files import write_atomically
from dspa.util.provenance import Provenance
from study.choice import chosen
from study.evaluation import Measurement
from study.evaluation import measure as measure_answers
from study.fits import Material
from study.methods import METHODS, UNSTEERED, Try, controls, file_name, tries
from study.prompts import Prompt, load
from study.settings import TASKS, Run, Task

STATIC = (UNSTEERED, "system prompt", "static list", "CAA", "RepE")
WITH_LISTS = ("DSPA, published", "DSPA", "DSPA, ridge")


def open_heldout(run: Run) -> list[Prompt]:
    """The held-out prompts, which all tasks share.

    Raises:
        SystemExit: if a setting was chosen again after they had been read.
    """
    choices = {each: {method: chosen(run, each, method).setting for method in METHODS} for each in TASKS}
    now: dict[str, Any] = json.loads(json.dumps({"chosen": choices, "settings": asdict(run.settings)}))
    if run.heldout_opened.is_file():
        before = json.loads(run.heldout_opened.read_text())
        if any(before[part] != now[part] for part in now):
            raise SystemExit(
                f"{run.heldout_opened} says that held-out prompts were read with other settings; they are used once: "
                "repeat the study in another folder, with prompts of another seed"
            )
    else:
        now |= {"commit": Provenance.here().commit, "opened": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())}
        write_atomically(run.heldout_opened, json.dumps(now, indent=1).encode())
    return load(run, "heldout")


def measure_static(run: Run, task: Task) -> None:
    """The methods that do the same for every prompt, at their chosen settings."""
    material = Material.load(run, task)
    prompts = open_heldout(run)
    for method in STATIC:
        _keep(material, method, tries(material, method)[chosen(run, task, method).index], prompts)


def measure(run: Run, task: Task) -> None:
    """Every other method at its chosen setting, the controls, and how alike edit lists are."""
    material = Material.load(run, task)
    prompts = open_heldout(run)
    attempts = {
        method: tries(material, method)[chosen(run, task, method).index] for method in METHODS if method not in STATIC
    }
    for method, attempt in attempts.items():
        _keep(material, method, attempt, prompts)
    first = prompts[: run.settings.control_prompts]
    for name, control in controls(material, attempts["DSPA"], first).items():
        _keep(material, name, control, first)
    overlaps = {method: asdict(_overlap(material, attempts[method], prompts)) for method in WITH_LISTS}
    write_atomically(run.heldout / task / "overlaps.json", json.dumps(overlaps).encode())


def _overlap(material: Material, attempt: Try, prompts: Sequence[Prompt]) -> Overlap:
    """How alike the lists of prompts are, within a kind and across kinds."""
    assert isinstance(attempt.policy, SteeringPolicy)
    lists = material.edit_lists(attempt.policy, [attempt.chat(prompt.text) for prompt in prompts])
    return Overlap.from_sets(list_sets(lists, material.output_sae.d_sae), [prompt.kind for prompt in prompts])


def _keep(material: Material, method: str, attempt: Try, prompts: Sequence[Prompt]) -> None:
    """Measures what was not measured yet."""
    file, settings = material.run.heldout / material.task / file_name(method), material.run.settings
    if not file.is_file():
        measure_answers(
            material,
            method,
            attempt,
            prompts,
            seed=settings.seed,
            scored=settings.fluency_prompts,
            questions=0 if method.startswith("control") else settings.questions,
        ).save(file)


def measurements(run: Run, task: Task) -> dict[str, Measurement]:
    """What was measured, by method."""
    files = [file for file in sorted((run.heldout / task).glob("*.json")) if file.name != "overlaps.json"]
    found = [Measurement.read(file) for file in files]
    order = list(METHODS)
    rank = {name: order.index(name) if name in order else len(order) for name in (each.method for each in found)}
    return {each.method: each for each in sorted(found, key=lambda each: rank[each.method])}
