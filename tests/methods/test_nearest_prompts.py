"""The estimator `nearest_prompts` against docs/method.md, section 2.1, in float64 numpy; its folder; steering."""

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

from dspa import ConditionalDifferenceMap, SteeringPolicy
from dspa.errors import CorruptFileError, InvalidInputError
from dspa.methods.nearest_prompts import NEIGHBOURS, TriplePrompts, choose_neighbours
from dspa.online.steering import steer

LENGTHS = (3, 5, 7, 11, 13)  # of prompts and responses: densities differ, and nothing ties but what is 0


def nearness(rho: tiny.Matrix, triples: tiny.Matrix) -> tiny.Matrix:
    """(1 + cosine) / 2 from the mean of the triples' prompts."""
    centre = triples.mean(axis=0)
    found = np.full((len(rho), len(triples)), 0.5)
    for b, prompt in enumerate(rho):
        for n, other in enumerate(triples):
            lengths = np.linalg.norm(prompt - centre) * np.linalg.norm(other - centre)
            if lengths > 1e-12:
                found[b, n] = (1 + (prompt - centre) @ (other - centre) / lengths) / 2
    return found


def extremes(scores: tiny.Matrix, k: int) -> tuple[list[int], list[int]]:
    """The k highest and the k lowest, best first; the k-th and the next must not be within rounding."""
    order = np.argsort(-scores, kind="stable")
    for last, following in ((order[k - 1], order[k]), (order[-k], order[-k - 1])):
        assert abs(scores[last] - scores[following]) > 1e-6, "construct another case"
    return order[:k].tolist(), order[::-1][:k].tolist()


def kept(deviation: tiny.Matrix, n: int) -> tiny.Matrix:
    """Each row's n largest and n smallest entries."""
    result = np.zeros_like(deviation)
    for row, out in zip(deviation, result, strict=True):
        for side in (np.argsort(-row, kind="stable")[:n], np.argsort(row, kind="stable")[:n]):
            out[side] = row[side]
    return result


def captured(rho: tiny.Matrix, rows: tiny.Matrix, difference: tiny.Matrix, neighbours: int, k: int) -> float:
    """How far the edits of each triple, chosen by its neighbours, go with the triple's own difference."""
    total, near = 0.0, nearness(rho, rho)
    for triple in range(len(rho)):
        others = [n for n in np.argsort(-near[triple], kind="stable") if n != triple][:neighbours]
        score = rows[others].sum(axis=0)
        up, down = (np.argsort(sign * score, kind="stable")[:k] for sign in (-1, 1))
        total += difference[triple, up].sum() - difference[triple, down].sum()
    return total


@pytest.mark.parametrize("triples", [1, 6, 40])
def test_nearness_is_the_equation_and_depends_on_no_other_prompt(triples: int) -> None:
    rho = tiny.random_densities(triples + 5, 30, 4, 3, LENGTHS).prompt.density
    found = TriplePrompts.from_densities(compressed(rho[:triples]))
    batch = torch.from_numpy(rho[triples:])
    near = found.nearness(batch)
    np.testing.assert_allclose(near.numpy(), nearness(rho[triples:], rho[:triples]), atol=1e-6)
    assert torch.equal(torch.cat([found.nearness(row[None]) for row in batch]), near)
    at_centre = found.nearness(found.centre[None].double())
    torch.testing.assert_close(at_centre, torch.full_like(at_centre, 0.5))
    assert found.nearness(batch[:0]).shape == (0, triples)
    with pytest.raises(InvalidInputError, match=r"density is \(5, 29\); expected \[B, d_sae_in = 30\]"):
        found.nearness(batch[:, 1:])


def compressed(rows: tiny.Matrix) -> Any:
    from dspa.kernels import CsrMap

    dense = torch.from_numpy(rows)
    offsets = torch.zeros(len(dense) + 1, dtype=torch.int64)
    offsets[1:] = (dense != 0).sum(dim=1).cumsum(dim=0)
    return CsrMap(offsets, dense.nonzero()[:, 1].int(), dense[dense != 0].float(), dense.shape[1]).check()


