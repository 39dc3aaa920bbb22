"""A token's edit in plain torch, as it is written on top of an SAE library: what the kernels are compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from dspa.kernels import SaeWeights
from dspa.sae.encode import activations, encoder_input

ALPHA = 0.2


class EncoderDecoder(Protocol):
    """The part of an SAE library's interface that the edits below use: sae-lens' own SAEs, or those of this module."""

    @property
    def W_dec(self) -> Tensor: ...  # noqa: N802, sae-lens' name

    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, feature_acts: Tensor) -> Tensor: ...


@dataclass(eq=False)
class PlainSae:
    """sae-lens' arithmetic for these two kinds of SAE, written out: encoder as `[d_model, d_sae]`, everything in the
    dtype of the weights."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor
    k: int | None

    @classmethod
    def from_weights(cls, sae: SaeWeights) -> PlainSae:
        dtype, zeros = sae.dtype, torch.zeros(sae.d_model, dtype=sae.dtype, device=sae.device)
        return cls(
            sae.W_enc.T.contiguous(), whole_decoder(sae), sae.b_enc.to(dtype), zeros, sae.threshold.to(dtype), sae.k
        )

    def encode(self, x: Tensor) -> Tensor:
        z = x @ self.W_enc + self.b_enc
        if self.k is None:
            return torch.relu(z) * (z > self.threshold)
        top = torch.topk(z, self.k, dim=-1)
        return torch.zeros_like(z).scatter(-1, top.indices, torch.relu(top.values))

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts @ self.W_dec + self.b_dec


@dataclass(eq=False)
class GeneralPlainSae:
    """Any SAE of this package without input normalization, in plain torch: products in the dtype of the weights, the
    rest in float32 or float64. `W_dec` is divided by the decoder's norms where activations would be."""

    sae: SaeWeights
    W_enc: Tensor
    W_dec: Tensor

    @classmethod
    def from_weights(cls, sae: SaeWeights) -> GeneralPlainSae:
        decoder = whole_decoder(sae)
        if sae.decoder_norm is not None:
            decoder = (decoder.float() / sae.decoder_norm[:, None]).to(sae.dtype)
        return cls(sae, sae.W_enc.T.contiguous(), decoder)

    def encode(self, x: Tensor) -> Tensor:
        x, _ = encoder_input(x, self.sae)
        product = (x.to(self.W_enc.dtype) @ self.W_enc).to(x.dtype)
        return activations(product, self.sae).to(self.W_enc.dtype)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts @ self.W_dec


def plain_sae(sae: SaeWeights) -> PlainSae | GeneralPlainSae | None:
    """The shortest plain form of an SAE, or None for one that normalizes its input. Decoder rows that it lacks are
    zero."""
    if sae.normalization != "none":
        return None
    if sae.activation in ("gated", "relu") or sae.subtract_b_dec or sae.decoder_norm is not None:
        return GeneralPlainSae.from_weights(sae)
    return PlainSae.from_weights(sae)


def whole_decoder(sae: SaeWeights) -> Tensor:
    """`[d_sae, d_model]`: the decoder with zeros for the rows that were not kept."""
    if sae.W_dec is None:
        return sae.W_enc.new_zeros(()).expand_as(sae.W_enc)
    if sae.decoder_rows is None:
        return sae.W_dec
    whole = torch.zeros_like(sae.W_enc)
    kept = sae.decoder_rows >= 0
    whole[kept] = sae.W_dec[sae.decoder_rows[kept].long()]
    return whole


def edited(f: Tensor, latents: Tensor, alpha: float = ALPHA) -> Tensor:
    """Activations `[B, d_sae]` with the listed latents ablated, as it is written on top of an SAE library."""
    selected = f.gather(1, latents)
    return f.scatter(1, latents, (selected - alpha * f.amax(dim=1, keepdim=True)).clamp(min=0))


@torch.no_grad()
def with_error_term(sae: EncoderDecoder, hidden: Tensor, latents: Tensor, alpha: float = ALPHA) -> Tensor:
    """Encode, edit, decode, and add what the SAE does not reconstruct: three passes over the weights."""
    f = sae.encode(hidden)
    return sae.decode(edited(f, latents, alpha)) + (hidden - sae.decode(f))


@torch.no_grad()
def as_delta(sae: EncoderDecoder, hidden: Tensor, latents: Tensor, alpha: float = ALPHA) -> Tensor:
    """The same by decoding only the difference: two passes."""
    f = sae.encode(hidden)
    return hidden + (edited(f, latents, alpha) - f) @ sae.W_dec
