"""Counting, per segment, the tokens on which each latent is active."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels.backends.registry import operations_for
from dspa.kernels.operands import can_be_read, check_is_tensor, check_same_device
from dspa.sae.weights import STORAGE_DTYPES, SaeWeights


@torch.no_grad()
def encode_density(hidden: Tensor, offsets: Tensor, sae: SaeWeights, *, backend: str = "auto") -> Tensor:
    """How many tokens of each segment activate each latent: `T_x * rho_i(x)` of docs/method.md, section 2.

    Tokens whose encoder input holds NaN or Inf activate nothing. The `[N, d_sae]` activations never exist in memory.
    In the reference backend, whose sums are a matrix product's, a latent whose pre-activation meets its threshold in
    the last bit may be counted differently in segments of other lengths; the other backends fix the order of sums.

    Args:
        hidden: `[N, d_model]` residual-stream vectors, bfloat16, float16, float32 or float64; rows may be strided.
        offsets: `[S + 1]` integers, never falling; segment s is rows `offsets[s]` to `offsets[s + 1]`.
        sae: the SAE that encodes.
        backend: a backend's name, or "auto".

    Returns:
        `[S, d_sae]` int32.

    Raises:
        InvalidInputError: if a shape does not fit.
        BackendUnavailableError: if a backend named explicitly cannot serve the call.
    """
    check_is_tensor("hidden", hidden)
    check_is_tensor("offsets", offsets)
    check_same_device(hidden.device, sae=sae.W_enc)
    if offsets.device.type != "cpu" or hidden.device.type == "meta":
        check_same_device(hidden.device, offsets=offsets)
    if hidden.ndim != 2 or hidden.shape[1] != sae.d_model or hidden.dtype not in STORAGE_DTYPES:
        raise InvalidInputError(
            f"hidden is {tuple(hidden.shape)} {hidden.dtype}; expected [N, d_model = {sae.d_model}] floating point"
        )
    if offsets.ndim != 1 or offsets.shape[0] < 1 or offsets.dtype not in (torch.int32, torch.int64):
        raise InvalidInputError(f"offsets are {tuple(offsets.shape)} {offsets.dtype}; expected [S + 1] int32 or int64")
    # On a device, looking at the values would wait for it; in a compiled graph there are none yet.
    if can_be_read(offsets):
        # The bound before the differences, which could wrap around.
        bounded = bool(((offsets >= 0) & (offsets <= hidden.shape[0])).all())
        if not bounded or bool((offsets.diff() < 0).any()):
            raise InvalidInputError(f"offsets do not rise within 0 to {hidden.shape[0]}, the rows of hidden")
    return operations_for(backend, "encode_density", (hidden,), sae).encode_density(hidden, offsets, sae)
