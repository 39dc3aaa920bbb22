"""`lookup` in C++ (`csrc/cpu/lookup.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.kernels.operands import refusals_of_the_library
from dspa.kernels.types import CsrMap, EditKind, EditList


def lookup(
    density: Tensor, conditional_map: CsrMap, k_prompt: int, k_diff: int, edit: EditKind, sign_guard: bool
) -> EditList:
    """See `dspa.kernels.lookup`."""
    edits = EditList.empty(density.shape[0], 2 * k_diff if edit == "both" else k_diff)
    with refusals_of_the_library():
        torch.ops.dspa.lookup(
            (density if density.dtype == torch.float64 else density.float()).contiguous(),
            conditional_map.row_offsets,
            conditional_map.columns,
            conditional_map.values,
            conditional_map.d_sae_out,
            k_prompt,
            k_diff,
            edit,
            sign_guard,
            edits.latents,
            edits.signs,
            edits.counts,
        )
    return edits
