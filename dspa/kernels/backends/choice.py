"""Which GPU backend "auto" tries first: the fastest one for the nearest SAE that was measured.

The batch is not considered, so that a row's bits do not depend on the rest of it.
"""

from __future__ import annotations

import math
from functools import cache

import torch

from dspa.kernels.backends.measured import FASTEST
from dspa.kernels.gpu_architecture import architecture
from dspa.sae.weights import SaeWeights


def measured_fastest(operation: str, device: torch.device, sae: SaeWeights | None) -> str | None:
    """The name of a backend, or None where nothing was measured: for the lookup, or on this kind of GPU."""
    if not FASTEST or sae is None or device.type != "cuda":
        return None
    return _nearest(operation, architecture(device), sae.d_model, sae.d_sae, sae.activation == "topk")


@cache
def _nearest(operation: str, architecture_name: str, d_model: int, d_sae: int, topk: bool) -> str | None:
    measured = FASTEST.get(architecture_name, {}).get(operation, {})

    def distance(key: tuple[int, int, bool]) -> tuple[bool, float]:
        return key[2] != topk, abs(math.log(key[0] / d_model)) + abs(math.log(key[1] / d_sae))

    return measured[min(measured, key=distance)] if measured else None
