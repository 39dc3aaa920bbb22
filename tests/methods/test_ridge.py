"""The estimator `ridge` against docs/method.md, section 2.1, in float64 numpy; its folder; steering."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_collection as tiny
import torch
from altered_records import change_record
from naive_generation import generate
from tiny_models import prompts, tiny_model, tiny_policy

from dspa import ConditionalDifferenceMap, SteeringPolicy, merge
from dspa.errors import CorruptFileError, InvalidInputError
from dspa.methods.prompt_features import PromptFeatures
from dspa.online.steering import steer

LENGTHS = (3, 5, 7, 11, 13)  # of prompts and responses: densities differ, and nothing ties but what is 0


def kept(rows: tiny.Matrix, n: int) -> tiny.Matrix:
    """Each row's n largest and n smallest entries."""
    result = np.zeros_like(rows)
    for row, out in zip(rows, result, strict=True):
        order = np.argsort(-row, kind="stable")
        for side in (order[:n], order[-n:]):
            out[side] = row[side]
    return result


@pytest.mark.parametrize(("triples", "d_sae_out"), [(25, 200), (9, 200), (60, 30)])
@pytest.mark.parametrize(("features", "entries"), [(7, 5), (12, None)])
def test_the_map_is_the_regression(
    tmp_path: Path, triples: int, d_sae_out: int, features: int, entries: int | None
) -> None:
    densities = tiny.random_densities(triples, 30, d_sae_out, 1, LENGTHS)
    store = tiny.write_store(tmp_path, densities)
    found = ConditionalDifferenceMap.fit(store, estimator="ridge", features=features, entries_per_side=entries)
    coefficients, deviation = tiny.ridge_coefficients(densities, features)
    expected = coefficients @ deviation
    expected[np.abs(expected) < 2.0**-49] = 0
    np.testing.assert_allclose(found.to_dense().numpy(), kept(expected, entries or 32), atol=1e-7)
    rho = densities.prompt.density
    np.testing.assert_allclose(found.mean_difference.numpy(), densities.difference.mean(axis=0), atol=1e-7)
    assert found.features is not None
    assert found.features.count == found.rows_per_prompt(3) == features
    chosen = tiny.described(rho, found.features.centre.double().numpy(), features)
    assert found.gate_counts.tolist() == chosen.sum(axis=0).tolist()


def test_blocks_and_shards_do_not_change_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    densities = tiny.random_densities(20, 30, 50, 3, LENGTHS)
    whole = ConditionalDifferenceMap.fit(tiny.write_store(tmp_path / "a", densities, 20), estimator="ridge", features=6)
    monkeypatch.setattr("dspa.methods.conditional_map.BLOCK_BYTES", 8 * 50 * 7)
    parts = ConditionalDifferenceMap.fit(tiny.write_store(tmp_path / "b", densities, 3), estimator="ridge", features=6)
    torch.testing.assert_close(parts.to_dense(), whole.to_dense(), rtol=0, atol=1e-7)
    assert torch.equal(parts.gate_counts, whole.gate_counts)


def test_equal_triples_and_a_single_one_have_nothing_to_learn_from(tmp_path: Path) -> None:
    one = tiny.random_densities(1, 30, 20, 3, LENGTHS)
    same = tiny.Densities(
        *(tiny.Part(np.repeat(p.counts, 5, 0), np.repeat(p.tokens, 5)) for p in (one.prompt, one.chosen, one.rejected))
    )
    for name, densities in (("one", one), ("same", same)):
        found = ConditionalDifferenceMap.fit(tiny.write_store(tmp_path / name, densities), estimator="ridge")
        assert found.matrix.nonzeros == 0
        np.testing.assert_allclose(found.mean_difference.numpy(), one.difference[0], atol=1e-7)


