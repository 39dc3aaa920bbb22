"""The first part: scores of the listed latents of a row, and whether the row needs the pass."""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from dspa.kernels.lookup.triton_row import lookup_row
from dspa.kernels.token_step.triton_kernel.rows import alpha_of, count_of, entries_of, is_enabled
from dspa.kernels.token_step.triton_kernel.structures import (
    BAR,
    DISABLED,
    FACTOR,
    LARGEST,
    NONFINITE,
    NUMBERS,
    OPEN,
    RECENT,
    SCALE,
    SETTLED,
    SHIFT,
)
from dspa.kernels.triton_common.rows import LISTED, ROW, as_scalar, products_of
from dspa.kernels.triton_common.tiles import is_finite, normalizer, numbers_of, score_of


@triton.jit
def bound_by_recent_argmax(
    row, begin, column_stride, encoder, recent_argmax, shift, factor, d_model, d_sae,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr,
):  # fmt: skip
    """A lower bound of the maximum that the pass would find, from recent argmax latents; 0 without any.

    A product differs from the exact one by at most d_model roundings of its absolute terms, 2^-24 each in float32 and
    less than 2^-22 on a tensor core. `slack` allows for twice that, for this computation and for that of the pass.
    """
    latents = tl.load(recent_argmax + row * RECENT + tl.arange(0, RECENT))
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
    return tl.max(tl.where(known & active & (lowest > 0.0), lowest, 0.0), axis=0)


@triton.jit
def prepare(
    row, hidden, encoder, edits, strength, scratch, prompt, d_model, d_sae,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, LAZY: tl.constexpr,
    EDIT: tl.constexpr, GUARD: tl.constexpr,
):  # fmt: skip
    """Looks up the list of a row, if it has a prompt; scores the listed latents; and decides whether the row needs the
    pass."""
    if prompt is not None:
        lookup_row(row, prompt, edits.latents, edits.signs, edits.counts, edits.capacity, EDIT, GUARD)
    state = DISABLED
    if is_enabled(strength, row):
        state = NONFINITE
        begin = hidden.rows + row.to(tl.int64) * hidden.row_stride
        zero = tl.zeros([1, 1], tl.int32)
        shift, factor, scale = normalizer(begin + zero, hidden.column_stride, d_model, zero == 0, NORMALIZATION, ROW)
        shift = as_scalar(shift)
        factor = as_scalar(factor)
        scale = as_scalar(scale)
        count = count_of(edits, row)
        largest, finite, never = 0.0, is_finite(scale), 0
        for first in range(0, tl.maximum(count, 1), LISTED):
            latents, signs, listed = entries_of(edits, row, first, count)
            of_latents = numbers_of(encoder, latents, listed, ACTIVATION)
            product, _, clean = products_of(
                latents, listed, begin, hidden.column_stride, encoder, shift, factor, d_model, NORMALIZATION
            )
            score = score_of(product, of_latents, encoder, ACTIVATION)
            finite &= clean & (tl.sum((~is_finite(product) | ~is_finite(score)).to(tl.int32), axis=0) == 0)
            tl.store(scratch.listed + row * edits.capacity + first + tl.arange(0, LISTED), score, mask=listed)
            largest = tl.maximum(largest, tl.max(tl.where(score > 0.0, score, 0.0), axis=0))
            never |= tl.max(((score > 0.0) & (signs > 0)).to(tl.int32), axis=0)
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
        tl.store(numbers + BAR, bar)
        if finite:
            state = OPEN
            if LAZY:
                alpha = alpha_of(strength, row, True)
                if (largest == 0.0) | (bar <= alpha * largest):
                    state = SETTLED
                elif never == 0:
                    floor = bound_by_recent_argmax(
                        row, begin, hidden.column_stride, encoder, scratch.recent_argmax, shift, factor, d_model, d_sae,
                        ACTIVATION, NORMALIZATION,
                    )  # fmt: skip
                    if bar <= alpha * floor:
                        state = SETTLED
    tl.store(scratch.states + row, state)
