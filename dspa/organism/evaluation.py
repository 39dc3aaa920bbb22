"""Measuring what policies do to the organism: rewards counted by rule, over prompts paired by seed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspa.kernels import EditList
from dspa.kernels.lookup import top
from dspa.methods.conditional_map import differences
from dspa.methods.policy import Policy
from dspa.methods.static_policy import StaticPolicy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.offline.density_store import DensityStore
from dspa.online.steering import steer
from dspa.organism.language import KINDS, MAX_RESPONSE_TOKENS, RULES, Prompt, neutral_text, parse
from dspa.util.estimate import Estimate
from dspa.util.progress import track

if TYPE_CHECKING:
    from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

PROMPTS_PER_BATCH = 120
NEUTRAL_TEXTS = 240
NEUTRAL_PREFIX = 12  # tokens of a neutral text that are given; they are its prompt
NEUTRAL_SCORED = 36  # tokens after them, whose likelihood is measured under steering


@dataclass(frozen=True, eq=False)
class Setting:
    """A row of the table: a name and the policy behind it, None for the unsteered model.

    A `StaticPolicy` with more than one list has one for each prompt of the evaluation, in order.
    """

    name: str
    policy: Policy | None

    def policy_of(self, start: int, end: int) -> Policy | None:
        """The policy for prompts `start` to `end`."""
        if isinstance(self.policy, StaticPolicy) and self.policy.edits.batch > 1:
            return replace(self.policy, edits=self.policy.edits.rows(torch.arange(start, end)))
        return self.policy


@dataclass(frozen=True, eq=False)
class Measurement:
    """What one setting did, an entry per prompt (per batch for speed, per text for neutral text).

    Attributes:
        setting: its name.
        preferred, dispreferred: number of such moves in each response.
        malformed: whether a response has a sentence that is none of the language's, or no sentence at all.
        tokens_per_second: generated tokens over the time `generate` took.
        neutral_loss: mean cross-entropy in nats per token of a neutral text.
    """

    setting: str
    preferred: NDArray[np.int64]
    dispreferred: NDArray[np.int64]
    malformed: NDArray[np.bool_]
    tokens_per_second: NDArray[np.float64]
    neutral_loss: NDArray[np.float64]

    @property
    def rewards(self) -> NDArray[np.int64]:
        """Preferred minus dispreferred moves."""
        return self.preferred - self.dispreferred

    def perplexity(self) -> Estimate:
        """Perplexity on neutral text; the interval by the delta method."""
        loss = Estimate.from_samples(self.neutral_loss)
        perplexity = float(np.exp(loss.mean))
        return Estimate(perplexity, perplexity * loss.half_width)


@dataclass(frozen=True, eq=False)
class RecordingPolicy(SteeringPolicy):
    """A steering policy that keeps the densities it selects by."""

    densities: list[Tensor] = field(default_factory=list, kw_only=True)

    def select(self, density: Tensor) -> EditList:
        self.densities.append(density.clone())
        return super().select(density)


def measure(
    model: Gemma2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    settings: Sequence[Setting],
    *,
    seed: int,
    neutral_texts: int = NEUTRAL_TEXTS,
    progress: bool = False,
) -> list[Measurement]:
    """Samples a response to every prompt under every setting, at temperature 1.

    A batch of prompts goes through all settings, with the same sampling noise, before the next batch comes: responses
    are paired by prompt, and a slow moment of the machine meets all settings.

    Args:
        model, tokenizer: the organism.
        prompts: held-out prompts.
        settings: what to compare.
        seed: of the sampling noise and of the neutral texts.
        neutral_texts: how many neutral texts are scored.
        progress: whether to draw a progress bar.
    """
    starts = range(0, len(prompts), PROMPTS_PER_BATCH)
    responses: dict[str, list[str]] = {setting.name: [] for setting in settings}
    speeds: dict[str, list[float]] = {setting.name: [] for setting in settings}
    work = [(start, setting) for start in starts for setting in settings]
    for start, setting in track(work, "Generating", enabled=progress, unit="batches"):
        batch = prompts[start : start + PROMPTS_PER_BATCH]
        policy = setting.policy_of(start, start + len(batch))
        texts, speed = respond(model, tokenizer, batch, policy, seed=seed + start)
        responses[setting.name] += texts
        speeds[setting.name].append(speed)
    neutral = _neutral_ids(tokenizer, neutral_texts, seed)
    measurements = []
    for setting in settings:
        parsed = [parse(text) for text in responses[setting.name]]
        rules = [RULES[prompt.kind] for prompt in prompts]
        pairs = list(zip(parsed, rules, strict=True))
        policy = setting.policy_of(0, min(len(neutral), len(prompts)))
        measurements.append(
            Measurement(
                setting=setting.name,
                preferred=np.array([sum(move in rule.preferred for move in p.moves) for p, rule in pairs]),
                dispreferred=np.array([sum(move in rule.dispreferred for move in p.moves) for p, rule in pairs]),
                malformed=np.array([p.malformed > 0 or not p.moves for p in parsed]),
                tokens_per_second=np.array(speeds[setting.name]),
                neutral_loss=_neutral_loss(model, neutral[: len(prompts)], policy),
            )
        )
    return measurements


def prompt_batch(tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` `[B, P]` of chat prompts, padded on the left."""
    chats = [[{"role": "user", "content": prompt.text}] for prompt in prompts]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    return {name: batch[name] for name in ("input_ids", "attention_mask")}  # type: ignore[index, call-overload]


