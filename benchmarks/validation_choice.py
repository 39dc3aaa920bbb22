"""Which try of a method counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def best_within(notes: Sequence[Mapping[str, Any]], allowed: float) -> int:
    """The try with the highest reward among those that break at most a share of responses; if all break more, the one
    that breaks the fewest.

    Args:
        notes: of each try its mean `reward`, and the share of responses that are `malformed`.
        allowed: the share.
    """
    sound = [index for index, note in enumerate(notes) if note["malformed"] <= allowed]
    if not sound:
        return min(range(len(notes)), key=lambda index: notes[index]["malformed"])
    return max(sound, key=lambda index: notes[index]["reward"])
