"""How well maps predict triples that were left out, against docs/method.md, section 2.2, fold by fold in numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_collection as tiny
import torch

from dspa import ConditionalDifferenceMap, cross_validated_agreement
from dspa.errors import InvalidInputError
from dspa.methods.agreement import Folds, ListOptions
from dspa.offline.density_subset import DensitySubset

LENGTHS = (3, 5, 7, 11, 13)
K_DIFF = 8


def part_of(densities: tiny.Densities, triples: tiny.Counts) -> tiny.Densities:
    parts = (densities.prompt, densities.chosen, densities.rejected)
    return tiny.Densities(*(tiny.Part(part.counts[triples], part.tokens[triples]) for part in parts))


@pytest.mark.parametrize("triples", [[4], [2, 0, 11], [5, 5, 1]])
def test_a_subset_is_as_if_it_had_been_collected(tmp_path: Path, triples: list[int]) -> None:
    densities = tiny.random_densities(12, 20, 15, 0, LENGTHS)
    subset = DensitySubset.from_store(tiny.write_store(tmp_path / "all", densities, 5), triples)
    alone = tiny.write_store(tmp_path / "some", part_of(densities, np.array(triples)))
    for options in ({"sparsify": "none"}, {"estimator": "ridge", "features": 4})[: len(triples)]:
        one, other = (ConditionalDifferenceMap.fit(each, **options) for each in (subset, alone))  # type: ignore[arg-type]
        assert torch.equal(one.to_dense(), other.to_dense())
    by_numpy = DensitySubset.from_store(tiny_store(tmp_path / "numpy"), np.array(triples))
    assert by_numpy.run.triples == DensitySubset.from_store(tiny_store(tmp_path / "list"), triples).run.triples
    assert by_numpy.run.triples != DensitySubset.from_store(tiny_store(tmp_path / "other"), [*triples, 3]).run.triples


@pytest.mark.parametrize("triples", [[12], [-1], [], [1.0], [True, "2"], [float("nan")], np.array([0.5]), np.array([])])
def test_a_subset_of_no_triples_is_refused(tmp_path: Path, triples: Any) -> None:
    whole = DensitySubset.from_store(tiny_store(tmp_path), range(12))
    with pytest.raises(InvalidInputError, match="expected numbers from 0 to 11, at least 1"):
        DensitySubset.from_store(whole, triples)


def tiny_store(folder: Path) -> Any:
    return tiny.write_store(folder / "again", tiny.random_densities(12, 20, 15, 0, LENGTHS))


@pytest.mark.parametrize("edit", ["ablate", "augment", "both"])
@pytest.mark.parametrize("fit", [{"estimator": "ridge", "features": 5}, {"gate_percentile": 70}])
@pytest.mark.parametrize("sign_guard", [False, True])
def test_agreement_is_what_the_lists_of_other_folds_take_along(
    tmp_path: Path, fit: Any, edit: Any, sign_guard: bool
) -> None:
    densities = tiny.random_densities(17, 20, 20, 5, LENGTHS)
    store = tiny.write_store(tmp_path / "all", densities)
    policy: Any = {"k_prompt": 6, "k_diff": K_DIFF, "edit": edit, "sign_guard": sign_guard}
    found = cross_validated_agreement(store, folds=4, seed=3, **policy, sparsify="none", **fit)
    if edit == "ablate" and not sign_guard:
        assert (
            cross_validated_agreement(store, folds=4, seed=3, k_prompt=6, k_diff=K_DIFF, sparsify="none", **fit)
            == found
        )
    order, agreement, guarded = np.random.default_rng(3).permutation(17), np.zeros(17), 0
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
            score = chosen @ A
            ordered = np.sort(score)
            gaps = ordered[K_DIFF] - ordered[K_DIFF - 1], ordered[-K_DIFF] - ordered[-K_DIFF - 1], np.abs(score).min()
            assert min(gaps) > 1e-5, "construct another case"
            up, down = (np.argsort(each, kind="stable")[:K_DIFF] for each in (-score, score))
            if sign_guard:
                up, down = up[score[up] > 0], down[score[down] < 0]
                guarded += 2 * K_DIFF - len(up) - len(down)
            D = densities.difference[triple]
            agreement[triple] = (edit != "ablate") * D[up].sum() - (edit != "augment") * D[down].sum()
    if sign_guard:
        assert guarded, "construct another case"
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
    ridge = cross_validated_agreement(store, k_prompt=6, k_diff=6, edit="both", estimator="ridge", features=6)
    mean = cross_validated_agreement(store, k_prompt=6, k_diff=6, edit="both")
    assert ridge.mean - ridge.half_width > mean.mean + mean.half_width


def test_too_few_triples_or_folds(tmp_path: Path) -> None:
    store = tiny.write_store(tmp_path, tiny.random_densities(3, 20, 15, 0))
    with pytest.raises(InvalidInputError, match="there are 3 triples; expected at least one for each of 5 folds"):
        cross_validated_agreement(store)
    with pytest.raises(InvalidInputError, match="folds is 1; expected at least 2"):
        cross_validated_agreement(store, folds=1)


# Kind A has latent 0 on all tokens, kind B latent 1; 2 and 3 tell the prompts of a kind apart and are never chosen.
PROMPTS = ((4, 0, 1, 0), (4, 0, 0, 1), (0, 4, 1, 0), (0, 4, 0, 1))
CHOSEN = ((4, 0, 0, 0, 0, 0), (2, 0, 0, 0, 0, 0), (0, 0, 3, 0, 0, 0), (0, 0, 1, 0, 2, 0))
REJECTED = ((0, 2, 0, 0, 0, 0), (0, 4, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0), (0, 0, 0, 1, 0, 0))


def by_hand(folder: Path, order: Sequence[int] = range(4)) -> Any:
    """Four triples of four tokens each, every one a fold of its own; `order` deals the differences to the prompts."""
    tokens = np.full(4, 4)
    chosen, rejected = ([part[index] for index in order] for part in (CHOSEN, REJECTED))
    return tiny.write_store(
        folder, tiny.Densities(*(tiny.Part(np.array(c), tokens) for c in (PROMPTS, chosen, rejected)))
    )


@pytest.mark.parametrize(
    ("options", "sums", "lengths"),
    [
        # The other prompt of the kind decides: +0 -1, +0 -1, +4 -3, +2 -3.
        ({"k_diff": 1, "gate_rule": "positive_ge"}, (1.5, 1.5, 0.25, 0.5), (2, 2, 2, 2)),
        # Zeros that both directions reach into are in neither list: +0 -1, +0 -1, +4 +2 -3 -0, +2 -3.
        ({"k_diff": 2, "gate_rule": "positive_ge"}, (1.5, 1.5, 1.0, 0.5), (2, 2, 4, 2)),
        ({"k_diff": 1, "gate_rule": "positive_ge", "edit": "ablate"}, (0.5, 1.0, 0.25, 0.25), (1, 1, 1, 1)),
        # Thresholds are 0, so that all gates are on: the other three decide. +2 -1, +0 -1, +0 -1, +0 -1.
        ({"k_diff": 1}, (0.5, 1.5, 0, 0), (2, 2, 2, 2)),
        # +2 +0 -1 -3, +0 +2 -1 -3, +0 +4 -1 -3, +0 +2 -1 -3.
        ({"k_diff": 2}, (1.5, 1.5, 0.25, 0.5), (4, 4, 4, 4)),
    ],
)
def test_agreement_by_hand(
    tmp_path: Path, options: dict[str, Any], sums: Sequence[float], lengths: Sequence[int]
) -> None:
    given: Any = {"folds": 4, "k_prompt": 1, "edit": "both", "gate_percentile": 50, "sparsify": "none"} | options
    store = by_hand(tmp_path)
    assert cross_validated_agreement(store, **given).mean == pytest.approx(np.mean(sums), abs=1e-12)
    found = cross_validated_agreement(store, per_edit=True, **given)
    expected = np.array(sums) / np.sqrt(lengths)
    assert found.mean == pytest.approx(expected.mean(), abs=1e-12)
    assert found.half_width == pytest.approx(1.959964 * expected.std(ddof=1) / 2)


def test_lists_without_latents_agree_with_nothing(tmp_path: Path) -> None:
    lists = ListOptions(1, 2, "both", editable=torch.tensor([False, True, False, False, False, False]))
    (found,) = Folds.from_store(by_hand(tmp_path), 4, 0).agreement(
        [lists], gate_percentile=50, gate_rule="positive_ge", sparsify="none"
    )
    assert found.sums.tolist() == [0.5, 1, 0, 0]
    assert found.lengths.tolist() == [1, 1, 0, 0]
    assert found.per_edit.tolist() == [0.5, 1, 0, 0]
    assert sorted(found.by_fold()) == [0, 0, 0.5, 1]


@pytest.mark.parametrize("seed", range(4))
def test_triples_of_one_prompt_are_left_out_together(tmp_path: Path, seed: int) -> None:
    drawn = tiny.random_densities(5, 20, 15, 0, LENGTHS)
    repeated = part_of(drawn, np.array([0, 1, 2, 1, 3, 4, 0, 1]))
    folds = Folds.from_store(tiny.write_store(tmp_path / "repeated", repeated, 3), 3, seed)
    for same in ([0, 6], [1, 3, 7]):
        assert len(set(folds.fold[same])) == 1
    assert set(folds.fold) == {0, 1, 2}
    apart = Folds.from_store(tiny.write_store(tmp_path / "apart", drawn), 3, seed)
    order = np.random.default_rng(seed).permutation(5)
    assert [sorted(order[each::3]) for each in range(3)] == [
        np.flatnonzero(apart.fold == each).tolist() for each in range(3)
    ]
    with pytest.raises(
        InvalidInputError, match="there are 5 prompts of 8 triples; expected at least one for each of 6"
    ):
        Folds.from_store(tiny.write_store(tmp_path / "few", repeated), 6, seed)
