"""What each method of the head to head costs: FLOPs and peak memory of aligning, FLOPs and speed of a generated token.

    python benchmarks/head_to_head_costs.py --out benchmarks/results/organism/head_to_head_costs.json
    python benchmarks/head_to_head_costs.py --out ... --speed ADAPTERS

FLOPs of aligning are counted by torch's counter while the method runs on the organism (of trainings: while the first
steps run; every step costs the same). Peak memory is that of a process of its own, above what it has when aligning
begins. A token's FLOPs follow from formulas (docs/flops.md). Speed is measured on an idle machine only, with `--speed`:
all methods in turn, batch by batch; the trained adapters are read from the folder ADAPTERS, and written there first.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from head_to_head import (
    K_DIFF,
    METHODS,
    MOST_TRIPLES,
    TRAINING_STEPS,
    TRIPLES_SEED,
    Bench,
    Settings,
    dspa_policy,
    means,
    training_options,
)
from peak_memory import peak_column

import dspa
from dspa.flops.counter import count, count_collection, model_shape
from dspa.flops.inference import InferenceAssumptions, decode_step, steer_token
from dspa.flops.shapes import SteeringShape
from dspa.methods.fsrl.policy import FsrlPolicy
from dspa.methods.fsrl.training import train
from dspa.methods.mean_vectors import latent_addition_policy, mean_difference_policy, principal_directions_policy
from dspa.methods.static_policy import StaticPolicy
from dspa.offline.batching import BatchLimits
from dspa.organism import INPUT_LAYER, OUTPUT_LAYER, load_model, sae_folder
from dspa.organism.demo import Candidate
from dspa.organism.evaluation import Setting, measure
from dspa.organism.language import draw_triples
from dspa.util.files import write_atomically
from dspa.util.machine import processor_name
from dspa.util.provenance import Provenance

CONTEXT = 100  # tokens a generated token of the organism has before it, about
LORA = {"DPO, LoRA": "dpo", "SimPO, LoRA": "simpo"}
TRAINED: dict[str, dict[str, Any]] = {
    "FSRL": {"learning_rate": 1e-3, "l1": 0.01},
    "constant sparse vector (YaPO)": {"learning_rate": 3e-3, "l1": 1e-3, "train_weight": False},
}


ALIKE = {"static list": "DSPA", "static addition": "CAA", "RepE": "CAA"}  # what they run but for a second at its end


def load(triples: int, seed: int = 0) -> Bench:
    model, tokenizer = load_model()
    saes = [dspa.SparseAutoencoder.from_sae_lens(sae_folder(which)) for which in ("input", "output")]
    drawn = draw_triples(np.random.default_rng(TRIPLES_SEED), MOST_TRIPLES)[:triples]
    torch.set_grad_enabled(True)
    return Bench(model, tokenizer, saes[0], saes[1], Settings(0, 0, seed), drawn, Path(tempfile.mkdtemp()))


def aligning(bench: Bench, method: str, triples: int, *, epochs: int = 1, steps: int = 1) -> Callable[[], object]:
    """What aligning with a method runs; of trainings the first epochs, with LoRA the first steps."""
    if method == "DSPA":
        return lambda: dspa_policy(replace(bench, cached={}), triples, Candidate("ge", "both", 0.3))
    if method == "CAA":
        return lambda: means(replace(bench, cached={}), triples)
    if method in TRAINED:
        pairs = bench.triples(triples)
        options = replace(training_options(bench, triples, **TRAINED[method]), epochs=epochs)
        return lambda: train(bench.model, pairs, bench.output_sae, OUTPUT_LAYER, options)
    from lora_baselines import LoraOptions, train_lora

    options = LoraOptions(LORA[method], 1e-3, steps)
    return lambda: train_lora(bench.model, bench.tokenizer, bench.rows(triples), options, bench.folder / "lora")


def prepare(method: str, triples: int) -> Callable[[], object]:
    """For `peak_column`: loads everything, and aligns on a few triples to warm up."""
    bench = load(triples)
    aligning(bench, method, 8)()
    return aligning(bench, method, triples)


def alignment_flops(bench: Bench, method: str, triples: int) -> float:
    if method == "DSPA":  # kernels are not seen by the counter
        steering = SteeringShape(INPUT_LAYER, OUTPUT_LAYER, bench.input_sae.d_sae, bench.output_sae.d_sae)
        return count_collection(bench.model, bench.triples(triples).triples, steering, BatchLimits()).total()
    if method == "CAA":
        return count(aligning(bench, method, triples)).total()
    if method in TRAINED:
        epochs = training_options(bench, triples).epochs
        first, second = (count(aligning(bench, method, triples, epochs=n)).total() for n in (1, 2))
        return first + (epochs - 1) * (second - first)
    first, second = (count(aligning(bench, method, triples, steps=n)).total() for n in (1, 2))
    return first + (TRAINING_STEPS - 1) * (second - first)


def token_flops(bench: Bench, method: str, fired: float) -> tuple[float, str]:
    """What a method adds to a generated token at most, and by what.

    Args:
        fired: latents that a trained adapter fires at a token.
    """
    shape = model_shape(bench.model, "organism")
    d_model, d_sae = shape.d_model, bench.output_sae.d_sae
    steering = SteeringShape(INPUT_LAYER, OUTPUT_LAYER, bench.input_sae.d_sae, d_sae)
    if method in ("DSPA", "static list"):
        work = steer_token(shape, steering, InferenceAssumptions(edited_latents=2 * K_DIFF), "dense")
        return work.flops, "one pass over the encoder, 32 decoder rows"
    if method in ("CAA", "RepE"):
        return float(d_model), "one vector"
    matrix, row = 2.0 * d_model * d_sae, 2.0 * d_model
    if method == "static addition":
        return matrix + 2 * row * 2 * K_DIFF, "one pass over a matrix of zeros, 32 rows of encoder and decoder"
    if method in TRAINED:
        return matrix + 2 * row * fired, f"one pass over the adapter, {fired:.0f} rows of encoder and decoder"
    return 0.0, "a longer prompt" if method == "prompt prefix" else "merged into the weights"


def run(triples: int, head_to_head: Path, out: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    if report and report["triples"] != triples:
        raise SystemExit(f"{out} holds results of {report['triples']} triples; expected {triples}")
    measured = json.loads(head_to_head.read_text())["rows"]
    bench = load(triples)
    bench.model.set_attn_implementation("eager")  # of which the counter sees every product
    report |= {"triples": triples, "processor": processor_name(), "provenance": asdict(Provenance.here())}
    report["model_token_flops"] = decode_step(
        model_shape(bench.model, "organism"), InferenceAssumptions(context=CONTEXT)
    ).flops
    rows = report.setdefault("rows", {})
    present = [method for method in METHODS if f"{method} @ {triples}" in measured]

    def keep(method: str, **found: Any) -> None:
        rows.setdefault(method, {}).update(found)
        write_atomically(out, json.dumps(report).encode())
        print(method, found, flush=True)

    for method in present:
        row = measured[f"{method} @ {triples}"]
        history = [step["l0"] for step in row["history"] if "l0" in step]
        added, by = token_flops(bench, method, float(np.mean(history[-8:])) if history else 0.0)
        keep(method, trained=row["trained"], seconds=row["seconds"], token_flops=added, token_by=by)
    for method in present:
        known, runs = rows[method], ALIKE.get(method, method)
        if method == "prompt prefix":
            keep(method, flops=0.0, peak_mib=0.0)
        elif "flops" not in known:
            keep(method, flops=rows[runs].get("flops") or alignment_flops(bench, runs, triples))
    for method in present:
        known, runs = rows[method], ALIKE.get(method, method)
        if "peak_mib" in known:
            continue
        if "peak_mib" not in rows[runs]:
            interval = peak_column(method, prepare, runs, triples).measured
            keep(runs, peak_mib=interval.value, peak_range=[interval.low, interval.high])
        keep(method, peak_mib=rows[runs]["peak_mib"], peak_range=rows[runs]["peak_range"])
    return report


def speed(triples: int, adapters: Path, out: Path, prompts: int) -> None:
    """Tokens per second of every method, as a share of the unsteered model's in the same batch."""
    report = json.loads(out.read_text())
    bench = load(MOST_TRIPLES)
    bench.settings = Settings(prompts, 0, 0)
    chosen, _ = dspa_policy(bench, triples, Candidate("ge", "both", 0.3))
    found, _ = means(bench, triples)
    policies: dict[str, Any] = {
        "unsteered": None,
        "DSPA": chosen,
        "static list": StaticPolicy.from_mean_difference(chosen),
        "static addition": latent_addition_policy(found, k=K_DIFF, scale=4.0),
        "CAA": mean_difference_policy(found, scale=0.5),
        "RepE": principal_directions_policy(found, scale=0.25),
    }
    for number, (method, options) in enumerate(TRAINED.items()):
        folder = adapters / str(number)
        if not folder.is_dir():
            chosen_options = training_options(bench, triples, **options)
            result = train(bench.model, bench.triples(triples), bench.output_sae, OUTPUT_LAYER, chosen_options)
            result.policy.save_pretrained(folder)
        policies[method] = FsrlPolicy.from_pretrained(folder)
    settings = [Setting(name, policy) for name, policy in policies.items()]
    measured = measure(bench.model, bench.tokenizer, bench.prompts(), settings, seed=0, neutral_texts=2)
    unsteered = measured[0].tokens_per_second
    report["speed"] = {
        "prompts": prompts,
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "rows": {
            each.setting: {
                "tokens_per_second": each.tokens_per_second.tolist(),
                "of_unsteered": float(np.median(each.tokens_per_second / unsteered)),
            }
            for each in measured
        },
    }
    write_atomically(out, json.dumps(report).encode())


