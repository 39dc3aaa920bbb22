"""What an audit says of a map and of the triples behind it, against docs/method.md written out in numpy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import tiny_collection as tiny
import torch

from dspa import ConditionalDifferenceMap, MismatchError, SteeringPolicy, audit, merge
from dspa.auditing.map_facts import MapByLatent
from dspa.auditing.support import supporting_triples
from dspa.methods.personal import Overlay, PersonalPolicy
from dspa.offline.density_store import DensityStore

TRIPLES, D_IN, D_OUT, K_DIFF = 14, 12, 18, 3


@pytest.fixture(scope="module")
def densities() -> tiny.Densities:
    return tiny.random_densities(TRIPLES, D_IN, D_OUT, seed=5, active=0.6)


@pytest.fixture(scope="module")
def store(densities: tiny.Densities, tmp_path_factory: pytest.TempPathFactory) -> DensityStore:
    saes = tiny.tiny_sae(D_IN, 1), tiny.tiny_sae(D_OUT, 2)
    return tiny.write_store(tmp_path_factory.mktemp("store"), densities, per_shard=4, saes=saes)


def policy_of(store: DensityStore, edit: Any = "ablate", **fit: Any) -> SteeringPolicy:
    fitted = ConditionalDifferenceMap.fit(store, **{"gate_percentile": 60, "sparsify": "none", **fit})
    return SteeringPolicy(fitted, tiny.tiny_sae(D_IN, 1), tiny.tiny_sae(D_OUT, 2), k_prompt=4, k_diff=K_DIFF, edit=edit)


def gates(densities: tiny.Densities, percentile: float) -> tiny.Matrix:
    rho = densities.prompt.density
    return (rho >= np.percentile(rho, percentile, axis=0)).astype(float)


@pytest.mark.parametrize("edit", ["ablate", "augment", "both"])
def test_rows_and_columns(store: DensityStore, densities: tiny.Densities, edit: Any) -> None:
    g = gates(densities, 60)
    A = g.T @ densities.difference / TRIPLES
    found = audit(policy_of(store, edit))
    assert found.map is not None
    assert (found.map.shape, found.map.triples) == ((D_IN, D_OUT), TRIPLES)
    assert found.map.entries == (A != 0).sum()
    assert found.map.sparsity == pytest.approx(1 - (A != 0).mean())
    assert found.map.always_open == (g.sum(axis=0) == TRIPLES).sum() > 0
    mass = np.abs(A).sum(axis=1)
    assert found.map.always_open_mass == pytest.approx(mass[g.sum(axis=0) == TRIPLES].sum() / mass.sum())
    heaviest = found.map.heaviest
    assert [row.mass for row in heaviest] == pytest.approx(sorted(mass[mass > 0], reverse=True))
    assert [row.mass for row in heaviest] == pytest.approx([mass[row.row] for row in heaviest])
    assert [row.gate_count for row in heaviest] == [g[:, row.row].sum() for row in heaviest]
    shares = np.cumsum(sorted(mass, reverse=True)) / mass.sum()
    assert found.map.rows_for_half_the_mass == int((shares < 0.5).sum()) + 1
    assert [latent.latent for latent in found.latents] == np.argsort(-np.abs(A).sum(axis=0), kind="stable").tolist()

    for latent in found.latents:
        column, use = A[:, latent.latent], latent.map
        assert use is not None
        assert (use.raising, use.lowering) == ((column > 0).sum(), (column < 0).sum())
        assert use.mean == pytest.approx(column[column != 0].mean(), abs=1e-7)
        assert use.strongest == pytest.approx(column[np.abs(column).argmax()], abs=1e-7)
        assert use.share == pytest.approx(np.abs(column).sum() / np.abs(A).sum())
        wanted = {"ablate": -column, "augment": column, "both": np.abs(column)}[edit]
        assert [lead.entry for lead in use.leads] == pytest.approx(
            [column[i] for i in np.argsort(-wanted, kind="stable")[:5] if wanted[i] > 0], abs=1e-7
        )
        extremes = 0
        for row in A:
            up = [j for j in np.argsort(-row, kind="stable")[:K_DIFF] if row[j] > 0]
            down = [j for j in np.argsort(row, kind="stable")[:K_DIFF] if row[j] < 0]
            extremes += (edit != "ablate" and latent.latent in up) or (edit != "augment" and latent.latent in down)
        assert use.in_extremes == extremes


@pytest.mark.parametrize("gate_rule", ["ge", "positive_ge"])
def test_contributions_of_triples_are_the_score(store: DensityStore, densities: tiny.Densities, gate_rule: Any) -> None:
    """By hand for each triple, and all of them together: the mean of s_j over the prompts that list the latent."""
    policy = policy_of(store, gate_rule=gate_rule)
    g = gates(densities, 60) * (densities.prompt.density > 0 if gate_rule == "positive_ge" else 1)
    D = densities.difference
    latents = [0, 7, 11]
    picks = {(i, j): (i + j) % 3 for i in range(D_IN) for j in latents}
    listed = {0: 2, 7: 3, 11: 4}
    found = supporting_triples(MapByLatent(policy), latents, store, picks, listed)
    for j in latents:
        by_hand = np.sum([g[:, i] * D[:, j] * picks[i, j] for i in range(D_IN)], axis=0) / TRIPLES / listed[j]
        A = policy.conditional_map.to_dense().double().numpy()
        assert by_hand.sum() == pytest.approx(sum(A[i, j] * picks[i, j] for i in range(D_IN)) / listed[j], abs=1e-7)
        expected = [k for k in np.argsort(by_hand, kind="stable")[:3] if by_hand[k] < 0]
        assert [each.triple for each in found[j]] == expected
        assert [each.contribution for each in found[j]] == pytest.approx([by_hand[k] for k in expected])
        assert [each.difference for each in found[j]] == pytest.approx([D[k, j] for k in expected])
        assert found[j][0].prompt is None


def test_without_prompts_every_row_that_names_a_latent_counts_once(
    store: DensityStore, densities: tiny.Densities
) -> None:
    found = audit(policy_of(store, "augment"), densities=store.folder)
    g, D = gates(densities, 60), densities.difference
    A = g.T @ D / TRIPLES
    for latent in found.latents:
        j = latent.latent
        by_hand = np.sum([g[:, i] * D[:, j] for i in range(D_IN) if A[i, j] != 0], axis=0) / TRIPLES
        expected = [k for k in np.argsort(-by_hand, kind="stable")[:3] if by_hand[k] > 0]
        assert [each.contribution for each in latent.support] == pytest.approx([by_hand[k] for k in expected])


def test_a_map_by_ridge_is_taken_apart_by_triple(store: DensityStore, densities: tiny.Densities) -> None:
    policy = policy_of(store, estimator="ridge", features=5)
    coefficients, deviation = tiny.ridge_coefficients(densities, 5)
    found = audit(policy, densities=store)
    assert found.latents
    for latent in found.latents:
        by_hand = coefficients.sum(axis=0) * deviation[:, latent.latent]
        expected = sorted(value for value in by_hand if value < 0)[:3]
        assert [each.contribution for each in latent.support] == pytest.approx(expected)


def test_densities_of_another_collection_are_refused(store: DensityStore) -> None:
    other = replace(store, run=replace(store.run, triples="others"))
    with pytest.raises(MismatchError, match="other densities than those the policy's map was fitted from"):
        audit(policy_of(store), densities=other)


def test_links_to_pages_of_latents(store: DensityStore) -> None:
    policy = policy_of(store)
    for which in ("input", "output"):
        sae = getattr(policy, f"{which}_sae")
        named = replace(sae, metadata=replace(sae.metadata, neuronpedia_id=f"tiny/{which}"))
        policy = replace(policy, **{f"{which}_sae": named})
    found = audit(policy)
    first = next(latent for latent in found.latents if latent.map is not None and latent.map.leads)
    assert first.link == f"https://www.neuronpedia.org/tiny/output/{first.latent}"
    assert first.map is not None
    assert first.map.leads[0].link == f"https://www.neuronpedia.org/tiny/input/{first.map.leads[0].row}"
    assert found.map is not None
    assert found.map.heaviest[0].link == f"https://www.neuronpedia.org/tiny/input/{found.map.heaviest[0].row}"


@pytest.mark.parametrize("edit", ["ablate", "both"])
def test_what_is_switched_off_is_left_out(store: DensityStore, edit: Any) -> None:
    """Everything is that of the map without these columns; a latent keeps its place in the rows' extremes."""
    whole = policy_of(store, edit)
    kept = [1, 4, 9]
    found, before = audit(whole.only(kept), densities=store), audit(whole, densities=store)
    assert sorted(latent.latent for latent in found.latents) == kept
    assert found.map is not None
    A = whole.conditional_map.to_dense().double().numpy()
    mass = np.abs(A[:, kept]).sum()
    assert found.map.entries == (A[:, kept] != 0).sum()
    assert (found.map.columns_used, found.map.columns_left_out) == (3, int((A != 0).any(axis=0).sum()) - 3)
    assert sum(row.mass for row in found.map.heaviest) == pytest.approx(mass)
    assert sum(latent.map.share for latent in found.latents if latent.map) == pytest.approx(1)
    for latent in found.latents:
        was = before.latent(latent.latent)
        assert latent.map is not None
        assert was.map is not None
        assert replace(latent.map, share=was.map.share) == was.map
        assert latent.support == was.support


