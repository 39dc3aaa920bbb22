"""The history of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class StepRecord:
    """One optimiser step, of all its pairs.

    Attributes:
        step: its number, from 1.
        simpo: mean SimPO loss.
        l1, l0: means over edited tokens of `sum_j |v_j|` and of the number of active latents.
        margin: mean of `lp_chosen - lp_rejected`.
        accuracy: share of pairs with a positive margin.
    """

    step: int
    simpo: float
    l1: float
    l0: float
    margin: float
    accuracy: float


@dataclass(frozen=True)
class EvaluationRecord:
    """An evaluation after some step.

    Attributes:
        step: after which step; 0 is the adapter before training.
        simpo, margin, accuracy: on the validation triples; NaN without any.
        reward: of the reward function; NaN without one.
    """

    step: int
    simpo: float
    margin: float
    accuracy: float
    reward: float

    @property
    def score(self) -> float:
        """What training keeps the best of: the reward, else the margin."""
        return self.margin if math.isnan(self.reward) else self.reward
