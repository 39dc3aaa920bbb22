"""Arguments of a token step in the order of the operations' schemas, shared by the compiled backends."""

from __future__ import annotations

from torch import Tensor

from dspa.kernels.types import TokenStats


def strength_arguments(alpha: float | Tensor, enabled: Tensor | None, stats: TokenStats | None) -> tuple[object, ...]:
    """alpha as a number and as a tensor, enabled, and the counters."""
    return (
        0.0 if isinstance(alpha, Tensor) else alpha,
        alpha.float().contiguous() if isinstance(alpha, Tensor) else None,
        None if enabled is None else enabled.contiguous(),
        *((None,) * 7 if stats is None else counter_arguments(stats)),
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
