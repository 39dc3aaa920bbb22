"""Checks of single numbers and switches, made when an option is set and not when it is used."""

from __future__ import annotations

from dspa.errors import InvalidInputError

LARGEST_FLOAT32 = (2 - 2**-23) * 2.0**127  # strengths beyond it are infinite to the kernels


def check_integer(name: str, value: object, low: int, high: int | None = None, bound: str = "") -> None:
    """Raises InvalidInputError if an option is not an integer from `low` to `high`; `bound` names `high`."""
    expected = f"at least {low}" if high is None else f"{low} to {bound}{high}"
    if type(value) is not int:
        raise InvalidInputError(f"{name} is {value!r}; expected an integer, {expected}")
    if value < low or (high is not None and value > high):
        raise InvalidInputError(f"{name} is {value}; expected {expected}")


def check_number(name: str, value: object, low: float, high: float, hint: str = "") -> None:
    """Raises InvalidInputError if an option is not a number from `low` to `high`; `hint` ends the message."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        expected = f"{low:g} to {high:g}"
        if high == LARGEST_FLOAT32:
            expected = "a finite float32" if low == -high else f"a finite float32 >= {low:g}"
        raise InvalidInputError(f"{name} is {value!r}; expected {expected}{hint}")


def check_switch(name: str, value: object) -> None:
    """Raises InvalidInputError if an option is neither True nor False."""
    if type(value) is not bool:
        raise InvalidInputError(f"{name} is {value!r}; expected True or False")
