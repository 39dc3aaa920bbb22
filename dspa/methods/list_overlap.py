"""How alike the edit lists of prompts are, within a kind of prompt and across kinds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspa.kernels import EditList


@dataclass(frozen=True)
class Overlap:
    """Mean Jaccard overlap of sets that belong to prompts: of pairs of one kind, and of pairs of two kinds.

    NaN where there is no such pair.
    """

    within_kind: float
    across_kinds: float

    @classmethod
    def from_sets(cls, sets: Tensor, kinds: Sequence[str]) -> Overlap:
        """From sets as rows of `[prompts, d]` bool, and the kind of each prompt."""
        member = sets.double()
        shared = member @ member.T
        sizes = member.sum(dim=1)
        jaccard = shared / (sizes[:, None] + sizes[None, :] - shared).clamp(min=1)
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(kinds))}
        kind = torch.tensor([numbers[each] for each in kinds])
        same = kind[:, None] == kind[None, :]
        other_prompt = ~torch.eye(len(kind), dtype=torch.bool)
        return cls(float(jaccard[same & other_prompt].mean()), float(jaccard[~same].mean()))


def list_sets(edits: EditList, d_sae: int) -> Tensor:
    """The latents of edit lists as rows of `[prompts, d_sae]` bool, whatever their signs."""
    sets = torch.zeros(edits.batch, d_sae, dtype=torch.bool)
    row, entry = edits.valid().nonzero(as_tuple=True)
    sets[row, edits.latents[row, entry].long()] = True
    return sets
