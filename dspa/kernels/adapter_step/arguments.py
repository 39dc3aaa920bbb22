"""Arguments of an adapter step in the order of the operations' schemas, shared by the compiled backends."""

from __future__ import annotations

from torch import Tensor

from dspa.kernels.adapter_weights import AdapterWeights
from dspa.kernels.types import TokenStats


def adapter_arguments(adapter: AdapterWeights) -> tuple[Tensor, Tensor, Tensor, str, bool]:
    """The adapter's tensors and rules."""
    return (adapter.weight, adapter.bias, adapter.threshold, adapter.activation, adapter.clip)


def row_arguments(
    enabled: Tensor | None, stats: TokenStats | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Which rows are enabled, and the counters that a step adds to."""
    on = None if enabled is None else enabled.contiguous()
    if stats is None:
        return (on, None, None, None, None)
    return (on, stats.seen, stats.edited, stats.nonfinite, stats.latent_edits)
