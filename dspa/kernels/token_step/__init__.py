"""Editing one token per row: encode, select, and write the decoded difference back."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels.backends.interface import StepMode
from dspa.kernels.backends.registry import operations_for, step_with_lookup_for
from dspa.kernels.lookup import check_density, check_lookup_options, lookup
from dspa.kernels.operands import can_be_read, check_is_tensor, check_same_device
from dspa.kernels.token_step.cpu import StepWork, work_of
from dspa.kernels.types import CsrMap, EditKind, EditList, TokenStats
from dspa.sae.weights import STORAGE_DTYPES, SaeWeights
from dspa.util.scalars import LARGEST_FLOAT32, check_number, check_switch

__all__ = ["StepWork", "token_step", "token_step_with_lookup", "work_of"]


@torch.no_grad()
def token_step(
    hidden: Tensor,
    sae: SaeWeights,
    edits: EditList,
    alpha: float | Tensor,
    enabled: Tensor | None = None,
    stats: TokenStats | None = None,
    *,
    mode: StepMode | None = None,
    backend: str = "auto",
) -> None:
    """Edits each row of `hidden` in place by its own list: docs/method.md, section 4.

    A listed latent is edited only where it is active: augmented by `alpha * M_t`, or lowered by `alpha * M_t` but not
    below 0, with `M_t` the largest activation of all latents before edits. What is written back is the decoded
    difference, so the SAE's reconstruction error stays as it was. A row that nothing changes keeps its bits.

    A row is left alone and counted as nonfinite if NaN or Inf occurs in its encoder input, in the pre-activation of
    a listed latent, or in `M_t` where the edit depends on its value. Another latent whose pre-activation is NaN is
    not active.

    Args:
        hidden: `[B, d_model]`, bfloat16, float16, float32 or float64, edited in place; rows may be strided.
        sae: the output SAE, with `W_dec` rows for every listed latent.
        edits: one list per row; each latent at most once in a list, all of them below `d_sae` (not checked on a GPU).
        alpha: edit strength, not negative; a number, or `[B]`.
        enabled: `[B]` bool on the device of `hidden`, False for rows to leave alone; None for all.
        stats: counters to add to.
        mode: how `M_t` is found: "dense" (one pass over `W_enc`), "lazy" (none where none is needed), "screened"
            (rows that cannot matter are skipped). The result is the same. None is the backend's fastest.
        backend: a backend's name, or "auto".

    Raises:
        InvalidInputError: if a shape does not fit or alpha is negative.
        BackendUnavailableError: if a backend named explicitly cannot serve the call.
    """
    _check(hidden, sae, edits.batch, alpha, enabled, stats, mode)
    check_same_device(hidden.device, edits=edits.latents)
    edits.check(sae)
    operations = operations_for(backend, "token_step", (hidden,), sae)
    operations.token_step(hidden, sae, edits, alpha, enabled, stats, mode)


@torch.no_grad()
def token_step_with_lookup(
    hidden: Tensor,
    sae: SaeWeights,
    density: Tensor,
    conditional_map: CsrMap,
    alpha: float | Tensor,
    enabled: Tensor | None = None,
    stats: TokenStats | None = None,
    *,
    k_prompt: int,
    k_diff: int,
    edit: EditKind = "ablate",
    sign_guard: bool = False,
    mode: StepMode | None = None,
    backend: str = "auto",
) -> EditList:
    """`lookup` and `token_step` in one call, for prompt features that change with every token. The GPU backends do both
    in one launch.

    Args and errors as for the two. Returns the lists that were looked up.
    """
    if conditional_map.d_sae_out != sae.d_sae:
        raise InvalidInputError(f"the map has {conditional_map.d_sae_out} columns; expected d_sae = {sae.d_sae}")
    check_density(density, conditional_map)
    check_lookup_options(conditional_map, k_prompt, k_diff, edit)
    check_switch("sign_guard", sign_guard)
    check_same_device(density.device, hidden=hidden)
    _check(hidden, sae, density.shape[0], alpha, enabled, stats, mode)
    combined = step_with_lookup_for(backend, hidden, density, conditional_map.values, sae)
    if combined is not None:
        return combined(
            hidden, sae, density, conditional_map, k_prompt, k_diff, edit, sign_guard, alpha, enabled, stats, mode
        )
    edits = lookup(density, conditional_map, k_prompt, k_diff, edit, sign_guard=sign_guard, backend=backend)
    token_step(hidden, sae, edits, alpha, enabled, stats, mode=mode, backend=backend)
    return edits


def _check(
    hidden: Tensor,
    sae: SaeWeights,
    lists: int,
    alpha: float | Tensor,
    enabled: Tensor | None,
    stats: TokenStats | None,
    mode: str | None,
) -> None:
    check_is_tensor("hidden", hidden)
    if hidden.ndim != 2 or hidden.shape[1] != sae.d_model or hidden.dtype not in STORAGE_DTYPES:
        raise InvalidInputError(
            f"hidden is {tuple(hidden.shape)} {hidden.dtype}; expected [B, d_model = {sae.d_model}] floating point"
        )
    batch = hidden.shape[0]
    if sae.W_dec is None:
        raise InvalidInputError("the SAE has no W_dec, so no edit can be decoded; pass the output SAE")
    if lists != batch:
        raise InvalidInputError(f"edit lists are for {lists} rows, hidden has {batch}; expected as many")
    if isinstance(alpha, Tensor):
        if alpha.shape != (batch,) or not alpha.is_floating_point():
            raise InvalidInputError(
                f"alpha is {tuple(alpha.shape)} {alpha.dtype}; expected a number or [B = {batch}] floating point"
            )
        if batch and can_be_read(alpha) and not 0 <= float(alpha.min()) <= float(alpha.max()) <= LARGEST_FLOAT32:
            raise InvalidInputError(f"alpha holds {alpha.tolist()[:8]}; expected finite numbers >= 0")
    else:
        check_number("alpha", alpha, 0, LARGEST_FLOAT32, " (the direction is the edit's sign)")
    if enabled is not None and (enabled.shape != (batch,) or enabled.dtype != torch.bool):
        raise InvalidInputError(f"enabled is {tuple(enabled.shape)} {enabled.dtype}; expected [B = {batch}] bool")
    if stats is not None and (stats.seen.shape != (batch,) or stats.latent_edits.shape != (sae.d_sae,)):
        raise InvalidInputError(
            f"stats are for {stats.seen.shape[0]} rows and {stats.latent_edits.shape[0]} latents; "
            f"expected {batch} and {sae.d_sae}"
        )
    check_same_device(
        hidden.device,
        sae=sae.W_enc,
        alpha=alpha if isinstance(alpha, Tensor) else None,
        enabled=enabled,
        stats=None if stats is None else stats.seen,
    )
    if mode is not None and mode not in get_args(StepMode):
        raise InvalidInputError(f"mode is {mode!r}; expected one of {', '.join(get_args(StepMode))}")
