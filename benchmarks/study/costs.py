"""What a method costs: FLOPs and peak memory of aligning, and the speed of answers.

Costs are those of the conditional task. FLOPs are counted by torch while a method runs on a few triples, and scaled to
all that it sees. Peak memory is that of a process of its own, above what it has when aligning begins.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lora_baselines import train_lora
from peak_memory import peak_column

import dspa
from dspa.flops.counter import count, count_collection, model_shape
from dspa.flops.inference import InferenceAssumptions, decode_step, steer_token
from dspa.flops.shapes import SteeringShape
from dspa.methods.fsrl.training import train
from dspa.methods.mean_vectors import response_means
from dspa.offline.batching import BatchLimits
from dspa.util.files import write_atomically
from dspa.util.machine import processor_name
from study.choice import chosen
from study.fits import PAIRS_AT_ONCE, Material, fsrl_options, lora_options
from study.methods import METHODS, PUBLISHED, Try, tries
from study.prompts import load
from study.settings import Run, Task

TASK: Task = "conditional"
COUNTED = 4  # triples whose FLOPs are counted
AT_ONCE = {"densities": 64, "means": 16, "fsrl": 4, "dpo": 4, "simpo": 4}  # triples whose peak memory is measured
ANSWERS = 16  # in a timed batch
CONTEXT = 100  # tokens that a generated token has before it, about
FIT_OF = {
    "static list": "densities",
    "CAA": "means",
    "RepE": "means",
    PUBLISHED: "densities",
    "DSPA": "densities",
    "DSPA, ridge": "densities",
    "FSRL": "fsrl",
    "DPO, LoRA": "dpo",
    "SimPO, LoRA": "simpo",
}


def measure(run: Run) -> None:
    file = run.folder / "costs.json"
    found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"processor": processor_name()}

    def keep(part: str, name: str, make: Callable[..., float], *arguments: Any) -> None:
        if name not in found.setdefault(part, {}):
            found[part][name] = make(*arguments)
            write_atomically(file, json.dumps(found, indent=1).encode())

    material = Material.load(run, TASK)
    for name in AT_ONCE:
        keep("align_flops", name, align_flops, material, name)
        keep("peak_mib", name, peak_mib, run, name)
    for method in METHODS:
        attempt = tries(material, method)[chosen(run, TASK, method).index]
        keep("token_flops", method, token_flops, material, attempt)
    keep("token_flops", "model", model_token_flops, material)
    if "speed" not in found:
        found["speed"] = speed(material)
        write_atomically(file, json.dumps(found, indent=1).encode())


# ------------------------------------------------------------------------------------------------------------- aligning


def aligning(material: Material, name: str, count: int) -> Callable[[], object]:
    """What aligning on the first triples runs; of trainings one step with all of them."""
    run, model = material.run, material.model
    triples = material.triples[:count]
    layers: dict[str, Any] = {"input_layer": run.settings.input_layer, "output_layer": run.settings.output_layer}
    if name == "means":
        return lambda: response_means(model, triples, run.settings.output_layer)
    if name == "fsrl":
        options = replace(fsrl_options(run), epochs=1, pairs_per_step=count, checkpoint_every=0)
        return lambda: train(model, triples, material.output_sae, run.settings.output_layer, options)

    def in_folder() -> None:
        with tempfile.TemporaryDirectory() as folder:
            if name == "densities":
                saes: dict[str, Any] = {"input_sae": material.input_sae, "output_sae": material.output_sae}
                dspa.collect(model, material.tokenizer, triples, **saes, **layers, out=folder)
            else:
                options = replace(lora_options(run, name), steps=1, pairs_per_step=count, progress=False)
                with torch.enable_grad():
                    train_lora(model, material.tokenizer, material.rows[:count], options, Path(folder))

    return in_folder


def align_flops(material: Material, name: str) -> float:
    settings = material.run.settings
    pairs = min(COUNTED, settings.triples // PAIRS_AT_ONCE * PAIRS_AT_ONCE)
    original = material.model.config._attn_implementation
    material.model.set_attn_implementation("eager")  # of which the counter sees every product
    try:
        if name == "densities":  # kernels are not seen by the counter
            steering, triples = steering_shape(material), material.triples[:pairs].triples
            counted = count_collection(material.model, triples, steering, BatchLimits()).total()
        else:
            counted = count(aligning(material, name, pairs)).total()
    finally:
        material.model.set_attn_implementation(original)
    seen = settings.triples if name in ("densities", "means") else settings.pairs_per_training
    return counted * seen / pairs


def peak_mib(run: Run, name: str) -> float:
    threads, processes = torch.get_num_threads(), run.settings.peak_processes
    return peak_column(name, prepare, run, name, threads, processes=processes).measured.value


def prepare(run: Run, name: str, threads: int) -> Callable[[], object]:
    """For `peak_column`: loads everything, and aligns on a few triples to warm up."""
    torch.set_num_threads(threads)
    material = Material.load(run, TASK)
    aligning(material, name, PAIRS_AT_ONCE)()
    return aligning(material, name, min(AT_ONCE[name], run.settings.triples // PAIRS_AT_ONCE * PAIRS_AT_ONCE))


# ------------------------------------------------------------------------------------------------------------ answering


def shape(material: Material) -> Any:
    return model_shape(material.model, "SmolLM2-135M-Instruct")


def steering_shape(material: Material) -> SteeringShape:
    settings = material.run.settings
    return SteeringShape(settings.input_layer, settings.output_layer, settings.latents, settings.latents)


def model_token_flops(material: Material) -> float:
    """What a generated token takes without a method, by formulas."""
    return decode_step(shape(material), InferenceAssumptions(context=CONTEXT)).flops


def token_flops(material: Material, attempt: Try) -> float:
    """What a method adds to a generated token at most, by formulas (docs/flops.md)."""
    policy = attempt.policy
    if isinstance(policy, (dspa.SteeringPolicy, dspa.StaticPolicy)):
        edited = policy.intervention.longest_list
        return steer_token(
            shape(material), steering_shape(material), InferenceAssumptions(edited_latents=edited), "dense"
        ).flops
    d_model = float(material.output_sae.d_model)
    if isinstance(policy, dspa.VectorPolicy):
        return d_model
    if isinstance(policy, dspa.FsrlPolicy):  # one pass over the adapter, and of all that may fire encoder and decoder
        history = material.record(attempt.fits[0]).history
        fired = float(np.mean([step["l0"] for step in history[-8:]]))
        return 2 * d_model * (material.output_sae.d_sae + 2 * fired)
    return 0.0  # merged into the weights, or a longer prompt


def speed(material: Material) -> dict[str, dict[str, float]]:
    """Tokens per second of a batch of answers of one length, prompts included: medians, all methods in turn."""
    settings = material.run.settings
    prompts = load(material.run, "validation")[:ANSWERS]
    attempts = {name: tries(material, name)[chosen(material.run, TASK, name).index] for name in METHODS}
    seconds: dict[str, list[float]] = {name: [] for name in attempts}
    with ExitStack() as merged:
        models = {name: merged.enter_context(attempt.applied(material)) for name, attempt in attempts.items()}
        for _ in range(settings.speed_rounds):
            for name, attempt in attempts.items():
                chats = [attempt.chat(prompt.text) for prompt in prompts]
                seconds[name].append(answering(models[name], material.tokenizer, chats, attempt, settings.speed_tokens))
    tokens = len(prompts) * settings.speed_tokens
    unsteered = np.array(seconds["unsteered"])
    return {
        name: {
            "tokens_per_second": float(np.median(tokens / np.array(found))),
            "of_unsteered": float(np.median(unsteered / np.array(found))),
        }
        for name, found in seconds.items()
    }


def answering(model: Any, tokenizer: Any, chats: list[Any], attempt: Try, tokens: int) -> float:
    """Seconds to answer."""
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with nullcontext() if attempt.policy is None else dspa.steer(model, attempt.policy):
        started = time.perf_counter()
        model.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
        return time.perf_counter() - started
