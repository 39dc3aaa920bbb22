"""The SAE encoder in plain torch: the definition that every kernel's encode is tested against (method, section 1)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dspa.sae.weights import SaeWeights

LAYER_NORM_EPSILON = 1e-5  # as sae-lens normalises


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any operand is float64, else float32: what every operation accumulates in."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def encoder_input(hidden: Tensor, sae: SaeWeights) -> tuple[Tensor, Tensor | None]:
    """`h'` of method.md, section 1, and the factor that maps a decoded difference back to the residual stream.

    Args:
        hidden: `[..., d_model]`.

    Returns:
        `h'`, `[..., d_model]` in the compute dtype, and `[..., 1]` or None where no factor applies.
    """
    x = hidden.to(compute_dtype(hidden, sae.W_enc))
    scale = None
    if sae.normalization == "constant_norm_rescale":
        coefficient = math.sqrt(sae.d_model) / x.norm(dim=-1, keepdim=True)
        x, scale = x * coefficient, 1 / coefficient
    elif sae.normalization == "layer_norm":
        x = x - x.mean(dim=-1, keepdim=True)
        scale = x.std(dim=-1, keepdim=True)
        x = x / (scale + LAYER_NORM_EPSILON)
    if sae.subtract_b_dec:
        assert sae.b_dec is not None  # SaeWeights checks it
        x = x - sae.b_dec
    return x, scale


def activations(product: Tensor, sae: SaeWeights) -> Tensor:
    """Latent activations `f` from the bare products `W_enc h'`.

    Args:
        product: `[..., d_sae]` in the compute dtype.

    Returns:
        `[..., d_sae]`, same dtype, none of them negative.
    """
    z = product + sae.b_enc
    if sae.decoder_norm is not None:
        z = z * sae.decoder_norm
    if sae.activation == "gated":
        assert sae.magnitude_scale is not None  # SaeWeights checks it
        assert sae.magnitude_bias is not None
        return (product * sae.magnitude_scale + sae.magnitude_bias).relu() * (z > 0)
    if sae.activation == "topk":
        assert sae.k is not None  # SaeWeights checks it
        # A stable sort keeps equal values in index order, which breaks ties towards the lower index.
        z = torch.where(z.isnan(), -math.inf, z)  # NaN is not active, and takes nobody's place
        kept = z.sort(dim=-1, descending=True, stable=True).indices[..., : sae.k]
        return torch.zeros_like(z).scatter(-1, kept, z.gather(-1, kept).relu())
    return z.relu() * (z > sae.threshold)


def encode(hidden: Tensor, sae: SaeWeights) -> Tensor:
    """Latent activations of hidden states, as sae-lens' own `encode` computes them.

    Args:
        hidden: `[..., d_model]`, any floating dtype.

    Returns:
        `[..., d_sae]`, float64 if `hidden` or the SAE is float64, else float32.
    """
    x, _ = encoder_input(hidden, sae)
    return activations(x @ sae.W_enc.to(x.dtype).T, sae)
