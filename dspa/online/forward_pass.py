"""The state of one forward pass of the decoder."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ForwardPass:
    """Which positions of the batch a pass computes.

    Attributes:
        start: the first of them, the number of positions in the cache.
        end: one more than the last.
        speculative: whether their tokens may be rejected, as the candidates of assisted decoding are.
        thread: the thread that runs it.
    """

    start: int
    end: int
    speculative: bool
    thread: int
