"""The part that comes before the pass of a screened step: bounds of all activations, by 8-bit codes of `W_enc`.

A program reads the codes of one tile of latents, half the bytes of the weights, and bounds what the pass would compute
for 16 rows of the batch. The largest lower bound of a row is its *floor*: M_t is at least that. The pass then computes
only the latents whose upper bound is above the floor, at their places in their tiles and by its own code, so with its
own bits. All others have scores of at most the floor, which is raised into the maxima too, as it may be M_t itself.

The bound. Row i of `W_enc` is `scale_i * code_i + error_i` in the coded columns, whose inputs are c; a few,
whose inputs are o, are kept exactly (`encoder_codes.py`). What is computed here differs from what the pass computes by

- `|error_i . c| <= |error_i| |c|` (Cauchy-Schwarz);
- the roundings of both sums: d_model each, of 2^-24 of the sum of absolute terms in float32 and of less than 2^-22
  of it on a tensor core. That sum is at most `size_i |c| + exact_i |o|`, where `size_i` is the larger of the norms of
  the coded weights and of their codes, and `exact_i` the norm of the exact weights;
- the parts of the input beyond two of 8 bits, which are left out here: less than 2^-14 of `size_i |c|`.

A few roundings of the bound itself are allowed for too. Scores never fall where products rise, rounding included, so
that the scores of bounds are bounds of scores, on whichever side of a threshold or gate they are. Where a bound is not
finite, or sums might have overflowed, it proves nothing: the lower score is 0, the upper one infinite.
"""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dspa.kernels.token_step.triton_kernel.rows import alpha_of, packed, packed_value
from dspa.kernels.token_step.triton_kernel.structures import DISABLED, FACTOR, NUMBERS, SHIFT
from dspa.kernels.triton_common.tiles import (
    INTERPRETED,
    add_products,
    dot,
    encoder_input,
    is_finite,
    leading_bits,
    scores,
    widen,
)

EXACT = tl.constexpr(32)  # columns that may be kept exactly
NORMS = tl.constexpr(2)  # of a row: of its coded inputs, and of the others
MEASURED = tl.constexpr(4096)  # columns of a row that are measured at a time

CLEARED = tl.constexpr(256)  # rows that are cleared at a time

ROUNDED_UP = tl.constexpr(1.0 + 2.0**-9)  # more than the roundings of a sum of squares may take away
TINY = tl.constexpr(1e-16)  # and their underflow
SAFE = tl.constexpr(1e36)  # sums of absolute terms up to here do not overflow
ROUNDING = tl.constexpr(2.0**-22)
PARTS_LEFT_OUT = tl.constexpr(2.0**-13)
OF_THE_BOUND = tl.constexpr(2.0**-20)
UNDERFLOW = tl.constexpr(1e-30)  # more than all that underflow can take from a product


class Screen(NamedTuple):
    """The codes of `W_enc`, and what the programs that use them exchange. A launch restores `floors` and `counter`.

    Attributes:
        codes: `[P, C]` int8, with `P` and `C` at least d_sae and d_model, and 0 beyond them and in exact columns.
        factors: `[4, P]` float32: scale, norm of the error, `size` and norm of the exact weights of each latent.
        exact: `[P, 32]`, the weights of the exact columns in the dtype of `W_enc`.
        columns: `[32]` int32, the exact columns; d_model where there are fewer.
        is_exact: `[C]` int8, 1 for those.
        inputs: `[B, 32]` float32, the inputs of the exact columns.
        norms: `[B, 2]` float32, norms of the coded inputs of a row and of the others, rounded up.
        floors: `[B]` int64, lower bounds of M_t, and which latents prove them; 0 between launches.
        uppers: `[B, P]` float32, upper bounds of scores.
        counter: `[1]` int32, tiles that are screened; 0 between launches.
        latents: `P`.
        width: `C`.
    """

    codes: Tensor
    factors: Tensor
    exact: Tensor
    columns: Tensor
    is_exact: Tensor
    inputs: Tensor
    norms: Tensor
    floors: Tensor
    uppers: Tensor
    counter: Tensor
    latents: int
    width: int


