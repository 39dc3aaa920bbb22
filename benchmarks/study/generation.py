"""Answers of the chat model, many at once, with sampling noise that is paired by prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dspa
from dspa.util.progress import track

Chat = Sequence[dict[str, str]]


@dataclass(frozen=True)
class Answer:
    """What a model answered.

    Attributes:
        text: without special tokens.
        ids: the tokens that were generated, without the end of the turn.
        ended: whether the model ended its turn; False where the answer was cut off.
        seconds: its share of the time that its batch took.
    """

    text: str
    ids: tuple[int, ...]
    ended: bool
    seconds: float = 0.0

    @property
    def tokens(self) -> int:
        return len(self.ids)


class PairedNoise:
    """A logits processor with which the likeliest token is a sample at temperature 1 (the Gumbel-max trick).

    The noise of a row depends on the seed, the row's number and the step alone: the same chat meets the same noise
    under every policy, whatever batch it is in.
    """

    def __init__(self, seed: int, rows: Sequence[int]) -> None:
        self._generators = [np.random.Generator(np.random.SFC64([seed, row])) for row in rows]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        width = scores.shape[-1]
        draws = [each.standard_exponential(width, dtype=np.float32) for each in self._generators]
        noise = torch.from_numpy(np.stack(draws)).clamp_(min=torch.finfo(torch.float32).tiny).log_()
        return scores - noise.to(scores.device)


def answers(
    model: Any,
    tokenizer: Any,
    chats: Sequence[Chat],
    *,
    policy: dspa.Policy | None = None,
    seed: int,
    max_new_tokens: int,
    batch: int,
    sample: bool = True,
    progress: str = "",
) -> list[Answer]:
    """An answer to every chat, in their order.

    Chats of similar length share a batch. A `StaticPolicy` with more than one list has one for each chat, in order.

    Args:
        model, tokenizer: as `study.model.load` returns them.
        chats: lists of messages.
        policy: what steers the model; None for the model as it is.
        seed: of the sampling noise; a chat's noise also depends on its place in `chats`.
        max_new_tokens: of an answer.
        batch: chats that are answered at once.
        sample: sample at temperature 1 instead of taking the likeliest token.
        progress: the label of a progress bar; none is drawn without.
    """
    prompts = [prompt_ids(tokenizer, chat) for chat in chats]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    found: dict[int, Answer] = {}
    for rows in track(batches, progress, enabled=bool(progress), unit="batches"):
        noise = [PairedNoise(seed, rows)] if sample else []
        started = time.perf_counter()
        new = _generate(model, tokenizer, [prompts[row] for row in rows], _of_rows(policy, rows), noise, max_new_tokens)
        seconds = (time.perf_counter() - started) / len(rows)
        for row, ids in zip(rows, new, strict=True):
            found[row] = _answer(tokenizer, ids, seconds)
    return [found[row] for row in range(len(chats))]


def prompt_ids(tokenizer: Any, chat: Chat) -> list[int]:
    """The tokens of a chat, up to where the assistant's turn begins."""
    return tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, return_dict=True)["input_ids"]


def _generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[list[int]],
    policy: dspa.Policy | None,
    noise: list[PairedNoise],
    max_new_tokens: int,
) -> list[list[int]]:
    padded = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
    inputs = {name: padded[name].to(model.device) for name in ("input_ids", "attention_mask")}
    with nullcontext() if policy is None else dspa.steer(model, policy):
        output = model.generate(**inputs, do_sample=False, logits_processor=noise, max_new_tokens=max_new_tokens)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def _answer(tokenizer: Any, ids: list[int], seconds: float) -> Answer:
    ended = tokenizer.eos_token_id in ids
    kept = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
    return Answer(tokenizer.decode(kept, skip_special_tokens=True).strip(), tuple(kept), ended, seconds)


def _of_rows(policy: dspa.Policy | None, rows: Sequence[int]) -> dspa.Policy | None:
    if isinstance(policy, dspa.StaticPolicy) and policy.edits.batch > 1:
        return replace(policy, edits=policy.edits.rows(torch.tensor(rows)))
    return policy
