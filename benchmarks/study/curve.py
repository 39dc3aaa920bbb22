"""Gain against the number of triples, at the settings that were chosen with all of them.

Methods that are trained are left out: each point of theirs costs as much as the last.
"""

from __future__ import annotations

from collections.abc import Callable

from study.choice import chosen
from study.evaluation import Measurement
from study.evaluation import measure as measure_answers
from study.fits import Material, first_means
from study.heldout import measurements, open_heldout
from study.methods import CAA_SCALES, DSPA, RIDGE, UNSTEERED, Try, caa, file_name, static_list
from study.settings import Run, Task

Make = Callable[[Material, int, int], Try]
"""A setting, by its place, from the first triples."""

CURVE: dict[str, Make] = {
    "static list": lambda m, index, count: Try("", ("densities",), static_list(DSPA[index].policy(m, count))),
    "CAA": lambda m, index, count: Try("", ("means",), caa(first_means(m.means, count), CAA_SCALES[index])),
    "DSPA": lambda m, index, count: Try("", ("densities",), DSPA[index].policy(m, count)),
    "DSPA, ridge": lambda m, index, count: Try("", ("densities",), RIDGE[index].policy(m, count)),
}


def measure(run: Run, task: Task) -> None:
    material = Material.load(run, task)
    prompts = open_heldout(run)[: run.settings.curve_prompts]
    for count in run.settings.triple_counts[:-1]:
        for method, make in CURVE.items():
            file = run.folder / "curve" / task / str(count) / file_name(method)
            if not file.is_file():
                attempt = make(material, chosen(run, task, method).index, count)
                name = f"{method}, {count} triples"
                measure_answers(material, name, attempt, prompts, seed=run.settings.seed).save(file)


def points(run: Run, task: Task) -> dict[str, list[tuple[int, Measurement, Measurement]]]:
    """By method: numbers of triples that were measured, what was found, and the unsteered model on the same prompts.
    The last point is that of the table, on the prompts of the curve."""
    found = {name: each.first(run.settings.curve_prompts) for name, each in measurements(run, task).items()}
    folder = run.folder / "curve" / task
    return {
        method: [
            *(
                (count, Measurement.read(file), found[UNSTEERED])
                for count in run.settings.triple_counts[:-1]
                if (file := folder / str(count) / file_name(method)).is_file()
            ),
            (run.settings.triples, found[method], found[UNSTEERED]),
        ]
        for method in CURVE
    }
