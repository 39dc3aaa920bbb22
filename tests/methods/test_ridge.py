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

from dspa import ConditionalDifferenceMap, SteeringPolicy, cross_validated_agreement, merge
from dspa.errors import CorruptFileError, InvalidInputError
from dspa.kernels import CsrMap, lookup
from dspa.methods.conditional_map import FOLDER
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


@pytest.mark.parametrize(("triples", "d_sae_out"), [(25, 200), (9, 200), (60, 30), (2, 4)])
@pytest.mark.parametrize(("features", "entries", "penalty"), [(7, 5, 1.0), (12, None, 0.01), (29, 5, 1.0), (9, 5, 20)])
def test_the_map_is_the_regression(
    tmp_path: Path, triples: int, d_sae_out: int, features: int, entries: int | None, penalty: float
) -> None:
    densities = tiny.random_densities(triples, 30, d_sae_out, 1, LENGTHS)
    densities.prompt.counts[:, :3] = 0  # dead in all prompts
    store = tiny.write_store(tmp_path, densities)
    found = ConditionalDifferenceMap.fit(
        store, estimator="ridge", features=features, entries_per_side=entries, penalty=penalty
    )
    coefficients, deviation = tiny.ridge_coefficients(densities, features, penalty)
    expected = coefficients @ deviation
    expected[np.abs(expected) < 2.0**-49] = 0
    np.testing.assert_allclose(found.to_dense().numpy(), kept(expected, entries or 32), atol=1e-7)
    rho = densities.prompt.density
    np.testing.assert_allclose(found.mean_difference.numpy(), densities.difference.mean(axis=0), atol=1e-7)
    assert found.features is not None
    assert found.features.count == found.rows_per_prompt(3) == features
    chosen = tiny.described(rho, found.features.centre.double().numpy(), features)
    assert found.gate_counts.tolist() == chosen.sum(axis=0).tolist()
    assert found.gate_counts[:3].tolist() == [0, 0, 0]
    if features == 29:
        assert (chosen.sum(axis=1) < 29).all(), "construct another case"


@pytest.mark.parametrize("penalty", [0, -1.0, float("nan"), float("inf"), True])
def test_a_penalty_that_is_none_is_refused(tmp_path: Path, penalty: Any) -> None:
    store = tiny.write_store(tmp_path, tiny.random_densities(9, 20, 15, 0))
    with pytest.raises(InvalidInputError, match="penalty is"):
        ConditionalDifferenceMap.fit(store, estimator="ridge", penalty=penalty)


