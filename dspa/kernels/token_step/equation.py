"""The edit of one token's activations: the equation that the reference, the trace and the documentation share."""

from __future__ import annotations

import torch
from torch import Tensor


def edited_activations(selected: Tensor, signs: Tensor, alpha: float | Tensor, maximum: Tensor) -> Tensor:
    """Activations after the edit (docs/method.md, section 4):

        augmented and active:  f'_j = f_j + alpha * M
        ablated and active:    f'_j = max(f_j - alpha * M, 0)
        otherwise:             f'_j = f_j

    Plain torch, differentiable in `selected`, `alpha` and `maximum`.

    Args:
        selected: `[B, k]` floating point, activations f_j of the listed latents.
        signs: `[B, k]`, +1 augment, -1 ablate, 0 leave alone.
        alpha: edit strength, one number or `[B]`.
        maximum: `[B]`, M, the largest activation of all latents before edits.

    Returns:
        `[B, k]`.
    """
    step = torch.as_tensor(alpha, dtype=selected.dtype, device=selected.device) * maximum
    moved = selected + signs * step[:, None]
    moved = torch.where(signs < 0, moved.clamp(min=0), moved)
    return torch.where((selected > 0) & (signs != 0), moved, selected)
