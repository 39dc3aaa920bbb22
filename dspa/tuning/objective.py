"""What is maximised, and what must not happen: gains by preferences or by a user's function, and the guard."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from dspa.errors import InvalidInputError
from dspa.methods.policy import Policy
from dspa.offline.triples import PreferenceTriple
from dspa.online.steering import steer
from dspa.tuning.scoring import Floats, ResponseScorer, Row
from dspa.util.scalars import LARGEST_FLOAT32, check_number

Reward = Callable[[str, str], float]


@dataclass(frozen=True)
class Guard:
    """What a setting may do to neutral text; one that does more, on the mean, is not chosen.

    Attributes:
        max_kl: mean KL(unsteered || steered) of the next-token distribution, nats per token.
        max_perplexity: perplexity as a multiple of the unsteered model's.

    Raises:
        InvalidInputError: for a value out of range.
    """

    max_kl: float = 0.1
    max_perplexity: float = 1.05

    def __post_init__(self) -> None:
        check_number("max_kl", self.max_kl, 0, LARGEST_FLOAT32)
        check_number("max_perplexity", self.max_perplexity, 0, LARGEST_FLOAT32)


@dataclass(eq=False)
class Objective:
    """Gains of policies over the unsteered model, example by example, on some triples and neutral texts.

    Attributes:
        model: the model.
        tokenizer: its tokenizer.
        scorer: scores its responses.
        triples: the examples.
        texts: neutral texts, as prompt and continuation.
        margin: whether the preference margin is part of the gain.
        reward: a user's function of prompt and response, or None.
        max_new_tokens: of generated responses.
        seed: of the sampling noise; that of an example is the same for every policy.
    """

    model: nn.Module
    tokenizer: Any
    scorer: ResponseScorer
    triples: Sequence[PreferenceTriple]
    texts: Sequence[Row]
    margin: bool
    reward: Reward | None
    max_new_tokens: int
    seed: int
    rows_at_once: int
    _unsteered: dict[str, dict[int, float]] = field(default_factory=dict, init=False)

    def gains(self, policy: Policy, start: int, stop: int) -> dict[str, Floats]:
        """By part ("margin", "reward"): steered minus unsteered, of the examples from `start` to `stop`."""
        found: dict[str, Floats] = {}
        if self.margin:
            found["margin"] = self._margins(policy, start, stop) - self._cached("margin", self._margins, start, stop)
        if self.reward is not None:
            found["reward"] = self._rewards(policy, start, stop) - self._cached("reward", self._rewards, start, stop)
        return found

    def damage(self, policy: Policy, start: int, stop: int) -> dict[str, Floats]:
        """By kind ("kl", "loss"), of the neutral texts that are looked at with the examples from `start` to `stop`: all
        of them with all examples, as many in proportion with a part, but at least two, so that a mean has an interval.
        """
        texts = self.texts[self._texts_upto(start) : self._texts_upto(stop)]
        found = self.scorer.damage(texts, policy) if texts else None
        empty = np.zeros(0)
        return {"kl": found.kl if found else empty, "loss": found.loss if found else empty}

    def _texts_upto(self, examples: int) -> int:
        return (
            min(len(self.texts), max(2, math.ceil(examples * len(self.texts) / len(self.triples)))) if examples else 0
        )

    def _margins(self, policy: Policy | None, start: int, stop: int) -> Floats:
        return self.scorer.margins(self.triples[start:stop], policy)

    def _rewards(self, policy: Policy | None, start: int, stop: int) -> Floats:
        assert self.reward is not None
        found: list[float] = []
        for first in range(start, stop, self.rows_at_once):
            part = self.triples[first : min(first + self.rows_at_once, stop)]
            for triple, response in zip(part, self._responses(part, policy, self.seed + first), strict=True):
                prompt = self.tokenizer.decode(triple.prompt, skip_special_tokens=True)
                found.append(_checked_reward(self.reward, prompt, response))
        return np.array(found)

    def _responses(self, triples: Sequence[PreferenceTriple], policy: Policy | None, seed: int) -> list[str]:
        """Sampled at temperature 1, a batch with noise of its own."""
        inputs = self.tokenizer.pad(
            {"input_ids": [list(triple.prompt) for triple in triples]}, padding_side="left", return_tensors="pt"
        )
        model: Any = self.model
        inputs = {name: inputs[name].to(model.device) for name in ("input_ids", "attention_mask")}
        with nullcontext() if policy is None else steer(self.model, policy), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "steering changed nothing")  # of the weakest settings that is no surprise
            torch.manual_seed(seed)
            output = model.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=self.max_new_tokens
            )
        return self.tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)

    def _cached(self, part: str, compute: Callable[[None, int, int], Floats], start: int, stop: int) -> Floats:
        known = self._unsteered.setdefault(part, {})
        if any(index not in known for index in range(start, stop)):
            known.update(zip(range(start, stop), compute(None, start, stop).tolist(), strict=True))
        return np.array([known[index] for index in range(start, stop)])


def _checked_reward(reward: Reward, prompt: str, response: str) -> float:
    """Raises InvalidInputError if a user's function fails, or returns what is no finite number."""
    try:
        found = reward(prompt, response)
    except Exception as error:
        raise InvalidInputError(
            f"the reward failed on the response {response[:40]!r} with {type(error).__name__}: {error}; mend it"
        ) from error
    try:
        value = float(found)
    except (TypeError, ValueError):
        value = math.nan
    if not math.isfinite(value):
        raise InvalidInputError(f"the reward of the response {response[:40]!r} is {found!r}; expected a finite number")
    return value