def test_blocks_and_shards_do_not_change_the_map(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    densities = tiny.random_densities(20, 30, 50, 3, LENGTHS)
    whole = ConditionalDifferenceMap.fit(tiny.write_store(tmp_path / "a", densities, 20), estimator="ridge", features=6)
    monkeypatch.setattr("dspa.methods.conditional_map.BLOCK_BYTES", 8 * 50 * 7)
    parts = ConditionalDifferenceMap.fit(tiny.write_store(tmp_path / "b", densities, 3), estimator="ridge", features=6)
    torch.testing.assert_close(parts.to_dense(), whole.to_dense(), rtol=0, atol=1e-7)
    assert torch.equal(parts.gate_counts, whole.gate_counts)


def times(part: tiny.Part, count: int) -> tiny.Part:
    """The first triple of a part, so many times."""
    return tiny.Part(np.repeat(part.counts[:1], count, 0), np.repeat(part.tokens[:1], count))


@pytest.mark.parametrize(
    ("triples", "alike", "words"),
    [
        (1, (), "the prompts of all 1 triples alike"),
        (6, ("prompt", "chosen", "rejected"), "the prompts of all 6 triples alike"),
        (6, ("prompt",), "the prompts of all 6 triples alike"),
        (6, ("chosen", "rejected"), "the differences between responses of all 6 triples alike"),
    ],
)
def test_triples_that_do_not_differ_are_refused(
    tmp_path: Path, triples: int, alike: tuple[str, ...], words: str
) -> None:
    """Thirds and sevenths: their mean over equal triples is rounded."""
    drawn = tiny.random_densities(triples, 30, 20, 3, (3, 7))
    densities = replace(drawn, **{name: times(getattr(drawn, name), triples) for name in alike})
    store = tiny.write_store(tmp_path, densities)
    with pytest.raises(InvalidInputError, match=f"ridge finds {words}, and has nothing to learn"):
        ConditionalDifferenceMap.fit(store, estimator="ridge")
    assert ConditionalDifferenceMap.fit(store).run.triple_count == triples


def test_folds_of_a_single_triple_are_refused(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path, tiny.random_densities(2, 30, 20, 3, LENGTHS))
    with pytest.raises(InvalidInputError, match="the prompts of all 1 triples alike"):
        cross_validated_agreement(store, folds=2, estimator="ridge")


def test_a_map_without_gates_answers_no_question_about_them(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path, tiny.random_densities(9, 30, 20, 3, LENGTHS))
    found = ConditionalDifferenceMap.fit(store, estimator="ridge", features=7)
    for ask in (found.always_on, lambda: found.deviation_probability(0.1)):
        with pytest.raises(InvalidInputError, match="fitted by ridge and has no gates"):
            ask()
    assert "gates" not in found._repr_html_()
    assert "at most 7" in found._repr_html_()


def test_deviations_are_in_units_of_a_token_and_depend_on_no_other_prompt() -> None:
    centre = torch.tensor([0.5, 0.1, 0.0, 1.0])
    features = PromptFeatures(centre, 2)
    rho = torch.tensor([[0.75, 0.4, 0.5, 0.5], [0.5, 0.0, 1.0, 0.0]], dtype=torch.float64)
    found = features.deviation(rho)
    torch.testing.assert_close(found, torch.tensor([[0.5, 1.0, 0.0, 0.0], [0.0, -1 / 3, 0.0, 0.0]]))
    assert torch.equal(torch.cat([features.deviation(row[None]) for row in rho]), found)
    assert features.indicators(rho).tolist() == [[True, True, False, False], [False, False, False, False]]
    assert features.deviation(rho[:0]).shape == (0, 4)
    with pytest.raises(InvalidInputError, match=r"density is \(2, 3\); expected \[B, d_sae_in = 4\]"):
        features.deviation(rho[:, 1:])


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_prompt_with_fewer_features_chooses_fewer_rows(backend: str) -> None:
    """Rows of what is unknown, or as dense as usual, or less, are never added, and neither is row 0 in their place."""
    rows = torch.tensor([[4.0, 0, 0, 0], [0, 3, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]])
    features = PromptFeatures(torch.tensor([0.5, 0.1, 0.0, 0.5]), 3)
    matrix = CsrMap(torch.arange(5), torch.arange(4).int(), rows.diagonal().contiguous(), 4)
    rho = torch.tensor([[0.25, 0.4, 0.9, 0.75], [0.5, 0.0, 1.0, 0.5], [0.6, 0.2, 0.0, 0.6]])
    edits = lookup(features.ranking(rho), features.padded(matrix), 3, 4, "augment", sign_guard=True, backend=backend)
    assert [edits.augmented(row) for row in range(3)] == [[1, 3], [], [0, 1, 3]]


@pytest.mark.parametrize("edit", ["ablate", "augment", "both"])
def test_a_prompt_unlike_any_is_not_edited(tmp_path: Path, edit: Any) -> None:
    """Nothing of it is denser than usual: all scores are 0, and the first latents are not edited for that."""
    densities = tiny.random_densities(25, 30, 120, 2, LENGTHS)
    fitted = ConditionalDifferenceMap.fit(tiny.write_store(tmp_path, densities), estimator="ridge")
    rho = torch.zeros(3, 30, dtype=torch.float64)
    rho[1] = torch.from_numpy(densities.prompt.density[0])
    assert (fitted.select(rho, 32, 5, edit).counts > 0).tolist() == [False, True, False]


@pytest.mark.parametrize("edit", ["ablate", "augment", "both"])
@pytest.mark.parametrize("features", [6, 29])
def test_a_prompt_is_edited_by_the_rows_of_its_features(tmp_path: Path, features: int, edit: Any) -> None:
    densities = tiny.random_densities(25, 30, 120, 2, LENGTHS)
    fitted = ConditionalDifferenceMap.fit(
        tiny.write_store(tmp_path, densities), estimator="ridge", features=features, sparsify="none"
    )
    assert fitted.features is not None
    rho = tiny.random_densities(4, 30, 2, 9, LENGTHS).prompt.density
    edits = fitted.select(torch.from_numpy(rho), 32, 7, edit)
    coefficients, deviation = tiny.ridge_coefficients(densities, features)
    chosen = tiny.described(rho, fitted.features.centre.double().numpy(), features)
    for row, of_prompt in enumerate(chosen):
        assert sorted(fitted.picked(torch.from_numpy(rho[row]), 32)) == np.flatnonzero(of_prompt).tolist()
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
    picked = [row.latent for row in explained.rows]
    assert 1 < len(picked) <= 10
    score = fitted.to_dense()[picked].double().sum(dim=0)
    assert explained.edits
    assert [edit.score for edit in explained.edits] == pytest.approx(
        score[[edit.latent for edit in explained.edits]].tolist()
    )
    with pytest.raises(InvalidInputError, match="global_tau is a rule of the paper's map"):
        ConditionalDifferenceMap.fit(tmp_path / "store", estimator="ridge", sparsify="global_tau")
    by_mean = replace(policy, conditional_map=replace(ConditionalDifferenceMap.fit(tmp_path / "store"), run=own))
    for other in (replace(policy, alpha=0.7), by_mean):
        with pytest.raises(InvalidInputError, match="looked up by features of its own triples"):
            merge({policy: 0.5, other: 0.5})


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


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("prompt_centre"), "no tensor 'prompt_centre'"),
        (lambda tensors: tensors["prompt_centre"].__setitem__(3, float("nan")), "prompt_centre is not all float32"),
        (lambda tensors: tensors["prompt_centre"].__setitem__(3, 1.01), "prompt_centre is not all float32 from 0 to 1"),
        (
            lambda tensors: tensors["prompt_centre"].__setitem__(3, -0.01),
            "prompt_centre is not all float32 from 0 to 1",
        ),
        (lambda tensors: tensors.update(prompt_centre=tensors["prompt_centre"].double()), "prompt_centre is not all"),
        (lambda tensors: tensors.update(prompt_centre=tensors["prompt_centre"][1:]), r"prompt_centre is \(19,\)"),
    ],
)
def test_a_centre_that_is_none_is_refused(tmp_path: Path, change: Any, words: str) -> None:
    store = tiny.write_store(tmp_path / "store", tiny.random_densities(9, 20, 15, 0))
    config, tensors = FOLDER.read(ConditionalDifferenceMap.fit(store, estimator="ridge").save(tmp_path / "map"))
    assert ConditionalDifferenceMap.from_tensors(config, tensors, "it").features is not None
    change(tensors)
    with pytest.raises(CorruptFileError, match=words):
        ConditionalDifferenceMap.from_tensors(config, tensors, "it")


def test_a_map_from_before_there_were_estimators_is_read(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path / "store", tiny.random_densities(9, 20, 15, 0))
    fitted = ConditionalDifferenceMap.fit(store)
    folder = fitted.save(tmp_path / "map")

    def older(record: dict[str, Any]) -> None:
        del record["fit"]["estimator"], record["fit"]["features"], record["fit"]["penalty"]

    change_record(folder / "config.json", older)
    loaded = ConditionalDifferenceMap.load(folder)
    assert (loaded.options, loaded.features) == (fitted.options, None)
    assert torch.equal(loaded.to_dense(), fitted.to_dense())
