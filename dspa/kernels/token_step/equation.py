"""The equation of the edit (docs/method.md, section 4), as a pure function that autograd can differentiate."""

from __future__ import annotations

import torch
from torch import Tensor


def edited_activations(selected: Tensor, signs: Tensor, alpha: float | Tensor, maximum: Tensor) -> Tensor:
    """The activations `f~'` of listed latents after the edit.

    An active latent of sign +1 becomes `f~ + alpha * M_t`, one of sign -1 becomes `max(f~ - alpha * M_t, 0)`. Inactive
    latents, and those of sign 0 (padding), keep their value.

    Args:
        selected: `[..., k]` floating point, the activations `f~` of the listed latents, not negative.
        signs: `[..., k]` integers, +1 augment, -1 ablate, 0 padding.
        alpha: edit strength, a number or `[...]`; rounded to the dtype of `selected`.
        maximum: `[...]`, `M_t`, the largest activation of all latents before edits.

    Returns:
        `[..., k]`, dtype of `selected`.
    """
    step = (torch.as_tensor(alpha, dtype=selected.dtype, device=selected.device) * maximum)[..., None]
    moved = selected + signs * step
    moved = torch.where(signs < 0, moved.clamp(min=0), moved)
    return torch.where((selected > 0) & (signs != 0), moved, selected)