@triton.jit
def measure_input(row, hidden, encoder, scratch, screen, d_model, NORMALIZATION: tl.constexpr):
    """The norms of the encoder input of a prepared row, and its exact inputs."""
    tl.debug_barrier()  # all threads see the numbers of the row
    shift = 0.0
    factor = 1.0
    if NORMALIZATION != "none":
        shift = tl.load(scratch.numbers + row * NUMBERS + SHIFT, cache_modifier=".cg")
        factor = tl.load(scratch.numbers + row * NUMBERS + FACTOR, cache_modifier=".cg")
    begin = hidden.rows + row.to(tl.int64) * hidden.row_stride
    columns = tl.load(screen.columns + tl.arange(0, EXACT))
    there = columns < d_model
    kept = tl.load(begin + columns * hidden.column_stride, mask=there, other=0.0)
    kept = encoder_input(kept, shift, factor, encoder.b_dec, columns, there, there, NORMALIZATION)
    tl.store(screen.inputs + row * EXACT + tl.arange(0, EXACT), kept)
    coded = tl.zeros([MEASURED], tl.float32)
    others = tl.zeros([MEASURED], tl.float32)
    for first in range(0, d_model, MEASURED):
        at = first + tl.arange(0, MEASURED)
        inside = at < d_model
        h = tl.load(begin + at * hidden.column_stride, mask=inside, other=0.0)
        is_exact = tl.load(screen.is_exact + at, mask=inside, other=0) != 0
        x = encoder_input(h, shift, factor, encoder.b_dec, at, inside, inside, NORMALIZATION)
        coded += tl.where(is_exact, 0.0, x * x)
        others += tl.where(is_exact, x * x, 0.0)
    norms = screen.norms + row * NORMS
    tl.store(norms, tl.sqrt_rn(tl.sum(coded, axis=0)) * ROUNDED_UP + TINY)
    tl.store(norms + 1, tl.sqrt_rn(tl.sum(others, axis=0)) * ROUNDED_UP + TINY)


@triton.jit
def as_factor(codes, dtype: tl.constexpr):
    """Codes in a dtype of tensor cores, all of which hold them exactly."""
    return codes.to(tl.float32 if INTERPRETED else dtype)


@triton.jit
def add_coded(codes, h, x, product, X_PARTS: tl.constexpr):
    """Adds the products of codes with inputs: `h` as loaded, or two parts of `x`."""
    if X_PARTS == 0:
        product = dot(as_factor(codes, h.dtype), tl.trans(h), product)
    else:
        factor = as_factor(codes, tl.bfloat16)
        leading = leading_bits(x)
        product = dot(factor, tl.trans(leading), product)
        if X_PARTS > 1:
            product = dot(factor, tl.trans(leading_bits(x - widen(leading))), product)
    return product


@triton.jit
def bounds_of(
    coded, exact, factors, coded_norm, exact_norm, latents, inside, encoder, d_model,
    ACTIVATION: tl.constexpr, X_PARTS: tl.constexpr,
):  # fmt: skip
    """Lower and upper bounds of scores, `[latents, tokens]`, from the products with codes and with exact weights."""
    scale, error, size, exact_size = factors
    roundings = d_model + 16.0
    of_codes = size * coded_norm
    magnitude = of_codes + exact_size * exact_norm
    if X_PARTS > 1:
        width = error * coded_norm + magnitude * (3.0 * ROUNDING * roundings) + of_codes * PARTS_LEFT_OUT
    else:
        width = error * coded_norm + magnitude * (2.0 * ROUNDING * roundings)
    middle = coded * scale
    width += (tl.abs(middle) + tl.abs(exact) + width) * OF_THE_BOUND + UNDERFLOW
    middle += exact
    proven = is_finite(middle - width) & is_finite(middle + width) & (magnitude < SAFE)
    lower = tl.where(inside & proven, middle - width, 0.0)
    upper = tl.where(inside & proven, middle + width, 0.0)
    lower = scores(lower, encoder, latents, inside, ACTIVATION)
    upper = scores(upper, encoder, latents, inside, ACTIVATION)
    lower = tl.where(inside & proven, lower, 0.0)
    upper = tl.where(inside, tl.where(proven, upper, float("inf")), 0.0)
    return lower, upper


