"""Why a method gains what it gains: three questions about training triples, answered without generating.

- Agreement: does a map predict the differences of triples that it was not fitted from, and does it need the prompt for
  that (docs/method.md, section 2.2)?
- Size: how far does a method move the residual stream?
- Margin: does it make the preferred answer of a triple likelier than the other one?

Size and margin are measured on the last triples; what is measured is made from the first ones alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import dspa
from dspa.methods.agreement import Agreement, Folds, ListOptions, agreement_sums
from dspa.methods.conditional_map import ConditionalDifferenceMap
from dspa.methods.controls import lists_of_other_prompts
from dspa.offline.density_subset import DensitySubset
from dspa.offline.triples import PreferenceTriple
from dspa.util.estimate import Estimate
from dspa.util.files import make_folder, write_atomically
from dspa.util.progress import track
from study.choice import chosen
from study.curve import CURVE
from study.fits import Material
from study.methods import DSPA, RIDGE, DspaSetting, Try, static_list, tries
from study.settings import Run, Task

MOST_MEASURED = 64  # triples whose size and margin are measured; a third of all where there are fewer
FOLDS = 5
ROWS_AT_ONCE = 16
TRAINED = ("FSRL", "DPO, LoRA", "SimPO, LoRA")  # of which the first triples alone are seen
STRONGER: dict[str, Callable[[DspaSetting], DspaSetting]] = {
    "DSPA, alpha 1": lambda chosen: replace(chosen, alpha=1.0),
    "DSPA, 64 latents a side": lambda chosen: replace(chosen, k_diff=64),
    "DSPA, 64 latents a side, alpha 1": lambda chosen: replace(chosen, k_diff=64, alpha=1.0),
    "DSPA, 256 latents a side": lambda chosen: replace(chosen, k_diff=256),
}


def measure(run: Run, task: Task) -> None:
    """Goes on where it was stopped, row by row."""
    file = make_folder(run.diagnosis) / f"{task}.json"
    found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
    material = Material.load(run, task)

    def keep(part: str, name: str, make: Callable[..., dict[str, Any]], *arguments: Any) -> None:
        if name not in found.setdefault(part, {}):
            found[part][name] = make(*arguments)
            write_atomically(file, json.dumps(found, indent=1).encode())

    by_prompt, by_template = folds_of_prompts(material), folds_of_templates(material)
    for name, settings in (("DSPA", DSPA), ("DSPA, ridge", RIDGE)):
        setting = settings[chosen(run, task, name).index]
        keep("agreement", name, agreement, material, setting, by_prompt)
        if by_template.count > 1:  # else no kind has two templates, at toy size
            keep("agreement", f"{name}, other templates", agreement, material, setting, by_template)

    @cache
    def unsteered() -> Reading:
        return Reading.of(material, Try("-"), "unsteered")

    def effect(name: str, make: Callable[[], Try]) -> dict[str, Any]:
        return Reading.of(material, make(), name).beside(unsteered())

    for name, make in attempts(material).items():
        keep("effect", name, effect, name, make)


# ----------------------------------------------------------------------------------------------------------- agreement


def folds_of_prompts(material: Material) -> Folds:
    """The triples of a part have templates that triples of other parts have as well."""
    store: Any = material.densities
    return Folds.from_store(store, min(FOLDS, len(material.triples)), material.run.settings.seed)


def folds_of_templates(material: Material) -> Folds:
    """The triples of a part have templates that no other part has, as held-out prompts do: the first template of every
    kind is in the first part."""
    templates: dict[str, list[str]] = {kind: [] for kind in material.kinds}
    fold = np.zeros(len(material.triples), dtype=np.int64)
    for row, (kind, template) in enumerate(zip(material.kinds, material.templates, strict=True)):
        if template not in templates[kind]:
            templates[kind].append(template)
        fold[row] = templates[kind].index(template) % FOLDS
    return replace(folds_of_prompts(material), fold=fold, count=int(fold.max()) + 1)


def agreement(material: Material, setting: DspaSetting, folds: Folds) -> dict[str, Any]:
    """Per edit, over parts of the triples: with a prompt's own list, with the list of a prompt of another kind, and
    with the list that is the same for all."""
    seed = material.run.settings.seed
    options = ListOptions(k_diff=setting.k_diff, edit=setting.edit)
    kinds = np.array(material.kinds)
    found: dict[str, list[NDArray[np.float64]]] = {"own list": [], "list of another kind": [], "static list": []}
    for part in range(folds.count):
        left_out = np.flatnonzero(folds.fold == part)
        others = DensitySubset.from_store(folds.triples, np.flatnonzero(folds.fold != part).tolist())
        fitted = ConditionalDifferenceMap.fit(others, gate_rule=setting.gate_rule, estimator=setting.estimator)
        own = options.of(fitted, folds.density[left_out])
        static = static_list(setting.of(material, fitted)).edits.rows(torch.zeros(len(left_out), dtype=torch.int64))
        lists = {"own list": own, "static list": static}
        if len(set(kinds[left_out])) > 1:
            lists["list of another kind"] = lists_of_other_prompts(own, kinds[left_out].tolist(), seed)
        for name, edits in lists.items():
            sums = agreement_sums(edits, folds.difference[left_out]).numpy()
            found[name].append(Agreement(sums, edits.counts.numpy(), folds.fold[left_out]).per_edit)
    return {name: numbers(np.concatenate(parts)) for name, parts in found.items() if parts}


# ------------------------------------------------------------------------------------------------------ size and margin


def measured_triples(triples: int) -> int:
    """How many of so many triples."""
    return min(MOST_MEASURED, triples // 3)


def attempts(material: Material) -> dict[str, Callable[[], Try]]:
    """What is measured, each from triples before the measured ones."""
    run: Run = material.run
    task: Task = material.task
    count = len(material.triples) - measured_triples(len(material.triples))

    def at_index(method: str) -> int:
        return chosen(run, task, method).index

    def at_choice(method: str) -> Try:
        return tries(material, method)[at_index(method)]

    def stronger(change: Callable[[DspaSetting], DspaSetting]) -> Try:
        setting = change(DSPA[at_index("DSPA")])
        return Try(str(setting), ("densities",), setting.policy(material, count))

    return {
        **{name: partial(make, material, at_index(name), count) for name, make in CURVE.items()},
        **{name: partial(stronger, change) for name, change in STRONGER.items()},
        **{name: partial(at_choice, name) for name in TRAINED},
    }


class Reading:
    """What the model makes of both responses of the measured triples.

    Attributes:
        likelihood: `[N, 2]`, mean log-probability of a token of the chosen and of the rejected response.
        states: for each response, the chosen one first, `[T, d_model]`, the residual stream after the output layer at
            the tokens that are edited while it is generated.
    """

    def __init__(self, likelihood: NDArray[np.float64], states: list[Tensor]) -> None:
        self.likelihood, self.states = likelihood, states

    @classmethod
    @torch.no_grad()
    def of(cls, material: Material, attempt: Try, name: str) -> Reading:
        triples: list[PreferenceTriple] = list(material.triples)[-measured_triples(len(material.triples)) :]
        rows = [(triple.prompt, response) for triple in triples for response in (triple.chosen, triple.rejected)]
        likelihood, states = np.zeros(len(rows)), [torch.empty(0)] * len(rows)
        order = sorted(range(len(rows)), key=lambda row: sum(map(len, rows[row])))
        layer = material.run.settings.output_layer
        with attempt.applied(material) as model:
            for start in track(range(0, len(order), ROWS_AT_ONCE), f"  {name}", enabled=True, unit="batches"):
                batch = order[start : start + ROWS_AT_ONCE]
                logits, stream = read(model, material.tokenizer, [rows[row] for row in batch], attempt.policy, layer)
                for place, row in enumerate(batch):
                    response = torch.tensor(rows[row][1])
                    scores = logits[place, -len(response) - 1 : -1].float()
                    likelihood[row] = -float(nn.functional.cross_entropy(scores, response))
                    states[row] = stream[place, -len(response) - 1 : -1].float().clone()
        return cls(likelihood.reshape(-1, 2), states)

    @property
    def margin(self) -> NDArray[np.float64]:
        """`[N]`, of the chosen over the rejected response, in nats per token."""
        return self.likelihood[:, 0] - self.likelihood[:, 1]

    def beside(self, unsteered: Reading) -> dict[str, Any]:
        change = self.margin - unsteered.margin
        moved = [
            ((state - before).norm(dim=1) / before.norm(dim=1)).mean()
            for state, before in zip(self.states, unsteered.states, strict=True)
        ]
        return {
            "size": float(torch.stack(moved).mean()),
            "margin": numbers(change),
            "raised": float((change > 0).mean()),
            "chosen": numbers(self.likelihood[:, 0] - unsteered.likelihood[:, 0]),
        }


def read(
    model: Any,
    tokenizer: Any,
    rows: Sequence[tuple[Sequence[int], Sequence[int]]],
    policy: dspa.Policy | None,
    layer: int,
) -> tuple[Tensor, Tensor]:
    """Logits and the residual stream after a layer, of prompts that responses follow, padded on the left."""
    inputs = tokenizer.pad(
        {"input_ids": [[*prompt, *response] for prompt, response in rows]}, padding_side="left", return_tensors="pt"
    )
    mask = inputs["attention_mask"]
    options = {
        "attention_mask": mask,
        "position_ids": (mask.cumsum(dim=1) - 1).clamp(min=0),
        "use_cache": False,
        "logits_to_keep": max(len(response) for _, response in rows) + 1,
    }
    if policy is None:
        with stream_after(model, layer) as states:
            logits = model(inputs["input_ids"], **options).logits
    else:
        lengths = [len(prompt) for prompt, _ in rows]
        with (
            dspa.steer(model, policy) as steering,
            stream_after(model, layer) as states,
            steering.scoring(prompt_tokens=lengths),
        ):
            logits = model(inputs["input_ids"], **options).logits
    return logits, states[0]


@contextmanager
def stream_after(model: Any, layer: int) -> Iterator[list[Tensor]]:
    """What a decoder layer returns, after every hook that was registered before."""
    states: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hook = model.model.layers[layer].register_forward_hook(keep)
    try:
        yield states
    finally:
        hook.remove()


def numbers(samples: NDArray[np.float64]) -> list[float]:
    """The mean and half its 95 % interval."""
    estimate = Estimate.from_samples(samples)
    return [estimate.mean, estimate.half_width]
