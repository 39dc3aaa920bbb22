"""From prompt features to edit lists, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.kernels.types import CsrMap, EditKind, EditList


def lookup(
    density: Tensor, conditional_map: CsrMap, k_prompt: int, k_diff: int, edit: EditKind, sign_guard: bool
) -> EditList:
    """See `dspa.kernels.lookup`."""
    augment, ablate = [], []
    for row in density:
        score = row_sum(conditional_map, top(row, k_prompt, largest=True).sort().values)
        up = top(score, k_diff, largest=True) if edit != "ablate" else score.new_empty(0, dtype=torch.int64)
        down = top(score, k_diff, largest=False) if edit != "augment" else score.new_empty(0, dtype=torch.int64)
        if sign_guard:
            up, down = up[score[up] > 0], down[score[down] < 0]
        in_both = set(up.tolist()) & set(down.tolist())
        augment.append([latent for latent in up.tolist() if latent not in in_both])
        ablate.append([latent for latent in down.tolist() if latent not in in_both])
    edits = EditList.empty(len(augment), 2 * k_diff if edit == "both" else k_diff, density.device)
    compact = EditList.from_lists(augment, ablate, density.device)
    edits.latents[:, : compact.k] = compact.latents
    edits.signs[:, : compact.k] = compact.signs
    edits.counts.copy_(compact.counts)
    return edits


def top(values: Tensor, k: int, largest: bool) -> Tensor:
    """Indices of the k largest (smallest) of `[n]` values, best first, ties to the lower index."""
    return values.sort(descending=largest, stable=True).indices[:k]


def row_sum(conditional_map: CsrMap, rows: Tensor) -> Tensor:
    """Sum of some rows of the map, `[d_sae_out]`, added in the order of `rows`."""
    score = torch.zeros(conditional_map.d_sae_out, dtype=conditional_map.values.dtype, device=rows.device)
    for row in rows.tolist():
        entries = slice(int(conditional_map.row_offsets[row]), int(conditional_map.row_offsets[row + 1]))
        score[conditional_map.columns[entries].long()] += conditional_map.values[entries]
    return score
