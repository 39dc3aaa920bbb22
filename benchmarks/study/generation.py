"""Answers of the chat model, many at once, with sampling noise that is paired by prompt."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import dspa
from dspa.util.progress import track

Chat = Sequence[dict[str, str]]

TEMPERATURE = 0.7
"""At 1 a model this small writes little that holds together; its authors recommend 0.2."""

TOP_K = 50
"""Only so many of the likeliest tokens are sampled from, the default of transformers."""


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
    """A logits processor that leaves one token: a sample at `TEMPERATURE` among the `TOP_K` likeliest, by the
    Gumbel-max trick. It serves one generate call.

    The noise of a token depends on the seed, the number of its row, the step and the token alone: the same chat meets
    the same noise under every policy, whatever batch it is in.
    """

    def __init__(self, seed: int, rows: Sequence[int]) -> None:
        self._row_keys = _mixed(_mixed(np.array([[seed]], dtype=np.uint64)) ^ np.array(rows, dtype=np.uint64)[:, None])
        self._step = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        likeliest = scores.topk(min(TOP_K, scores.shape[-1]), dim=-1)
        keys = _mixed(self._row_keys ^ np.uint64(self._step)) ^ likeliest.indices.cpu().numpy().astype(np.uint64)
        self._step += 1
        uniform = ((_mixed(keys) >> np.uint64(11)) + 0.5) / 2**53
        noise = torch.from_numpy(-np.log(-np.log(uniform))).to(scores)
        best = (likeliest.values / TEMPERATURE + noise).argmax(dim=-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(-1, likeliest.indices.gather(-1, best), 0.0)


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
        sample: sample at `TEMPERATURE` instead of taking the likeliest token.
        progress: the label of a progress bar; none is drawn without.
    """
    prompts = [prompt_ids(tokenizer, chat) for chat in chats]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batches = [order[start : start + batch] for start in range(0, len(order), batch)]
    found: dict[int, Answer] = {}
    for rows in track(batches, progress, enabled=bool(progress), unit="batches"):
        noise = [PairedNoise(seed, rows)] if sample else []
        started = time.perf_counter()
        inputs = _padded(model, tokenizer, [prompts[row] for row in rows])
        rows_policy = _of_rows(policy, rows)
        with nullcontext() if rows_policy is None else dspa.steer(model, rows_policy):
            new = _generate(model, inputs, noise, max_new_tokens)
        seconds = (time.perf_counter() - started) / len(rows)
        for row, ids in zip(rows, new, strict=True):
            found[row] = _answer(tokenizer, ids, seconds)
    return [found[row] for row in range(len(chats))]


@torch.no_grad()
def samples(
    model: Any, tokenizer: Any, chats: Sequence[Chat], each: int, *, seed: int, max_new_tokens: int
) -> list[list[Answer]]:
    """`each` answers of the unsteered model to every chat, all at once; every chat is read once."""
    inputs = _padded(model, tokenizer, [prompt_ids(tokenizer, chat) for chat in chats])
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    started = time.perf_counter()
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    read = model(
        ids[:, :-1], attention_mask=mask[:, :-1], position_ids=positions[:, :-1], use_cache=True, logits_to_keep=1
    )
    read.past_key_values.batch_repeat_interleave(each)
    repeated = {name: values.repeat_interleave(each, dim=0) for name, values in inputs.items()}
    noise = [PairedNoise(seed, range(len(chats) * each))]
    new = _generate(model, repeated, noise, max_new_tokens, past_key_values=read.past_key_values)
    seconds = (time.perf_counter() - started) / len(new)
    found = [_answer(tokenizer, ids, seconds) for ids in new]
    return [found[start : start + each] for start in range(0, len(found), each)]


def prompt_ids(tokenizer: Any, chat: Chat) -> list[int]:
    """The tokens of a chat, up to where the assistant's turn begins."""
    return tokenizer.apply_chat_template(list(chat), add_generation_prompt=True, return_dict=True)["input_ids"]


def _mixed(keys: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of each key (splitmix64, Steele, Lea and Flood 2014)."""
    keys = keys + np.uint64(0x9E3779B97F4A7C15)
    keys = (keys ^ (keys >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    keys = (keys ^ (keys >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return keys ^ (keys >> np.uint64(31))


def _padded(model: Any, tokenizer: Any, prompts: Sequence[list[int]]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` `[B, P]`, padded on the left."""
    padded = tokenizer.pad({"input_ids": list(prompts)}, padding_side="left", return_tensors="pt")
    return {name: padded[name].to(model.device) for name in ("input_ids", "attention_mask")}


def _generate(
    model: Any, inputs: dict[str, Tensor], noise: list[PairedNoise], max_new_tokens: int, **options: Any
) -> list[list[int]]:
    """The new tokens of each row, the end of the turn and what pads it included."""
    output = model.generate(**inputs, do_sample=False, logits_processor=noise, max_new_tokens=max_new_tokens, **options)
    return output[:, inputs["input_ids"].shape[1] :].tolist()


def _answer(tokenizer: Any, ids: list[int], seconds: float) -> Answer:
    ended = tokenizer.eos_token_id in ids
    kept = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
    return Answer(tokenizer.decode(kept, skip_special_tokens=True).strip(), tuple(kept), ended, seconds)


def _of_rows(policy: dspa.Policy | None, rows: Sequence[int]) -> dspa.Policy | None:
    if isinstance(policy, dspa.StaticPolicy) and policy.edits.batch > 1:
        return replace(policy, edits=policy.edits.rows(torch.tensor(rows)))
    return policy
