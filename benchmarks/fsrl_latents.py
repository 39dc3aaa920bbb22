"""Which latents FSRL's adapter uses, by the language's own labels, and what they are worth by loss and by reward.

    python benchmarks/fsrl_latents.py --out benchmarks/results/organism/fsrl_latents.json

A latent's label is what its activity on responses drawn from the language says (docs/results.md). A class of latents is
masked when the adapter is evaluated, and masked while another adapter is trained, each time beside random sets of as
many latents. The file is written after every row; what it holds already is not computed again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from head_to_head import Bench, training_options
from organism_runs import kept_adapter
from torch import Tensor
from validation_study import opened, study

from dspa.kernels import AdapterWeights
from dspa.kernels.adapter_step.differentiable import differentiable_adapter_step
from dspa.kernels.adapter_step.equation import steering_activations
from dspa.methods.fsrl.objective import response_log_probabilities, simpo_losses
from dspa.methods.fsrl.pairs import EditedTokens, PairBatch, PairSource
from dspa.methods.fsrl.policy import FsrlPolicy
from dspa.methods.fsrl.training import train
from dspa.methods.policy import Policy
from dspa.methods.split_model import SplitModel
from dspa.offline.preferences import PreferenceTriples, load_preferences
from dspa.organism import OUTPUT_LAYER
from dspa.organism.evaluation import Estimate
from dspa.organism.language import MOVES, REGISTERS, draw_prompt, draw_response, draw_triples
from dspa.organism.sentences import WORDING_TOKENS
from dspa.sae.encode import encode, encoder_input
from dspa.util.files import write_atomically

OPTIONS: dict[str, Any] = {"learning_rate": 1e-3, "l1": 0.01}  # as in the head to head
LABELLED_PAIRS = 240  # of drawn responses, by which latents are labelled
LABEL_SEED, UNSEEN_SEED = 11, 13
UNSEEN_PAIRS = 240  # on which the loss is measured
RANDOM_SETS = 2  # of each size
FEWEST = 20  # active response tokens below which a latent has no label
SHARE = 0.5
RETRAINED = ("one move", "one register")  # classes without which another adapter is trained
CLASSES = ("one move", "one register", "several registers", "not in responses")


@dataclass(frozen=True, eq=False)
class Labels:
    """What the latents of an SAE are active on, in responses drawn from the language.

    Attributes:
        classes: for each latent, one of `CLASSES`.
        registers: for each latent, the register it is most active on; "" where it has no label.
    """

    classes: list[str]
    registers: list[str]

    def members(self, name: str) -> list[int]:
        return [latent for latent, own in enumerate(self.classes) if own == name]

    @classmethod
    def from_rates(cls, rates: Tensor, active: Tensor) -> Labels:
        """From `rates [moves, d_sae]`, the share of each move's tokens on which a latent is active, and the number of
        response tokens it is `active [d_sae]` on."""
        names, registers = list(MOVES), list(REGISTERS)
        shares = rates / rates.sum(dim=0).clamp(min=1e-12)
        by_register = torch.stack(
            [shares[[names.index(move) for move in REGISTERS[register]]].sum(dim=0) for register in registers]
        )
        classes, own = [], []
        for latent in range(rates.shape[1]):
            if int(active[latent]) < FEWEST:
                classes.append("not in responses")
                own.append("")
                continue
            own.append(registers[int(by_register[:, latent].argmax())])
            if float(shares[:, latent].max()) >= SHARE:
                classes.append("one move")
            else:
                classes.append("one register" if float(by_register[:, latent].max()) >= SHARE else "several registers")
        return cls(classes, own)


@torch.no_grad()
def label(bench: Bench) -> Labels:
    rng, rows, moves = np.random.default_rng(LABEL_SEED), [], []
    for _ in range(LABELLED_PAIRS):
        responses = draw_response(rng), draw_response(rng)
        texts = [[{"role": "assistant", "content": response.text}] for response in responses]
        prompt = [{"role": "user", "content": draw_prompt(rng, "train").text}]
        rows.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]})
        moves.append(responses)
    sae, split = bench.output_sae, SplitModel(bench.model, OUTPUT_LAYER)
    names = list(MOVES)
    active, tokens = torch.zeros(len(names), sae.d_sae), torch.zeros(len(names))
    for triple, responses in zip(load_preferences(rows, bench.tokenizer), moves, strict=True):
        for ids, response in zip((triple.chosen, triple.rejected), responses, strict=True):
            of_token = [
                names.index(move)
                for move, wording in zip(response.moves, response.wordings, strict=True)
                for _ in range(WORDING_TOKENS[wording])
            ]
            assert len(of_token) == len(ids) - 1, "a response is its sentences and an end-of-turn token"
            whole = torch.tensor([[*triple.prompt, *ids]])
            hidden = split.states(whole, torch.ones_like(whole))[0, len(triple.prompt) : -1]
            active.index_add_(0, torch.tensor(of_token), (sae.encode(hidden) > 0).float())
            tokens.index_add_(0, torch.tensor(of_token), torch.ones(len(of_token)))
    return Labels.from_rates(active / tokens[:, None], active.sum(dim=0))


class UnseenPairs:
    """Pairs that no adapter was trained on, in batches with their states."""

    def __init__(self, bench: Bench, positions: Any) -> None:
        drawn = draw_triples(np.random.default_rng(UNSEEN_SEED), UNSEEN_PAIRS)
        other = Bench(
            bench.model, bench.tokenizer, bench.input_sae, bench.output_sae, bench.settings, drawn, bench.folder
        )
        triples: PreferenceTriples = other.triples(UNSEEN_PAIRS)
        self.split = SplitModel(bench.model, OUTPUT_LAYER)
        self._source = PairSource(
            self.split,
            triples.triples,
            EditedTokens(positions, ()),
            device=torch.device("cpu"),
            pad_token_id=int(bench.model.config.pad_token_id),
            cached=True,
            padding_too=False,
        )

    def batches(self) -> Iterator[PairBatch]:
        for first in range(0, UNSEEN_PAIRS, 16):
            yield self._source.batch(range(first, min(first + 16, UNSEEN_PAIRS)))

    @torch.no_grad()
    def loss(self, policy: FsrlPolicy | None, beta: float, gamma: float) -> Estimate:
        """The SimPO loss without the penalty."""
        losses = []
        for batch in self.batches():
            hidden = batch.hidden
            if policy is not None:
                step = differentiable_adapter_step(
                    hidden.flatten(0, 1), policy.sae, policy.intervention.effective_adapter(), batch.edited.flatten()
                )
                hidden = step.hidden.view_as(hidden)
            logits = self.split.logits(hidden, batch.ids, batch.mask)
            chosen, rejected = response_log_probabilities(logits, batch.ids, batch.response).chunk(2)
            losses.append(simpo_losses(chosen - rejected, beta, gamma))
        return Estimate.from_samples(torch.cat(losses).double().numpy())


@torch.no_grad()
def usage(policy: FsrlPolicy, pairs: UnseenPairs, labels: Labels) -> dict[str, Any]:
    """Shares of the classes, and of the registers, among the latents that are active: of the SAE's `f` and of the
    adapter's `v`, means over the tokens of prompts and of responses; and of `sum |v|`."""
    adapter = policy.intervention.effective_adapter()
    groups = {name: labels.members(name) for name in CLASSES} | {
        name: [latent for latent, own in enumerate(labels.registers) if own == name] for name in REGISTERS
    }
    member = torch.zeros(policy.sae.d_sae, len(groups))
    for column, latents in enumerate(groups.values()):
        member[latents, column] = 1
    sums = {(what, part): torch.zeros(len(groups)) for what in ("f", "v", "|v|") for part in ("prompt", "response")}
    counted = dict.fromkeys(sums, 0)
    for batch in pairs.batches():
        for part, of_part in (("prompt", batch.mask & ~batch.response), ("response", batch.response)):
            hidden = batch.hidden[of_part]
            x, _ = encoder_input(hidden, policy.sae)
            v = steering_activations(x @ adapter.weight.T + adapter.bias, adapter.threshold, adapter.activation)
            values = {"f": (encode(hidden, policy.sae) > 0).float(), "v": (v.abs() > 1e-6).float(), "|v|": v.abs()}
            for what, value in values.items():
                whole = value.sum(dim=1)
                some = whole > 0
                sums[what, part] += (value[some] @ member / whole[some, None]).sum(dim=0)
                counted[what, part] += int(some.sum())
    found = {name: {"latents": len(latents)} for name, latents in groups.items()}
    for (what, part), total in sums.items():
        for name, share in zip(groups, (total / max(1, counted[what, part])).tolist(), strict=True):
            found[name][f"{what}, {part}"] = share
    return found


