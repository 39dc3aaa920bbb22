"""An SAE as part of a policy folder: its semantics in the configuration, its tensors in the safetensors file."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from dspa.sae.autoencoder import SparseAutoencoder
from dspa.sae.metadata import SaeMetadata

SEMANTICS = ("activation", "k", "subtract_b_dec", "normalization")  # beside the tensors


def sae_config(sae: SparseAutoencoder) -> dict[str, Any]:
    return {**{name: getattr(sae, name) for name in SEMANTICS}, "metadata": asdict(sae.metadata)}


def sae_from_config(config: dict[str, Any], tensors: dict[str, Tensor]) -> SparseAutoencoder:
    semantics: dict[str, Any] = {name: config[name] for name in SEMANTICS}
    arguments: dict[str, Any] = {**semantics, "metadata": SaeMetadata(**config["metadata"]), **tensors}
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
