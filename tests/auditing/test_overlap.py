"""Overlaps of edit lists by sets of Python, and clusters that are known because they were built."""

from __future__ import annotations

import random

import pytest
import torch

from dspa.auditing.overlap import clustered, jaccard, list_overlap

Listed = tuple[int, int]


def ablated(*latents: int) -> frozenset[Listed]:
    return frozenset((latent, -1) for latent in latents)


def test_jaccard() -> None:
    draw = random.Random(0)
    sets = [frozenset((draw.randrange(9), draw.choice((-1, 1))) for _ in range(draw.randrange(6))) for _ in range(20)]
    found = jaccard(sets)
    for row, one in enumerate(sets):
        for column, other in enumerate(sets):
            expected = len(one & other) / len(one | other) if one | other else 1.0
            assert float(found[row, column]) == pytest.approx(expected)


def test_a_latent_that_is_augmented_is_not_the_one_that_is_ablated() -> None:
    assert float(jaccard([ablated(1, 2), frozenset({(1, 1), (2, -1)})])[0, 1]) == pytest.approx(1 / 3)


def test_average_linkage_by_hand() -> None:
    """0 and 1 overlap by 0.8; 2 with them by 0.7 and 0.4, so 0.55 on average, and is joined; 3 stays alone at 0.49."""
    overlaps = [
        [1.0, 0.8, 0.7, 0.49],
        [0.8, 1.0, 0.4, 0.49],
        [0.7, 0.4, 1.0, 0.49],
        [0.49, 0.49, 0.49, 1.0],
    ]
    assert clustered(torch.tensor(overlaps, dtype=torch.float64)) == [[0, 1, 2], [3]]
    overlaps[1][2] = overlaps[2][1] = 0.2  # 0.45 on average
    assert clustered(torch.tensor(overlaps, dtype=torch.float64)) == [[0, 1], [2], [3]]


def test_clusters_of_prompts_that_were_built_alike() -> None:
    themes = {0: range(10), 1: range(10, 20), 2: range(20, 30)}
    draw = random.Random(1)
    of = [draw.randrange(3) for _ in range(30)]
    lists = [ablated(*draw.sample(list(themes[theme]), 8)) for theme in of]
    found = list_overlap(lists)
    assert found is not None
    assert [len(cluster.prompts) for cluster in found.clusters] == sorted(
        (of.count(theme) for theme in themes), reverse=True
    )
    for cluster in found.clusters:
        (theme,) = {of[prompt] for prompt in cluster.prompts}
        assert set(cluster.shared) <= set(themes[theme])
        pairs = [(a, b) for a in cluster.prompts for b in cluster.prompts if a < b]
        mean = sum(len(lists[a] & lists[b]) / len(lists[a] | lists[b]) for a, b in pairs) / len(pairs)
        assert cluster.overlap == pytest.approx(mean)
    assert found.order == tuple(prompt for cluster in found.clusters for prompt in cluster.prompts)
    assert found.matrix[0][1] == float(jaccard([lists[found.order[0]], lists[found.order[1]]])[0, 1])


def test_one_prompt_has_no_overlap() -> None:
    assert list_overlap([ablated(1)]) is None
