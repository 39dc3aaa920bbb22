"""Short questions of arithmetic and fact whose answers are computed."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)
LENGTHS = (31, 28, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)  # days, of no leap year
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Question:
    """A question and its answer.

    Attributes:
        text: what is asked.
        answer: a number or a name.
    """

    text: str
    answer: str

    def is_answered_by(self, text: str) -> bool:
        """Whether it is the first number, or day or month, that a text says and the question does not."""
        said = re.findall(r"\d+" if self.answer.isdigit() else r"[A-Z][a-z]+", text)
        names, asked = {*DAYS, *MONTHS}, re.findall(r"\w+", self.text)
        new = [word for word in said if word not in asked and (word.isdigit() or word in names)]
        return bool(new) and new[0] == self.answer


def _sum(rng: np.random.Generator) -> Question:
    a, b = rng.integers(2, 50, size=2).tolist()
    return Question(f"What is {a} + {b}?", str(a + b))


def _difference(rng: np.random.Generator) -> Question:
    taken, left = rng.choice(np.arange(2, 30), size=2, replace=False).tolist()
    return Question(f"What is {taken + left} - {taken}?", str(left))


def _product(rng: np.random.Generator) -> Question:
    a, b = rng.integers(2, 10, size=2).tolist()
    return Question(f"What is {a} times {b}?", str(a * b))


def _day(rng: np.random.Generator) -> Question:
    place = int(rng.integers(7))
    return Question(f"Which day comes after {DAYS[place]}?", DAYS[(place + 1) % 7])


def _month(rng: np.random.Generator) -> Question:
    place = int(rng.integers(12))
    return Question(f"Which month comes after {MONTHS[place]}?", MONTHS[(place + 1) % 12])


def _days(rng: np.random.Generator) -> Question:
    place = int(rng.choice([month for month in range(12) if month != 1]))
    return Question(f"How many days does {MONTHS[place]} have?", str(LENGTHS[place]))


SORTS: tuple[Callable[[np.random.Generator], Question], ...] = (
    _sum,
    _difference,
    _product,
    _day,
    _month,
    _days,
)


def questions(count: int, seed: int) -> list[Question]:
    """Of all sorts in turn."""
    rng = np.random.default_rng(seed)
    return [SORTS[place % len(SORTS)](rng) for place in range(count)]
