"""`token_step` in CUDA C++ (`csrc/cuda/token_step.cuh`): one launch for the batch, with or without the lookup."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dspa.kernels.backends.interface import BoundStep, StepMode
from dspa.kernels.native import encoder_arguments
from dspa.kernels.token_step.arguments import (
    NO_COUNTERS,
    are_passed_as_they_are,
    counter_arguments,
    strength_arguments,
)
from dspa.kernels.token_step.scratch import Key, kept, rows_for
from dspa.kernels.types import CsrMap, EditKind, EditList, TokenStats
from dspa.sae.weights import SaeWeights

DEFAULT_MODE: StepMode = "lazy"  # no pass where none is needed

_scratch: WeakKeyDictionary[SaeWeights, dict[Key, Tensor]] = WeakKeyDictionary()


def scratch_words(rows: int, capacity: int) -> int:
    """The size of the scratch that `csrc/cuda/operations.h` lays out; the operation refuses any other size."""
    return 5 * rows + 2 * rows * capacity


def scratch_of(sae: SaeWeights, batch: int, capacity: int) -> Tensor:
    """The scratch of the blocks of a step on the current stream, `[words]` int32, for at least this batch and lists of
    this length. Zero between steps, except for scores that are not read again. Two steps that use it must not run at
    the same time."""
    rows = rows_for(batch)
    words = scratch_words(rows, capacity)
    return kept(_scratch, sae, rows, capacity, lambda: torch.zeros(words, dtype=torch.int32, device=sae.device))


def token_step(
    hidden: Tensor,
    sae: SaeWeights,
    edits: EditList,
    alpha: float | Tensor,
    enabled: Tensor | None,
    stats: TokenStats | None,
    mode: StepMode | None,
    *,
    library: Any = torch.ops.dspa,
) -> None:
    """See `dspa.kernels.token_step`. An entry of a list that is out of bounds, or has no decoder row, is ignored: the
    device cannot raise an error. `library` holds the operations."""
    library.token_step(
        hidden,
        *encoder_arguments(sae),
        sae.W_dec,
        sae.decoder_rows,
        edits.latents.contiguous(),
        edits.signs.contiguous(),
        edits.counts.contiguous(),
        *strength_arguments(alpha, enabled, stats),
        None,  # for the CPU only: recent_argmax, codes and code_factors
        None,
        None,
        scratch_of(sae, hidden.shape[0], edits.k),
        mode or DEFAULT_MODE,
    )


def token_step_with_lookup(
    hidden: Tensor,
    sae: SaeWeights,
    density: Tensor,
    conditional_map: CsrMap,
    k_prompt: int,
    k_diff: int,
    edit: EditKind,
    sign_guard: bool,
    alpha: float | Tensor,
    enabled: Tensor | None,
    stats: TokenStats | None,
    mode: StepMode | None,
    *,
    library: Any = torch.ops.dspa,
) -> EditList:
    """See `dspa.kernels.token_step_with_lookup`: one launch. The density and the map must not be float64. `library`
    holds the operations."""
    edits = EditList.empty(hidden.shape[0], 2 * k_diff if edit == "both" else k_diff, hidden.device)
    library.token_step_with_lookup(
        hidden,
        *encoder_arguments(sae),
        sae.W_dec,
        sae.decoder_rows,
        density.float().contiguous(),
        conditional_map.row_offsets,
        conditional_map.columns,
        conditional_map.values,
        k_prompt,
        k_diff,
        edit,
        sign_guard,
        edits.latents,
        edits.signs,
        edits.counts,
        *strength_arguments(alpha, enabled, stats),
        scratch_of(sae, hidden.shape[0], edits.k),
        mode or DEFAULT_MODE,
    )
    return edits


def bind_step(
    hidden: Tensor,
    sae: SaeWeights,
    edits: EditList,
    alpha: float | Tensor,
    mode: StepMode | None,
    *,
    library: Any = torch.ops.dspa,
) -> BoundStep | None:
    """See `dspa.kernels.backends.interface.BindStep`. The library looks at all tensors at every call, so what is laid
    out always holds."""
    if not are_passed_as_they_are(edits, alpha):
        return None
    batch, capacity = hidden.shape[0], edits.k
    lists = (edits.latents, edits.signs, edits.counts)
    before = (*encoder_arguments(sae), sae.W_dec, sae.decoder_rows, *lists, *strength_arguments(alpha, None, None)[:2])
    only_on_a_cpu = (None, None, None)
    mode = mode or DEFAULT_MODE
    operation = library.token_step.default

    def bound(hidden: Tensor, enabled: Tensor | None, stats: TokenStats | None) -> bool:
        on = None if enabled is None else enabled.contiguous()
        counters = NO_COUNTERS if stats is None else counter_arguments(stats)
        scratch = scratch_of(sae, batch, capacity)
        operation(hidden, *before, on, *counters, *only_on_a_cpu, scratch, mode)
        return True

    return bound