def masked_sets(labels: Labels, sets: int) -> dict[str, list[int]]:
    """Every class, and random sets of as many latents, by name."""
    found = {name: latents for name in CLASSES if (latents := labels.members(name))}
    for number in range(sets):
        for place, name in enumerate(CLASSES):
            if name in found:
                rng = np.random.default_rng([place, number])
                drawn = rng.choice(len(labels.classes), size=len(found[name]), replace=False)
                found[f"{name}: random {number + 1}"] = sorted(int(latent) for latent in drawn)
    return found


def run(bench: Bench, triples: int, out: Path, adapters: Path) -> dict[str, Any]:
    report = opened(out, bench, triples)
    options = replace(training_options(bench, triples, **OPTIONS), edit_positions="all")
    rows = report["rows"]
    labels, pairs, prompts = label(bench), UnseenPairs(bench, options.edit_positions), bench.validation()
    report["sizes"] = {name: len(labels.members(name)) for name in CLASSES}

    def trained(name: str, masked: Sequence[int]) -> FsrlPolicy:
        chosen = replace(options, masked_latents=tuple(masked))

        def make() -> AdapterWeights:
            return train(bench.model, bench.triples(triples), bench.output_sae, OUTPUT_LAYER, chosen).policy.adapter

        adapter = kept_adapter(adapters / name, bench.output_sae, make)
        return FsrlPolicy(adapter, bench.output_sae, OUTPUT_LAYER)

    def keep(name: str, policy: Policy | None, masked: Sequence[int]) -> None:
        loss = pairs.loss(policy, options.beta, options.gamma)  # type: ignore[arg-type]
        found = bench.measured(policy, prompts, bench.settings.seed + 3 * 10**6, 2)
        rows[name] = {
            "masked": len(masked),
            "loss": asdict(loss),
            "rewards": found.rewards.tolist(),
            "malformed": found.malformed.astype(int).tolist(),
        }
        write_atomically(out, json.dumps(report).encode())
        print(f"{name}: loss {loss.mean:.3f}, reward {found.rewards.mean():+.3f}", flush=True)

    if "unsteered" not in rows:
        keep("unsteered", None, ())
    whole = trained("fsrl", ())
    if "usage" not in report:
        report["usage"] = usage(whole, pairs, labels)
    if "whole adapter" not in rows:
        keep("whole adapter", whole, ())
    sets = masked_sets(labels, RANDOM_SETS)
    for name, masked in sets.items():
        if f"masked, {name}" not in rows:
            keep(f"masked, {name}", replace(whole, masked_latents=tuple(masked)), masked)
    for name, masked in sets.items():
        if name.startswith(RETRAINED) and f"trained without, {name}" not in rows:
            policy = trained(f"without-{name}".replace(" ", "-").replace(":", ""), masked)
            keep(f"trained without, {name}", policy, masked)
    return report


