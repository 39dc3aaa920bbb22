"""FSRL adapters for the kernel tests, and the call that poisons what must not be touched."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import equations
import numpy as np
import torch
from kernel_cases import Backend, as_equations, exact, generator, integers, normal, poisoned_view, same_bits
from torch import Tensor

from dspa.kernels import AdapterActivation, AdapterMode, AdapterWeights, SaeWeights, TokenStats, adapter_step


@dataclass(frozen=True)
class Version:
    """What an adapter means, apart from its numbers."""

    activation: AdapterActivation = "soft_threshold"
    clip: bool = True

    def __str__(self) -> str:
        return f"{self.activation}{'-clip' if self.clip else ''}"


MODES: tuple[AdapterMode | None, ...] = (None, "dense", "screened")
VERSIONS = tuple(
    Version(activation, clip) for activation in ("soft_threshold", "relu", "jump_relu") for clip in (True, False)
)


def make_adapter(version: Version, sae: SaeWeights, dtype: torch.dtype, seed: int) -> AdapterWeights:
    """As a trained adapter is: sparse, thresholds of both signs, some latents masked."""
    rng = generator(seed)
    d_sae, d_model = sae.d_sae, sae.d_model
    return _assemble(
        version,
        sae,
        dtype,
        weight=normal(rng, d_sae, d_model) / math.sqrt(d_model),
        bias=normal(rng, d_sae) * 0.1,
        threshold=normal(rng, d_sae) + 1,
        masked=torch.rand(d_sae, generator=rng, device=rng.device) < 0.1,
    )


def make_integer_adapter(version: Version, sae: SaeWeights, dtype: torch.dtype, seed: int) -> AdapterWeights:
    """Small integers: every sum is exact in float32, and `y` meets thresholds exactly."""
    rng = generator(seed)
    d_sae, d_model = sae.d_sae, sae.d_model
    return _assemble(
        version,
        sae,
        dtype,
        weight=integers(rng, -1, 1, d_sae, d_model),
        bias=integers(rng, -2, 2, d_sae),
        threshold=integers(rng, -1, 3, d_sae),
        masked=torch.rand(d_sae, generator=rng, device=rng.device) < 0.1,
    )


def _assemble(
    version: Version, sae: SaeWeights, dtype: torch.dtype, *, masked: Tensor, **numbers: Tensor
) -> AdapterWeights:
    small = torch.float64 if dtype == torch.float64 else torch.float32
    threshold = torch.zeros(sae.d_sae) if version.activation == "relu" else numbers["threshold"].clone()
    threshold[masked] = math.inf
    if sae.decoder_rows is not None:  # what cannot be decoded may not fire
        threshold[sae.decoder_rows < 0] = math.inf
    return AdapterWeights(
        weight=numbers["weight"].to(dtype),
        bias=numbers["bias"].to(small),
        threshold=threshold.to(small),
        activation=version.activation,
        clip=version.clip,
    )


def untrained_adapter(sae: SaeWeights, dtype: torch.dtype, seed: int) -> AdapterWeights:
    """As version 3 starts: weights and thresholds of about 1e-6, so that nearly every latent fires."""
    rng = generator(seed)
    weight = (torch.rand(sae.d_sae, sae.d_model, generator=rng, dtype=torch.float64) * 2 - 1) * 1e-6
    zeros = torch.zeros(sae.d_sae)
    return AdapterWeights(weight=weight.to(dtype), bias=zeros, threshold=zeros + 1e-6)


def as_adapter_equations(adapter: AdapterWeights) -> equations.Adapter:
    """The same adapter in float64."""
    return equations.Adapter(
        exact(adapter.weight), exact(adapter.bias), exact(adapter.threshold), adapter.activation, adapter.clip
    )


def as_whole_equations(sae: SaeWeights) -> equations.Sae:
    """The SAE in float64. Decoder rows that are missing decode nothing that changes: any will do in both
    reconstructions."""
    given = as_equations(sae)
    assert given.W_dec is not None
    return replace(given, W_dec=np.nan_to_num(given.W_dec, nan=0.5))


def adapt(
    rows: Tensor,
    sae: SaeWeights,
    adapter: AdapterWeights,
    *,
    backend: Backend,
    enabled: Tensor | None = None,
    stats: TokenStats | None = None,
    mode: AdapterMode | None = None,
    steering_fraction: float | None = None,
) -> Tensor:
    """adapter_step on a strided copy of the rows. Checks that nothing but the rows was written."""
    view, surroundings = poisoned_view(rows, backend.device)
    before = surroundings.clone()
    adapter_step(
        view,
        sae.to(backend.device),
        adapter.to(backend.device),
        None if enabled is None else enabled.to(backend.device),
        stats,
        mode=mode,
        steering_fraction=steering_fraction,
        backend=backend.name,
    )
    written = view.cpu().clone()
    view.copy_(before[:, 1, 2 : 2 + rows.shape[1]])
    assert same_bits(surroundings, before), "something beside the rows was written"
    return written
