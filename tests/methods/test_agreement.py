"""How well maps predict triples that were left out, against docs/method.md, section 2.2, fold by fold in numpy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_collection as tiny
import torch

from dspa import ConditionalDifferenceMap, cross_validated_agreement
from dspa.errors import InvalidInputError
from dspa.offline.density_subset import DensitySubset

LENGTHS = (3, 5, 7, 11, 13)


def part_of(densities: tiny.Densities, triples: tiny.Counts) -> tiny.Densities:
    parts = (densities.prompt, densities.chosen, densities.rejected)
    return tiny.Densities(*(tiny.Part(part.counts[triples], part.tokens[triples]) for part in parts))


@pytest.mark.parametrize("triples", [[4], [2, 0, 11], [5, 5, 1]])
def test_a_subset_is_as_if_it_had_been_collected(tmp_path: Path, triples: list[int]) -> None:
    densities = tiny.random_densities(12, 20, 15, 0, LENGTHS)
    subset = DensitySubset.from_store(tiny.write_store(tmp_path / "all", densities, 5), triples)
    alone = tiny.write_store(tmp_path / "some", part_of(densities, np.array(triples)))
    for options in ({"sparsify": "none"}, {"estimator": "ridge", "features": 4}):
        one, other = (ConditionalDifferenceMap.fit(each, **options) for each in (subset, alone))  # type: ignore[arg-type]
        assert torch.equal(one.to_dense(), other.to_dense())
    with pytest.raises(InvalidInputError, match="expected numbers from 0 to 11, at least 1"):
        DensitySubset.from_store(DensitySubset.from_store(tiny_store(tmp_path), range(12)), [12])


def tiny_store(folder: Path) -> Any:
    return tiny.write_store(folder / "again", tiny.random_densities(12, 20, 15, 0, LENGTHS))


@pytest.mark.parametrize("edit", ["ablate", "augment", "both"])
@pytest.mark.parametrize("fit", [{"estimator": "ridge", "features": 5}, {"gate_percentile": 70}])
def test_agreement_is_what_the_lists_of_other_folds_take_along(tmp_path: Path, fit: Any, edit: Any) -> None:
    densities = tiny.random_densities(17, 20, 60, 4, LENGTHS)
    store = tiny.write_store(tmp_path / "all", densities)
    found = cross_validated_agreement(store, folds=4, seed=3, k_prompt=6, k_diff=5, edit=edit, sparsify="none", **fit)
    order, agreement = np.random.default_rng(3).permutation(17), np.zeros(17)
    for fold in range(4):
        others = np.array(sorted(set(order) - set(order[fold::4])))
        fitted = ConditionalDifferenceMap.fit(
            tiny.write_store(tmp_path / f"{fold}", part_of(densities, others)), sparsify="none", **fit
        )
        A = fitted.to_dense().double().numpy()
        for triple in order[fold::4]:
            rho = densities.prompt.density[triple]
            if "estimator" in fit:
                centre = densities.prompt.density[others].mean(axis=0)
                chosen = tiny.described(rho[None], centre.astype(np.float32).astype(np.float64), 5)[0]
            else:
                chosen = np.isin(np.arange(20), np.argsort(-rho, kind="stable")[:6]).astype(float)
            best = np.argsort(-(chosen @ A), kind="stable")
            D = densities.difference[triple]
            agreement[triple] = (edit != "ablate") * D[best[:5]].sum() - (edit != "augment") * D[best[-5:]].sum()
    assert found.mean == pytest.approx(agreement.mean())
    assert found.half_width == pytest.approx(1.959964 * agreement.std(ddof=1) / 17**0.5)


def test_agreement_finds_the_estimator_that_predicts(tmp_path: Path) -> None:
    """Differences depend on one of four latents, and half of the others fire in every prompt."""
    generator = np.random.default_rng(0)
    kinds = generator.integers(0, 4, 40)
    prompt = np.zeros((40, 24), dtype=np.int64)
    prompt[:, 4:] = generator.integers(5, 10, (40, 20))
    prompt[np.arange(40), kinds] = 4
    probability = 0.2 + 0.6 * (np.arange(40)[None] % 4 == np.arange(4)[:, None])[kinds]
    counts = [generator.binomial(10, p) for p in (probability, 1 - probability)]
    tokens = np.full(40, 10)
    store = tiny.write_store(
        tmp_path, tiny.Densities(tiny.Part(prompt, tokens), *(tiny.Part(each, tokens) for each in counts))
    )
    ridge = cross_validated_agreement(store, k_prompt=6, k_diff=6, estimator="ridge", features=6)
    mean = cross_validated_agreement(store, k_prompt=6, k_diff=6)
    assert ridge.mean - ridge.half_width > mean.mean + mean.half_width


def test_too_few_triples_or_folds(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path, tiny.random_densities(3, 20, 15, 0))
    with pytest.raises(InvalidInputError, match="there are 3 triples; expected at least one for each of 5 folds"):
        cross_validated_agreement(store)
    with pytest.raises(InvalidInputError, match="folds is 1; expected at least 2"):
        cross_validated_agreement(store, folds=1)
