"""Whether a text is whole: what it repeats, how it ends, and how likely the unsteered model finds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dspa.util.progress import track
from study.generation import prompt_ids

GRAM = 4
MOST_REPEATED = 0.3  # an answer that repeats more than this share of its 4-grams is broken
ENDS = frozenset(".!?:;)]}\"'`*’”…")
ROWS_AT_ONCE = 32


def repetition(ids: Sequence[int]) -> float:
    """The share of runs of four tokens that occurred before in the same answer."""
    grams = [tuple(ids[place : place + GRAM]) for place in range(len(ids) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def is_malformed(text: str, ended: bool) -> bool:
    """Whether nothing was said, or undecodable bytes, or the answer ended where no sentence, list item or bare word
    ends. An answer that was cut off at the longest length is not malformed for that."""
    stripped = text.strip()
    if not stripped or "\ufffd" in stripped:
        return True
    return ended and stripped[-1] not in ENDS and not stripped[-1].isalnum()


@torch.no_grad()
def losses(model: Any, tokenizer: Any, prompts: Sequence[str], answers: Sequence[Sequence[int]]) -> list[float]:
    """Mean cross-entropy in nats per token of answers to prompts, under a model that is not steered; 0 for an answer
    without a token."""
    asked = [prompt_ids(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    rows = [(before, list(answer)) for before, answer in zip(asked, answers, strict=True)]
    found = [0.0] * len(rows)
    order = sorted((row for row in range(len(rows)) if rows[row][1]), key=lambda row: len(rows[row][0] + rows[row][1]))
    starts = range(0, len(order), ROWS_AT_ONCE)
    for start in track(starts, "Scoring answers", enabled=bool(order), unit="batches"):
        batch = order[start : start + ROWS_AT_ONCE]
        longest = max(len(rows[row][1]) for row in batch)
        inputs = tokenizer.pad(
            {"input_ids": [[*rows[row][0], *rows[row][1]] for row in batch]}, padding_side="left", return_tensors="pt"
        )
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
        read = model(ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=longest + 1)
        for place, row in enumerate(batch):
            answer = torch.tensor(rows[row][1])
            scores = read.logits[place, -len(answer) - 1 : -1].float()
            found[row] = float(torch.nn.functional.cross_entropy(scores, answer))
    return found