def table(report: dict[str, Any]) -> list[str]:
    speeds = report.get("speed", {}).get("rows", {})
    lines = [
        "| method | trained | align, s | align, GFLOP | peak, MiB | a token, FLOPs | speed |",
        "|---|---|---|---|---|---|---|",
    ]
    own = report["model_token_flops"]
    for method, row in report["rows"].items():
        share = speeds.get(method, {}).get("of_unsteered")
        cells = [
            f"{row['trained']}",
            f"{row['seconds']:.0f}",
            f"{row['flops'] / 1e9:.0f}" if "flops" in row else "-",
            f"{row['peak_mib']:.0f}" if "peak_mib" in row else "-",
            f"+{100 * row['token_flops'] / own:.2g} %",
            "-" if share is None else f"{share:.2f}",
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return lines


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; what it holds is kept")
    parser.add_argument("--triples", type=int, default=250)
    parser.add_argument(
        "--head-to-head", type=Path, default=Path(__file__).parent / "results" / "organism" / "head_to_head.json"
    )
    parser.add_argument("--speed", type=Path, help="measures speed, with adapters from this folder")
    parser.add_argument("--prompts", type=int, default=360, help="held-out prompts that speed is measured on")
    options = parser.parse_args(arguments)
    if options.speed is None:
        report = run(options.triples, options.head_to_head, options.out)
    else:
        speed(options.triples, options.speed, options.out, options.prompts)
        report = json.loads(options.out.read_text())
    print("\n".join(table(report)))


if __name__ == "__main__":
    main()
