"""Grids of settings, and the policy of each: fitted again where the gates differ, without a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_collection as tiny
import torch
from tiny_collection import one_thread  # noqa: F401

from dspa import ConditionalDifferenceMap, SteeringPolicy
from dspa.errors import InvalidInputError, MismatchError
from dspa.methods.policy_merge import merge
from dspa.offline.density_store import DensityStore
from dspa.tuning.settings import PolicyMaker, TunedSetting, TuningGrid

D_IN, D_OUT = 30, 60
SAES = tiny.tiny_sae(D_IN, 1, layer=1), tiny.tiny_sae(D_OUT, 2, layer=2)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> DensityStore:
    densities = tiny.random_densities(20, D_IN, D_OUT, 0, active=0.1)
    return tiny.write_store(tmp_path_factory.mktemp("store"), densities, saes=SAES)


@pytest.fixture(scope="module")
def policy(store: DensityStore) -> SteeringPolicy:
    fitted = ConditionalDifferenceMap.fit(store, entries_per_side=3)
    return SteeringPolicy(fitted, *SAES, k_prompt=6, k_diff=4, alpha=0.3, edit="both")


def test_a_grid_is_every_combination_with_the_policys_own_values_elsewhere(policy: SteeringPolicy) -> None:
    grid = TuningGrid(alpha=(0.1, 0.2), edit=None, k_diff=(2, 3), gate_rule=("positive_ge",))
    assert grid.settings(policy) == [
        TunedSetting(alpha, "both", 6, k_diff, 90.0, "positive_ge", entries_per_side=3)
        for alpha in (0.1, 0.2)
        for k_diff in (2, 3)
    ]


def test_each_setting_is_the_policy_that_would_be_made_by_hand(policy: SteeringPolicy, store: DensityStore) -> None:
    maker = PolicyMaker(policy, store)
    density = torch.rand(12, D_IN, generator=torch.Generator().manual_seed(1))
    for setting in TuningGrid(
        alpha=(0.1,), edit=("ablate",), k_prompt=(3,), gate_percentile=(50.0, 90.0), gate_rule=("ge", "positive_ge")
    ).settings(policy):
        fitted = ConditionalDifferenceMap.fit(
            store, gate_percentile=setting.gate_percentile, gate_rule=setting.gate_rule, entries_per_side=3
        )
        expected = SteeringPolicy(
            fitted, *SAES, k_prompt=setting.k_prompt, k_diff=setting.k_diff, alpha=setting.alpha, edit=setting.edit
        )
        made = maker.policy_of(setting)
        assert TunedSetting.of_policy(made) == setting
        assert made.select(density).latents.tolist() == expected.select(density).latents.tolist()
        assert made.alpha == 0.1
        refitted = (setting.gate_percentile, setting.gate_rule) != (90.0, "ge")
        assert any("fitted again" in change for change in made.changes) == refitted
        assert "alpha 0.3 -> 0.1" in made.changes


def test_a_map_is_fitted_once_for_each_gate(
    policy: SteeringPolicy, store: DensityStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fits: list[Any] = []
    fit = ConditionalDifferenceMap.fit
    monkeypatch.setattr(
        ConditionalDifferenceMap, "fit", lambda store, **options: (fits.append(options), fit(store, **options))[1]
    )
    maker = PolicyMaker(policy, store)
    for setting in TuningGrid(gate_percentile=(50.0, 75.0, 90.0)).settings(policy):
        maker.policy_of(setting)
    assert [options["gate_percentile"] for options in fits] == [50.0, 75.0]


def test_what_cannot_be_made_is_refused(policy: SteeringPolicy, store: DensityStore, tmp_path: Path) -> None:
    other_gate = TuningGrid(gate_percentile=(50.0,)).settings(policy)[0]
    with pytest.raises(InvalidInputError, match="percentile 50 with rule ge needs another map"):
        PolicyMaker(policy).policy_of(other_gate)
    other = tiny.write_store(tmp_path / "other", tiny.random_densities(8, D_IN, D_OUT, 1), saes=SAES)
    with pytest.raises(MismatchError, match="not those the policy's map was fitted from"):
        PolicyMaker(policy, other)
    with pytest.raises(InvalidInputError, match="expected values, each once"):
        TuningGrid(alpha=())
    with pytest.raises(InvalidInputError, match="expected values, each once"):
        TuningGrid(k_diff=(1, 1))
    saved = SteeringPolicy.from_pretrained(policy.save_pretrained(tmp_path / "policy"))
    wide = TuningGrid(k_diff=(60,)).settings(policy)[0]
    with pytest.raises(MismatchError, match="decoder rows were not saved"):
        PolicyMaker(saved, store).policy_of(wide)
    assert PolicyMaker(saved, store, SAES[1]).policy_of(wide).k_diff == 60


@pytest.mark.parametrize(
    "changes", [{"alpha": 0.1}, {"edit": "both"}, {"alpha": ("0.1",)}, {"gate_percentile": (None,)}]
)
def test_a_grid_of_what_are_no_values_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(changes))):
        TuningGrid(**changes)


def test_settings_that_differ_are_written_differently(policy: SteeringPolicy) -> None:
    grid = TuningGrid(alpha=(0.1234561, 0.1234564, 0.1 + 0.2, 0.3, 1.0), gate_percentile=(90.0, 90.0000001))
    assert len({str(setting) for setting in grid.settings(policy)}) == 40
    assert "alpha 1, k_prompt 6, k_diff 8, percentile 90, ge, 3 entries" in str(grid.settings(policy)[-4])


def test_factors_are_not_lost_to_the_whole_sae(policy: SteeringPolicy, tmp_path: Path) -> None:
    latent = int(policy.selectable_latents()[0])
    for changed in (policy.scaled({latent: 5.0}), policy.scaled({latent: 1.0})):
        saved = SteeringPolicy.from_pretrained(changed.save_pretrained(tmp_path / "policy"))
        with pytest.raises(MismatchError, match="decoder rows of the policy are not those"):
            PolicyMaker(saved, None, SAES[1])
        assert PolicyMaker(saved).policy_of(TunedSetting.of_policy(saved)).output_sae is saved.output_sae


def test_a_merge_is_not_fitted_again(policy: SteeringPolicy, store: DensityStore, tmp_path: Path) -> None:
    other = replace(
        policy,
        conditional_map=ConditionalDifferenceMap.fit(
            store, gate_percentile=50, gate_rule="positive_ge", entries_per_side=3
        ),
    )
    merged = merge({policy: 1.0, other: 3.0})
    assert "gates ge percentile 90" in merged.changes[0]
    assert "gates positive_ge percentile 50" in merged.changes[0]
    assert "| of each part |" in merged.model_card("me/policy")
    again = SteeringPolicy.from_pretrained(merged.save_pretrained(tmp_path / "policy")).with_options(alpha=0.1)
    with pytest.raises(InvalidInputError, match="is a merge of several fits; tune the gates of the parts"):
        PolicyMaker(again, store, SAES[1]).policy_of(TuningGrid(gate_percentile=(75.0,)).settings(again)[0])
