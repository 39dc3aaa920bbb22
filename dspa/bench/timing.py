"""Timing several things in turn, so that whatever else the machine does meets all of them alike.

Before each sample a large buffer is read: while a model generates, its own weights have driven the encoder out of the
caches since the last token, and the way that came before must not warm them for the next.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dspa.bench.measurements import Column, Interval

EVICTING_BYTES = 512 << 20


@dataclass(frozen=True)
class Way:
    """A way to do the work of a row.

    Attributes:
        name: of its column.
        run: what is timed.
        bytes_read: what it has to read of the encoder, where that takes the time.
        prepare: runs before each sample, not timed.
    """

    name: str
    run: Callable[[], object]
    bytes_read: int | None = None
    prepare: Callable[[], object] = lambda: None


def timed(
    ways: Sequence[Way], reference: str, *, seconds: float, at_least: int = 7, device: str = "cpu"
) -> tuple[Column, ...]:
    """Runs every way once a round, for so many seconds and at least so many rounds.

    Args:
        ways: what to time.
        reference: the name of the way whose time divides the others', round by round.
        seconds, at_least: how long.
        device: where the ways run; work of a GPU is waited for.
    """
    for way in ways:  # compiles, reads the weights, fills the scratch
        way.run()
        way.run()
    evicting = torch.ones(EVICTING_BYTES // 4, device=device)
    samples: dict[str, list[float]] = {way.name: [] for way in ways}
    end = time.perf_counter() + seconds
    while len(samples[reference]) < at_least or time.perf_counter() < end:
        for way in ways:
            samples[way.name].append(_milliseconds(way, evicting))
    return tuple(time_column(way.name, samples[way.name], samples[reference], way.bytes_read) for way in ways)


def time_column(
    name: str, samples: Sequence[float], reference: Sequence[float], bytes_read: int | None = None
) -> Column:
    """The column of times in ms, a sample a round, and their ratios to the reference's sample of the same round."""
    low, _, high = statistics.quantiles(samples, n=4)
    ratios = [sample / other for sample, other in zip(samples, reference, strict=True)]
    return Column(
        name,
        "ms",
        Interval.around_median(samples),
        spread=(low, high),
        relative=Interval.around_median(ratios),
        rounds=len(samples),
        bytes_read=bytes_read,
    )


def _milliseconds(way: Way, evicting: torch.Tensor) -> float:
    way.prepare()
    evicting.sum()
    _wait_for(evicting)
    start = time.perf_counter()
    way.run()
    _wait_for(evicting)
    return (time.perf_counter() - start) * 1e3


def _wait_for(tensor: torch.Tensor) -> None:
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
