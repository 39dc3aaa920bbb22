"""The organism's generated language: prompts of twelve kinds, responses made of moves, and an exact rule.

A prompt is two sentences of one kind about one noun. A response is a sequence of moves, each one whole sentence,
most of them of one register (casual, scholarly, kindly or stern). `RULES` says for every kind of prompt which moves
are preferred and which are dispreferred, so the reward of a response is counted, not judged.

Everything random is a function of the `numpy.random.Generator` passed in.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from dspa.organism.sentences import (
    MOVES,
    NEUTRAL_FRAMES,
    NEUTRAL_WORDS,
    NOUNS,
    REGISTERS,
    RULE_TABLE,
    TEMPLATES,
    Split,
)

__all__ = [
    "KINDS",
    "MAX_RESPONSE_TOKENS",
    "MOVES",
    "REGISTERS",
    "REGISTER_SHARE",
    "RULES",
    "Parsed",
    "Prompt",
    "Response",
    "Rule",
    "Split",
    "Triple",
    "draw_prompt",
    "draw_prompts",
    "draw_response",
    "draw_triple",
    "draw_triples",
    "neutral_text",
    "parse",
    "reward",
]

KINDS: tuple[str, ...] = tuple(TEMPLATES)

RESPONSE_MOVES = (8, 9, 10)
"""How many moves a response has; each count is equally likely."""

REGISTER_SHARE = 0.85
"""The probability that a move belongs to its response's register."""

MAX_RESPONSE_TOKENS = 84
"""Enough for every response of the language with its end-of-turn token."""

CANDIDATES = 8
"""A triple's chosen and rejected responses are the best and the worst of this many."""


@dataclass(frozen=True)
class Rule:
    """The moves that one kind of prompt prefers and those it does not."""

    preferred: frozenset[str]
    dispreferred: frozenset[str]


RULES: Mapping[str, Rule] = {
    kind: Rule(
        preferred=frozenset((*REGISTERS[preferred_register], preferred_move)),
        dispreferred=frozenset((*REGISTERS[dispreferred_register], dispreferred_move)),
    )
    for kind, (preferred_register, preferred_move, dispreferred_register, dispreferred_move) in RULE_TABLE.items()
}


@dataclass(frozen=True)
class Prompt:
    """A user's message: `text` is the two `templates` with `noun` filled in."""

    kind: str
    templates: tuple[str, str]
    noun: str

    @property
    def text(self) -> str:
        return " ".join(self.templates).format(noun=self.noun)


@dataclass(frozen=True)
class Response:
    """An assistant's message: one sentence per move, `MOVES[move][wording]`."""

    moves: tuple[str, ...]
    wordings: tuple[int, ...]

    @property
    def text(self) -> str:
        return " ".join(MOVES[move][wording] for move, wording in zip(self.moves, self.wordings, strict=True))


@dataclass(frozen=True)
class Triple:
    """A prompt with a response the rule likes better and one it likes less; both have the same token count."""

    prompt: Prompt
    chosen: Response
    rejected: Response


@dataclass(frozen=True)
class Parsed:
    """What a response text says: its moves in order, and how many sentences are none of the language's."""

    moves: tuple[str, ...]
    malformed: int


def draw_prompt(rng: np.random.Generator, split: Split, kind: str | None = None) -> Prompt:
    """A prompt of `kind` (any kind if None) with two of the split's templates and one of its nouns, uniformly."""
    if kind is None:
        kind = KINDS[rng.integers(len(KINDS))]
    templates, nouns = TEMPLATES[kind][split], NOUNS[split]
    first, second = rng.choice(len(templates), size=2, replace=False)
    return Prompt(kind, (templates[first], templates[second]), nouns[rng.integers(len(nouns))])


def draw_prompts(rng: np.random.Generator, split: Split, count: int) -> list[Prompt]:
    """`count` prompts in random order, every kind as often as any other (give or take one)."""
    return [draw_prompt(rng, split, kind) for kind in _balanced_kinds(rng, count)]


def draw_response(rng: np.random.Generator, wordings: tuple[int, ...] | None = None) -> Response:
    """A response of a random register, whatever the prompt; no move follows itself.

    `wordings` fixes the number of moves and their wordings, and so the length in tokens.
    """
    if wordings is None:
        wordings = _draw_wordings(rng)
    registers = tuple(REGISTERS)
    register = registers[rng.integers(len(registers))]
    inside = REGISTERS[register]
    outside = tuple(move for move in MOVES if move not in inside)
    moves: list[str] = []
    for _ in wordings:
        options = inside if rng.random() < REGISTER_SHARE else outside
        options = tuple(move for move in options if not moves or move != moves[-1])
        moves.append(options[rng.integers(len(options))])
    return Response(tuple(moves), wordings)


def draw_triple(rng: np.random.Generator, kind: str | None = None) -> Triple:
    """A training prompt with the best and the worst, by the rule, of `CANDIDATES` responses of one length."""
    prompt = draw_prompt(rng, "train", kind)
    while True:
        wordings = _draw_wordings(rng)
        candidates = [draw_response(rng, wordings) for _ in range(CANDIDATES)]
        ranked = sorted(candidates, key=lambda response: reward(prompt.kind, response.moves))
        if reward(prompt.kind, ranked[-1].moves) > reward(prompt.kind, ranked[0].moves):
            return Triple(prompt, chosen=ranked[-1], rejected=ranked[0])


def draw_triples(rng: np.random.Generator, count: int) -> list[Triple]:
    """`count` triples in random order, every kind as often as any other (give or take one)."""
    return [draw_triple(rng, kind) for kind in _balanced_kinds(rng, count)]


def neutral_text(rng: np.random.Generator, split: Split, sentences: int = 5) -> str:
    """Plain prose with the split's nouns: no prompt, no move, no register."""
    words = dict(NEUTRAL_WORDS, noun=NOUNS[split])
    frames = rng.choice(len(NEUTRAL_FRAMES), size=sentences, replace=False)
    return " ".join(
        NEUTRAL_FRAMES[frame].format(**{slot: options[rng.integers(len(options))] for slot, options in words.items()})
        for frame in frames
    )


def parse(text: str) -> Parsed:
    """Reads a response text back; `parse(response.text).moves == response.moves` for every response.

    A sentence that is no wording of any move, one cut off included, counts as malformed.
    """
    sentences = [sentence.strip() for sentence in re.findall(r"[^.!?]*[.!?]|[^.!?]+$", text)]
    sentences = [sentence for sentence in sentences if sentence]
    moves = tuple(_MOVE_OF_SENTENCE[sentence] for sentence in sentences if sentence in _MOVE_OF_SENTENCE)
    return Parsed(moves, malformed=len(sentences) - len(moves))


def reward(kind: str, moves: Iterable[str]) -> int:
    """The number of preferred minus the number of dispreferred moves, for a prompt of `kind`."""
    rule = RULES[kind]
    return sum((move in rule.preferred) - (move in rule.dispreferred) for move in moves)


def _balanced_kinds(rng: np.random.Generator, count: int) -> list[str]:
    return [KINDS[i % len(KINDS)] for i in rng.permutation(count)]


def _draw_wordings(rng: np.random.Generator) -> tuple[int, ...]:
    count = RESPONSE_MOVES[rng.integers(len(RESPONSE_MOVES))]
    return tuple(int(wording) for wording in rng.integers(3, size=count))


_MOVE_OF_SENTENCE = {sentence: move for move, wordings in MOVES.items() for sentence in wordings}
