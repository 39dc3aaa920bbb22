"""Choosing, for each prompt, which output latents to edit."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels.backends.registry import operations_for
from dspa.kernels.lookup.reference import top
from dspa.kernels.operands import check_is_tensor, check_same_device
from dspa.kernels.types import CsrMap, EditKind, EditList
from dspa.util.scalars import check_integer, check_switch

__all__ = ["check_density", "check_lookup_options", "lookup", "top"]


@torch.no_grad()
def lookup(
    density: Tensor,
    conditional_map: CsrMap,
    k_prompt: int,
    k_diff: int,
    edit: EditKind = "ablate",
    *,
    sign_guard: bool = False,
    backend: str = "auto",
) -> EditList:
    """`S_augment` and `S_ablate` of docs/method.md, section 3, for each prompt of a batch.

    The k_prompt densest prompt latents pick rows of the map; their sum scores the output latents; the k_diff highest
    are augmented, the k_diff lowest ablated. Ties go to the lower index. The rows are added in ascending order of
    their index, so that a score depends on the set of them alone. With `edit="both"`, a latent in both sets (both
    reach into the zeros of a sparse score) is in neither: the two edits would cancel.

    Args:
        density: `[B, d_sae_in]` floating point, activation density over each prompt's tokens.
        conditional_map: the map A.
        k_prompt: number of prompt latents, 0 to `d_sae_in`.
        k_diff: number of output latents in each direction, 0 to `d_sae_out`.
        edit: "ablate", "augment" or "both".
        sign_guard: drop augmented latents whose score is not positive and ablated ones whose score is not negative.
        backend: a backend's name, or "auto".

    Returns:
        Lists with room for k_diff entries a row, 2 k_diff for "both".

    Raises:
        InvalidInputError: if a shape, k_prompt, k_diff or edit is out of range.
        CorruptFileError: if the map's offsets, columns or values are out of bounds.
        BackendUnavailableError: if a backend named explicitly cannot serve the call.
    """
    check_density(density, conditional_map)
    check_lookup_options(conditional_map, k_prompt, k_diff, edit)
    check_switch("sign_guard", sign_guard)
    operations = operations_for(backend, "lookup", (density, conditional_map.values))
    return operations.lookup(density, conditional_map, k_prompt, k_diff, edit, sign_guard)


def check_density(density: Tensor, conditional_map: CsrMap) -> None:
    """Raises InvalidInputError if prompt features do not fit the map's rows, and CorruptFileError if the map is out of
    bounds."""
    check_is_tensor("density", density)
    if not torch.compiler.is_compiling():  # a compiled graph has no values to look at yet
        conditional_map.check()
    check_same_device(density.device, conditional_map=conditional_map.values)
    if not density.is_floating_point():
        raise InvalidInputError(f"density is {density.dtype}; expected floating point")
    if density.ndim != 2 or density.shape[1] != conditional_map.d_sae_in:
        raise InvalidInputError(
            f"density is {tuple(density.shape)}; expected [B, d_sae_in = {conditional_map.d_sae_in}]"
        )


def check_lookup_options(conditional_map: CsrMap, k_prompt: int, k_diff: int, edit: str) -> None:
    """Raises InvalidInputError if the options cannot be used with a map of this size."""
    check_integer("k_prompt", k_prompt, 0, conditional_map.d_sae_in, "d_sae_in = ")
    check_integer("k_diff", k_diff, 0, conditional_map.d_sae_out, "d_sae_out = ")
    if edit not in get_args(EditKind):
        raise InvalidInputError(f"edit is {edit!r}; expected one of {', '.join(get_args(EditKind))}")
