"""`lookup` in CUDA C++ (`csrc/cuda/lookup_row.cuh`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspa.kernels.types import CsrMap, EditKind, EditList


def lookup(
    density: Tensor,
    conditional_map: CsrMap,
    k_prompt: int,
    k_diff: int,
    edit: EditKind,
    sign_guard: bool,
    *,
    library: Any = torch.ops.dspa,
) -> EditList:
    """See `dspa.kernels.lookup`. `library` holds the operations."""
    edits = EditList.empty(density.shape[0], 2 * k_diff if edit == "both" else k_diff, density.device)
    library.lookup(
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
