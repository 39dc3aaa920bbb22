"""The tensors of a sparse autoencoder in the one layout every kernel reads, and the record of what they mean."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

from dspa.errors import UnsupportedSaeError

Activation = Literal["jumprelu", "relu", "gated", "topk", "batchtopk"]
InputNormalization = Literal["none", "constant_norm_rescale", "layer_norm"]

STORAGE_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)

WeightsT = TypeVar("WeightsT", bound="SaeWeights")


@dataclass(frozen=True, eq=False, kw_only=True)
class SaeWeights:
    """Weights and semantics of one SAE. One latent is one contiguous row of `W_enc` and of `W_dec`.

    The latents of a residual-stream vector `h` are (method, section 1):

        h' = normalize(h) - b_dec if subtract_b_dec else normalize(h)
        z  = W_enc h' + b_enc                                  (times decoder_norm, if given)
        jumprelu, relu, batchtopk:  f = relu(z) where z > threshold
        gated:                      f = relu(magnitude_scale * (W_enc h') + magnitude_bias) where z > 0
        topk:                       f = relu(z) where fewer than k latents have a larger z, ties to the lower index

    Attributes:
        W_enc: `[d_sae, d_model]`, bfloat16, float16, float32 or float64, row-contiguous.
        b_enc: `[d_sae]`, float32 (float64 if `W_enc` is); the gate's bias for a gated SAE.
        threshold: `[d_sae]`, dtype of `b_enc`; 0 for relu and gated, not used by topk.
        activation: which rule of the table above.
        W_dec: `[rows, d_model]`, dtype of `W_enc`, or None where nothing is ever decoded.
        b_dec: `[d_model]`, dtype of `b_enc`. Read only if `subtract_b_dec`: a decoded *difference* has no bias.
        decoder_rows: `[d_sae]` int32, the row of `W_dec` that decodes each latent, -1 where there is none; None if
            `W_dec` has all rows in order.
        k: number of latents kept by topk, else None.
        subtract_b_dec: whether the decoder bias is subtracted from the input.
        normalization: how the input is scaled before it is encoded; a decoded difference is scaled back.
        decoder_norm: `[d_sae]`, dtype of `b_enc`, the L2 norms of the decoder rows if `z` is scaled by them before the
            selection (and activations divided by them before decoding), else None.
        magnitude_scale, magnitude_bias: `[d_sae]`, dtype of `b_enc`, for gated SAEs, else None.
    """

    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    activation: Activation
    W_dec: Tensor | None = None
    b_dec: Tensor | None = None
    decoder_rows: Tensor | None = None
    k: int | None = None
    subtract_b_dec: bool = False
    normalization: InputNormalization = "none"
    decoder_norm: Tensor | None = None
    magnitude_scale: Tensor | None = None
    magnitude_bias: Tensor | None = None

    def __post_init__(self) -> None:
        self._check()

    @property
    def d_sae(self) -> int:
        """Number of latents."""
        return self.W_enc.shape[0]

    @property
    def d_model(self) -> int:
        """Width of the residual stream."""
        return self.W_enc.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of the weight matrices."""
        return self.W_enc.dtype

    @property
    def device(self) -> torch.device:
        return self.W_enc.device

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are present, by field name."""
        return {field.name: value for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}

    def to(self: WeightsT, device: torch.device | str) -> WeightsT:
        """The same SAE on another device; itself if it is already there."""
        if self.device == torch.device(device):
            return self
        return replace(self, **{name: tensor.to(device) for name, tensor in self.tensors().items()})

    def _check(self) -> None:
        if self.activation not in get_args(Activation):
            raise UnsupportedSaeError(
                f"SAE activation {self.activation!r} is not known; expected one of {', '.join(get_args(Activation))}"
            )
        if self.normalization not in get_args(InputNormalization):
            raise UnsupportedSaeError(
                f"SAE input normalization {self.normalization!r} is not known; "
                f"expected one of {', '.join(get_args(InputNormalization))}"
            )
        if self.W_enc.ndim != 2 or self.W_enc.dtype not in STORAGE_DTYPES or self.W_enc.layout != torch.strided:
            raise UnsupportedSaeError(
                f"W_enc is {tuple(self.W_enc.shape)} {self.W_enc.dtype}; expected a [d_sae, d_model] matrix in "
                "bfloat16, float16, float32 or float64"
            )
        small = torch.float64 if self.dtype == torch.float64 else torch.float32
        own_rows = self.W_dec is not None and self.W_dec.ndim == 2 and self.decoder_rows is not None
        decoder_rows = self.W_dec.shape[0] if own_rows and self.W_dec is not None else self.d_sae
        expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "W_enc": ((self.d_sae, self.d_model), self.dtype),
            "W_dec": ((decoder_rows, self.d_model), self.dtype),
            "b_dec": ((self.d_model,), small),
            "decoder_rows": ((self.d_sae,), torch.int32),
        }
        for name, tensor in self.tensors().items():
            shape, dtype = expected.get(name, ((self.d_sae,), small))
            if tensor.device != self.device:
                raise UnsupportedSaeError(f"SAE tensor {name} is on {tensor.device}; expected {self.device} as W_enc")
            if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
                raise UnsupportedSaeError(
                    f"SAE tensor {name} is {tuple(tensor.shape)} {tensor.dtype}"
                    f"{'' if tensor.is_contiguous() else ' (not contiguous)'}; expected {shape} {dtype}, contiguous"
                )
        if self.subtract_b_dec and self.b_dec is None:
            raise UnsupportedSaeError("the SAE subtracts its decoder bias, but b_dec is missing; pass b_dec")
        if (self.activation == "topk") != (self.k is not None):
            raise UnsupportedSaeError(f"k is {self.k} for a {self.activation} SAE; topk needs k, the others have none")
        if self.k is not None and not 1 <= self.k <= self.d_sae:
            raise UnsupportedSaeError(f"k is {self.k}; expected 1 to d_sae = {self.d_sae}")
        gated = self.magnitude_scale is not None and self.magnitude_bias is not None
        if (self.activation == "gated") != gated:
            raise UnsupportedSaeError("magnitude_scale and magnitude_bias belong to gated SAEs, and those need both")
        if gated and self.decoder_norm is not None:
            raise UnsupportedSaeError("a gated SAE has a decoder_norm; only its absence is supported")


DECODER_FIELDS = ("W_dec", "decoder_rows")


def encode_alike(one: SaeWeights, other: SaeWeights) -> bool:
    """Whether two SAEs have the same encoder, whatever rows of the decoder they hold."""
    if one is other:
        return True
    for name in (field.name for field in fields(SaeWeights) if field.name not in DECODER_FIELDS):
        a, b = getattr(one, name), getattr(other, name)
        if not isinstance(a, Tensor) or not isinstance(b, Tensor):
            if a is not b and (isinstance(a, Tensor) or isinstance(b, Tensor) or a != b):
                return False
        elif (a.shape, a.dtype, a.device) != (b.shape, b.dtype, b.device) or not torch.equal(a, b):
            return False
    return True


def decode_alike(one: SaeWeights, other: SaeWeights) -> bool:
    """Whether two SAEs of one width decode every latent alike for which both hold a row of the decoder."""
    if (
        one.W_dec is None
        or other.W_dec is None
        or (one.W_dec is other.W_dec and one.decoder_rows is other.decoder_rows)
    ):
        return True
    rows = [
        torch.arange(sae.d_sae, device=sae.device) if sae.decoder_rows is None else sae.decoder_rows.long()
        for sae in (one, other)
    ]
    known = (rows[0] >= 0) & (rows[1] >= 0)
    return torch.equal(one.W_dec[rows[0][known]], other.W_dec[rows[1][known]])
