"""The examples of a tuning, in two parts: what the choice sees, and what it is measured on."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from dspa.errors import InvalidInputError
from dspa.offline.triples import PreferenceTriple
from dspa.tuning.scoring import Row

ItemT = TypeVar("ItemT")

LEAST_EXAMPLES = 4  # of each part
LEAST_TEXTS = 2  # likewise; a mean of one has no interval
LEAST_TOKENS = 8  # of a neutral text


@dataclass(frozen=True)
class Part:
    """Preferences and neutral texts, as prompt and continuation, in the order they are evaluated in."""

    triples: list[PreferenceTriple]
    texts: Sequence[Row]


def split_examples(
    triples: Sequence[PreferenceTriple], texts: Sequence[Row], share: float, rng: np.random.Generator
) -> tuple[Part, Part]:
    """What the choice sees, and the part, about `share`, that it does not. Preferences of one prompt stay together;
    without texts, the responses of each part's preferences are its texts.

    Raises:
        InvalidInputError: if a part has too few preferences or texts.
    """
    halves = _split(triples, lambda triple: tuple(triple.prompt), share, rng)
    if min(map(len, halves)) < LEAST_EXAMPLES:
        raise InvalidInputError(
            f"{len(triples)} preferences leave {len(halves[0])} to choose on and {len(halves[1])} to report on, those "
            f"of one prompt together; expected at least {LEAST_EXAMPLES} each"
        )
    if not texts:
        chosen, reported = ([(t.prompt, rest) for t in half for rest in (t.chosen, t.rejected)] for half in halves)
        return Part(halves[0], chosen), Part(halves[1], reported)
    neutral = _split(texts, lambda row: (tuple(row[0]), tuple(row[1])), share, rng)
    if min(map(len, neutral)) < LEAST_TEXTS:
        raise InvalidInputError(
            f"{len(texts)} neutral texts leave {len(neutral[0])} to choose on and {len(neutral[1])} to report on; "
            f"expected at least {LEAST_TEXTS} each"
        )
    return Part(halves[0], neutral[0]), Part(halves[1], neutral[1])


def distinct(triples: Sequence[PreferenceTriple]) -> list[PreferenceTriple]:
    """Each preference once; warns of how many were there again."""
    found = list({(tuple(t.prompt), tuple(t.chosen), tuple(t.rejected)): t for t in reversed(triples)}.values())[::-1]
    if len(found) < len(triples):
        warnings.warn(
            f"{len(triples) - len(found)} of {len(triples)} preferences repeat an earlier one and were left out",
            stacklevel=3,
        )
    return found


def neutral_rows(texts: Sequence[str], tokenizer: Any, longest: int = 256) -> list[Row]:
    """Texts as token ids; the first quarter of each, at most 32 tokens, is taken for its prompt. Texts of fewer than 8
    tokens, and repeated ones, are left out with a warning.

    Raises:
        InvalidInputError: if none is left of those that were passed, or one is no text.
    """
    if isinstance(texts, str) or not all(isinstance(text, str) for text in texts):
        raise InvalidInputError(f"neutral is {type(texts).__name__}; expected a list of texts")
    rows: dict[tuple[int, ...], Row] = {}
    short = 0
    for text in texts:
        ids = tokenizer(text).input_ids[:longest]
        if len(ids) < LEAST_TOKENS:
            short += 1
            continue
        cut = min(len(ids) // 4, 32)
        rows[tuple(ids)] = (ids[:cut], ids[cut:])
    if texts and not rows:
        raise InvalidInputError(
            f"all {len(texts)} neutral texts have fewer than {LEAST_TOKENS} tokens; pass longer ones, or none"
        )
    if len(rows) < len(texts):
        warnings.warn(
            f"{len(texts) - len(rows)} of {len(texts)} neutral texts were left out: {short} have fewer than "
            f"{LEAST_TOKENS} tokens, {len(texts) - len(rows) - short} are there again",
            stacklevel=3,
        )
    return list(rows.values())


def _split(
    items: Sequence[ItemT], key: Callable[[ItemT], Hashable], share: float, rng: np.random.Generator
) -> tuple[list[ItemT], list[ItemT]]:
    """In random order, items of one key together."""
    groups: dict[Hashable, list[ItemT]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    listed = list(groups.values())
    cut = len(items) - math.floor(share * len(items))
    first, second = list[ItemT](), list[ItemT]()
    for index in rng.permutation(len(listed)).tolist():
        (first if len(first) < cut else second).extend(listed[index])
    return first, second