@triton.jit
def screen_tile(
    tile, rows, is_open, shift, factor, hidden, encoder, screen, d_model, d_sae,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, X_PARTS: tl.constexpr,
    LATENTS: tl.constexpr, TOKENS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """Bounds the scores of one tile of latents for some rows, and raises the floors of these."""
    # As many bytes at a time as the pass reads of weights.
    COLUMNS: tl.constexpr = 256 if MODEL >= 128 else 2 * MODEL  # pyright: ignore[reportAssignmentType]
    latents = tile * LATENTS + tl.arange(0, LATENTS)
    codes = screen.codes + latents.to(tl.int64)[:, None] * screen.width
    begin = hidden.rows + rows.to(tl.int64)[:, None] * hidden.row_stride
    # What comes after the codes is loaded before them.
    kept = tl.arange(0, EXACT)[None, :]
    w = tl.load(screen.exact + latents.to(tl.int64)[:, None] * EXACT + kept)
    of_row = is_open[:, None]
    x = tl.load(screen.inputs + rows[:, None] * EXACT + kept, mask=of_row, other=0.0, cache_modifier=".cg")
    coded_norm = tl.load(screen.norms + rows * NORMS, mask=is_open, other=0.0, cache_modifier=".cg")
    exact_norm = tl.load(screen.norms + rows * NORMS + 1, mask=is_open, other=0.0, cache_modifier=".cg")
    scale = tl.load(screen.factors + latents)[:, None]
    error = tl.load(screen.factors + screen.latents + latents)[:, None]
    size = tl.load(screen.factors + 2 * screen.latents + latents)[:, None]
    exact_size = tl.load(screen.factors + 3 * screen.latents + latents)[:, None]

    coded = tl.zeros([LATENTS, TOKENS], tl.float32)
    for first in tl.range(0, screen.width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        within = columns < d_model
        valid = of_row & within[None, :]
        c = tl.load(codes + columns[None, :])
        h = tl.load(begin + columns[None, :] * hidden.column_stride, mask=valid, other=0.0)
        if X_PARTS == 0:
            coded = add_coded(c, h, h, coded, X_PARTS)
        else:
            inputs = encoder_input(
                h, shift, factor, encoder.b_dec, columns[None, :], within[None, :], valid, NORMALIZATION
            )  # fmt: skip
            coded = add_coded(c, h, inputs, coded, X_PARTS)
    exact = tl.zeros([LATENTS, TOKENS], tl.float32)
    rest = tl.zeros([LATENTS, TOKENS], tl.float32)
    exact, rest = add_products(w, tl.trans(x), exact, rest, X_PARTS)

    lower, upper = bounds_of(
        coded, exact + rest, (scale, error, size, exact_size), coded_norm[None, :], exact_norm[None, :],
        latents[:, None], (latents < d_sae)[:, None], encoder, d_model, ACTIVATION, X_PARTS,
    )  # fmt: skip
    at = screen.uppers + rows.to(tl.int64)[None, :] * screen.latents + latents[:, None]
    tl.store(at, upper, mask=tl.broadcast_to(is_open[None, :], upper.shape))
    floor, where = tl.max(lower, axis=0, return_indices=True)
    found = is_open & (floor > 0.0)
    tl.atomic_max(screen.floors + rows, packed(floor, tile * LATENTS + where), mask=found, sem="relaxed")


@triton.jit
def raise_to_floors(rows, batch, scratch, screen):
    """Lets the maxima of some rows be at least their floors, which is what M_t is for rows that need no more."""
    floors = tl.load(screen.floors + rows, mask=rows < batch, other=0, cache_modifier=".cg")
    tl.atomic_max(scratch.maxima + rows, floors, mask=floors > 0, sem="relaxed")


@triton.jit
def possible_maxima(tile, rows, batch, strength, scratch, screen, LATENTS: tl.constexpr, TOKENS: tl.constexpr):
    """`[latents]`: which latents of a tile may have the maximum of one of some open rows that still needs it.

    Everything it reads is final, so that all threads see the same.
    """
    latents = tile * LATENTS + tl.arange(0, LATENTS)
    is_open = rows < batch
    bar = tl.load(scratch.bars + rows, mask=is_open, other=DISABLED, cache_modifier=".cg")
    is_open &= ~(bar < 0.0)
    floor = packed_value(tl.load(screen.floors + rows, mask=is_open, other=0, cache_modifier=".cg"))
    is_open &= ~(bar <= alpha_of(strength, rows, is_open) * floor)
    at = screen.uppers + rows.to(tl.int64)[None, :] * screen.latents + latents[:, None]
    upper = tl.load(at, mask=tl.broadcast_to(is_open[None, :], [LATENTS, TOKENS]), other=0.0, cache_modifier=".cg")
    return tl.max((is_open[None, :] & (upper > floor[None, :])).to(tl.int32), axis=1) != 0


@triton.jit
def clear_screen(passed, passes, batch, screen):
    """Leaves floors and counter as a launch has to find them, by the program whose pass is the last."""
    if passed == passes - 1:
        for first in range(0, batch, CLEARED):
            rows = first + tl.arange(0, CLEARED)
            tl.store(screen.floors + rows, tl.zeros([CLEARED], tl.int64), mask=rows < batch)
        tl.store(screen.counter, 0)
