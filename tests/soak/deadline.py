"""How long a part of the campaign may take: what has not begun by then is left out, and the counts say so."""

from __future__ import annotations

import math
import time


class Deadline:
    """A moment at which a part stops.

    Attributes:
        hit: whether something was left out because of it.
    """

    def __init__(self, seconds: float = math.inf) -> None:
        self._at = time.monotonic() + seconds
        self.hit = False

    @property
    def passed(self) -> bool:
        self.hit |= time.monotonic() > self._at
        return self.hit
