"""The tensors of an FSRL adapter in the layout that the kernels read (docs/method.md, section 6)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels.operands import check_same_device
from dspa.sae.weights import STORAGE_DTYPES

AdapterActivation = Literal["soft_threshold", "relu", "jump_relu"]


@dataclass(frozen=True, eq=False, kw_only=True)
class AdapterWeights:
    """An FSRL adapter beside an SAE with as many latents. One latent is one contiguous row of `weight`.

    Of the SAE's input `h'` and activations `f` (docs/method.md, sections 1 and 6):

        y = weight h' + bias
        soft_threshold:   v = sign(y) * relu(|y| - max(threshold, 0))
        relu, jump_relu:  v = y where y > max(threshold, 0), else 0
        delta = max(v, -f) if clip else v

    Attributes:
        weight: `[d_sae, d_model]`, bfloat16, float16, float32 or float64, row-contiguous.
        bias: `[d_sae]`, float32 (float64 if `weight` is).
        threshold: `[d_sae]`, dtype of `bias`, not NaN; Inf masks a latent, whose `v` is then 0; 0 for relu otherwise.
        activation: which rule of the table above.
        clip: whether an activation is kept from falling below 0 (version 3 of the method; versions 1 and 2 do not).
    """

    weight: Tensor
    bias: Tensor
    threshold: Tensor
    activation: AdapterActivation = "soft_threshold"
    clip: bool = True

    def __post_init__(self) -> None:
        check_same_device(self.weight.device, bias=self.bias, threshold=self.threshold)
        if self.activation not in get_args(AdapterActivation):
            raise InvalidInputError(
                f"adapter activation {self.activation!r} is not known; "
                f"expected one of {', '.join(get_args(AdapterActivation))}"
            )
        weight = self.weight
        if weight.ndim != 2 or weight.dtype not in STORAGE_DTYPES or not weight.is_contiguous():
            raise InvalidInputError(
                f"adapter weight is {tuple(weight.shape)} {weight.dtype}"
                f"{'' if weight.is_contiguous() else ' (not contiguous)'}; expected a contiguous [d_sae, d_model] "
                "matrix in bfloat16, float16, float32 or float64"
            )
        small = torch.float64 if weight.dtype == torch.float64 else torch.float32
        for name, tensor in (("bias", self.bias), ("threshold", self.threshold)):
            if tuple(tensor.shape) != (self.d_sae,) or tensor.dtype != small or not tensor.is_contiguous():
                raise InvalidInputError(
                    f"adapter {name} is {tuple(tensor.shape)} {tensor.dtype}"
                    f"{'' if tensor.is_contiguous() else ' (not contiguous)'}; expected ({self.d_sae},) {small}, "
                    "contiguous"
                )

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.weight.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the weight matrix."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def to(self, device: torch.device | str) -> AdapterWeights:
        """The same adapter on another device; itself if it is already there."""
        if self.device == torch.device(device):
            return self
        return AdapterWeights(
            weight=self.weight.to(device),
            bias=self.bias.to(device),
            threshold=self.threshold.to(device),
            activation=self.activation,
            clip=self.clip,
        )
