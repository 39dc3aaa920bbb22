"""Totals of counters, and how they read."""

from __future__ import annotations

import math

import pytest
import torch

from dspa.kernels import TokenStats
from dspa.online.summary import SHOWN_LATENTS, LatentEdits, SteeringSummary


def counters(
    seen: list[int],
    edited: list[int] | None = None,
    nonfinite: list[int] | None = None,
    maxima: tuple[float, int] = (0.0, 0),
    latents: dict[int, int] | None = None,
    d_sae: int = 32,
) -> TokenStats:
    """Counters of a batch; `maxima` is the sum of M_t in the first row and over how many tokens it was taken."""
    stats = TokenStats.zeros(len(seen), d_sae)
    stats.seen.copy_(torch.tensor(seen))
    stats.edited.copy_(torch.tensor(edited or [0] * len(seen)))
    stats.nonfinite.copy_(torch.tensor(nonfinite or [0] * len(seen)))
    stats.maximum_sum[0], stats.maximum_known[0] = maxima
    for latent, tokens in (latents or {}).items():
        stats.latent_edits[latent] = tokens
    return stats


def test_counters_of_batches_of_different_sizes_add_up() -> None:
    summary = SteeringSummary.from_stats(
        [
            counters([3, 4], [1, 2], [0, 1], (6.0, 2), {5: 2, 9: 1}),
            counters([10], [5], [0], (3.0, 1), {9: 4, 2: 1}),
        ],
        prompts=3,
    )
    assert summary == SteeringSummary(
        prompts=3,
        tokens_seen=17,
        tokens_edited=8,
        tokens_nonfinite=1,
        mean_maximum=3.0,
        latents=(LatentEdits(9, 5), LatentEdits(5, 2), LatentEdits(2, 1)),
    )


def test_latents_of_several_layers_are_told_apart() -> None:
    summary = SteeringSummary.from_layers(
        [
            (2, [counters([3], [2], latents={5: 2}), counters([1], [1], latents={5: 1})]),
            (4, [counters([3], [3], latents={5: 3})]),
        ],
        prompts=1,
    )
    assert summary.latents == (LatentEdits(5, 3, 2), LatentEdits(5, 3, 4))
    assert (summary.tokens_seen, summary.tokens_edited) == (7, 6)
    assert "2/5 (3), 4/5 (3)" in str(summary)
    assert "<tr><td>4</td><td>5</td><td>3</td></tr>" in summary._repr_html_()


def test_latents_edited_equally_often_come_in_order() -> None:
    summary = SteeringSummary.from_stats([counters([4], [4], latents={7: 2, 3: 2, 5: 4})], prompts=1)
    assert [edit.latent for edit in summary.latents] == [5, 3, 7]


@pytest.mark.parametrize("stats", [[], [counters([0])], [counters([3])]])
def test_a_maximum_that_never_was_needed(stats: list[TokenStats]) -> None:
    assert math.isnan(SteeringSummary.from_stats(stats, prompts=0).mean_maximum)


@pytest.mark.parametrize(
    ("stats", "prompts", "text"),
    [
        ([], 0, "prompts 0, tokens seen 0, edited 0, mean M_t nan"),
        (
            [counters([8, 8], [4, 0], maxima=(5.0, 4), latents={3: 4, 1: 1})],
            2,
            "prompts 2, tokens seen 16, edited 4 (25%), mean M_t 1.25\nlatents edited (tokens): 3 (4), 1 (1)",
        ),
        (
            [counters([2], nonfinite=[2])],
            1,
            "prompts 1, tokens seen 2, edited 0 (0%), mean M_t nan\ntokens left alone because of NaN or Inf: 2",
        ),
    ],
)
def test_text(stats: list[TokenStats], prompts: int, text: str) -> None:
    assert str(SteeringSummary.from_stats(stats, prompts)) == text


@pytest.mark.parametrize("extra", [0, 1, 5])
def test_long_lists_of_latents_are_cut(extra: int) -> None:
    latents = {latent: 20 - latent for latent in range(SHOWN_LATENTS + extra)}
    text = str(SteeringSummary.from_stats([counters([20], [20], latents=latents)], 1))
    assert text.endswith(f" and {extra} more" if extra else f" {SHOWN_LATENTS - 1} ({21 - SHOWN_LATENTS})")
    assert text.count("(") == SHOWN_LATENTS + 2  # each latent, the share, the heading
