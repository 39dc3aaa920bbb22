"""`token_step` as a function that autograd follows, for training through a steered model."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels.token_step.equation import edited_activations
from dspa.kernels.types import EditList
from dspa.sae.encode import encode, encoder_input
from dspa.sae.weights import SaeWeights


def differentiable_token_step(
    hidden: Tensor, sae: SaeWeights, edits: EditList, alpha: float | Tensor, enabled: Tensor | None = None
) -> Tensor:
    """The hidden states after the edit of docs/method.md, section 4, as a new tensor.

    The value is that of `token_step`, up to rounding. The gradient flows through the activations, M_t and alpha; the
    selection of latents is constant. Plain torch, `[B, d_sae]` in memory: for training, not for generation.

    Args:
        hidden: `[B, d_model]` floating point.
        sae, edits, alpha, enabled: as for `token_step`.

    Raises:
        InvalidInputError: if the SAE has no decoder.
    """
    if sae.W_dec is None:
        raise InvalidInputError("the SAE has no W_dec, so no edit can be decoded; pass the output SAE")
    latents = edits.latents.long()
    f = encode(hidden, sae)
    selected = f.gather(1, latents)
    difference = edited_activations(selected, edits.signs, alpha, f.amax(dim=-1)) - selected
    difference = torch.where(edits.valid(), difference, 0)
    if sae.decoder_norm is not None:
        difference = difference / sae.decoder_norm[latents]
    _, scale = encoder_input(hidden, sae)
    if scale is not None:
        difference = difference * scale
    rows = latents if sae.decoder_rows is None else sae.decoder_rows[latents].long()
    decoded = torch.einsum("bk,bkd->bd", difference, sae.W_dec[rows].to(difference.dtype))
    changed = (difference != 0).any(dim=-1) & decoded.isfinite().all(dim=-1)
    if enabled is not None:
        changed = changed & enabled
    return torch.where(changed[:, None], (hidden.to(decoded.dtype) + decoded).to(hidden.dtype), hidden)
