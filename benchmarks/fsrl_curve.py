"""FSRL's SimPO loss beside the reward of what is generated, over training.

python benchmarks/fsrl_curve.py --out benchmarks/results/organism/fsrl_curve.json [--png docs/fsrl_training.png]
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import dspa
from dspa.methods.fsrl.policy import FsrlPolicy
from dspa.methods.fsrl.training import TrainingOptions, train
from dspa.offline.preferences import load_preferences
from dspa.organism import OUTPUT_LAYER, load_model, sae_folder, triples_file
from dspa.organism.evaluation import Estimate, Setting, measure
from dspa.organism.language import draw_prompts
from dspa.util.files import write_atomically
from dspa.util.provenance import Provenance
from dspa.util.report_parts import COLORS, new_figure, png_bytes

RUNS: dict[str, dict[str, Any]] = {
    "learning rate 1e-3, l1 1e-2": {"learning_rate": 1e-3, "l1": 1e-2},
    "learning rate 3e-3, l1 1e-3": {"learning_rate": 3e-3, "l1": 1e-3},
}


def run(out: Path, triples: int, prompts: int, epochs: int, every: int) -> dict[str, Any]:
    model, tokenizer = load_model()
    sae = dspa.SparseAutoencoder.from_sae_lens(sae_folder("output"))
    pairs = load_preferences(triples_file(), tokenizer, limit=triples)
    validation = draw_prompts(np.random.default_rng(1), "validation", prompts)
    report: dict[str, Any] = {
        "triples": triples,
        "prompts": prompts,
        "provenance": asdict(Provenance.here()),
        "runs": {},
    }
    for name, chosen in RUNS.items():
        measured: list[dict[str, Any]] = []

        def reward(policy: FsrlPolicy, measured: list[dict[str, Any]] = measured) -> float:
            (found,) = measure(model, tokenizer, validation, [Setting("", policy)], seed=10**6, neutral_texts=60)
            malformed = Estimate.from_samples(found.malformed.astype(float))
            value = Estimate.from_samples(found.rewards)
            measured.append(
                {"reward": asdict(value), "malformed": asdict(malformed), "perplexity": found.perplexity().mean}
            )
            return value.mean

        options = TrainingOptions(epochs=epochs, evaluate_every=every, **chosen)
        result = train(model, pairs, sae, OUTPUT_LAYER, options, reward=reward)
        steps = [each.step for each in result.evaluations]
        report["runs"][name] = {
            "options": asdict(options),
            "steps": [asdict(record) for record in result.steps],
            "evaluations": [{"step": step, **each} for step, each in zip(steps, measured, strict=True)],
        }
        write_atomically(out, json.dumps(report).encode())
        print(name, report["runs"][name]["evaluations"], flush=True)
    return report


def draw(report: dict[str, Any], png: Path) -> None:
    figure = new_figure((10, 3.6))
    axes: Any = figure.subplots(1, 3)
    for (name, values), color in zip(report["runs"].items(), COLORS, strict=False):
        steps = values["steps"]
        axes[0].plot([each["step"] for each in steps], [each["simpo"] for each in steps], color=color, label=name)
        evaluations = values["evaluations"]
        at = [each["step"] for each in evaluations]
        for axis, part in ((axes[1], "reward"), (axes[2], "malformed")):
            mean = np.array([each[part]["mean"] for each in evaluations])
            half = np.array([each[part]["half_width"] for each in evaluations])
            axis.plot(at, mean, color=color, marker="o", markersize=3)
            axis.fill_between(at, mean - half, mean + half, color=color, alpha=0.15, linewidth=0)
    for axis, title in zip(axes, ("SimPO loss (training)", "reward (validation)", "malformed responses"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
    axes[0].legend(frameon=False, fontsize=8)
    write_atomically(png, png_bytes(figure))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; drawn again if it is there")
    parser.add_argument("--png", type=Path, help="the figure")
    parser.add_argument("--triples", type=int, default=250)
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--every", type=int, default=8, help="steps between evaluations")
    options = parser.parse_args(arguments)
    if options.out.is_file():
        report = json.loads(options.out.read_text())
    else:
        report = run(options.out, options.triples, options.prompts, options.epochs, options.every)
    if options.png is not None:
        draw(report, options.png)


if __name__ == "__main__":
    main()
