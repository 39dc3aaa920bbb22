"""Device functions of the Triton kernels: number formats, the SAE's encoder, and waiting between programs of a launch.

Loaded only by the Triton backend. Contraction of `a * b + c` is switched off at every launch (`launch.py`), so that
the bits of a result are those that the source says; where a fused multiply-add is meant, it is written `tl.fma`.
"""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

# The interpreter multiplies bfloat16 matrices as if they were integers, so `dot` widens them to float32 there.
INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


FETCHED = tl.constexpr(256)  # columns of a row that are asked for at a time
SECTOR = tl.constexpr(32)  # bytes that come for each that is asked for; a line of the cache has four


class Encoder(NamedTuple):
    """The tensors of `SaeWeights` that encoding reads; None for those that the SAE does not have or does not use."""

    W_enc: Tensor
    b_enc: Tensor
    threshold: Tensor
    b_dec: Tensor | None
    decoder_norm: Tensor | None
    magnitude_scale: Tensor | None
    magnitude_bias: Tensor | None


# ---- number formats --------------------------------------------------------------------------------------------------


@triton.jit
def widen(x):
    """The same numbers in float32."""
    if x.dtype == tl.bfloat16:
        x = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return x.to(tl.float32)


@triton.jit
def narrow(x, dtype: tl.constexpr):
    """float32 to a storage dtype, to nearest, ties to even."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits = tl.where(x == x, bits + 0x7FFF + ((bits >> 16) & 1), 0x7FC00000)  # NaN stays NaN
        narrowed = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrowed = x.to(dtype)
    return narrowed


@triton.jit
def is_finite(x):
    """Whether float32 numbers are neither NaN nor infinite."""
    return (x.to(tl.uint32, bitcast=True) & 0x7F800000) != 0x7F800000


@triton.jit
def leading_bits(x):
    """The first 8 significant bits of float32, as bfloat16. Three times that, of what is left, is all of x."""
    return (x.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)


# ---- the encoder -----------------------------------------------------------------------------------------------------


@triton.jit
def encoder_input(h, shift, factor, b_dec, columns, inside, valid, NORMALIZATION: tl.constexpr):
    """`h'` of docs/method.md, section 1, in float32; 0 where not valid. All arguments broadcast to one shape.

    Args:
        columns, inside: which columns of the model, and whether they are there.
        valid: where `h` was loaded.
    """
    x = widen(h)
    if NORMALIZATION == "layer_norm":
        x = (x - shift) * factor
    elif NORMALIZATION == "constant_norm_rescale":
        x = x * factor
    if b_dec is not None:
        x = x - tl.load(b_dec + columns, mask=inside, other=0.0)
    return tl.where(valid, x, 0.0)


@triton.jit
def normalizer(begin, column_stride, d_model, valid, NORMALIZATION: tl.constexpr, BLOCK: tl.constexpr):
    """The factors that normalise some rows, `(h - shift) * factor`, and the scale that maps a decoded difference back.

    Args:
        begin: `[R, 1]`, where each row begins.
        valid: `[R, 1]`, which rows to read.

    Returns:
        Three times `[R, 1]` float32.
    """
    shift = tl.zeros(begin.shape, tl.float32)
    factor = shift + 1.0
    scale = shift + 1.0
    if NORMALIZATION != "none":
        size = tl.cast(d_model, tl.float32)
        columns = tl.arange(0, BLOCK)[None, :]
        if NORMALIZATION == "layer_norm":
            total = tl.zeros([begin.shape[0], BLOCK], tl.float32)
            for first in range(0, d_model, BLOCK):
                inside = valid & (first + columns < d_model)
                total += widen(tl.load(begin + (first + columns) * column_stride, mask=inside, other=0.0))
            shift = tl.div_rn(tl.sum(total, axis=1, keep_dims=True), size)
        squares = tl.zeros([begin.shape[0], BLOCK], tl.float32)
        for first in range(0, d_model, BLOCK):
            inside = valid & (first + columns < d_model)
            h = widen(tl.load(begin + (first + columns) * column_stride, mask=inside, other=0.0))
            centred = tl.where(inside, h - shift, 0.0)
            squares = tl.fma(centred, centred, squares)
        if NORMALIZATION == "layer_norm":
            scale = tl.sqrt_rn(tl.div_rn(tl.sum(squares, axis=1, keep_dims=True), size - 1.0))
            factor = tl.div_rn(1.0, scale + 1e-5)  # sae-lens' epsilon, as in dspa.sae.encode
        else:
            norm = tl.sqrt_rn(tl.sum(squares, axis=1, keep_dims=True))
            root = tl.sqrt_rn(size)
            factor = tl.div_rn(root, norm)
            scale = tl.div_rn(norm, root)
    return shift, factor, scale


@triton.jit
def dot(a, b, total):
    if INTERPRETED:
        a, b = widen(a), widen(b)
    return tl.dot(a, b, total)


@triton.jit
def add_products(w, x, main, rest, X_PARTS: tl.constexpr):
    """Adds `w @ x` to `main + rest`: exact products on tensor cores, float32 sums.

    bfloat16 holds 8 significant bits, so a float16 is the sum of 2 bfloat16 and a float32 that of 3. Matrices are
    multiplied part by part; `rest` takes the products of all but the leading parts, which are a hundredth of those, so
    that their roundings do not count.

    Args:
        w: `[latents, d]` in storage dtype.
        x: `[d, tokens]` float32.
        main, rest: `[latents, tokens]` float32.
        X_PARTS: how many bfloat16 it takes to represent x; 0 if x is exact in the dtype of w, so that it takes none.
    """
    if X_PARTS == 0:
        main = dot(w, narrow(x, w.dtype), main)
    elif w.dtype == tl.bfloat16:
        main, rest = add_part(w, x, main, rest, True, X_PARTS)
    else:
        left = widen(w)
        part = leading_bits(left)
        main, rest = add_part(part, x, main, rest, True, X_PARTS)
        left = left - widen(part)
        part = leading_bits(left)
        main, rest = add_part(part, x, main, rest, False, X_PARTS)
        if w.dtype == tl.float32:
            main, rest = add_part(leading_bits(left - widen(part)), x, main, rest, False, X_PARTS)
    return main, rest


@triton.jit
def add_part(w, x, main, rest, LEADING: tl.constexpr, X_PARTS: tl.constexpr):
    """Adds the products of one part of the weights, which is bfloat16."""
    for part in tl.static_range(X_PARTS):
        leading = leading_bits(x)
        if LEADING and part == 0:
            main = dot(w, leading, main)
        else:
            rest = dot(w, leading, rest)
        x = x - widen(leading)
    return main, rest


@triton.jit
def tile_products(
    matrix, latents, is_latent, begin, column_stride, is_token, shift, factor, b_dec, d_model, product,
    NORMALIZATION: tl.constexpr, X_PARTS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """Adds the products of some rows of a matrix with the encoder inputs of some tokens.

    Args:
        matrix: `[d_sae, d_model]`.
        latents, is_latent: `[latents]`, which rows of it, and whether there is such a row.
        begin: `[tokens, 1]`, where each row of the hidden states begins.
        is_token: `[tokens]`, which tokens to read.
        shift, factor: of `normalizer`.
        product: `[latents, tokens]` float32, what they are added to.

    Returns:
        `[latents, tokens]` float32.
    """
    weights = matrix + latents.to(tl.int64)[:, None] * d_model
    if X_PARTS == 0:
        # Both factors go from shared memory to the tensor cores as they were loaded, and while one block of columns is
        # multiplied the next ones arrive.
        for first in tl.range(0, d_model, MODEL):
            columns = (first + tl.arange(0, MODEL))[None, :]
            within = columns < d_model
            w = tl.load(weights + columns, mask=is_latent[:, None] & within, other=0.0)
            h = tl.load(begin + columns * column_stride, mask=is_token[:, None] & within, other=0.0)
            product = dot(w, tl.trans(h), product)
    else:
        rest = tl.zeros([latents.shape[0], is_token.shape[0]], tl.float32)
        for first in tl.range(0, d_model, MODEL):
            columns = (first + tl.arange(0, MODEL))[None, :]
            within = columns < d_model
            valid = is_token[:, None] & within
            w = tl.load(weights + columns, mask=is_latent[:, None] & within, other=0.0)
            h = tl.load(begin + columns * column_stride, mask=valid, other=0.0)
            x = encoder_input(h, shift, factor, b_dec, columns, within, valid, NORMALIZATION)
            product, rest = add_products(w, tl.trans(x), product, rest, X_PARTS)
        product += rest
    return product


@triton.jit
def dirty_inputs(
    begin, column_stride, is_token, shift, factor, b_dec, d_model, NORMALIZATION: tl.constexpr, MODEL: tl.constexpr
):  # fmt: skip
    """`[tokens]` int32, 1 where the encoder input of a token is not finite; arguments as for `tile_products`."""
    dirty = tl.zeros([is_token.shape[0]], tl.int32)
    for first in range(0, d_model, MODEL):
        columns = (first + tl.arange(0, MODEL))[None, :]
        within = columns < d_model
        valid = is_token[:, None] & within
        h = tl.load(begin + columns * column_stride, mask=valid, other=0.0)
        x = encoder_input(h, shift, factor, b_dec, columns, within, valid, NORMALIZATION)
        dirty |= tl.max((~is_finite(x)).to(tl.int32), axis=1)
    return dirty


@triton.jit
def numbers_of(encoder, latents, valid, ACTIVATION: tl.constexpr):
    """What turns products of some latents into scores: bias, norm, and for "gated" the scale and offset of the
    magnitude, for "threshold" the threshold. Of the shape of `latents`, 0 where not valid; the bias in place of what
    there is not.
    """
    bias = tl.load(encoder.b_enc + latents, mask=valid, other=0.0)
    norm = bias
    scale = bias
    offset = bias
    if encoder.decoder_norm is not None:
        norm = tl.load(encoder.decoder_norm + latents, mask=valid, other=0.0)
    if ACTIVATION == "gated":
        scale = tl.load(encoder.magnitude_scale + latents, mask=valid, other=0.0)
        offset = tl.load(encoder.magnitude_bias + latents, mask=valid, other=0.0)
    elif ACTIVATION == "threshold":
        offset = tl.load(encoder.threshold + latents, mask=valid, other=0.0)
    return bias, norm, scale, offset


@triton.jit
def score_of(product, numbers, encoder, ACTIVATION: tl.constexpr):
    """The values that the selection compares: the activation, or for topk the pre-activation, from `W_enc h'`.

    Args:
        product: float32. Where a latent is not valid, it must be 0, and so is the score.
        numbers: of `numbers_of`; they broadcast to the product.
        ACTIVATION: "threshold" (jumprelu, relu, batchtopk), "gated" or "topk".
    """
    bias, norm, scale, offset = numbers
    z = product + bias
    if encoder.decoder_norm is not None:
        z = z * norm
    if ACTIVATION == "gated":
        magnitude = product * scale
        magnitude += offset
        z = tl.where((z > 0.0) & (magnitude > 0.0), magnitude, 0.0)
    elif ACTIVATION == "threshold":
        z = tl.where((z > offset) & (z > 0.0), z, 0.0)
    return z


@triton.jit
def scores(product, encoder, latents, valid, ACTIVATION: tl.constexpr):
    """`score_of` some latents. `latents`, which rows of the encoder, and `valid` broadcast to the product."""
    return score_of(product, numbers_of(encoder, latents, valid, ACTIVATION), encoder, ACTIVATION)


# ---- memory that will be read ----------------------------------------------------------------------------------------


@triton.jit
def fetch_ahead(begin, columns: tl.constexpr):
    """Brings the first columns of some rows into the L2 cache of an NVIDIA GPU. Nothing waits for them.

    Args:
        begin: `[rows]`, where each row begins.
        columns: how many of a row; a power of 2, at least a sector of the cache.
    """
    sector: tl.constexpr = 8 * SECTOR // begin.dtype.element_ty.primitive_bitwidth
    sectors: tl.constexpr = columns // sector
    at = begin[:, None] + (tl.arange(0, sectors) * sector)[None, :]
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def fetch_rows(begin, columns):
    """Brings some rows into the L2 cache, as `fetch_ahead` does, up to whole blocks of columns.

    Args:
        begin: `[rows]`, where each row begins.
        columns: of a row.
    """
    for first in range(0, columns - FETCHED + 1, FETCHED):
        fetch_ahead(begin + first, FETCHED)


# ---- programs that wait for each other -------------------------------------------------------------------------------


@triton.jit
def announce(counter):
    """Adds 1 to a counter. Programs that wait for it see all earlier writes of this one."""
    tl.debug_barrier()  # a release covers what the other threads of this program wrote only behind a barrier
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def take_leave(counter):
    """Adds 1 to a counter, by a program that has only read what others may now overwrite."""
    tl.debug_barrier()  # all its threads have, and have used it: a relaxed addition waits for no load
    tl.atomic_add(counter, 1, sem="relaxed")


@triton.jit
def wait_for(counter, target):
    """Returns once a counter has reached `target`. Progress is certain only if those who raise it are running."""
    while tl.atomic_add(counter, 0, sem="acquire") < target:
        pass
    tl.debug_barrier()
