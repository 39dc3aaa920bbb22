"""What the per-token Triton kernels share: the structures of rows and decoders, and products of single latents."""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dspa.kernels.triton_common.tiles import encoder_input, is_finite, widen

LISTED = tl.constexpr(16)  # entries of a list that are handled at a time
TOKENS = tl.constexpr(16)  # rows of a batch that share an adapter's pass; fixed, so that their number changes no bit
IN_FLIGHT = tl.constexpr(4)  # blocks of columns of rows that lie apart, loaded ahead
ROW = tl.constexpr(256)  # columns of the model that are prepared at a time


class Hidden(NamedTuple):
    """Hidden states `[B, d_model]` and their strides in elements."""

    rows: Tensor
    row_stride: int
    column_stride: int


class Decoder(NamedTuple):
    """`W_dec` and, where it is compact, `decoder_rows` of `SaeWeights`."""

    W_dec: Tensor
    rows: Tensor | None


@triton.jit
def as_scalar(x):
    """The only element of `[1, 1]`."""
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def add_to(counter, number):
    tl.store(counter, tl.load(counter) + number)


@triton.jit
def products_of(
    latents, valid, begin, column_stride, encoder, shift, factor, d_model, NORMALIZATION: tl.constexpr
):  # fmt: skip
    """`W_enc h'` of some latents, the same with absolute values, and whether all of `h'` is finite."""
    columns = tl.arange(0, ROW)
    weights = encoder.W_enc + latents.to(tl.int64)[:, None] * d_model
    product = tl.zeros([latents.shape[0], ROW], tl.float32)
    magnitude = tl.zeros([latents.shape[0], ROW], tl.float32)
    dirty = tl.zeros([ROW], tl.int32)
    # As many bytes of 16-bit weights as of 32-bit ones: most of a row of a small model at once.
    STAGES: tl.constexpr = IN_FLIGHT * 32 // encoder.W_enc.dtype.element_ty.primitive_bitwidth
    for first in tl.range(0, d_model, ROW, num_stages=STAGES):
        at = first + columns
        inside = at < d_model
        h = tl.load(begin + at * column_stride, mask=inside, other=0.0)
        x = encoder_input(h, shift, factor, encoder.b_dec, at, inside, inside, NORMALIZATION)
        dirty |= (~is_finite(x)).to(tl.int32)
        w = widen(tl.load(weights + at[None, :], mask=valid[:, None] & inside[None, :], other=0.0))
        product = tl.fma(w, tl.broadcast_to(x[None, :], w.shape), product)
        magnitude = tl.fma(tl.abs(w), tl.broadcast_to(tl.abs(x)[None, :], w.shape), magnitude)
    clean = tl.sum(dirty, axis=0) == 0
    return tl.where(valid, tl.sum(product, axis=1), 0.0), tl.sum(magnitude, axis=1), clean
