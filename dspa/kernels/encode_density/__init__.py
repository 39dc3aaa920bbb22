"""Counting, per segment, the tokens on which each latent is active."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels.registry import operations_for
from dspa.kernels.sae_weights import SaeWeights


@torch.no_grad()
def encode_density(hidden: Tensor, offsets: Tensor, sae: SaeWeights, *, backend: str = "auto") -> Tensor:
    """How many tokens of each segment activate each latent: `T_x * rho_i(x)` of method.md, section 2.

    Tokens whose encoder input holds NaN or Inf activate nothing. The `[N, d_sae]` activations never exist in memory.

    Args:
        hidden: `[N, d_model]` residual-stream vectors, bfloat16, float16, float32 or float64; rows may be strided.
        offsets: `[S + 1]` integers, never falling; segment s is rows `offsets[s]` to `offsets[s + 1]`.
        sae: the SAE that encodes.
        backend: a backend's name, or "auto".

    Returns:
        `[S, d_sae]` int32.

    Raises:
        InvalidInputError: if a shape does not fit.
        BackendUnavailableError: if a backend asked for by name cannot serve the call.
    """
    if hidden.ndim != 2 or hidden.shape[1] != sae.d_model:
        raise InvalidInputError(f"hidden is {tuple(hidden.shape)}; expected [N, d_model = {sae.d_model}]")
    if offsets.ndim != 1 or offsets.shape[0] < 1 or offsets.is_floating_point():
        raise InvalidInputError(f"offsets are {tuple(offsets.shape)} {offsets.dtype}; expected [S + 1] integers")
    return operations_for(backend, "encode_density", (hidden,), sae).encode_density(hidden, offsets, sae)
