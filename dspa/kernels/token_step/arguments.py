"""Arguments of a token step in the order of the operations' schemas, shared by the compiled backends."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.kernels.types import EditList, TokenStats

NO_COUNTERS = (None,) * 7


def strength_arguments(alpha: float | Tensor, enabled: Tensor | None, stats: TokenStats | None) -> tuple[object, ...]:
    """alpha as a number and as a tensor, enabled, and the counters."""
    return (
        0.0 if isinstance(alpha, Tensor) else float(alpha),
        alpha.float().contiguous() if isinstance(alpha, Tensor) else None,
        None if enabled is None else enabled.contiguous(),
        *(NO_COUNTERS if stats is None else counter_arguments(stats)),
    )


def counter_arguments(stats: TokenStats) -> tuple[Tensor, ...]:
    """The counters, all of them."""
    return (
        stats.seen,
        stats.edited,
        stats.nonfinite,
        stats.maximum,
        stats.maximum_sum,
        stats.maximum_known,
        stats.latent_edits,
    )


def are_passed_as_they_are(edits: EditList, alpha: float | Tensor) -> bool:
    """Whether an operation gets these lists and strengths themselves, and not copies, which would be out of date when
    the originals are written to."""
    lists = (edits.latents, edits.signs, edits.counts)
    strengths = [alpha] if isinstance(alpha, Tensor) else []
    return all(each.is_contiguous() for each in (*lists, *strengths)) and all(
        each.dtype == torch.float32 for each in strengths
    )