def respond(
    model: Gemma2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: Sequence[Prompt],
    policy: Policy | None,
    *,
    seed: int,
) -> tuple[list[str], float]:
    """A sampled response to each prompt, and the generated tokens per second."""
    batch = prompt_batch(tokenizer, prompts)
    with nullcontext() if policy is None else steer(model, policy):
        torch.manual_seed(seed)
        started = time.perf_counter()
        output = model.generate(  # type: ignore[attr-defined]
            **batch,
            do_sample=True,
            temperature=1.0,
            top_k=0,
            max_new_tokens=MAX_RESPONSE_TOKENS,
        )
        seconds = time.perf_counter() - started
    generated = output[:, batch["input_ids"].shape[1] :]
    tokens = int((generated != tokenizer.pad_token_id).sum())
    return tokenizer.batch_decode(generated, skip_special_tokens=True), tokens / seconds


def prompt_densities(
    model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[Prompt], policy: SteeringPolicy
) -> Tensor:
    """`[prompts, d_sae_in]` activation densities, as steering sees them."""
    recording = RecordingPolicy(policy.conditional_map, policy.input_sae, policy.output_sae)
    with torch.no_grad(), steer(model, recording) as steering:
        for start in range(0, len(prompts), PROMPTS_PER_BATCH):
            batch = prompt_batch(tokenizer, prompts[start : start + PROMPTS_PER_BATCH])
            with steering.scoring(prompt_tokens=batch["attention_mask"].sum(dim=1).tolist()):
                model(**batch)
    return torch.cat(recording.densities)


def true_kind_lists(
    store: DensityStore, triple_kinds: Sequence[str], prompts: Sequence[Prompt], policy: SteeringPolicy
) -> EditList:
    """The ceiling: each prompt's list by the mean difference of the triples of its true kind."""
    kinds = torch.tensor([KINDS.index(kind) for kind in triple_kinds])
    totals = torch.zeros(len(KINDS), store.run.d_sae_out, dtype=torch.float64)
    for first, difference in differences(store):
        totals.index_add_(0, kinds[first : first + len(difference)], difference)
    up = [top(row, policy.k_diff, largest=True).tolist() if policy.edit != "ablate" else [] for row in totals]
    down = [top(row, policy.k_diff, largest=False).tolist() if policy.edit != "augment" else [] for row in totals]
    return EditList.from_lists(up, down).rows(torch.tensor([KINDS.index(prompt.kind) for prompt in prompts]))


def prompt_sets(densities: Tensor, k_prompt: int) -> Tensor:
    """`S_prompt` of each row of densities, as rows of `[prompts, d_sae_in]` bool."""
    sets = torch.zeros_like(densities, dtype=torch.bool)
    for row, density in zip(sets, densities, strict=True):
        row[top(density, k_prompt, largest=True)] = True
    return sets


def _neutral_ids(tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> Tensor:
    """`[count, NEUTRAL_PREFIX + NEUTRAL_SCORED]` ids of neutral texts with held-out nouns, cut to one length."""
    rng = np.random.default_rng(seed)
    width = NEUTRAL_PREFIX + NEUTRAL_SCORED
    rows: list[list[int]] = []
    while len(rows) < count:
        ids = tokenizer(neutral_text(rng, "heldout", sentences=8)).input_ids
        if len(ids) >= width:
            rows.append(ids[:width])
    return torch.tensor(rows)


@torch.no_grad()
def _neutral_loss(model: Gemma2ForCausalLM, ids: Tensor, policy: Policy | None) -> NDArray[np.float64]:
    """Mean loss of each text's tokens after its prefix; the prefix is the prompt, all that follows is steered."""
    with nullcontext() if policy is None else steer(model, policy) as steering:
        with nullcontext() if steering is None else steering.scoring(prompt_tokens=NEUTRAL_PREFIX):
            prefix = model(ids[:, :NEUTRAL_PREFIX], use_cache=True)
        rest = model(ids[:, NEUTRAL_PREFIX:], past_key_values=prefix.past_key_values, use_cache=True)
    logits = torch.cat([prefix.logits[:, -1:], rest.logits[:, :-1]], dim=1).double()
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), ids[:, NEUTRAL_PREFIX:].flatten(), reduction="none"
    )
    return losses.view(len(ids), -1).mean(dim=1).numpy()
