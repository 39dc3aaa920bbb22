"""A copy of a weight matrix in 8 bits per weight, by which the CPU kernels rule rows out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspa.sae.weights import SaeWeights

WIDEST_QUANTIZED_MODEL = 16384  # the 32-bit sums of a wider row could overflow


@dataclass(frozen=True, eq=False)
class QuantizedRows:
    """The codes of a matrix, and what bounds their error (`csrc/cpu/quantized_encoder.h`).

    Attributes:
        values: `[d_sae, d_model rounded up]` int8.
        factors: `[3, d_sae]` float32: each row's scale, the norm of its quantization error, and its scale times the
            norm of its codes.
    """

    values: Tensor
    factors: Tensor


def quantize_rows(weights: Tensor) -> QuantizedRows:
    """`[d_sae, d_model]` weights, bfloat16, float16 or float32, in 8 bits each."""
    d_sae, d_model = weights.shape
    quantized = QuantizedRows(torch.empty(d_sae, -(-d_model // 32) * 32, dtype=torch.int8), torch.empty(3, d_sae))
    torch.ops.dspa.quantize_rows(weights, quantized.values, quantized.factors)
    return quantized


def scores_never_fall(sae: SaeWeights) -> bool:
    """Whether scores of an encoder rise with its products, so that bounds of products bound the scores."""
    factors = [factor for factor in (sae.decoder_norm, sae.magnitude_scale) if factor is not None]
    return all(bool((factor >= 0).all()) for factor in factors)
