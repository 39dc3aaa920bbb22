"""Every method on the organism, from the same triples, each with the same number of tries on validation prompts.

    python benchmarks/head_to_head.py --out benchmarks/results/organism/head_to_head.json [--triples 50,250,1000]

The file is written after every method and number of triples; what it holds already is not computed again. A row has the
response-by-response counts, so that any difference between methods can be computed as a paired one.

The methods "DPO, LoRA, 8 tries" and "SimPO, LoRA, 8 tries" have more tries than the others: those of the row with
four, which the file has to hold, and four at a learning rate between. They run only when they are named, with a
semicolon for a comma: `--methods "DPO; LoRA; 8 tries"`.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from validation_choice import best_within

import dspa
from dspa.kernels import EditList
from dspa.methods.conditional_map import ConditionalDifferenceMap
from dspa.methods.controls import lists_of_other_prompts, random_latents, response_density, with_permuted_latents
from dspa.methods.fsrl.policy import FsrlPolicy
from dspa.methods.fsrl.training import TrainingOptions, TrainingResult, train
from dspa.methods.mean_vectors import (
    ResponseMeans,
    latent_addition_policy,
    mean_difference_policy,
    principal_directions_policy,
    response_means,
)
from dspa.methods.policy import Policy
from dspa.methods.static_policy import StaticPolicy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.offline.preferences import PreferenceTriples, load_preferences
from dspa.organism import INPUT_LAYER, OUTPUT_LAYER, load_model, sae_folder
from dspa.organism.demo import CANDIDATES, MALFORMED_ALLOWANCE, Candidate
from dspa.organism.evaluation import Measurement, Setting, measure, prompt_densities
from dspa.organism.language import KINDS, MOVES, Prompt, Triple, draw_prompts, draw_triples, parse
from dspa.util.files import write_atomically
from dspa.util.machine import processor_name
from dspa.util.provenance import Provenance

TRIES = 4
TRIPLES_SEED = 7
MOST_TRIPLES = 1000
TRAINING_STEPS = 96  # of 32 pairs, whatever the number of triples
K_DIFF = 16
LORA_GRID = (1e-4, 1e-3), (0.5, 1.0)  # learning rates and scales
FINER_LORA_GRID = (3e-4,), (0.5, 0.75, 1.0, 1.5)  # of the rows with more tries


@dataclass(frozen=True)
class Settings:
    """What all rows of a file have in common."""

    prompts: int
    validation_prompts: int
    seed: int


@dataclass(eq=False)
class Bench:
    """The organism, and what several methods share at one number of triples."""

    model: Any
    tokenizer: Any
    input_sae: dspa.SparseAutoencoder
    output_sae: dspa.SparseAutoencoder
    settings: Settings
    drawn: list[Triple]
    folder: Path
    cached: dict[tuple[str, int], Any] = field(default_factory=dict)

    def once(self, name: str, count: int, make: Callable[[], Any]) -> Any:
        """The value and the seconds it took, made once."""
        if (name, count) not in self.cached:
            started = time.perf_counter()
            value = make()
            self.cached[name, count] = (value, time.perf_counter() - started)
        return self.cached[name, count]

    def rows(self, count: int) -> list[dict[str, Any]]:
        """The first triples as messages."""
        return [
            {
                "prompt": [{"role": "user", "content": triple.prompt.text}],
                "chosen": [{"role": "assistant", "content": triple.chosen.text}],
                "rejected": [{"role": "assistant", "content": triple.rejected.text}],
            }
            for triple in self.drawn[:count]
        ]

    def triples(self, count: int) -> PreferenceTriples:
        return load_preferences(self.rows(count), self.tokenizer)

    def prompts(self) -> list[Prompt]:
        return draw_prompts(np.random.default_rng(self.settings.seed), "heldout", self.settings.prompts)

    def validation(self) -> list[Prompt]:
        return draw_prompts(
            np.random.default_rng(self.settings.seed + 1), "validation", self.settings.validation_prompts
        )

    def measured(self, policy: Policy | None, prompts: Sequence[Prompt], seed: int, neutral: int) -> Measurement:
        setting = Setting("", policy)
        (found,) = measure(self.model, self.tokenizer, prompts, [setting], seed=seed, neutral_texts=neutral)
        return found


@dataclass(frozen=True, eq=False)
class Try:
    """One setting of a method.

    Attributes:
        name: the setting.
        policy: the policy; None for the model as it is.
        seconds: what aligning took.
        trained: trained parameters.
        change_prompts: for methods that change the prompt.
        history: of training.
        model: another model than the organism.
    """

    name: str
    policy: Policy | None
    seconds: float = 0.0
    trained: int = 0
    change_prompts: Callable[[Sequence[Prompt]], list[Prompt]] = list
    history: list[dict[str, Any]] = field(default_factory=list)
    model: Any = None


Method = Callable[[Bench, int], list[Try]]


# ------------------------------------------------------------------------------------------------------------- methods


def collected(bench: Bench, count: int) -> tuple[dspa.DensityStore, float]:
    """Densities of the first triples, and the seconds that they took."""
    return bench.once(
        "densities",
        count,
        lambda: dspa.collect(
            bench.model,
            bench.tokenizer,
            bench.triples(count),
            input_sae=bench.input_sae,
            output_sae=bench.output_sae,
            input_layer=INPUT_LAYER,
            output_layer=OUTPUT_LAYER,
            out=bench.folder / f"densities-{count}",
        ),
    )


def dspa_policy(bench: Bench, count: int, candidate: Candidate) -> tuple[SteeringPolicy, float]:
    store, seconds = collected(bench, count)
    started = time.perf_counter()
    fitted = ConditionalDifferenceMap.fit(store, gate_percentile=90, gate_rule=candidate.gate_rule)
    policy = SteeringPolicy(fitted, bench.input_sae, bench.output_sae, alpha=candidate.alpha, edit=candidate.edit)
    return policy, seconds + time.perf_counter() - started


def dspa_tries(bench: Bench, count: int) -> list[Try]:
    found = [(candidate, *dspa_policy(bench, count, candidate)) for candidate in CANDIDATES]
    return [Try(str(candidate), policy, seconds) for candidate, policy, seconds in found]


def static_list_tries(bench: Bench, count: int) -> list[Try]:
    tries = []
    for edit, alpha in (("ablate", 0.2), ("ablate", 0.5), ("both", 0.2), ("both", 0.3)):
        policy, seconds = dspa_policy(bench, count, Candidate("ge", edit, alpha))  # type: ignore[arg-type]
        tries.append(Try(f"{edit}, alpha {alpha}", StaticPolicy.from_mean_difference(policy), seconds))
    return tries


def means(bench: Bench, count: int) -> tuple[ResponseMeans, float]:
    return bench.once(
        "means",
        count,
        lambda: response_means(bench.model, bench.triples(count), OUTPUT_LAYER, bench.output_sae),
    )


def static_addition_tries(bench: Bench, count: int) -> list[Try]:
    found, seconds = means(bench, count)
    return [
        Try(f"scale {scale}", latent_addition_policy(found, k=K_DIFF, scale=scale), seconds)
        for scale in (0.5, 1.0, 2.0, 4.0)
    ]


def caa_tries(bench: Bench, count: int) -> list[Try]:
    found, seconds = means(bench, count)
    return [
        Try(f"scale {scale}", mean_difference_policy(found, scale=scale), seconds) for scale in (0.5, 1.0, 2.0, 4.0)
    ]


def repe_tries(bench: Bench, count: int) -> list[Try]:
    found, seconds = means(bench, count)
    return [
        Try(f"16 directions, scale {scale}", principal_directions_policy(found, scale=scale), seconds)
        for scale in (0.25, 0.5, 1.0, 2.0)
    ]


def training_options(bench: Bench, count: int, **options: Any) -> TrainingOptions:
    epochs = -(-TRAINING_STEPS // -(-count // 32))
    return TrainingOptions(epochs=epochs, seed=bench.settings.seed, **options)


def trained(bench: Bench, name: str, count: int, **options: Any) -> tuple[TrainingResult, float, list[dict[str, Any]]]:
    def make() -> TrainingResult:
        triples = bench.triples(count)
        return train(bench.model, triples, bench.output_sae, OUTPUT_LAYER, training_options(bench, count, **options))

    result, seconds = bench.once(name, count, make)
    return result, seconds, [asdict(record) for record in result.steps]


def fsrl_tries(bench: Bench, count: int) -> list[Try]:
    tries = []
    for positions in ("all", "from_last_prompt"):
        options = {"learning_rate": 1e-3, "l1": 0.01, "edit_positions": positions}
        result, seconds, history = trained(bench, f"fsrl {positions}", count, **options)
        parameters = bench.output_sae.d_sae * (bench.output_sae.d_model + 2)
        for scale in (0.5, 1.0):
            policy = replace(result.policy, scale=scale)
            tries.append(Try(f"{positions}, scale {scale}", policy, seconds, parameters, history=history))
    return tries


def yapo_tries(bench: Bench, count: int) -> list[Try]:
    tries = []
    for positions in ("all", "from_last_prompt"):
        options = {"learning_rate": 3e-3, "l1": 1e-3, "train_weight": False, "edit_positions": positions}
        result, seconds, history = trained(bench, f"yapo {positions}", count, **options)
        for scale in (1.0, 2.0):
            policy = replace(result.policy, scale=scale)
            tries.append(Try(f"{positions}, scale {scale}", policy, seconds, bench.output_sae.d_sae, history=history))
    return tries


@dataclass(frozen=True)
class PrefixedPrompt(Prompt):
    """A prompt after other sentences."""

    prefix: str = ""

    @property
    def text(self) -> str:
        return f"{self.prefix} {' '.join(self.templates).format(noun=self.noun)}"


def prompt_tries(bench: Bench, count: int) -> list[Try]:
    """The sentences of the k moves most preferred on the whole, before every prompt: the organism follows no
    instruction, so it is shown what is wanted."""
    balance: Counter[str] = Counter()
    for triple in bench.drawn[:count]:
        balance.update(parse(triple.chosen.text).moves)
        balance.subtract(parse(triple.rejected.text).moves)
    ranked = [move for move, _ in balance.most_common()]
    tries = []
    for k in (1, 2, 4, 6):
        prefix = " ".join(MOVES[move][0] for move in ranked[:k])

        def change(prompts: Sequence[Prompt], prefix: str = prefix) -> list[Prompt]:
            return [PrefixedPrompt(p.kind, p.templates, p.noun, prefix) for p in prompts]

        tries.append(Try(f"{k} sentences", None, change_prompts=change))
    return tries


def lora_tries(objective: str, learning_rates: Sequence[float], scales: Sequence[float]) -> Method:
    def tries(bench: Bench, count: int) -> list[Try]:
        from lora_baselines import LoraOptions, merge_into_copy, train_lora

        found = []
        for learning_rate in learning_rates:
            started = time.perf_counter()
            folder = bench.folder / f"{objective}-{count}-{learning_rate}"
            options = LoraOptions(objective, learning_rate, TRAINING_STEPS)
            training = train_lora(bench.model, bench.tokenizer, bench.rows(count), options, folder)
            seconds = time.perf_counter() - started
            for scale in scales:
                merged = merge_into_copy(bench.model, folder, scale)
                name = f"learning rate {learning_rate}, scale {scale}"
                found.append(Try(name, None, seconds, training.parameters, history=training.history, model=merged))
        return found

    return tries


METHODS: dict[str, Method] = {
    "DSPA": dspa_tries,
    "static list": static_list_tries,
    "static addition": static_addition_tries,
    "CAA": caa_tries,
    "RepE": repe_tries,
    "FSRL": fsrl_tries,
    "constant sparse vector (YaPO)": yapo_tries,
    "prompt prefix": prompt_tries,
    "DPO, LoRA": lora_tries("dpo", *LORA_GRID),
    "SimPO, LoRA": lora_tries("simpo", *LORA_GRID),
}


@dataclass(frozen=True)
class MoreTries:
    """A method with more tries than the others have.

    Attributes:
        base: the method whose tries count too, as its row has them.
        own: the further tries.
    """

    base: str
    own: Method


WITH_MORE_TRIES = {
    "DPO, LoRA, 8 tries": MoreTries("DPO, LoRA", lora_tries("dpo", *FINER_LORA_GRID)),
    "SimPO, LoRA, 8 tries": MoreTries("SimPO, LoRA", lora_tries("simpo", *FINER_LORA_GRID)),
}


def controls(bench: Bench, count: int, method: str, chosen: Try) -> dict[str, Policy]:
    """What the gain of a chosen policy has to be compared with."""
    if isinstance(chosen.policy, FsrlPolicy) and method == "FSRL":
        return {"control: FSRL on random latents": with_permuted_latents(chosen.policy, bench.settings.seed)}
    if not isinstance(chosen.policy, SteeringPolicy):
        return {}
    prompts = bench.prompts()
    densities = prompt_densities(bench.model, bench.tokenizer, prompts, chosen.policy)
    lists: EditList = chosen.policy.select(densities)
    others = lists_of_other_prompts(lists, [prompt.kind for prompt in prompts], bench.settings.seed)
    random = random_latents(lists, response_density(collected(bench, count)[0]), bench.settings.seed)
    return {
        "control: DSPA, lists of other prompts": StaticPolicy.with_edits(chosen.policy, others),
        "control: DSPA, random latents": StaticPolicy.with_edits(chosen.policy, random),
    }


# ----------------------------------------------------------------------------------------------------------- the table


def record(measurement: Measurement, prompts: Sequence[Prompt], **more: Any) -> dict[str, Any]:
    perplexity = measurement.perplexity()
    return {
        **more,
        "preferred": measurement.preferred.tolist(),
        "dispreferred": measurement.dispreferred.tolist(),
        "malformed": measurement.malformed.astype(int).tolist(),
        "kinds": [KINDS.index(prompt.kind) for prompt in prompts],
        "perplexity": [perplexity.mean, perplexity.half_width],
        "tokens_per_second": float(np.median(measurement.tokens_per_second)),
    }


def choose(
    bench: Bench, tries: Sequence[Try], unsteered: Measurement, known: Sequence[dict[str, Any]] = ()
) -> tuple[int, list[dict[str, Any]]]:
    """The try with the highest reward among those that break few responses, and what was measured of each.

    Args:
        bench, tries: what is measured.
        unsteered: the model as it is, on the same prompts.
        known: what was measured of other tries, which come before these.
    """
    prompts, seed = bench.validation(), bench.settings.seed + 10**6
    notes: list[dict[str, Any]] = list(known)
    for each in tries:
        original = bench.model
        bench.model = each.model or original
        try:
            found = bench.measured(each.policy, each.change_prompts(prompts), seed, 2)
        finally:
            bench.model = original
        notes.append(
            {"setting": each.name, "reward": float(found.rewards.mean()), "malformed": float(found.malformed.mean())}
        )
    allowed = float(unsteered.malformed.mean()) + MALFORMED_ALLOWANCE
    return best_within(notes, allowed), notes


def base_row(rows: dict[str, Any], method: str, count: int) -> dict[str, Any]:
    """The row whose tries count for a method too; empty for a method that has its own only."""
    if method not in WITH_MORE_TRIES:
        return {}
    name = f"{WITH_MORE_TRIES[method].base} @ {count}"
    if name not in rows:
        raise SystemExit(f"{method} @ {count} needs the row {name}, which the file does not hold")
    return rows[name]


def run(bench: Bench, out: Path, counts: Sequence[int], methods: Sequence[str]) -> None:
    report: dict[str, Any] = json.loads(out.read_text()) if out.is_file() else {}
    settings = asdict(bench.settings)
    if report and report["settings"] != settings:
        raise SystemExit(f"{out} holds results of other settings: {report['settings']}; expected {settings}")
    report |= {"settings": settings, "tries": TRIES, "training_steps": TRAINING_STEPS, "processor": processor_name()}
    report["provenance"] = asdict(Provenance.here())
    rows = report.setdefault("rows", {})
    prompts = bench.prompts()

    def keep(key: str, row: dict[str, Any]) -> None:
        rows[key] = row
        write_atomically(out, json.dumps(report).encode())
        print(
            f"{time.strftime('%H:%M:%S')} {key}: {np.mean(row['preferred']) - np.mean(row['dispreferred']):+.3f}",
            flush=True,
        )

    if "unsteered" not in rows:
        found = bench.measured(None, prompts, bench.settings.seed, 240)
        keep("unsteered", record(found, prompts, method="unsteered", triples=0))
    unsteered_validation = bench.measured(None, bench.validation(), bench.settings.seed + 10**6, 2)
    for count in counts:
        for method in methods:
            key = f"{method} @ {count}"
            if key in rows:
                continue
            base = base_row(rows, method, count)
            known = base.get("tries", [])
            tries = (WITH_MORE_TRIES[method].own if base else METHODS[method])(bench, count)
            assert len(tries) == TRIES
            index, notes = choose(bench, tries, unsteered_validation, known)
            if index < len(known):  # what the base has chosen, and measured
                assert notes[index]["setting"] == base["chosen"]
                keep(key, {**base, "method": method, "tries": notes})
                continue
            chosen = tries[index - len(known)]
            original = bench.model
            bench.model = chosen.model or original
            found = bench.measured(chosen.policy, chosen.change_prompts(prompts), bench.settings.seed, 240)
            bench.model = original
            more = {"seconds": chosen.seconds, "trained": chosen.trained, "history": chosen.history}
            keep(
                key,
                record(found, prompts, method=method, triples=count, chosen=chosen.name, tries=notes, **more),
            )
            for name, policy in controls(bench, count, method, chosen).items():
                found = bench.measured(policy, prompts, bench.settings.seed, 240)
                keep(f"{name} @ {count}", record(found, prompts, method=name, triples=count, chosen=chosen.name))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; what it holds is kept")
    parser.add_argument("--triples", default="50,100,250,500,1000", help="numbers of triples, in this order")
    parser.add_argument("--methods", default=",".join(METHODS).replace(", LoRA", "; LoRA"), help="names, by commas")
    parser.add_argument("--prompts", type=int, default=1080, help="held-out prompts")
    parser.add_argument("--validation-prompts", type=int, default=240, help="prompts on which a try is chosen")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, sampling noise and training")
    options = parser.parse_args(arguments)
    methods = [name.replace("; ", ", ") for name in options.methods.split(",")]
    known = [*METHODS, *WITH_MORE_TRIES]
    unknown = [name for name in methods if name not in known]
    if unknown:
        raise SystemExit(f"unknown method {unknown[0]!r}; there are {', '.join(known)}")
    model, tokenizer = load_model()
    saes = [dspa.SparseAutoencoder.from_sae_lens(sae_folder(which)) for which in ("input", "output")]
    drawn = draw_triples(np.random.default_rng(TRIPLES_SEED), MOST_TRIPLES)
    torch.set_grad_enabled(True)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(options.prompts, options.validation_prompts, options.seed)
        bench = Bench(model, tokenizer, saes[0], saes[1], settings, drawn, Path(folder))
        run(bench, options.out, [int(count) for count in options.triples.split(",")], methods)


if __name__ == "__main__":
    main()
