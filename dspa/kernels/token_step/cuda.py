"""`token_step` in CUDA C++ (`csrc/cuda/token_step.cuh`): one launch for the batch, with or without the lookup."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dspa.kernels.backends.registry import StepMode
from dspa.kernels.lookup.cuda import lookup
from dspa.kernels.native import encoder_arguments
from dspa.kernels.token_step.cpu import counters_of
from dspa.kernels.token_step.scratch import kept, rows_for
from dspa.kernels.types import CsrMap, EditKind, EditList, TokenStats
from dspa.sae.weights import SaeWeights

DEFAULT_MODE: StepMode = "lazy"  # no pass where none is needed; not yet measured on a GPU

_scratch: WeakKeyDictionary[SaeWeights, dict[tuple[int, int], Tensor]] = WeakKeyDictionary()


def scratch_words(rows: int, capacity: int) -> int:
    """What `csrc/cuda/operations.h` divides up; the operation refuses a number that is none of these, or too small."""
    return 2 + 5 * rows + 2 * rows * capacity


def scratch_of(sae: SaeWeights, batch: int, capacity: int) -> Tensor:
    """What the blocks of a step tell each other, `[words]` int32, zero between steps but for scores that nobody reads
    again, for at least this batch and lists of this length. Two steps of one SAE must not run at the same time."""
    rows = rows_for(batch)
    words = scratch_words(rows, capacity)
    return kept(_scratch, sae, (rows, capacity), lambda: torch.zeros(words, dtype=torch.int32, device=sae.device))


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
    device cannot refuse it. `library` is where the operations are."""
    library.token_step(
        hidden,
        *encoder_arguments(sae),
        sae.W_dec,
        sae.decoder_rows,
        edits.latents.contiguous(),
        edits.signs.contiguous(),
        edits.counts.contiguous(),
        *_strength(alpha, enabled, stats),
        None,  # what follows is the CPU's: leaders, codes and their factors
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
    """See `dspa.kernels.token_step_with_lookup`: one launch, or two if the density or the map is float64. `library` is
    where the operations are."""
    if torch.float64 in (density.dtype, conditional_map.values.dtype):
        edits = lookup(density, conditional_map, k_prompt, k_diff, edit, sign_guard, library=library)
        token_step(hidden, sae, edits, alpha, enabled, stats, mode, library=library)
        return edits
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
        *_strength(alpha, enabled, stats),
        scratch_of(sae, hidden.shape[0], edits.k),
        mode or DEFAULT_MODE,
    )
    return edits


def _strength(alpha: float | Tensor, enabled: Tensor | None, stats: TokenStats | None) -> tuple[object, ...]:
    """alpha, enabled and the counters in the order of the schemas."""
    return (
        0.0 if isinstance(alpha, Tensor) else alpha,
        alpha.float().contiguous() if isinstance(alpha, Tensor) else None,
        None if enabled is None else enabled.contiguous(),
        *((None,) * 7 if stats is None else counters_of(stats)),
    )
