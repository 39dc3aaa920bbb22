"""Adapters that FSRL's original code saved (github.com/Jazhyc/feature-steering-RL, `SAEAdapter.save_adapter`).

A folder holds `adapter_weights.safetensors` (`adapter_linear.weight`, `adapter_linear.bias`; `soft_threshold` or
`log_threshold`; `steering_magnitude` in versions that learn a gain per latent) and `fsrl_adapter_config.json`
(`base_sae_release`, `base_sae_id`, `activation_type`; older ones have `use_jump_relu` or `use_soft_threshold` instead).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspa.errors import CorruptFileError, InvalidInputError
from dspa.kernels import AdapterWeights
from dspa.methods.fsrl.policy import FsrlPolicy
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.util.files import read_safetensors

CONFIG = "fsrl_adapter_config.json"
WEIGHTS = "adapter_weights.safetensors"


def load_original_adapter(
    folder: str | Path, sae: SparseAutoencoder | None = None, *, layer: int | None = None, clip: bool = True
) -> FsrlPolicy:
    """The policy of an adapter that the original code saved; it edits all positions, the first one included, as there.

    A gain per latent is multiplied into the tensors. Nothing in the files says whether activations are clipped at 0:
    adapters of November 2025 and later (version 3) are, earlier ones (versions 1 and 2) are not.

    Args:
        folder: where the two files are.
        sae: the SAE that the adapter was trained beside; None loads the one the configuration names, by sae-lens.
        layer: the decoder layer, from 0; None takes the SAE's.
        clip: whether `f + v` is kept from falling below 0.

    Raises:
        InvalidInputError: if a file is missing, or the layer is not known.
        CorruptFileError: if a file is truncated, altered, or of another kind.
        MismatchError: if the SAE has another shape.
    """
    path = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (path / name).is_file():
            raise InvalidInputError(f"{folder} is not a folder of FSRL's original code: {name} is missing")
    try:
        config: dict[str, Any] = json.loads((path / CONFIG).read_text())
        activation = _activation(config)
    except (OSError, ValueError, AttributeError) as error:
        raise CorruptFileError(f"{path / CONFIG} cannot be read as an adapter's configuration ({error})") from error
    tensors = read_safetensors(path / WEIGHTS)
    if sae is None:
        sae = SparseAutoencoder.from_sae_lens(_text(config, "base_sae_release"), _text(config, "base_sae_id"))
    layer = sae.metadata.layer if layer is None else layer
    if layer is None:
        raise InvalidInputError("the SAE does not say which layer it belongs to; pass layer=")
    try:
        adapter = _adapter(tensors, activation, clip)
    except (KeyError, InvalidInputError) as error:
        raise CorruptFileError(f"{path / WEIGHTS} does not hold a whole adapter ({error})") from error
    return FsrlPolicy(adapter, sae, layer)


def _activation(config: dict[str, Any]) -> Any:
    """The activation's name; adapters older than the name have flags, or neither and are relu."""
    for flag, name in (("use_jump_relu", "jump_relu"), ("use_soft_threshold", "soft_threshold")):
        if config.get(flag):
            return name
    activation = config.get("activation_type", "relu")
    if activation not in ("soft_threshold", "relu", "jump_relu"):
        raise ValueError(f"activation_type is {activation!r}")
    return activation


def _text(config: dict[str, Any], name: str) -> str:
    if not isinstance(config.get(name), str):
        raise CorruptFileError(f"{CONFIG} names no {name}; pass the SAE")
    return config[name]


def _adapter(tensors: dict[str, Tensor], activation: Any, clip: bool) -> AdapterWeights:
    weight, small = tensors["adapter_linear.weight"], torch.float32
    bias = tensors["adapter_linear.bias"].to(small)
    threshold = torch.zeros_like(bias)
    if activation == "soft_threshold":
        threshold = tensors["soft_threshold"].to(small)
    elif activation == "jump_relu":
        threshold = tensors["log_threshold"].to(small).exp()
    if "steering_magnitude" in tensors:
        gain = tensors["steering_magnitude"].to(small).clamp(0, 1)
        weight = (weight.to(small) * gain[:, None]).to(weight.dtype)
        bias = bias * gain
        threshold = torch.where(gain > 0, threshold * gain, math.inf)
    return AdapterWeights(
        weight=weight.contiguous(),
        bias=bias.contiguous(),
        threshold=threshold.contiguous(),
        activation=activation,
        clip=clip,
    )
