"""The adapter's edit of one token per row, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dspa.kernels.adapter_step.equation import clipped, steering_activations
from dspa.kernels.adapter_weights import AdapterWeights
from dspa.kernels.backends.interface import AdapterMode
from dspa.kernels.types import TokenStats
from dspa.sae.encode import activations, encoder_input
from dspa.sae.weights import SaeWeights


def adapter_step(
    hidden: Tensor,
    sae: SaeWeights,
    adapter: AdapterWeights,
    enabled: Tensor | None,
    stats: TokenStats | None,
    steering_fraction: float | None,
    mode: AdapterMode | None,
) -> None:
    """See `dspa.kernels.adapter_step`. All modes have the same result, so the reference ignores `mode`."""
    assert sae.W_dec is not None  # the dispatcher checks it
    if hidden.shape[0] == 0:
        return
    x, scale = encoder_input(hidden, sae)
    x = x.to(torch.promote_types(x.dtype, adapter.bias.dtype))
    on = torch.ones(len(x), dtype=torch.bool, device=x.device) if enabled is None else enabled

    y = _products(x, adapter.weight) + adapter.bias
    finite = x.isfinite().all(dim=-1) & (y.isfinite() | (adapter.threshold == math.inf)).all(dim=-1)
    if scale is not None:
        finite &= scale.squeeze(-1).isfinite()
    delta = steering_activations(y, adapter.threshold, adapter.activation)
    if steering_fraction is not None:
        delta = _strongest(delta, steering_fraction)
    if adapter.clip and bool((delta < 0).any()):
        product = _products(x, sae.W_enc)
        f = activations(product, sae)
        falls = delta < 0
        read = falls.any(dim=-1, keepdim=True) if sae.activation == "topk" else falls  # a rank depends on all latents
        finite &= ((product.isfinite() & f.isfinite()) | ~read).all(dim=-1)
        delta = torch.where(falls, clipped(delta, f), delta)

    delta = torch.where((on & finite)[:, None], delta, 0)
    changed = (delta != 0).any(dim=-1)
    for row in changed.nonzero().flatten().tolist():
        latents = delta[row].nonzero().flatten()
        coefficient = delta[row, latents]
        if sae.decoder_norm is not None:
            coefficient = coefficient / sae.decoder_norm[latents]
        if scale is not None:
            coefficient = coefficient * scale[row]
        decoder_row = latents if sae.decoder_rows is None else sae.decoder_rows[latents].long()
        coefficient = torch.where(decoder_row >= 0, coefficient, 0)
        decoded = coefficient @ sae.W_dec[decoder_row].to(x.dtype)
        hidden[row] = (hidden[row].to(x.dtype) + decoded).to(hidden.dtype)

    if stats is not None:
        stats.seen.add_(on)
        stats.edited.add_(changed)
        stats.nonfinite.add_(on & ~finite)
        stats.latent_edits.add_((delta != 0).sum(dim=0))


def _products(x: Tensor, matrix: Tensor) -> Tensor:
    """`[B, d_sae]`. One matrix-vector product per row, each from a freshly aligned vector: the bits of a row do not
    depend on the rest of the batch, as those of a matrix product would."""
    wide = matrix.to(x.dtype)
    return torch.stack([wide.mv(row.clone()) for row in x])


def _strongest(v: Tensor, fraction: float) -> Tensor:
    """`v` where fewer than `fraction` of a row's latents are larger in size, ties to the lower index, else 0."""
    kept = max(1, int(v.shape[-1] * fraction))
    order = v.abs().sort(dim=-1, descending=True, stable=True).indices[..., :kept]
    return torch.zeros_like(v).scatter(-1, order, v.gather(-1, order))
