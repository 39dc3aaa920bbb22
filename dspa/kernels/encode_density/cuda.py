"""`encode_density` in CUDA C++ (`csrc/cuda/encode_density.cuh`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dspa.kernels.native import encoder_arguments
from dspa.sae.weights import SaeWeights


def encode_density(hidden: Tensor, offsets: Tensor, sae: SaeWeights, *, library: Any = torch.ops.dspa) -> Tensor:
    """See `dspa.kernels.encode_density`. `library` holds the operations."""
    counts = torch.zeros(offsets.shape[0] - 1, sae.d_sae, dtype=torch.int32, device=hidden.device)
    library.encode_density(hidden, offsets.to(torch.int64).contiguous(), *encoder_arguments(sae), counts)
    return counts
