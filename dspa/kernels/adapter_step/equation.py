"""The equations of the adapter (docs/method.md, section 6), as pure functions that autograd can differentiate."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dspa.kernels.adapter_weights import AdapterActivation


def steering_activations(y: Tensor, threshold: Tensor, activation: AdapterActivation) -> Tensor:
    """`v`, what the adapter adds to each latent before the clip.

    A NaN stays a NaN, except that of a masked latent.

    Args:
        y: `[..., d_sae]` floating point, `W_a h' + b_a`.
        threshold: `[d_sae]`; a negative one counts as 0, Inf masks the latent.
        activation: see `AdapterWeights`.

    Returns:
        `[..., d_sae]`, dtype of `y`.
    """
    least = threshold.to(y.dtype).clamp(min=0)
    size = y.abs() if activation == "soft_threshold" else y
    fires = ~(size <= least) & (least < math.inf)
    value = y.sign() * (size - least) if activation == "soft_threshold" else y
    return torch.where(fires, value, 0)


def clipped(v: Tensor, f: Tensor) -> Tensor:
    """`delta = max(v, -f)`, so that `f + delta = relu(f + v)` for activations `f >= 0` of the same shape."""
    return torch.maximum(v, -f)
