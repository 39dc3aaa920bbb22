"""`adapter_step` in CUDA C++ (`csrc/cuda/adapter_step.cuh`): three launches for the batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspa.kernels.adapter_step.arguments import adapter_arguments, row_arguments
from dspa.kernels.adapter_weights import AdapterWeights
from dspa.kernels.backends.interface import AdapterMode
from dspa.kernels.native import encoder_arguments
from dspa.kernels.types import TokenStats
from dspa.sae.weights import SaeWeights


def adapter_step(
    hidden: Tensor,
    sae: SaeWeights,
    adapter: AdapterWeights,
    enabled: Tensor | None,
    stats: TokenStats | None,
    steering_fraction: float | None,
    mode: AdapterMode | None,
    *,
    library: Any = torch.ops.dspa,
) -> None:
    """See `dspa.kernels.adapter_step`. "screened" is served as "dense". `library` holds the operations."""
    assert steering_fraction is None  # the backend's entry in the table refuses it
    library.adapter_step(
        hidden,
        *encoder_arguments(sae),
        sae.W_dec,
        sae.decoder_rows,
        *adapter_arguments(adapter),
        *row_arguments(enabled, stats),
        None,  # for the CPU only: codes, code_factors and work
        None,
        None,
    )
