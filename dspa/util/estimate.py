"""A mean and how well it is known."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NORMAL_95 = 1.959964  # half width of a 95 % interval in standard errors


@dataclass(frozen=True)
class Estimate:
    """A mean with the half width of its 95 % interval (normal approximation)."""

    mean: float
    half_width: float

    @classmethod
    def from_samples(cls, samples: NDArray[np.floating] | NDArray[np.integer]) -> Estimate:
        error = samples.std(ddof=1) / np.sqrt(len(samples)) if len(samples) > 1 else np.nan
        return cls(float(samples.mean()), float(NORMAL_95 * error))

    def excludes(self, value: float) -> bool:
        """Whether a value lies outside the interval."""
        return abs(self.mean - value) > self.half_width
