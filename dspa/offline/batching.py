"""Which triples run together: batches of one shard, by length and token budget. Pure arithmetic, so that a shard's
batches depend on nothing but its triples' lengths and the limits.

A prompt is a causal prefix of both of its sequences, so a group of triples runs what its prompts have in common in
length (the first `shared` tokens of each) once, and every response continues from there. What a longer prompt has
beyond `shared` runs with each response. Thus no row of a call begins with padding, and none of its keys are padding:
neither an attention mask nor position ids are needed, whatever the model's attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dspa.errors import InvalidInputError

Response = Literal["chosen", "rejected"]

CHUNK_TOKENS = 256
"""Most tokens of a row in one call of the model. A later chunk attends to the keys before it, so that attention costs
about half of the square, and memory does not grow with the length of a sequence."""

CALL_COST_TOKENS = 64
"""A call of the model costs as much as so many tokens: what it is worth to run a row less padded."""


@dataclass(frozen=True)
class TripleLengths:
    """Tokens of a triple's parts."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def total(self) -> int:
        return self.prompt + self.chosen + self.rejected

    def response(self, which: Response) -> int:
        return self.chosen if which == "chosen" else self.rejected


@dataclass(frozen=True)
class BatchLimits:
    """How much runs at once.

    Attributes:
        triples: most triples in a group.
        tokens: most tokens in a group's keys and values, padding included; a longer triple runs alone.
        chunk: most tokens of a row in one call of the model.

    Raises:
        InvalidInputError: if one of them is below 1.
    """

    triples: int = 64
    tokens: int = 16384
    chunk: int = CHUNK_TOKENS

    def __post_init__(self) -> None:
        for name, value in (("triples_per_batch", self.triples), ("tokens_per_batch", self.tokens)):
            if value < 1:
                raise InvalidInputError(f"{name} is {value}; expected at least 1")


@dataclass(frozen=True)
class Row:
    """A response, and what its prompt has beyond the shared part before it."""

    triple: int
    response: Response
    length: int


@dataclass(frozen=True)
class Group:
    """Triples that run together.

    Attributes:
        triples: their indices in the shard.
        shared: tokens of each prompt that run once.
        continuations: the rows that go on from there, those of one call together, padded to the longest.
    """

    triples: tuple[int, ...]
    shared: int
    continuations: tuple[tuple[Row, ...], ...]


def plan_groups(lengths: Sequence[TripleLengths], limits: BatchLimits, share: bool = True) -> list[Group]:
    """The groups of a shard: consecutive ones by prompt length, so chosen that the tokens run, and the calls at
    `CALL_COST_TOKENS` each, are fewest.

    Args:
        lengths: the shard's triples.
        limits: how much runs at once.
        share: False for a model whose state after a prompt cannot be continued twice: whole sequences run.
    """
    order = sorted(range(len(lengths)), key=lambda t: (lengths[t].prompt, lengths[t].chosen + lengths[t].rejected, t))

    def cost(first: int, last: int) -> int | None:
        members = [lengths[t] for t in order[first:last]]
        shared = members[0].prompt if share else 0
        responses = sum(2 * (m.prompt - shared) + m.chosen + m.rejected for m in members)
        widest = max(m.prompt - shared + max(m.chosen, m.rejected) for m in members)
        kept = 2 * len(members) * (shared + widest)
        if len(members) > 1 and (len(members) > limits.triples or kept > limits.tokens):
            return None
        return len(members) * shared + responses + 2 * CALL_COST_TOKENS

    return [_group(order[first:last], lengths, share) for first, last in _cheapest_cuts(len(order), cost)]


def chunks(length: int, chunk: int) -> list[range]:
    """The positions of a row of some length, call by call."""
    return [range(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def _group(triples: Sequence[int], lengths: Sequence[TripleLengths], share: bool) -> Group:
    shared = min(lengths[t].prompt for t in triples) if share else 0
    responses: tuple[Response, ...] = ("chosen", "rejected")
    rows = [
        Row(t, which, lengths[t].prompt - shared + lengths[t].response(which)) for t in triples for which in responses
    ]
    rows.sort(key=lambda row: (row.length, row.triple, row.response))

    def cost(first: int, last: int) -> int:
        return (last - first) * rows[last - 1].length + CALL_COST_TOKENS

    cuts = _cheapest_cuts(len(rows), cost)
    return Group(tuple(triples), shared, tuple(tuple(rows[first:last]) for first, last in cuts))


def _cheapest_cuts(count: int, cost: Callable[[int, int], int | None]) -> list[tuple[int, int]]:
    """Cuts `count` items into consecutive groups `[first, last)` of least total cost; None is not allowed, nor is any
    group that holds a forbidden one. Of equal costs the one with the later last cut is taken."""
    best: list[tuple[int, int]] = [(0, 0)]  # of the first n items: cost, and where the last group begins
    for last in range(1, count + 1):
        options = []
        for first in range(last - 1, -1, -1):
            price = cost(first, last)
            if price is None:
                break
            options.append((best[first][0] + price, -first))
        total, first = min(options)
        best.append((total, -first))
    cuts: list[tuple[int, int]] = []
    last = count
    while last:
        first = best[last][1]
        cuts.append((first, last))
        last = first
    return cuts[::-1]
