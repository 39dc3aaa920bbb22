"""Adapters and FSRL policies small enough for a test: random weights, seeded; many latents fire, and edits matter."""

from __future__ import annotations

from typing import Any

import torch
from tiny_models import D_MODEL, D_SAE_OUT, OUTPUT_LAYER, SaeKind, tiny_sae

from dspa.kernels import AdapterWeights
from dspa.methods.fsrl.policy import FsrlPolicy


def tiny_adapter(
    activation: Any = "soft_threshold", *, clip: bool = True, dtype: torch.dtype = torch.float64, seed: int = 0
) -> AdapterWeights:
    generator = torch.Generator().manual_seed(100 + seed)
    small = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    threshold = torch.zeros(D_SAE_OUT) if activation == "relu" else 0.5 * random(D_SAE_OUT).abs()
    return AdapterWeights(
        weight=(random(D_SAE_OUT, D_MODEL) / D_MODEL**0.5).to(dtype),
        bias=(0.2 * random(D_SAE_OUT)).to(small),
        threshold=threshold.to(small),
        activation=activation,
        clip=clip,
    )


def tiny_fsrl_policy(
    activation: Any = "soft_threshold",
    *,
    clip: bool = True,
    kind: SaeKind = "jumprelu",
    dtype: torch.dtype = torch.float64,
    layer: int = OUTPUT_LAYER,
    seed: int = 0,
    **options: Any,
) -> FsrlPolicy:
    adapter = tiny_adapter(activation, clip=clip, dtype=dtype, seed=seed)
    return FsrlPolicy(adapter, tiny_sae(kind, layer=layer, dtype=dtype, seed=seed), layer, **options)
