"""Successive halving: what it costs, whom it keeps, and that what is best everywhere wins."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from dspa.tuning.halving import FINALISTS, Schedule, successive_halving


@pytest.mark.parametrize(
    ("arms", "examples", "first", "keep", "expected_arms", "expected_examples"),
    [
        (96, 128, 4, 0.25, (96, 24, 6, 2), (4, 13, 40, 128)),
        (16, 64, 8, 0.25, (16, 4, 2), (8, 23, 64)),
        (2, 64, 8, 0.25, (2,), (64,)),
        (1, 64, 8, 0.25, (1,), (64,)),
        (96, 4, 8, 0.25, (96,), (4,)),
        (3, 64, 8, 0.5, (3, 2), (8, 64)),
    ],
)
def test_a_schedule(
    arms: int,
    examples: int,
    first: int,
    keep: float,
    expected_arms: tuple[int, ...],
    expected_examples: tuple[int, ...],
) -> None:
    schedule = Schedule.of(arms, examples, first=first, keep=keep)
    assert (schedule.arms, schedule.examples) == (expected_arms, expected_examples)


def test_a_schedule_costs_a_tenth_of_the_grid() -> None:
    schedule = Schedule.of(96, 128, first=4, keep=0.25)
    assert schedule.cost == 96 * 4 + 24 * 9 + 6 * 27 + 2 * 88
    assert schedule.cost < 0.1 * 96 * 128


def test_every_arm_sees_the_same_examples_once() -> None:
    seen: dict[int, list[tuple[int, int]]] = {}
    schedule = Schedule.of(24, 100, first=5, keep=0.25)
    rungs = successive_halving(
        range(24), schedule, lambda arm, start, stop: seen.setdefault(arm, []).append((start, stop)), sorted
    )
    spent = 0
    for ranges in seen.values():
        assert ranges[0][0] == 0
        assert all(before[1] == after[0] for before, after in pairwise(ranges))
        spent += ranges[-1][1]
    assert spent == schedule.cost
    assert [rung.examples for rung in rungs] == list(schedule.examples)
    assert rungs[-1].ranked == tuple(range(FINALISTS))
    assert {ranges[-1][1] for arm, ranges in seen.items() if arm < FINALISTS} == {100}


def test_the_best_of_noisy_arms_is_found_where_noise_is_common() -> None:
    """Examples differ by much more than arms do; with common examples the differences are seen nevertheless."""
    rng = np.random.default_rng(0)
    example, own = 10 * rng.standard_normal(128), 0.3 * rng.standard_normal((40, 128))
    worth = np.linspace(0, 4, 40)[rng.permutation(40)]
    values: dict[int, list[float]] = {arm: [] for arm in range(40)}

    def evaluate(arm: int, start: int, stop: int) -> None:
        values[arm] += (worth[arm] + example[start:stop] + own[arm, start:stop]).tolist()

    rungs = successive_halving(
        range(40),
        Schedule.of(40, 128, first=4, keep=0.25),
        evaluate,
        lambda arms: sorted(arms, key=lambda arm: -float(np.mean(values[arm]))),
    )
    assert rungs[-1].ranked[0] == int(worth.argmax())
