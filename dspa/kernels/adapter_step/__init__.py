"""FSRL's edit of one token per row: the adapter's steering vector in latent space, decoded and added."""

from __future__ import annotations

import math
from typing import get_args

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels.adapter_weights import AdapterWeights
from dspa.kernels.backends.interface import AdapterMode
from dspa.kernels.backends.registry import operations_for
from dspa.kernels.operands import check_is_tensor, check_same_device
from dspa.kernels.types import TokenStats
from dspa.sae.weights import STORAGE_DTYPES, SaeWeights

__all__ = ["adapter_step"]


@torch.no_grad()
def adapter_step(
    hidden: Tensor,
    sae: SaeWeights,
    adapter: AdapterWeights,
    enabled: Tensor | None = None,
    stats: TokenStats | None = None,
    *,
    steering_fraction: float | None = None,
    mode: AdapterMode | None = None,
    backend: str = "auto",
) -> None:
    """Adds the adapter's decoded steering vector to each row of `hidden`, in place: docs/method.md, section 6.

    This is the delta form: `h + W_dec^T delta`, `delta = max(v, -f)` with the clip and `v` without it. The SAE's bias
    and reconstruction error cancel, and `f` is only needed where `v < 0`. A row whose `delta` is 0 keeps its bits.

    A row is left alone and counted as nonfinite if NaN or Inf occurs in its encoder input, in `y` of a latent that is
    not masked, or, with the clip, in the product or the activation of a latent whose `v` is negative (with a topk SAE:
    of any latent, where a `v` is negative).

    Args:
        hidden: `[B, d_model]`, bfloat16, float16, float32 or float64, edited in place; rows may be strided.
        sae: the SAE that the adapter was trained beside, with `W_dec` rows for every latent that is not masked.
        adapter: the adapter.
        enabled: `[B]` bool on the device of `hidden`, False for rows to leave alone; None for all.
        stats: counters to add to; there is no M_t, so `maximum`, `maximum_sum` and `maximum_known` stay as they are.
        steering_fraction: keeps of each row the `int(d_sae * steering_fraction)` entries of `v` largest in size, at
            least one, ties to the lower latent; None keeps all. In (0, 1].
        mode: how `y` is found: "dense" (one pass over the adapter's weight) or "screened" (latents that cannot fire
            are ruled out by 8-bit codes, on the CPU). The result is the same. None is the backend's fastest.
        backend: a backend's name, or "auto".

    Raises:
        InvalidInputError: if a shape does not fit, or, on the CPU, a latent that is not masked has no row in `W_dec`
            (on other devices such a latent is ignored: they cannot raise an error).
        BackendUnavailableError: if a backend named explicitly cannot serve the call. A topk SAE with the clip, and
            `steering_fraction`, rank all latents; only the reference does that.
    """
    _check(hidden, sae, adapter, enabled, stats, steering_fraction, mode)
    ranks_all = steering_fraction is not None or (adapter.clip and sae.activation == "topk")
    operations = operations_for(backend, "adapter_step", (hidden, adapter.weight), sae, ranks_all=ranks_all)
    assert operations.adapter_step is not None  # a backend without it does not serve the call
    operations.adapter_step(hidden, sae, adapter, enabled, stats, steering_fraction, mode)


def _check(
    hidden: Tensor,
    sae: SaeWeights,
    adapter: AdapterWeights,
    enabled: Tensor | None,
    stats: TokenStats | None,
    steering_fraction: float | None,
    mode: str | None,
) -> None:
    check_is_tensor("hidden", hidden)
    if hidden.ndim != 2 or hidden.shape[1] != sae.d_model or hidden.dtype not in STORAGE_DTYPES:
        raise InvalidInputError(
            f"hidden is {tuple(hidden.shape)} {hidden.dtype}; expected [B, d_model = {sae.d_model}] floating point"
        )
    batch = hidden.shape[0]
    if sae.W_dec is None:
        raise InvalidInputError("the SAE has no W_dec, so no edit can be decoded; pass an SAE with its decoder")
    if adapter.weight.shape != sae.W_enc.shape:
        raise InvalidInputError(
            f"the adapter's weight is {tuple(adapter.weight.shape)}; "
            f"expected [d_sae, d_model] of the SAE, {tuple(sae.W_enc.shape)}"
        )
    check_same_device(
        hidden.device,
        sae=sae.W_enc,
        adapter=adapter.weight,
        enabled=enabled,
        stats=None if stats is None else stats.seen,
    )
    if sae.decoder_rows is not None and sae.device.type == "cpu" and not torch.compiler.is_compiling():
        missing = (sae.decoder_rows < 0) & (adapter.threshold < math.inf)
        if bool(missing.any()):
            raise InvalidInputError(
                f"latent {int(missing.nonzero()[0])} may fire, but has no row in W_dec; mask it by a threshold of Inf"
            )
    if enabled is not None and (enabled.shape != (batch,) or enabled.dtype != torch.bool):
        raise InvalidInputError(f"enabled is {tuple(enabled.shape)} {enabled.dtype}; expected [B = {batch}] bool")
    if stats is not None and (stats.seen.shape != (batch,) or stats.latent_edits.shape != (sae.d_sae,)):
        raise InvalidInputError(
            f"stats are for {stats.seen.shape[0]} rows and {stats.latent_edits.shape[0]} latents; "
            f"expected {batch} and {sae.d_sae}"
        )
    if steering_fraction is not None and not (type(steering_fraction) in (int, float) and 0 < steering_fraction <= 1):
        raise InvalidInputError(f"steering_fraction is {steering_fraction!r}; expected a number in (0, 1]")
    if mode is not None and mode not in get_args(AdapterMode):
        raise InvalidInputError(f"mode is {mode!r}; expected one of {', '.join(get_args(AdapterMode))}")
