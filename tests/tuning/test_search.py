"""A guard that what the halving kept breaks: the dropped settings are taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dspa.tuning.halving import Schedule, successive_halving
from dspa.tuning.journal import Journal
from dspa.tuning.objective import Guard
from dspa.tuning.search import Search
from dspa.tuning.settings import TunedSetting

EXAMPLES = 64


def setting(index: int) -> TunedSetting:
    return TunedSetting(float(index), "both", 1, 1, 90.0, "ge")


class Given:
    """An objective and maker whose values are known: setting i gains `gains[i]`, and its KL is `kl[i]`."""

    def __init__(self, gains: Any, kl: Any) -> None:
        self._gains, self._kl, self.texts = gains, kl, range(EXAMPLES)

    def policy_of(self, setting: TunedSetting) -> int:
        return int(setting.alpha)

    def gains(self, index: int, start: int, stop: int) -> dict[str, Any]:
        return {"margin": self._gains[index, start:stop]}

    def damage(self, index: int, start: int, stop: int) -> dict[str, Any]:
        return {"kl": self._kl[index, start:stop], "loss": np.zeros(stop - start)}


def searched(gains: Any, kl: Any, max_kl: float, out: Path) -> tuple[Search, int, TunedSetting | None]:
    given: Any = Given(gains, kl)
    search = Search(given, given, Journal(out, {}), "choose", Guard(max_kl, 10))
    settings = [setting(index) for index in range(len(gains))]
    rungs = successive_halving(
        settings, Schedule.of(len(settings), EXAMPLES, first=8, keep=0.25), search.evaluate, search.ranked
    )
    before = search.cost
    best = rungs[-1].ranked[0]
    return search, before, best if search.row(best).allowed else search.take_up_again(rungs, search.evaluate)


def stepped(low: Any, high: Any) -> Any:
    """`[settings, EXAMPLES]`: one value on the first 8 examples, another on the rest."""
    return np.where(np.arange(EXAMPLES) < 8, np.array(low)[:, None], np.array(high)[:, None]).astype(float)


@pytest.mark.parametrize(
    ("kl_first", "kl_rest", "expected"),
    [
        ([0.0] * 16, [0.1] * 10 + [1.0] * 6, 9),  # those that gain most break it later: the best of those that do not
        ([0.2] + [0.15] * 15, [0.0] + [1.0] * 15, 0),  # all break it at first; one keeps it in the end
        ([0.0] * 16, [1.0] * 16, None),
    ],
)
def test_a_setting_that_keeps_the_guard_is_found(kl_first: Any, kl_rest: Any, expected: Any, tmp_path: Path) -> None:
    gains = np.repeat(np.arange(16.0)[:, None], EXAMPLES, axis=1)
    kl = stepped(kl_first, kl_rest)
    search, before, found = searched(gains, kl, 0.1, tmp_path)
    assert found == (None if expected is None else setting(expected))
    assert before < search.cost <= 16 * EXAMPLES


def test_what_cannot_keep_the_guard_any_more_is_not_evaluated(tmp_path: Path) -> None:
    gains = np.repeat(np.arange(16.0)[:, None], EXAMPLES, axis=1)
    search, before, found = searched(gains, stepped([1.0] * 16, [0.0] * 16), 0.0, tmp_path)
    assert found is None
    assert search.cost == before


def test_random_values_agree_with_the_full_grid_on_whether_there_is_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for trial in range(30):
        gains, kl = rng.normal(size=(16, EXAMPLES)), rng.exponential(size=(16, EXAMPLES)) ** 2
        limit = float(np.sort(kl.mean(axis=1))[trial % 3]) * (1 + 1e-12)
        search, _, found = searched(gains, kl, limit, tmp_path / str(trial))
        assert found is not None
        assert search.examples[found] == EXAMPLES
        assert kl[int(found.alpha)].mean() <= limit
