"""Distributions in a few numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from dspa.auditing.records import Quantiles


def quantiles(values: Tensor | Sequence[float]) -> Quantiles:
    """Of the finite values; the 90th percentile and the median by linear interpolation, as numpy's."""
    numbers = torch.as_tensor(values, dtype=torch.float64).flatten()
    numbers = numbers[numbers.isfinite()].sort().values
    if not len(numbers):
        return Quantiles(math.nan, math.nan, math.nan, math.nan)

    def at(share: float) -> float:  # torch.quantile refuses more than 2**24 values
        place = share * (len(numbers) - 1)
        low = int(place)
        high = min(low + 1, len(numbers) - 1)
        return float(numbers[low] + (numbers[high] - numbers[low]) * (place - low))

    return Quantiles(float(numbers.mean()), at(0.5), at(0.9), float(numbers[-1]))


def mean(values: Sequence[float]) -> float:
    """NaN where there are none."""
    return sum(values) / len(values) if values else math.nan