def usage_table(report: dict[str, Any]) -> list[str]:
    columns = [f"{what}, {part}" for part in ("prompt", "response") for what in ("f", "v", "|v|")]
    shown = (column.replace("|v|", "size of v") for column in columns)  # a table knows no other meaning of a bar
    lines = ["| label | latents | " + " | ".join(shown) + " |", "|---" * (len(columns) + 2) + "|"]
    for name, found in report["usage"].items():
        shares = " | ".join(f"{100 * found[column]:.0f} %" for column in columns)
        lines.append(f"| {name} | {found['latents']} | {shares} |")
    return lines


def masks_table(report: dict[str, Any]) -> list[str]:
    """Loss and gain of each masked set."""
    rows = report["rows"]
    unsteered = np.array(rows["unsteered"]["rewards"])
    lines = ["| masked | latents | SimPO loss | gain | malformed % |", "|---|---|---|---|---|"]
    for name, row in rows.items():
        gain = Estimate.from_samples(np.array(row["rewards"]) - unsteered)
        shown = "-" if name == "unsteered" else f"{gain.mean:+.2f} ± {gain.half_width:.2f}"
        malformed = 100 * np.mean(row["malformed"])
        lines.append(f"| {name} | {row['masked']} | {row['loss']['mean']:.2f} | {shown} | {malformed:.1f} |")
    return lines


def tables(report: dict[str, Any]) -> list[str]:
    return [*usage_table(report), "", *masks_table(report)]


def main(arguments: Sequence[str] | None = None) -> None:
    study(__doc__, run, tables, arguments)


if __name__ == "__main__":
    main()