def test_changes_and_factors_are_said_everywhere(store: DensityStore) -> None:
    policy = policy_of(store)
    found = audit(policy.without([0]).scaled({4: 5.0, 7: 0.5}))
    assert found.subject.changes == ("without latent 0", "scaled the edits of latents 4 by 5, 7 by 0.5")
    assert {x.latent: x.factor for x in found.latents if x.factor != 1} == {4: 5.0, 7: 0.5}
    for text in (found.to_json(), found.to_markdown(), found.to_html()):
        assert "without latent 0" in text
        assert "factor" in text
        assert "4 by 5" in text
    plain = audit(policy)
    assert (plain.subject.changes, {x.factor for x in plain.latents}) == ((), {1.0})
    assert "factor" not in plain.to_markdown()


def test_a_policy_that_may_edit_nothing(store: DensityStore) -> None:
    found = audit(policy_of(store).only([1]).only([2]), densities=store)
    assert found.latents == ()
    assert found.map is not None
    assert (found.map.entries, found.map.heaviest, found.map.rows_for_half_the_mass) == (0, (), 0)
    assert found.to_json()
    assert found.to_html()


def test_triples_of_a_mixture(store: DensityStore) -> None:
    """Of maps with one gate they add up to the entries; of others they cannot, and are refused."""
    one, other = policy_of(store), policy_of(store, gate_percentile=20)
    with pytest.raises(MismatchError, match="as in a mixture of maps with different gates; audit it without densities"):
        audit(merge({one: 0.5, other: 0.5}), densities=store)
    alike = audit(merge({one: 0.5, policy_of(store): 0.5}), densities=store)
    assert alike.latents[0].support == audit(one, densities=store).latents[0].support
    assert audit(merge({one: 0.5, other: 0.5})).latents


