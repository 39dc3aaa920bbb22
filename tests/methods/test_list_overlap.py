"""Overlap of sets within a kind and across kinds."""

from __future__ import annotations

import math

import torch

from dspa.kernels import EditList
from dspa.methods.list_overlap import Overlap, list_sets


def test_overlap_by_kind() -> None:
    lists = EditList.from_lists([[0, 1], [0], [4], [4, 7]], [[], [1], [5], [5, 6]])
    found = Overlap.from_sets(list_sets(lists, 8), ["fact", "fact", "how-to", "how-to"])
    assert found == Overlap(within_kind=0.75, across_kinds=0.0)
    alone = Overlap.from_sets(torch.ones(2, 3, dtype=torch.bool), ["fact", "how-to"])
    assert math.isnan(alone.within_kind)
    assert alone.across_kinds == 1
