"""The values of settings on the examples, and which of them is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dspa.methods.policy import Policy
from dspa.tuning.halving import Rung
from dspa.tuning.journal import Journal
from dspa.tuning.objective import Guard, Objective
from dspa.tuning.report import TunedRow
from dspa.tuning.scoring import Floats
from dspa.tuning.settings import PolicyMaker, TunedSetting


class Search:
    """The values of settings on one part of the examples, computed or found in the journal."""

    def __init__(self, objective: Objective, maker: PolicyMaker, journal: Journal, part: str, guard: Guard) -> None:
        self._objective, self._maker, self._journal, self._part, self._guard = objective, maker, journal, part, guard
        self._values: dict[TunedSetting, dict[str, list[Floats]]] = {}
        self.examples: dict[TunedSetting, int] = {}  # on how many each was evaluated

    @property
    def cost(self) -> int:
        """Examples evaluated, of all settings together."""
        return sum(self.examples.values())

    def evaluate(self, setting: TunedSetting, start: int, stop: int) -> None:
        key = f"{self._part}: {setting}"
        found = self._journal.find(key, start, stop)
        if found is None:
            made: Policy = self._maker.policy_of(setting)
            found = {**self._objective.gains(made, start, stop), **self._objective.damage(made, start, stop)}
            self._journal.add(key, start, stop, found)
        values = self._values.setdefault(setting, {})
        for name, array in found.items():
            values.setdefault(name, []).append(array)
        self.examples[setting] = stop

    def row(self, setting: TunedSetting) -> TunedRow:
        parts = {name: np.concatenate(arrays) for name, arrays in self._values[setting].items()}
        return TunedRow.from_values(setting, parts, self._guard)

    def ranked(self, settings: Sequence[TunedSetting]) -> list[TunedSetting]:
        """Those that keep the guard first, by gain. Settings that do exactly what an earlier one does, as other gates
        often do, come last: they have nothing to add."""
        rows = [self.row(setting) for setting in settings]
        rows.sort(key=lambda row: (not row.allowed, -row.gain.mean, row.kl.mean))
        seen: set[tuple[float, float]] = set()
        first, again = list[TunedSetting](), list[TunedSetting]()
        for row in rows:
            effect = row.gain.mean, row.kl.mean
            (again if effect in seen else first).append(row.setting)
            seen.add(effect)
        return first + again

    def take_up_again(
        self, rungs: Sequence[Rung[TunedSetting]], evaluate: Callable[[TunedSetting, int, int], None]
    ) -> TunedSetting | None:
        """A setting that keeps the guard on all examples, where none of the last rung does: the best of those that the
        halving dropped. One is found if there is one.

        Those that kept the guard as far as they came go first, the last dropped and the better ones before others, and
        are evaluated rung by rung as long as they keep it. Then the others, by KL, but those whose KL so far is more
        than the guard allows on all texts together.
        """
        total = rungs[-1].examples
        dropped = [
            setting for rung in reversed(rungs) for setting in rung.ranked if self.examples[setting] == rung.examples
        ]
        for setting in dropped:
            for rung in rungs:
                done = self.examples[setting]
                if rung.examples > done and self.row(setting).allowed:
                    evaluate(setting, done, rung.examples)
            if self.examples[setting] == total and self.row(setting).allowed:
                return setting
        for setting in sorted(dropped, key=lambda setting: self.row(setting).kl.mean):
            done = self.examples[setting]
            if done < total and self._may_keep_the_guard(setting):
                evaluate(setting, done, total)
                if self.row(setting).allowed:
                    return setting
        return None

    def _may_keep_the_guard(self, setting: TunedSetting) -> bool:
        """False if the KL so far is too much already, whatever follows."""
        spent = sum(float(part.sum()) for part in self._values[setting]["kl"])
        return spent <= self._guard.max_kl * len(self._objective.texts) * (1 + 1e-9)

    def difference(self, one: TunedSetting, other: TunedSetting) -> Floats:
        """Of their gains, example by example."""
        gains = [
            sum(
                np.concatenate(self._values[setting][part])
                for part in ("margin", "reward")
                if part in self._values[setting]
            )
            for setting in (one, other)
        ]
        return np.asarray(gains[0]) - np.asarray(gains[1])
