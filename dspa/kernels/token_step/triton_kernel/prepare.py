"""The first part: scores of the listed latents of a row, and beside it a lower bound of its maximum."""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from dspa.kernels.lookup.triton_row import lookup_row
from dspa.kernels.token_step.triton_kernel.rows import alpha_of, count_of, is_enabled, packed, places_of
from dspa.kernels.token_step.triton_kernel.structures import (
    DISABLED,
    FACTOR,
    LARGEST,
    NONFINITE,
    NUMBERS,
    RECENT,
    SCALE,
    SETTLED,
    SHIFT,
)
from dspa.kernels.triton_common.rows import LISTED, ROW, as_scalar, products_of
from dspa.kernels.triton_common.tiles import is_finite, normalizer, numbers_of, score_of


@triton.jit
def bound_by_latents(
    latents, begin, column_stride, encoder, shift, factor, d_model, d_sae,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr,
):  # fmt: skip
    """A lower bound of the maximum that the pass would find, from some latents, and which of them proves it; 0 without
    any.

    A product differs from the exact one by at most d_model roundings of its absolute terms, 2^-24 each in float32 and
    less than 2^-22 on a tensor core. `slack` allows for twice that, for this computation and for that of the pass.
    """
    known = (latents >= 0) & (latents < d_sae)
    bias, norm, scale, offset = numbers_of(encoder, latents, known, ACTIVATION)
    product, magnitude, _ = products_of(
        latents, known, begin, column_stride, encoder, shift, factor, d_model, NORMALIZATION
    )
    unit = 4.76837158203125e-07  # 2^-21
    slack = magnitude * (unit * (d_model + 16))
    lowest = product + bias - slack - unit * tl.abs(bias)
    if encoder.decoder_norm is not None:
        lowest = (product + bias) * norm - (slack + unit * tl.abs(bias)) * tl.abs(norm)
    if ACTIVATION == "gated":
        active = lowest > 0.0
        lowest = product * scale + offset - slack * tl.abs(scale) - unit * tl.abs(offset)
    else:
        active = lowest > offset
    proven = tl.where(known & active & (lowest > 0.0), lowest, 0.0)
    best = tl.max(proven, axis=0)
    return best, tl.max(tl.where(proven == best, latents, 0), axis=0)


@triton.jit
def prepare(
    row, hidden, encoder, edits, strength, scratch, prompt, d_model, d_sae,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, LAZY: tl.constexpr,
    EDIT: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Looks up the list of a row, if it has a prompt; scores the listed latents; and settles the row if they show that
    it does not need M_t."""
    if prompt is not None:
        lookup_row(row, prompt, edits.latents, edits.signs, edits.counts, edits.capacity, EDIT, GUARD)
    state = tl.cast(DISABLED, tl.float32)
    if is_enabled(strength, row):
        state = tl.cast(NONFINITE, tl.float32)
        begin = hidden.rows + row.to(tl.int64) * hidden.row_stride
        zero = tl.zeros([1, 1], tl.int32)
        shift, factor, scale = normalizer(begin + zero, hidden.column_stride, d_model, zero == 0, NORMALIZATION, ROW)
        shift = as_scalar(shift)
        factor = as_scalar(factor)
        scale = as_scalar(scale)
        count = count_of(edits, row)
        largest, finite, never = 0.0, is_finite(scale), 0
        latents, signs = places_of(edits, row, 0)  # does not wait for the count
        for first in range(0, tl.maximum(count, 1), LISTED):
            listed = first + tl.arange(0, LISTED) < count
            latents = tl.where(listed, latents, 0)
            of_latents = numbers_of(encoder, latents, listed, ACTIVATION)
            product, _, clean = products_of(
                latents, listed, begin, hidden.column_stride, encoder, shift, factor, d_model, NORMALIZATION
            )
            score = score_of(product, of_latents, encoder, ACTIVATION)
            finite &= clean & (tl.sum((~is_finite(product) | ~is_finite(score)).to(tl.int32), axis=0) == 0)
            tl.store(scratch.listed + row * edits.capacity + first + tl.arange(0, LISTED), score, mask=listed)
            largest = tl.maximum(largest, tl.max(tl.where(score > 0.0, score, 0.0), axis=0))
            never |= tl.max(((score > 0.0) & (signs > 0)).to(tl.int32), axis=0)
            latents, signs = places_of(edits, row, first + LISTED)
        bar = largest
        if ACTIVATION == "topk":
            never = 1
        if never != 0:
            bar = float("nan")
        numbers = scratch.numbers + row * NUMBERS
        tl.store(numbers + SHIFT, shift)
        tl.store(numbers + FACTOR, factor)
        tl.store(numbers + SCALE, scale)
        tl.store(numbers + LARGEST, largest)
        if finite:
            state = bar
            if LAZY:
                alpha = alpha_of(strength, row, True)
                if (largest == 0.0) | (bar <= alpha * largest):
                    state = tl.cast(SETTLED, tl.float32)
    tl.store(scratch.bars + row, state)


@triton.jit
def bound(
    row, hidden, encoder, strength, scratch, screen, d_model, d_sae,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr,
):  # fmt: skip
    """Raises the maximum of a row to what its recent argmax latents prove, before the pass does so further; where a
    step is screened, its floor too."""
    latents = tl.load(scratch.recent_argmax + row * RECENT + tl.arange(0, RECENT))
    if is_enabled(strength, row) & (tl.max(latents, axis=0) >= 0):
        begin = hidden.rows + row.to(tl.int64) * hidden.row_stride
        zero = tl.zeros([1, 1], tl.int32)
        shift, factor, _ = normalizer(begin + zero, hidden.column_stride, d_model, zero == 0, NORMALIZATION, ROW)
        floor, latent = bound_by_latents(
            latents, begin, hidden.column_stride, encoder, as_scalar(shift), as_scalar(factor), d_model, d_sae,
            ACTIVATION, NORMALIZATION,
        )  # fmt: skip
        if floor > 0.0:
            tl.atomic_max(scratch.maxima + row, packed(floor, latent), sem="relaxed")
            if screen is not None:
                tl.atomic_max(screen.floors + row, packed(floor, latent), sem="relaxed")