def test_deviations_are_in_units_of_a_token_and_depend_on_no_other_prompt() -> None:
    centre = torch.tensor([0.5, 0.1, 0.0, 1.0])
    features = PromptFeatures(centre, 2)
    rho = torch.tensor([[0.75, 0.4, 0.5, 0.5], [0.5, 0.0, 1.0, 0.0]], dtype=torch.float64)
    found = features.deviation(rho)
    torch.testing.assert_close(found, torch.tensor([[0.5, 1.0, 0.0, 0.0], [0.0, -1 / 3, 0.0, 0.0]]))
    assert torch.equal(torch.cat([features.deviation(row[None]) for row in rho]), found)
    assert features.indicators(rho).tolist() == [[True, True, False, False], [True, False, True, False]]
    assert features.deviation(rho[:0]).shape == (0, 4)
    with pytest.raises(InvalidInputError, match=r"density is \(2, 3\); expected \[B, d_sae_in = 4\]"):
        features.deviation(rho[:, 1:])


@pytest.mark.parametrize("edit", ["ablate", "augment", "both"])
def test_a_prompt_is_edited_by_the_rows_of_its_features(tmp_path: Path, edit: Any) -> None:
    densities = tiny.random_densities(25, 30, 120, 2, LENGTHS)
    fitted = ConditionalDifferenceMap.fit(
        tiny.write_store(tmp_path, densities), estimator="ridge", features=6, sparsify="none"
    )
    assert fitted.features is not None
    rho = tiny.random_densities(4, 30, 2, 9, LENGTHS).prompt.density
    edits = fitted.select(torch.from_numpy(rho), 32, 7, edit)
    coefficients, deviation = tiny.ridge_coefficients(densities, 6)
    chosen = tiny.described(rho, fitted.features.centre.double().numpy(), 6)
    for row, score in enumerate(chosen @ (coefficients @ deviation)):
        order = np.argsort(-score, kind="stable")
        for last, following in ((order[6], order[7]), (order[-7], order[-8])):
            assert abs(score[last] - score[following]) > 1e-6, "construct another case"
        assert edits.augmented(row) == (order[:7].tolist() if edit != "ablate" else [])
        assert edits.ablated(row) == (order[::-1][:7].tolist() if edit != "augment" else [])


def test_a_saved_policy_steers_as_before(tmp_path: Path) -> None:
    model: Any = tiny_model()
    plain = tiny_policy(model)
    densities = tiny.random_densities(12, plain.input_sae.d_sae, plain.output_sae.d_sae, 5, LENGTHS)
    fitted = ConditionalDifferenceMap.fit(
        tiny.write_store(tmp_path / "store", densities), estimator="ridge", features=10
    )
    own = replace(plain.conditional_map.run, triple_count=12)
    policy = SteeringPolicy(
        replace(fitted, run=own), plain.input_sae, plain.output_sae, alpha=0.8, edit="both", k_diff=9
    )
    saved = policy.save_pretrained(tmp_path / "policy")
    rows, responses = prompts((6, 4, 5)), []
    for each in (policy, SteeringPolicy.from_pretrained(saved)):
        with steer(model, each):
            responses.append(generate(model, rows, 6))
    assert responses[0] == responses[1] != generate(model, rows, 6)
    explained = policy.explain(rows[0], model)
    assert len(explained.rows) == 10
    assert [edit.score for edit in explained.edits]
    with pytest.raises(InvalidInputError, match="global_tau is a rule of the paper's map"):
        ConditionalDifferenceMap.fit(tmp_path / "store", estimator="ridge", sparsify="global_tau")
    with pytest.raises(InvalidInputError, match="looked up by features of its own triples"):
        merge({policy: 0.5, replace(policy, alpha=0.7): 0.5})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda fit: fit.update(features=0), "features is 0; expected at least 1"),
        (
            lambda fit: fit.update(estimator="mean_difference"),
            "holds a tensor 'prompt_centre' that is no part of a map",
        ),
    ],
)
def test_a_record_that_does_not_fit_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    store = tiny.write_store(tmp_path / "store", tiny.random_densities(9, 20, 15, 0))
    folder = ConditionalDifferenceMap.fit(store, estimator="ridge").save(tmp_path / "map")
    loaded = ConditionalDifferenceMap.load(folder)
    assert loaded.features is not None
    assert loaded.features.count == 20
    change_record(folder / "config.json", lambda record: change(record["fit"]))
    with pytest.raises((CorruptFileError, InvalidInputError), match=words):
        ConditionalDifferenceMap.load(folder)