@pytest.mark.parametrize("per_shard", [4, 25])
@pytest.mark.parametrize("entries", [5, None])
def test_the_map_has_a_row_for_each_triple(tmp_path: Path, entries: int | None, per_shard: int) -> None:
    densities = tiny.random_densities(25, 30, 200, 1, LENGTHS)
    store = tiny.write_store(tmp_path, densities, per_shard)
    found = ConditionalDifferenceMap.fit(store, estimator="nearest_prompts", entries_per_side=entries)
    deviation = densities.difference - densities.difference.mean(axis=0)
    expected = kept(deviation, entries or 64)
    np.testing.assert_allclose(found.to_dense().numpy(), expected, atol=1e-7)
    assert found.prompts is not None
    np.testing.assert_allclose(found.prompts.densities.to_dense().numpy(), densities.prompt.density, atol=1e-7)
    rho = densities.prompt.density
    scores = {n: captured(rho, expected, densities.difference, n, 16) for n in NEIGHBOURS if n < 25}
    assert found.prompts.neighbours == max(scores, key=lambda n: scores[n])
    assert found.gate_counts.tolist() == (rho > 0).sum(axis=0).tolist()


def test_the_number_of_neighbours_is_that_of_the_groups() -> None:
    """Groups of nine triples with the same prompt and the same difference but for noise: the eight others help."""
    generator = np.random.default_rng(0)
    group = np.repeat(np.arange(8), 9)
    rho = np.eye(8)[group]
    difference = generator.normal(size=(8, 60))[group] + 2 * generator.normal(size=(72, 60))
    found = choose_neighbours(
        TriplePrompts.from_densities(compressed(rho)), compressed(difference), torch.from_numpy(difference), 6
    )
    assert found == 8
    assert (
        choose_neighbours(
            TriplePrompts.from_densities(compressed(rho[:1])), compressed(difference[:1]), torch.zeros(1, 60), 6
        )
        == 1
    )


@pytest.mark.parametrize("edit", ["ablate", "augment", "both"])
def test_a_prompt_is_edited_by_its_nearest_triples(tmp_path: Path, edit: Any) -> None:
    densities = tiny.random_densities(25, 30, 120, 2, LENGTHS)
    fitted = ConditionalDifferenceMap.fit(
        tiny.write_store(tmp_path, densities), estimator="nearest_prompts", sparsify="none"
    )
    assert fitted.prompts is not None
    fitted = replace(fitted, prompts=replace(fitted.prompts, neighbours=3))
    rho = tiny.random_densities(4, 30, 2, 9, LENGTHS).prompt.density
    edits = fitted.select(torch.from_numpy(rho), 32, 7, edit)
    deviation = densities.difference - densities.difference.mean(axis=0)
    for row, near in enumerate(nearness(rho, densities.prompt.density)):
        up, down = extremes(deviation[np.argsort(-near, kind="stable")[:3]].sum(axis=0), 7)
        assert edits.augmented(row) == (up if edit != "ablate" else [])
        assert edits.ablated(row) == (down if edit != "augment" else [])


def test_a_saved_policy_steers_as_before(tmp_path: Path) -> None:
    model: Any = tiny_model()
    plain = tiny_policy(model)
    densities = tiny.random_densities(12, plain.input_sae.d_sae, plain.output_sae.d_sae, 5, LENGTHS)
    fitted = ConditionalDifferenceMap.fit(tiny.write_store(tmp_path / "store", densities), estimator="nearest_prompts")
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
    with pytest.raises(InvalidInputError, match="global_tau is one threshold for the rows of latents"):
        ConditionalDifferenceMap.fit(tmp_path / "store", estimator="nearest_prompts", sparsify="global_tau")
    change_record(saved / "config.json", lambda record: record["conditional_map"].update(neighbours=13))
    with pytest.raises(CorruptFileError, match="names 13 neighbours; expected 1 to 12"):
        SteeringPolicy.from_pretrained(saved)
