"""The edit of one token per row, written to be read."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.kernels.encode import activations, encoder_input
from dspa.kernels.operands import EditList, TokenStats
from dspa.kernels.registry import StepMode
from dspa.kernels.sae_weights import SaeWeights


def token_step(
    hidden: Tensor,
    sae: SaeWeights,
    edits: EditList,
    alpha: float | Tensor,
    enabled: Tensor | None,
    stats: TokenStats | None,
    mode: StepMode | None,
) -> None:
    """See `dspa.kernels.token_step`. All modes give one result, so the reference has only this one."""
    assert sae.W_dec is not None  # the dispatcher checks it
    x, scale = encoder_input(hidden, sae)
    finite = x.isfinite().all(dim=-1)
    on = torch.ones_like(finite) if enabled is None else enabled.bool()

    # One matrix-vector product per row, each from a freshly aligned vector: the bits of a row do not depend on the
    # rest of the batch, as those of a matrix product would.
    W_enc = sae.W_enc.to(x.dtype)
    f = activations(torch.stack([W_enc.mv(row.clone()) for row in x]), sae)
    maximum = f.amax(dim=-1)

    latents = edits.latents.long()
    selected = f.gather(1, latents)
    step = torch.as_tensor(alpha, dtype=x.dtype, device=x.device) * maximum
    moved = selected + edits.signs * step[:, None]
    moved = torch.where(edits.signs < 0, moved.clamp(min=0), moved)
    applies = edits.valid() & (selected > 0) & (on & finite)[:, None]
    difference = torch.where(applies, moved - selected, 0)

    coefficient = difference if sae.decoder_norm is None else difference / sae.decoder_norm[latents]
    coefficient = coefficient if scale is None else coefficient * scale
    rows = latents if sae.decoder_rows is None else sae.decoder_rows[latents].long()
    changed = (difference != 0).any(dim=-1)
    for row in changed.nonzero().flatten().tolist():
        decoded = coefficient[row] @ sae.W_dec[rows[row]].to(x.dtype)
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
