"""An SAE as part of a policy folder: its semantics in the configuration, its tensors in the safetensors file."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from torch import Tensor

from dspa.sae.autoencoder import SparseAutoencoder
from dspa.sae.metadata import SaeMetadata
from dspa.sae.weights import Activation, InputNormalization


@dataclass(frozen=True)
class SaeConfig:
    """What a policy's `config.json` says of an SAE: its fields beside the tensors."""

    activation: Activation
    k: int | None
    subtract_b_dec: bool
    normalization: InputNormalization
    metadata: SaeMetadata


def sae_config(sae: SparseAutoencoder) -> dict[str, Any]:
    return asdict(SaeConfig(**{field.name: getattr(sae, field.name) for field in fields(SaeConfig)}))


def sae_from_config(config: SaeConfig, tensors: dict[str, Tensor]) -> SparseAutoencoder:
    """The SAE, its tensors checked; raises ValueError, TypeError or UnsupportedSaeError if they do not fit."""
    arguments: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(config)}
    if surplus := sorted(arguments.keys() & tensors.keys()):
        raise ValueError(f"{surplus[0]} is a tensor")
    arguments |= tensors
    sae = SparseAutoencoder(**arguments)
    if not sae.d_sae:
        raise ValueError("an SAE has no latents")
    for name, tensor in sae.tensors().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"SAE tensor {name} holds NaN or Inf")
    if sae.decoder_rows is not None and sae.W_dec is not None:
        lowest, highest = int(sae.decoder_rows.min()), int(sae.decoder_rows.max())
        if lowest < -1 or highest >= sae.W_dec.shape[0]:
            raise ValueError(f"decoder rows run from {lowest} to {highest}; there are {sae.W_dec.shape[0]}")
    return sae