def test_a_personal_policy(store: DensityStore) -> None:
    """The overlay's latents are edited whatever the map says; the shared policy's options are reported."""
    shared = policy_of(store).without([0])
    run = shared.conditional_map.run
    latents, signs = torch.tensor([4, 7, 9], dtype=torch.int32), torch.tensor([1, 0, -1], dtype=torch.int8)
    overlay = Overlay(latents, signs, torch.zeros(3), 0.4, run.output_layer, run.output_sae, 6)
    found = audit(PersonalPolicy(shared, overlay), densities=store)
    settings = found.subject.settings
    assert (settings["strength"], settings["alpha"], settings["k_diff"], settings["edit"]) == (
        0.4,
        0.4,
        K_DIFF,
        "ablate",
    )
    assert found.subject.changes == ("without latent 0",)
    assert found.subject.overlay == (
        "1 latents augmented and 1 ablated on every prompt, 1 left alone; from 6 examples; alpha 0.4"
    )
    assert [(x.latent, x.overlay, x.map) for x in found.latents[:2]] == [(4, "augment", None), (9, "ablate", None)]
    assert not {0, 7} & {x.latent for x in found.latents}
    expected = audit(shared.without([4, 7, 9]), densities=store)
    assert [(x.latent, x.map, x.support) for x in found.latents[2:]] == [
        (x.latent, x.map, x.support) for x in expected.latents
    ]
    assert found.map == expected.map
    assert "| overlay |" in found.to_markdown()
    assert "from 6 examples" in found.to_html()
