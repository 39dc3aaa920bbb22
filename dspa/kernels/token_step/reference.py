"""The edit of one token per row, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.kernels.backends.interface import StepMode
from dspa.kernels.token_step.equation import edited_activations
from dspa.kernels.types import EditList, TokenStats
from dspa.sae.encode import activations, encoder_input
from dspa.sae.weights import SaeWeights


def token_step(
    hidden: Tensor,
    sae: SaeWeights,
    edits: EditList,
    alpha: float | Tensor,
    enabled: Tensor | None,
    stats: TokenStats | None,
    mode: StepMode | None,
) -> None:
    """See `dspa.kernels.token_step`. All modes have the same result, so the reference ignores `mode`."""
    assert sae.W_dec is not None  # the dispatcher checks it
    if hidden.shape[0] == 0:
        return
    x, scale = encoder_input(hidden, sae)
    on = torch.ones(len(x), dtype=torch.bool, device=x.device) if enabled is None else enabled

    # One matrix-vector product per row, each from a freshly aligned vector: the bits of a row do not depend on the
    # rest of the batch, as those of a matrix product would.
    W_enc = sae.W_enc.to(x.dtype)
    product = torch.stack([W_enc.mv(row.clone()) for row in x])
    f = activations(product, sae)
    f = torch.where(f.isnan(), 0, f)
    maximum = f.amax(dim=-1)

    latents = edits.latents.long()
    listed = edits.valid()
    selected = f.gather(1, latents)
    edited = edited_activations(selected, edits.signs, alpha, maximum)
    difference = torch.where(listed & (selected > 0), edited - selected, 0)

    finite = x.isfinite().all(dim=-1) & difference.isfinite().all(dim=-1)
    finite &= (product.gather(1, latents).isfinite() | ~listed).all(dim=-1)
    if scale is not None:
        finite &= scale.squeeze(-1).isfinite()
    difference = torch.where((on & finite)[:, None], difference, 0)
    changed = (difference != 0).any(dim=-1)
    for row in changed.nonzero().flatten().tolist():
        entries = difference[row].nonzero().flatten()
        latent = latents[row, entries]
        coefficient = difference[row, entries]
        if sae.decoder_norm is not None:
            coefficient = coefficient / sae.decoder_norm[latent]
        if scale is not None:
            coefficient = coefficient * scale[row]
        decoder_row = latent if sae.decoder_rows is None else sae.decoder_rows[latent].long()
        decoded = coefficient @ sae.W_dec[decoder_row].to(x.dtype)
        hidden[row] = (hidden[row].to(x.dtype) + decoded).to(hidden.dtype)

    if stats is not None:
        known = on & finite
        stats.seen.add_(on)
        stats.edited.add_(changed)
        stats.nonfinite.add_(on & ~finite)
        stats.maximum.copy_(torch.where(known, maximum.double(), torch.where(on, torch.nan, stats.maximum)))
        stats.maximum_sum.add_(torch.where(known, maximum.double(), 0))
        stats.maximum_known.add_(known)
        stats.latent_edits.index_add_(0, latents[difference != 0], torch.ones_like(latents[difference != 0]))
