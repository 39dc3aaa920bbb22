"""Successive halving: all settings on a few examples, the better part of them on more, the last few on all.

Common random numbers: every setting sees the same examples in the same order, with the same sampling noise, so that
what is compared are paired differences.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

ArmT = TypeVar("ArmT")

FINALISTS = 2  # at least so many are evaluated on all examples


@dataclass(frozen=True)
class Schedule:
    """How many settings are evaluated on how many examples.

    Attributes:
        arms: how many settings enter each rung, falling.
        examples: on how many examples each of them has been evaluated at its end, rising.
    """

    arms: tuple[int, ...]
    examples: tuple[int, ...]

    @property
    def cost(self) -> int:
        """Examples evaluated, of all settings together. A setting that goes on keeps what it has."""
        before = (0, *self.examples)
        return sum(arms * (upto - done) for arms, upto, done in zip(self.arms, self.examples, before, strict=False))

    @classmethod
    def of(cls, arms: int, examples: int, *, first: int, keep: float) -> Schedule:
        """A schedule of geometric steps.

        Args:
            arms: how many settings there are.
            examples: how many examples there are.
            first: on how many of them every setting is evaluated, at most.
            keep: which part of the settings enters the next rung.
        """
        first = min(first, examples)
        counts = [arms]
        while counts[-1] > FINALISTS and first < examples:
            counts.append(max(FINALISTS, math.ceil(counts[-1] * keep)))
        steps = len(counts) - 1
        upto = [round(first * (examples / first) ** (step / steps)) if steps else examples for step in range(steps + 1)]
        return cls(tuple(counts), tuple(upto))


@dataclass(frozen=True)
class Rung(Generic[ArmT]):
    """The settings that were evaluated on so many examples, the best first."""

    examples: int
    ranked: tuple[ArmT, ...]


def successive_halving(
    arms: Sequence[ArmT],
    schedule: Schedule,
    evaluate: Callable[[ArmT, int, int], None],
    rank: Callable[[Sequence[ArmT]], list[ArmT]],
) -> list[Rung[ArmT]]:
    """Runs a schedule.

    Args:
        arms: the settings.
        schedule: how many on how many examples.
        evaluate: evaluates one on the examples from `start` to `stop`.
        rank: orders settings that were all evaluated on the same examples, the best first.

    Returns:
        The rungs; of the last one, the first is the best.
    """
    rungs: list[Rung[ArmT]] = []
    left, done = list(arms), 0
    for count, upto in zip(schedule.arms, schedule.examples, strict=True):
        left = left[:count]
        for arm in left:
            evaluate(arm, done, upto)
        left, done = rank(left), upto
        rungs.append(Rung(upto, tuple(left)))
    return rungs
