"""`lookup` in one Triton launch: one program for each prompt, with sums in the order of the reference."""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspa.kernels.lookup.triton_row import lookup_row, map_arguments, new_lists, prompt_of
from dspa.kernels.triton_common.launch import launch
from dspa.kernels.triton_common.table import LOOKUP
from dspa.kernels.types import CsrMap, EditKind, EditList


@triton.jit
def lookup_kernel(prompt, latents, signs, counts, capacity, EDIT: tl.constexpr, GUARD: tl.constexpr):
    """One prompt."""
    lookup_row(tl.program_id(0), prompt, latents, signs, counts, capacity, EDIT, GUARD)


def run(
    density: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    values: Tensor,
    d_sae_out: int,
    k_prompt: int,
    k_diff: int,
    edit: str,
    sign_guard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launches the kernel: the operation as a function of nothing but tensors, numbers and names."""
    latents, signs, counts = new_lists(density.shape[0], k_diff, edit, density.device)
    if density.shape[0] > 0:
        arguments: dict[str, object] = {
            "prompt": prompt_of(density, row_offsets, columns, values, d_sae_out, k_prompt, k_diff),
            "latents": latents,
            "signs": signs,
            "counts": counts,
            "capacity": latents.shape[1],
            "EDIT": edit,
            "GUARD": sign_guard,
        }
        launch(lookup_kernel, density.shape[0], arguments, LOOKUP, density.device)
    return latents, signs, counts


operation = torch.library.custom_op("dspa_triton::lookup", run, mutates_args=())


@operation.register_fake
def _(
    density: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    values: Tensor,
    d_sae_out: int,
    k_prompt: int,
    k_diff: int,
    edit: str,
    sign_guard: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return new_lists(density.shape[0], k_diff, edit, density.device)


def lookup(
    density: Tensor, conditional_map: CsrMap, k_prompt: int, k_diff: int, edit: EditKind, sign_guard: bool
) -> EditList:
    """See `dspa.kernels.lookup`."""
    step: Callable[..., tuple[Tensor, Tensor, Tensor]] = operation if torch.compiler.is_compiling() else run
    return EditList(*step(density, *map_arguments(conditional_map), k_prompt, k_diff, edit, sign_guard))
