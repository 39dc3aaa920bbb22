"""What a policy does to given texts: log-probabilities of responses, and how far next tokens are moved."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from dspa.methods.policy import Policy
from dspa.offline.triples import PreferenceTriple
from dspa.online.steering import steer
from dspa.transformers_model import device_of

Floats = NDArray[np.float64]
Row = tuple[Sequence[int], Sequence[int]]  # prompt and what follows it, token ids


@dataclass(frozen=True, eq=False)
class Damage:
    """How far a policy moves the model on texts that it should leave alone, an entry per text.

    Attributes:
        kl: mean over the tokens of KL(unsteered || steered) of the next-token distributions, in nats.
        loss: mean increase of the cross-entropy of the text's own tokens, in nats.
    """

    kl: Floats
    loss: Floats


class ResponseScorer:
    """Scores rows of prompt and response under policies, so many rows at once."""

    def __init__(self, model: nn.Module, rows_at_once: int) -> None:
        self._model: Any = model
        self._rows_at_once = rows_at_once
        config: Any = model.config
        self._pad = int(getattr(config, "pad_token_id", None) or 0)
        self._device = device_of(model)

    def log_probabilities(self, rows: Sequence[Row], policy: Policy | None) -> Floats:
        """Mean log-probability per response token, of each row, in nats."""
        found: list[float] = []
        for part in self._parts(rows):
            logprobs = self._logprobs(part, policy)
            found += [float(_of_tokens(each, row[1]).mean()) for each, row in zip(logprobs, part, strict=True)]
        return np.array(found)

    def margins(self, triples: Sequence[PreferenceTriple], policy: Policy | None) -> Floats:
        """Mean log-probability of the chosen minus that of the rejected response, of each triple, in nats."""
        rows = [(triple.prompt, response) for triple in triples for response in (triple.chosen, triple.rejected)]
        found = self.log_probabilities(rows, policy).reshape(-1, 2)
        return found[:, 0] - found[:, 1]

    def damage(self, rows: Sequence[Row], policy: Policy) -> Damage:
        """What a policy changes on texts, given as prompt and continuation."""
        kl: list[float] = []
        loss: list[float] = []
        for part in self._parts(rows):
            plain, steered = (self._logprobs(part, under) for under in (None, policy))
            for before, after, row in zip(plain, steered, part, strict=True):
                kl.append(float((before.exp() * (before - after)).sum(dim=-1).clamp(min=0).mean()))
                loss.append(float((_of_tokens(before, row[1]) - _of_tokens(after, row[1])).mean()))
        return Damage(np.array(kl), np.array(loss))

    def _parts(self, rows: Sequence[Row]) -> list[Sequence[Row]]:
        return [rows[start : start + self._rows_at_once] for start in range(0, len(rows), self._rows_at_once)]

    @torch.no_grad()
    def _logprobs(self, rows: Sequence[Row], policy: Policy | None) -> list[Tensor]:
        """For each row, `[response tokens, vocabulary]`, float32 at least."""
        width = max(len(prompt) + len(response) for prompt, response in rows)
        ids = torch.full((len(rows), width), self._pad)
        mask = torch.zeros_like(ids)
        for row, (prompt, response) in enumerate(rows):
            ids[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
            mask[row, : len(prompt) + len(response)] = 1
        inputs = {"input_ids": ids.to(self._device), "attention_mask": mask.to(self._device)}
        prompt_tokens = [len(prompt) for prompt, _ in rows]
        with (
            nullcontext() if policy is None else steer(self._model, policy) as steering,
            nullcontext() if steering is None else steering.scoring(prompt_tokens),
        ):
            logits = self._model(**inputs, use_cache=False).logits
        return [
            logits[row, len(prompt) - 1 : len(prompt) + len(response) - 1]
            .to(torch.promote_types(logits.dtype, torch.float32))
            .log_softmax(dim=-1)
            for row, (prompt, response) in enumerate(rows)
        ]


def _of_tokens(logprobs: Tensor, tokens: Sequence[int]) -> Tensor:
    """`[tokens]` float64, the log-probability of each."""
    chosen = torch.tensor(list(tokens), device=logprobs.device)
    return logprobs.gather(1, chosen[:, None])[:, 0].double()
