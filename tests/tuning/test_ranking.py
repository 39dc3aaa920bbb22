"""Which lists a tuning tries: by agreements that were computed by hand, and as many as were asked for."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_collection as tiny
import torch
from tiny_collection import one_thread  # noqa: F401

from dspa import ConditionalDifferenceMap, SteeringPolicy, cross_validated_agreement
from dspa.errors import InvalidInputError
from dspa.methods.policy_merge import merge
from dspa.offline.density_store import DensityStore
from dspa.tuning import ranking
from dspa.tuning.ranking import AgreementRanking, settings_to_try
from dspa.tuning.settings import PolicyMaker, TunedSetting, TuningGrid

SAES = tiny.tiny_sae(4, 1, layer=1), tiny.tiny_sae(6, 2, layer=2)
WIDE = tiny.tiny_sae(30, 1, layer=1), tiny.tiny_sae(60, 2, layer=2)
PROMPTS = ((4, 0, 1, 0), (4, 0, 0, 1), (0, 4, 1, 0), (0, 4, 0, 1))
CHOSEN = ((4, 0, 0, 0, 0, 0), (2, 0, 0, 0, 0, 0), (0, 0, 3, 0, 0, 0), (0, 0, 1, 0, 2, 0))
REJECTED = ((0, 2, 0, 0, 0, 0), (0, 4, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0), (0, 0, 0, 1, 0, 0))
ROOT = 2**0.5


def by_hand(folder: Path, order: tuple[int, ...] = (0, 1, 2, 3)) -> PolicyMaker:
    """Two kinds of prompts by latents 0 and 1, four triples of four tokens; `order` deals the differences to them."""
    tokens = np.full(4, 4)
    chosen, rejected = ([part[index] for index in order] for part in (CHOSEN, REJECTED))
    parts = (tiny.Part(np.array(counts), tokens) for counts in (PROMPTS, chosen, rejected))
    store = tiny.write_store(folder, tiny.Densities(*parts), saes=SAES)
    fitted = ConditionalDifferenceMap.fit(store, gate_percentile=50, sparsify="none")
    return PolicyMaker(SteeringPolicy(fitted, *SAES, k_prompt=1, k_diff=1, edit="both"), store)


def tried(grid: TuningGrid, maker: PolicyMaker, **changes: Any) -> tuple[list[TunedSetting], AgreementRanking]:
    options: dict[str, Any] = {"rank": True, "folds": 4, "tries": None, "seed": 0}
    settings, found, why = settings_to_try(grid, maker, **(options | changes))
    assert found is not None
    assert why == ""
    return settings, found


BOTH_RULES = TuningGrid(
    alpha=(0.1, 0.2), edit=("both",), k_diff=(1, 2), gate_rule=("ge", "positive_ge"), estimator=("mean_difference",)
)


def test_lists_are_ranked_by_the_agreement_that_a_hand_computes(tmp_path: Path) -> None:
    settings, found = tried(BOTH_RULES, by_hand(tmp_path), tries=5)
    assert [(row.lists.gate_rule, row.lists.k_diff) for row in found.rows] == [
        ("positive_ge", 2), ("positive_ge", 1), ("ge", 2), ("ge", 1)
    ]  # fmt: skip
    best = np.array([1.5 / ROOT, 1.5 / ROOT, 0.5, 0.5 / ROOT])
    by_row = [best, np.array([1.5, 1.5, 0.25, 0.5]) / ROOT, np.array([1.5, 1.5, 0.25, 0.5]) / 2]
    by_row.append(np.array([0.5, 1.5, 0, 0]) / ROOT)
    for row, expected in zip(found.rows, by_row, strict=True):
        assert row.agreement is not None
        assert row.behind is not None
        assert row.agreement.mean == pytest.approx(expected.mean(), abs=1e-12)
        assert row.agreement.half_width == pytest.approx(1.959964 * expected.std(ddof=1) / 2)
        assert row.behind.mean == pytest.approx((best - expected).mean(), abs=1e-12)
        assert row.behind.half_width == pytest.approx(1.959964 * (best - expected).std(ddof=1) / 2)
        assert sorted(row.by_fold) == pytest.approx(sorted(expected), abs=1e-12)
        assert row.spread == pytest.approx(expected.std(ddof=1))
    assert [row.tried for row in found.rows] == [True, True, False, False]
    assert (found.folds, found.triples, found.per_edit) == (4, 4, 2)
    assert [(each.alpha, each.k_diff, each.gate_rule) for each in settings] == [
        (alpha, k_diff, "positive_ge") for alpha in (0.1, 0.2) for k_diff in (1, 2)
    ]


@pytest.mark.parametrize(
    ("order", "rule"), [((0, 1, 2, 3), "positive_ge"), ((0, 2, 1, 3), "ge")], ids=["by kind", "whatever the kind"]
)
def test_the_choice_follows_what_the_differences_depend_on(tmp_path: Path, order: tuple[int, ...], rule: str) -> None:
    """Where prompts of a kind have differences of other kinds, gates that tell kinds apart agree with nothing."""
    settings, found = tried(BOTH_RULES, by_hand(tmp_path, order), tries=2)
    assert {each.gate_rule for each in settings} == {rule}
    assert len(settings) == 2
    if rule == "ge":
        by_rule = {row.lists.gate_rule: row.agreement for row in found.rows if row.lists.k_diff == 1}
        gated, ungated = by_rule["positive_ge"], by_rule["ge"]
        assert gated is not None
        assert ungated is not None
        assert (gated.mean, ungated.mean) == pytest.approx((0, 0.5 / ROOT), abs=1e-12)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DensityStore:
    densities = tiny.random_densities(20, 30, 60, 0, (3, 5, 7, 11), active=0.3)
    return tiny.write_store(tmp_path_factory.mktemp("store"), densities, saes=WIDE)


@pytest.fixture(scope="module")
def policy(store: DensityStore) -> SteeringPolicy:
    fitted = ConditionalDifferenceMap.fit(store, entries_per_side=3)
    return SteeringPolicy(fitted, *WIDE, k_prompt=6, k_diff=4, alpha=0.3, edit="both")


GRID = TuningGrid(alpha=(0.1, 0.3, 0.5), edit=("ablate", "both"), k_diff=(2, 4))


def test_there_are_as_many_tries_as_without_a_ranking(policy: SteeringPolicy, store: DensityStore) -> None:
    """Both estimators are ranked; no value of an option that is ranked only is a try more."""
    maker = PolicyMaker(policy, store)
    without = settings_to_try(GRID, maker, rank=False, folds=5, tries=None, seed=0)
    assert without == (GRID.settings(policy), None, "")
    with pytest.raises(InvalidInputError, match="tries is 6, but lists cannot be ranked by agreement: it was switched"):
        settings_to_try(GRID, maker, rank=False, folds=5, tries=6, seed=0)
    wide = replace(GRID, features=(3, 9, 20), penalty=(0.1, 1.0), entries_per_side=(3, 8))
    for grid, lists in ((GRID, 2 * 2 * 2), (wide, 2 * 2 * (2 + 3 * 2 * 2))):
        settings, found = tried(grid, maker, folds=5)
        assert len(settings) == len(without[0]) == 12
        assert len(found.rows) == lists
        for edit in ("ablate", "both"):
            rows = [row for row in found.rows if row.lists.edit == edit]
            means = [row.agreement.mean for row in rows if row.agreement]
            assert means == sorted(means, reverse=True)
            kept = [row.lists for row in rows if row.tried]
            assert kept == [row.lists for row in rows[:2]]
            assert {each.lists for each in settings if each.edit == edit} == set(kept)
        assert {row.lists.estimator for row in found.rows} == {"mean_difference", "ridge"}


def test_what_is_ranked_is_the_agreement_of_the_policy_that_is_tried(
    policy: SteeringPolicy, store: DensityStore
) -> None:
    guarded = policy.with_options(sign_guard=True)
    _, found = tried(replace(GRID, gate_percentile=(60.0, 90.0), penalty=(0.3,)), PolicyMaker(guarded, store), folds=3)
    for row in found.rows:
        of_ridge = {"features": 64, "penalty": 0.3} if row.lists.estimator == "ridge" else {}
        expected = cross_validated_agreement(
            store,
            folds=3,
            per_edit=True,
            k_prompt=6,
            k_diff=row.lists.k_diff,
            edit=row.lists.edit,
            sign_guard=True,
            estimator=row.lists.estimator,
            gate_percentile=row.lists.gate_percentile,
            entries_per_side=32 if row.lists.estimator == "ridge" else 3,
            **of_ridge,
        )
        assert row.agreement == expected
    _, only = tried(GRID, PolicyMaker(policy.only([0, 1]), store), folds=3)
    _, every = tried(GRID, PolicyMaker(policy, store), folds=3)
    assert {row.agreement for row in only.rows}.isdisjoint({row.agreement for row in every.rows})


def test_lists_that_are_the_same_come_last(tmp_path: Path) -> None:
    """No latent has a density of 0 at this percentile, so that both rules are one."""
    densities = tiny.random_densities(20, 30, 60, 1, (3, 5, 7, 11), active=1)
    store = tiny.write_store(tmp_path, densities, saes=WIDE)
    policy = SteeringPolicy(ConditionalDifferenceMap.fit(store), *WIDE, k_prompt=6, k_diff=4)
    grid = TuningGrid(
        alpha=(0.1,), edit=None, k_diff=(4, 2), gate_percentile=(99.0,), gate_rule=("ge", "positive_ge"),
        estimator=("mean_difference",),
    )  # fmt: skip
    settings, found = tried(grid, PolicyMaker(policy, store), tries=2)
    assert found.rows[0].agreement in [row.agreement for row in found.rows[2:]]
    assert [row.lists.gate_rule for row in found.rows] == ["ge", "ge", "positive_ge", "positive_ge"]
    assert {each.k_diff for each in settings} == {2, 4}


def test_a_map_that_folds_cannot_have_is_not_tried(tmp_path: Path) -> None:
    """One difference is not 0: a fold without its triple leaves ridge nothing."""
    densities = tiny.random_densities(6, 30, 60, 3, (3, 5, 7))
    for part in (densities.chosen, densities.rejected):
        part.counts[1:] = 0
    store = tiny.write_store(tmp_path, densities, saes=WIDE)
    maker = PolicyMaker(SteeringPolicy(ConditionalDifferenceMap.fit(store), *WIDE, k_diff=4, k_prompt=6), store)
    settings, found = tried(GRID, maker, folds=3)
    refused = [row for row in found.rows if row.agreement is None]
    assert {row.lists.estimator for row in refused} == {"ridge"}
    assert all("has nothing to learn" in row.refused and not row.tried for row in refused)
    assert {each.estimator for each in settings} == {"mean_difference"}
    assert any("has nothing to learn" in cell for row in found.table().rows for cell in row)
    with pytest.raises(InvalidInputError, match=r"has nothing to learn.*; or switch the ranking off"):
        tried(replace(GRID, estimator=("ridge",)), maker, folds=3)


def test_why_nothing_is_ranked(policy: SteeringPolicy, store: DensityStore, monkeypatch: pytest.MonkeyPatch) -> None:
    other = replace(policy, conditional_map=ConditionalDifferenceMap.fit(store, gate_percentile=50, entries_per_side=3))
    cases: list[tuple[PolicyMaker, int, str]] = [
        (PolicyMaker(policy), 5, "no densities were passed"),
        (PolicyMaker(merge({policy: 1.0, other: 1.0}), store), 5, "the policy is a merge of several fits"),
        (PolicyMaker(policy, store), 21, "there are 20 triples; expected at least one for each of 21 folds"),
    ]
    for maker, folds, why in cases:
        found = settings_to_try(GRID, maker, rank=True, folds=folds, tries=None, seed=0)
        assert found == (GRID.settings(maker.policy), None, why)
        with pytest.raises(InvalidInputError, match=f"tries is 6, but lists cannot be ranked by agreement: {why}"):
            settings_to_try(GRID, maker, rank=True, folds=folds, tries=6, seed=0)
    monkeypatch.setattr(ranking, "MOST_TRIPLES", 19)
    _, nothing, why = settings_to_try(GRID, PolicyMaker(policy, store), rank=True, folds=5, tries=None, seed=0)
    assert nothing is None
    assert why.startswith("there are 20 triples")


def test_what_cannot_be_ranked_is_refused(policy: SteeringPolicy, store: DensityStore) -> None:
    maker = PolicyMaker(policy, store)
    with pytest.raises(InvalidInputError, match="tries is 5; expected at least 6, one for each strength and edit"):
        tried(GRID, maker, tries=5)
    for changes, words in (
        ({"estimator": ("lasso",)}, "the grid has 'lasso' for estimator; expected some of mean_difference, ridge"),
        ({"estimator": ("ridge",), "penalty": (0.0,)}, "penalty is 0.0"),
        ({"estimator": ("ridge",), "features": (0,)}, "features is 0"),
        ({"estimator": ("mean_difference",), "features": (9,)}, "features is an option of ridge, which is not tried"),
        ({"entries_per_side": (0,)}, "entries_per_side is 0"),
    ):
        changed: Any = changes
        with pytest.raises(InvalidInputError, match=words):
            tried(replace(GRID, **changed), maker)
    with pytest.raises(InvalidInputError, match="penalty is an option of ridge"):
        settings_to_try(replace(GRID, penalty=(0.1,)), maker, rank=False, folds=5, tries=None, seed=0)


def test_a_policy_with_some_decoder_rows_keeps_its_estimator(
    policy: SteeringPolicy, store: DensityStore, tmp_path: Path
) -> None:
    saved = SteeringPolicy.from_pretrained(policy.save_pretrained(tmp_path / "policy"))
    grid = TuningGrid(k_diff=(2, 4))
    _, found = tried(grid, PolicyMaker(saved, store))
    assert {row.lists.estimator for row in found.rows} == {"mean_difference"}
    _, found = tried(grid, PolicyMaker(saved, store, WIDE[1]))
    assert {row.lists.estimator for row in found.rows} == {"mean_difference", "ridge"}


def test_options_that_mean_nothing_to_an_estimator_are_no_settings(policy: SteeringPolicy, store: DensityStore) -> None:
    grid = TuningGrid(
        alpha=(0.1,), edit=None, k_prompt=(3, 6), k_diff=None, gate_percentile=(50.0, 90.0),
        estimator=("mean_difference", "ridge"), features=(5, 9),
    )  # fmt: skip
    settings = grid.settings(policy)
    assert [str(each) for each in settings] == [
        *(f"both, alpha 0.1, k_prompt {k}, k_diff 4, percentile {p}, ge, 3 entries" for k in (3, 6) for p in (50, 90)),
        *(f"both, alpha 0.1, k_diff 4, ridge, {features} features" for features in (5, 9)),
    ]
    maker = PolicyMaker(policy, store)
    made = [maker.policy_of(each) for each in settings]
    assert [TunedSetting.of_policy(each) for each in made] == settings
    fitted = ConditionalDifferenceMap.fit(store, estimator="ridge", features=9)
    assert torch.equal(made[-1].conditional_map.to_dense(), fitted.to_dense())
    assert (
        made[-1].changes[0]
        == "fitted again: estimator mean_difference -> ridge, features 64 -> 9, entries_per_side 3 -> 32"
    )


def test_a_ridge_policy_is_fitted_again_with_its_own_options(store: DensityStore) -> None:
    fitted = ConditionalDifferenceMap.fit(store, estimator="ridge", features=7, penalty=0.5, gate_percentile=70)
    own = SteeringPolicy(fitted, *WIDE, k_prompt=6, k_diff=4)
    maker = PolicyMaker(own, store)
    assert maker.policy_of(TunedSetting.of_policy(own)).conditional_map is fitted
    (setting,) = TuningGrid(alpha=None, edit=None, k_diff=None, entries_per_side=(9,)).settings(own)
    expected = ConditionalDifferenceMap.fit(store, estimator="ridge", features=7, penalty=0.5, entries_per_side=9)
    assert torch.equal(maker.policy_of(setting).conditional_map.to_dense(), expected.to_dense())
