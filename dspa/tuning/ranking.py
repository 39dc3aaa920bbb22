"""Which lists a tuning tries: those that agree most with triples that their maps were not fitted from.

What decides a prompt's lists (the estimator, its options, gates, `k_prompt`, `k_diff`) is ranked by agreement over
folds of the triples that the policy was fitted from (docs/method.md, section 2.2), without the model. Strengths and
edits are left to the tries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np

from dspa.errors import InvalidInputError
from dspa.methods.agreement import Agreement, Folds, ListOptions
from dspa.methods.conditional_map import ENTRIES_PER_SIDE, Estimator, FitOptions
from dspa.tuning.settings import ListSetting, PolicyMaker, TunedSetting, TuningGrid
from dspa.util.estimate import Estimate
from dspa.util.report_parts import Table

MOST_TRIPLES = 2000  # densities of all of them are held dense, and ridge has a number for each pair
SHOWN = 12  # rows of the printed table


@dataclass(frozen=True)
class AgreementRow:
    """How far one way to make lists agrees with triples that its map was not fitted from.

    Attributes:
        lists: what makes them.
        agreement: D along the edit's direction, mean over the triples with its 95 % interval; None where no map could
            be fitted.
        by_fold: the mean in each fold.
        behind: what it lacks to the best of the same edit, triple by triple, mean with its 95 % interval.
        tried: whether the tuning tries it.
        refused: why no map could be fitted from some folds.
    """

    lists: ListSetting
    agreement: Estimate | None
    by_fold: tuple[float, ...]
    behind: Estimate | None
    tried: bool
    refused: str = ""

    @property
    def spread(self) -> float:
        """The standard deviation of the means of folds."""
        return float(np.std(self.by_fold, ddof=1))


@dataclass(frozen=True)
class AgreementRanking:
    """All ways to make lists, by agreement.

    Attributes:
        triples: how many triples there are.
        folds: into how many parts they were divided.
        per_edit: how many ways are tried with each edit.
        rows: the edits in the order of the grid, of each the best first.
    """

    triples: int
    folds: int
    per_edit: int
    rows: tuple[AgreementRow, ...]

    def table(self) -> Table:
        edits = dict.fromkeys(row.lists.edit for row in self.rows)
        of_edit = [[row for row in self.rows if row.lists.edit == edit] for edit in edits]
        shown = [row for rows in of_edit for row in rows[: max(1, SHOWN // len(edits))]]
        left = len(self.rows) - len(shown)
        return Table(
            f"Agreement over {self.folds} folds of the {self.triples} triples that the policy was fitted from",
            "Differences of triples that were left out along the edit, nothing generated; 95 % intervals over triples, "
            "the standard deviation of folds, and what is lacking to the best of the same edit."
            + (f" And {left} more." if left else ""),
            ("lists", "agreement", "folds", "behind", "tried"),
            tuple(_cells(row) for row in shown),
            text_columns=("tried",),
        )


def settings_to_try(
    grid: TuningGrid, maker: PolicyMaker, *, rank: bool, folds: int, tries: int | None, seed: int
) -> tuple[list[TunedSetting], AgreementRanking | None, str]:
    """The settings of a grid that are tried, the ranking that chose them, and why there is none, if it was asked for.

    With a ranking, each strength and edit is tried with as many ways to make lists as the grid has without the fields
    that are ranked only, or as `tries` leaves; the best are.

    Args:
        grid: what to try.
        maker: of the policy, with the densities that its map was fitted from.
        rank: whether to rank at all.
        folds: into how many parts the triples are divided.
        tries: how many settings are tried at most; None for as many as the grid has.
        seed: of the division.

    Raises:
        InvalidInputError: for a value out of range, settings that cannot be made, fewer tries than strengths and edits,
            or tries without a ranking.
        MismatchError: if a policy may select latents whose decoder rows are not there.
    """
    policy = maker.policy
    settings = grid.settings(policy)
    for setting in settings:
        maker.policy_of(setting)  # what cannot be made is refused before anything is computed
    found = _folds(maker, folds, seed) if rank else "it was switched off"
    if isinstance(found, str):
        if tries is not None:
            raise InvalidInputError(f"tries is {tries}, but lists cannot be ranked by agreement: {found}")
        _check_that_ridge_is_there(grid, settings)
        return settings, None, found if rank else ""
    count = grid.lists_per_edit
    if tries is not None:
        if tries < grid.strengths:
            raise InvalidInputError(
                f"tries is {tries}; expected at least {grid.strengths}, one for each strength and edit of the grid"
            )
        count = min(count, tries // grid.strengths)
    if grid.estimator is None and policy.output_sae.decoder_rows is None:
        settings = replace(grid, estimator=_own_first(policy.conditional_map.options)).settings(policy)
    _check_that_ridge_is_there(grid, settings)
    rows = _ranked(settings, maker, found, count)
    kept = {row.lists for row in rows if row.tried}
    tried = [setting for setting in settings if setting.lists in kept]
    for setting in tried:
        maker.policy_of(setting)
    return tried, AgreementRanking(len(found.fold), folds, count, tuple(rows)), ""


def _check_that_ridge_is_there(grid: TuningGrid, settings: Sequence[TunedSetting]) -> None:
    """Raises InvalidInputError if its options are named and nothing is fitted by it."""
    for name in ("features", "penalty"):
        if getattr(grid, name) is not None and all(setting.estimator != "ridge" for setting in settings):
            raise InvalidInputError(f"{name} is an option of ridge, which is not tried; name it as an estimator")


def _folds(maker: PolicyMaker, count: int, seed: int) -> Folds | str:
    """The triples in parts, or why they cannot be divided."""
    if maker.store is None:
        return "no densities were passed"
    if maker.policy.merged:
        return "the policy is a merge of several fits"
    triples = maker.store.run.triple_count
    if triples > MOST_TRIPLES:
        return f"there are {triples} triples, and all are held in memory; it is meant for at most {MOST_TRIPLES}"
    try:
        return Folds.from_store(maker.store, count, seed)
    except InvalidInputError as error:
        return str(error)


def _ranked(settings: Sequence[TunedSetting], maker: PolicyMaker, folds: Folds, count: int) -> list[AgreementRow]:
    """Raises InvalidInputError if no map of an edit could be fitted."""
    like, policy = maker.policy.conditional_map.options, maker.policy
    by_fit: dict[FitOptions, list[ListSetting]] = {}
    for lists, setting in {setting.lists: setting for setting in settings}.items():
        by_fit.setdefault(setting.fit_options(like), []).append(lists)
    agreements: dict[ListSetting, Agreement | str] = {}
    for fit, group in by_fit.items():
        options = [
            ListOptions(each.k_prompt, each.k_diff, each.edit, policy.sign_guard, policy.editable) for each in group
        ]
        try:
            agreements |= zip(group, folds.agreement(options, **asdict(fit)), strict=True)
        except InvalidInputError as error:  # ridge found nothing to learn; the settings themselves were checked
            agreements |= dict.fromkeys(group, str(error))
    rows: list[AgreementRow] = []
    for edit in dict.fromkeys(setting.edit for setting in settings):
        rows += _rows_of({lists: agreements[lists] for lists in agreements if lists.edit == edit}, count)
    return rows


def _rows_of(agreements: dict[ListSetting, Agreement | str], count: int) -> list[AgreementRow]:
    """Of one edit, the best first. What agrees triple by triple as an earlier one does, as other gates often do, comes
    after the others: it has nothing to add."""
    found = [(lists, each) for lists, each in agreements.items() if isinstance(each, Agreement)]
    if not found:
        raise InvalidInputError(f"{next(iter(agreements.values()))}; or switch the ranking off")
    found.sort(key=lambda row: -float(row[1].per_edit.mean()))
    seen: set[bytes] = set()
    first, again = [], []
    for lists, each in found:
        effect = each.per_edit.tobytes()
        (again if effect in seen else first).append((lists, each))
        seen.add(effect)
    best = first[0][1].per_edit
    rows = [
        AgreementRow(
            lists,
            Estimate.from_samples(each.per_edit),
            each.by_fold(),
            Estimate.from_samples(best - each.per_edit),
            place < count,
        )
        for place, (lists, each) in enumerate([*first, *again])
    ]
    refused = [(lists, each) for lists, each in agreements.items() if isinstance(each, str)]
    return rows + [AgreementRow(lists, None, (), None, False, why) for lists, why in refused]


def _own_first(options: FitOptions) -> tuple[Estimator, ...]:
    return (options.estimator, *(each for each in ENTRIES_PER_SIDE if each != options.estimator))


def _cells(row: AgreementRow) -> tuple[str, str, str, str, str]:
    if row.agreement is None or row.behind is None:
        return str(row.lists), "-", "-", "-", row.refused
    return (
        str(row.lists),
        f"{row.agreement.mean:+.4f} ± {row.agreement.half_width:.4f}",
        f"{row.spread:.4f}",
        f"{row.behind.mean:.4f} ± {row.behind.half_width:.4f}" if row.behind.mean else "",
        "yes" if row.tried else "",
    )
