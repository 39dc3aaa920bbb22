"""`encode_density` in C++ (`csrc/cpu/encode_density.cpp`)."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.kernels.native import encoder_arguments
from dspa.kernels.operands import refusals_of_the_library
from dspa.sae.weights import SaeWeights


def encode_density(hidden: Tensor, offsets: Tensor, sae: SaeWeights) -> Tensor:
    """See `dspa.kernels.encode_density`."""
    counts = torch.zeros(offsets.shape[0] - 1, sae.d_sae, dtype=torch.int32)
    with refusals_of_the_library():
        torch.ops.dspa.encode_density(hidden, offsets.to(torch.int64).contiguous(), *encoder_arguments(sae), counts)
    return counts
