"""`token_step` in one Triton launch, whatever the batch.

The programs of a launch take numbers as they start. The first of them, one for each row of the batch, *prepare* a row:
they compute its listed latents and, in lazy mode, decide whether M_t is needed. The next ones *pass* over one tile of
`W_enc` each, for 16 rows of the batch at a time. The last ones, one a row, *finish*: they write the edit. A program
only ever waits for programs with lower numbers, which are running or done, so that a launch gets to its end however
few of its programs fit on the GPU at a time, and in whatever order they start.

Results do not depend on that order: maxima and integer counts are the same in any order, every other sum has a fixed
one. A row's bits do not depend on the batch: each row is one column of a product that always has 16.

The activations of listed latents come from one piece of code in all modes, and M_t is the largest of them and of what
the pass finds. So what `lazy` proves from a listed latent holds for the M_t that `dense` computes, bit for bit. What it
proves from a leader, a latent that was the maximum before, it proves from a lower bound that allows for the rounding of
both computations.
"""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspa.kernels.backends.registry import StepMode
from dspa.kernels.lookup.triton import lookup_row, map_arguments, new_lists, prompt_of
from dspa.kernels.native import encoder_arguments
from dspa.kernels.token_step.cpu import counters_of
from dspa.kernels.token_step.scratch import kept, rows_for
from dspa.kernels.triton_common import launch as triton_launch
from dspa.kernels.triton_common.table import blocks
from dspa.kernels.triton_common.tiles import (
    Encoder,
    add_products,
    announce,
    encoder_input,
    is_finite,
    narrow,
    normalizer,
    scores,
    wait_for,
    widen,
)
from dspa.kernels.types import CsrMap, EditKind, EditList, TokenStats
from dspa.sae.weights import SaeWeights

LEADERS = tl.constexpr(16)  # latents a row remembers
LISTED = tl.constexpr(16)  # entries of a list that are handled at a time
TOKENS = tl.constexpr(16)  # rows of a batch that share a pass; fixed, so that their number changes no bit
ROW = tl.constexpr(256)  # columns of the model that are prepared and edited at a time

# Counters of a launch.
STARTED, PREPARED, PASSED, FINISHED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# States of a row.
DISABLED, NONFINITE, SETTLED, OPEN = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# Numbers of a row.
SHIFT, FACTOR, SCALE, LARGEST, BAR = (
    tl.constexpr(0),
    tl.constexpr(1),
    tl.constexpr(2),
    tl.constexpr(3),
    tl.constexpr(4),
)
NUMBERS = tl.constexpr(5)


class Hidden(NamedTuple):
    """Hidden states `[B, d_model]` and their strides in elements."""

    rows: Tensor
    row_stride: int
    column_stride: int


class Decoder(NamedTuple):
    """`W_dec` and, where it is compact, `decoder_rows` of `SaeWeights`."""

    W_dec: Tensor
    rows: Tensor | None


class Edits(NamedTuple):
    """The tensors of an `EditList`, and its k."""

    latents: Tensor
    signs: Tensor
    counts: Tensor
    capacity: int


class Strength(NamedTuple):
    """alpha, or one for each row, and the flags of the rows."""

    alpha: float
    alpha_of_row: Tensor | None
    enabled: Tensor | None


class Stats(NamedTuple):
    """The tensors of `TokenStats`."""

    seen: Tensor
    edited: Tensor
    nonfinite: Tensor
    maximum: Tensor
    maximum_sum: Tensor
    maximum_known: Tensor
    latent_edits: Tensor


class Scratch(NamedTuple):
    """What the programs of a launch tell each other. A launch leaves it as it found it, except for the leaders.

    Attributes:
        counters: `[4]` int32, 0 between launches.
        states: `[B]` int32.
        numbers: `[B, 5]` float32: what normalises the row, its largest listed activation, and what alpha * M_t must
            reach for all listed latents to vanish (NaN if they do not vanish whatever it is).
        maxima: `[B]` int64, the largest activation found by the pass, and which latent; 0 between launches.
        listed: `[B, k]` float32, scores of listed latents.
        ranks: `[B, k]` int32, for topk: how many latents are ahead of a listed one; 0 between launches.
        leaders: `[B, 16]` int32, latents that were the maximum of this row before, the latest first, or -1.
    """

    counters: Tensor
    states: Tensor
    numbers: Tensor
    maxima: Tensor
    listed: Tensor
    ranks: Tensor
    leaders: Tensor


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
            product, _, clean = products_of(
                latents, listed, begin, hidden.column_stride, encoder, shift, factor, d_model, NORMALIZATION
            )
            score = scores(product, encoder, latents, listed, ACTIVATION)
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
                    floor = bound_by_leaders(
                        row, begin, hidden.column_stride, encoder, scratch.leaders, shift, factor, d_model, d_sae,
                        ACTIVATION, NORMALIZATION,
                    )  # fmt: skip
                    if bar <= alpha * floor:
                        state = SETTLED
    tl.store(scratch.states + row, state)


@triton.jit
def as_scalar(x):
    """The only element of `[1, 1]`."""
    return tl.sum(tl.sum(x, axis=1), axis=0)


@triton.jit
def is_enabled(strength, row):
    on = True
    if strength.enabled is not None:
        on = tl.load(strength.enabled + row)
    return on


@triton.jit
def alpha_of(strength, rows, valid):
    alpha = tl.cast(strength.alpha, tl.float32)
    if strength.alpha_of_row is not None:
        alpha = tl.load(strength.alpha_of_row + rows, mask=valid, other=0.0).to(tl.float32)
    return alpha


@triton.jit
def count_of(edits, row):
    return tl.minimum(tl.load(edits.counts + row), edits.capacity)


@triton.jit
def entries_of(edits, row, first, count):
    """16 entries of a list: latents, signs, and which of them are there."""
    entries = first + tl.arange(0, LISTED)
    listed = entries < count
    at = row.to(tl.int64) * edits.capacity + entries
    latents = tl.load(edits.latents + at, mask=listed, other=0)
    signs = tl.load(edits.signs + at, mask=listed, other=0)
    return latents, signs.to(tl.int32), listed


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
    for first in range(0, d_model, ROW):
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


@triton.jit
def bound_by_leaders(
    row, begin, column_stride, encoder, leaders, shift, factor, d_model, d_sae,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr,
):  # fmt: skip
    """A number that the maximum of the pass is certain to reach; 0 if there is no leader to prove it.

    A product differs from the exact one by at most d_model roundings of its absolute terms, 2^-24 each in float32 and
    less than 2^-22 on a tensor core. `slack` allows for twice that, for this computation and for that of the pass.
    """
    latents = tl.load(leaders + row * LEADERS + tl.arange(0, LEADERS))
    known = (latents >= 0) & (latents < d_sae)
    product, magnitude, _ = products_of(
        latents, known, begin, column_stride, encoder, shift, factor, d_model, NORMALIZATION
    )
    unit = 4.76837158203125e-07  # 2^-21
    slack = magnitude * (unit * (d_model + 16))
    bias = tl.load(encoder.b_enc + latents, mask=known, other=0.0)
    lowest = product + bias - slack - unit * tl.abs(bias)
    if encoder.decoder_norm is not None:
        norm = tl.load(encoder.decoder_norm + latents, mask=known, other=0.0)
        lowest = (product + bias) * norm - (slack + unit * tl.abs(bias)) * tl.abs(norm)
    if ACTIVATION == "gated":
        scale = tl.load(encoder.magnitude_scale + latents, mask=known, other=0.0)
        offset = tl.load(encoder.magnitude_bias + latents, mask=known, other=0.0)
        active = lowest > 0.0
        lowest = product * scale + offset - slack * tl.abs(scale) - unit * tl.abs(offset)
    else:
        active = lowest > tl.load(encoder.threshold + latents, mask=known, other=0.0)
    return tl.max(tl.where(known & active & (lowest > 0.0), lowest, 0.0), axis=0)


@triton.jit
def pass_tile(
    tile, first_row, hidden, encoder, edits, strength, scratch, batch, d_model, d_sae,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, LAZY: tl.constexpr, X_PARTS: tl.constexpr,
    LATENTS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """Raises the maxima, and for topk the ranks, of 16 rows by what one tile of latents says."""
    rows = first_row + tl.arange(0, TOKENS)
    is_open = rows < batch
    shift = 0.0
    factor = 1.0
    if LAZY or ACTIVATION == "topk" or NORMALIZATION != "none":  # it needs what the preparation finds out
        wait_for(scratch.counters + PREPARED, batch)
        is_open &= tl.load(scratch.states + rows, mask=is_open, other=DISABLED, cache_modifier=".cg") == OPEN
        if NORMALIZATION != "none":
            numbers = scratch.numbers + rows * NUMBERS
            shift = tl.load(numbers + SHIFT, mask=is_open, other=0.0, cache_modifier=".cg")[:, None]
            factor = tl.load(numbers + FACTOR, mask=is_open, other=0.0, cache_modifier=".cg")[:, None]
    if LAZY:
        is_open &= ~is_settled(rows, is_open, strength, scratch)
    if tl.max(is_open.to(tl.int32), axis=0) != 0:
        latents = tile * LATENTS + tl.arange(0, LATENTS)
        inside = latents < d_sae
        weights = encoder.W_enc + (tile * LATENTS).to(tl.int64) * d_model + tl.arange(0, LATENTS)[:, None] * d_model
        begin = hidden.rows + rows.to(tl.int64)[:, None] * hidden.row_stride
        product = tl.zeros([LATENTS, TOKENS], tl.float32)
        rest = tl.zeros([LATENTS, TOKENS], tl.float32)
        for first in tl.range(0, d_model, MODEL):
            columns = first + tl.arange(0, MODEL)
            within = columns < d_model
            valid = is_open[:, None] & within[None, :]
            w = tl.load(weights + columns[None, :], mask=inside[:, None] & within[None, :], other=0.0)
            h = tl.load(begin + columns[None, :] * hidden.column_stride, mask=valid, other=0.0)
            x = encoder_input(
                h, shift, factor, encoder.b_dec, columns[None, :], within[None, :], valid, NORMALIZATION
            )  # fmt: skip
            product, rest = add_products(w, tl.trans(x), product, rest, X_PARTS)
        score = scores(product + rest, encoder, latents[:, None], inside[:, None], ACTIVATION)
        if ACTIVATION == "topk":
            score = count_ranks(score, latents, rows, is_open, edits, scratch)
        score = tl.where(inside[:, None] & (score > 0.0), score, 0.0)
        largest, where = tl.max(score, axis=0, return_indices=True)
        found = is_open & (largest > 0.0)
        tl.atomic_max(scratch.maxima + rows, packed(largest, tile * LATENTS + where), mask=found, sem="relaxed")


@triton.jit
def packed(value, latent):
    """A positive value and a latent as one integer, larger for larger values and then for lower latents."""
    return (value.to(tl.int32, bitcast=True).to(tl.int64) << 32) | (0x7FFFFFFF - latent).to(tl.int64)


@triton.jit
def packed_value(number):
    return (number >> 32).to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def packed_latent(number):
    return 0x7FFFFFFF - (number & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def is_settled(rows, is_open, strength, scratch):
    """Which rows other programs have proven to need no maximum, as far as one knows."""
    bar = tl.load(scratch.numbers + rows * NUMBERS + BAR, mask=is_open, other=0.0, cache_modifier=".cg")
    floor = packed_value(tl.load(scratch.maxima + rows, mask=is_open, other=0, volatile=True))
    return bar <= alpha_of(strength, rows, is_open) * floor


@triton.jit
def count_ranks(score, latents, rows, is_open, edits, scratch):
    """Adds to the ranks of the listed latents how many of this tile are ahead of them.

    Returns the scores with those of listed latents replaced by the ones that were prepared: a latent has one score.
    """
    counts = tl.minimum(tl.load(edits.counts + rows, mask=is_open, other=0), edits.capacity)
    most = tl.max(counts, axis=0)
    for entry in range(most):
        listed = entry < counts
        at = rows.to(tl.int64) * edits.capacity + entry
        latent = tl.load(edits.latents + at, mask=listed, other=-1)
        known = tl.load(scratch.listed + at, mask=listed, other=0.0, cache_modifier=".cg")
        score = tl.where(latents[:, None] == latent[None, :], known[None, :], score)
    for entry in range(most):
        listed = entry < counts
        at = rows.to(tl.int64) * edits.capacity + entry
        latent = tl.load(edits.latents + at, mask=listed, other=-1)
        known = tl.load(scratch.listed + at, mask=listed, other=0.0, cache_modifier=".cg")
        tied = (score == known[None, :]) & (latents[:, None] < latent[None, :])
        ahead = tl.sum(((score > known[None, :]) | tied).to(tl.int32), axis=0)
        tl.atomic_add(scratch.ranks + at, ahead, mask=listed & (known > 0.0) & (ahead > 0), sem="relaxed")
    return score


@triton.jit
def finish(
    row, passes, hidden, encoder, decoder, edits, strength, stats, scratch, batch, d_model, k,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, LAZY: tl.constexpr,
):  # fmt: skip
    """Writes the edit of a row, counts it, and leaves the scratch as it was."""
    wait_for(scratch.counters + PREPARED, batch)
    state = tl.load(scratch.states + row, cache_modifier=".cg")
    if LAZY:
        if state == OPEN:
            wait_for(scratch.counters + PASSED, passes)
    else:
        wait_for(scratch.counters + PASSED, passes)
    if state != DISABLED:
        numbers = scratch.numbers + row * NUMBERS
        best = tl.load(scratch.maxima + row, cache_modifier=".cg")
        maximum = tl.maximum(packed_value(best), tl.load(numbers + LARGEST, cache_modifier=".cg"))
        alpha = alpha_of(strength, row, True)
        count = count_of(edits, row)

        needed = False  # whether the edit depends on the value of M_t
        finite = state != NONFINITE
        edited = False
        if (state == OPEN) | (state == SETTLED):
            for first in range(0, count, LISTED):
                _, signs, listed = entries_of(edits, row, first, count)
                f = active_scores(row, first, listed, edits, scratch, k, ACTIVATION)
                stays = (f > 0.0) & ((signs > 0) | ~(f <= alpha * maximum))
                needed |= (state == OPEN) & (tl.max(stays.to(tl.int32), axis=0) != 0)
            finite &= is_finite(maximum) | ~needed
            for first in range(0, count, LISTED):
                _, signs, listed = entries_of(edits, row, first, count)
                f = active_scores(row, first, listed, edits, scratch, k, ACTIVATION)
                change = difference(f, signs, alpha * maximum, needed)
                finite &= tl.max((~is_finite(change)).to(tl.int32), axis=0) == 0
                edited |= tl.max((change != 0.0).to(tl.int32), axis=0) != 0
        edited &= finite
        if edited:
            write_edit(
                row, hidden, encoder, decoder, edits, scratch, alpha * maximum, needed, count, d_model, k,
                ACTIVATION, NORMALIZATION,
            )  # fmt: skip
        if stats is not None:
            for first in range(0, count, LISTED):
                latents, signs, listed = entries_of(edits, row, first, count)
                f = active_scores(row, first, listed, edits, scratch, k, ACTIVATION)
                changed = edited & (difference(f, signs, alpha * maximum, needed) != 0.0)
                one = tl.full([LISTED], 1, tl.int64)
                tl.atomic_add(stats.latent_edits + latents, one, mask=changed, sem="relaxed")
            known = finite
            if LAZY:
                known &= needed
            add_to(stats.seen + row, 1)
            add_to(stats.edited + row, edited.to(tl.int64))
            add_to(stats.nonfinite + row, (~finite).to(tl.int64))
            add_to(stats.maximum_known + row, known.to(tl.int64))
            tl.store(stats.maximum + row, tl.where(known, maximum, float("nan")).to(tl.float64))
            tl.store(
                stats.maximum_sum + row,
                tl.load(stats.maximum_sum + row) + tl.where(known, maximum, 0.0).to(tl.float64),
            )
        if LAZY:
            remember(scratch.leaders + row * LEADERS, best)

    tl.debug_barrier()  # all threads have read what is now cleared
    tl.store(scratch.maxima + row, 0)
    if ACTIVATION == "topk":
        for first in range(0, edits.capacity, LISTED):
            entries = first + tl.arange(0, LISTED)
            zero = tl.zeros([LISTED], tl.int32)
            tl.store(scratch.ranks + row * edits.capacity + entries, zero, mask=entries < edits.capacity)
    if announce(scratch.counters + FINISHED) == batch - 1:
        # All others are done with the counters, once the passes that nobody waited for are.
        wait_for(scratch.counters + PASSED, passes)
        tl.store(scratch.counters + tl.arange(0, 4), tl.zeros([4], tl.int32))


@triton.jit
def add_to(counter, number):
    tl.store(counter, tl.load(counter) + number)


@triton.jit
def active_scores(row, first, listed, edits, scratch, k, ACTIVATION: tl.constexpr):
    """Activations of 16 entries of a list; 0 where inactive."""
    at = row.to(tl.int64) * edits.capacity + first + tl.arange(0, LISTED)
    score = tl.load(scratch.listed + at, mask=listed, other=0.0, cache_modifier=".cg")
    if ACTIVATION == "topk":
        rank = tl.load(scratch.ranks + at, mask=listed, other=0, cache_modifier=".cg")
        score = tl.where(rank < k, score, 0.0)
    return tl.where(score > 0.0, score, 0.0)


@triton.jit
def difference(f, signs, step, needed):
    """`f~' - f~` of method.md, section 4. Where M_t is not needed, all listed latents vanish."""
    lowered = f - step
    lowered = tl.where(needed & ((lowered > 0.0) | (lowered != lowered)), lowered, 0.0)
    moved = tl.where(signs > 0, f + step, lowered)
    return tl.where(f > 0.0, moved - f, 0.0)


@triton.jit
def write_edit(
    row, hidden, encoder, decoder, edits, scratch, step, needed, count, d_model, k,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr,
):  # fmt: skip
    """Adds the decoded difference to a row of the hidden states."""
    begin = hidden.rows + row.to(tl.int64) * hidden.row_stride
    scale = tl.load(scratch.numbers + row * NUMBERS + SCALE, cache_modifier=".cg")
    for left in range(0, d_model, ROW):
        columns = left + tl.arange(0, ROW)
        inside = columns < d_model
        decoded = tl.zeros([ROW], tl.float32)
        for first in range(0, count, LISTED):
            latents, signs, listed = entries_of(edits, row, first, count)
            f = active_scores(row, first, listed, edits, scratch, k, ACTIVATION)
            change = difference(f, signs, step, needed)
            changed = change != 0.0
            if encoder.decoder_norm is not None:
                change = tl.div_rn(change, tl.load(encoder.decoder_norm + latents, mask=changed, other=1.0))
            if NORMALIZATION != "none":
                change = change * scale
            if decoder.rows is None:
                decoder_row = latents.to(tl.int64)
            else:
                decoder_row = tl.load(decoder.rows + latents, mask=changed, other=0).to(tl.int64)
            w = tl.load(
                decoder.W_dec + decoder_row[:, None] * d_model + columns[None, :],
                mask=changed[:, None] & inside[None, :],
                other=0.0,
            )
            decoded += tl.sum(widen(w) * change[:, None], axis=0)
        at = begin + columns * hidden.column_stride
        edited = widen(tl.load(at, mask=inside, other=0.0)) + decoded
        tl.store(at, narrow(edited, hidden.rows.dtype.element_ty), mask=inside)


@triton.jit
def remember(leaders, best):
    """Brings the latent of a maximum, if there is one, to the front of a row's leaders; the one that was the maximum
    longest ago falls out."""
    latent = packed_latent(best)
    slots = tl.arange(0, LEADERS)
    old = tl.load(leaders + slots)
    end = tl.min(tl.where(old == latent, slots, LEADERS - 1), axis=0)
    tl.debug_barrier()  # all threads have read what is now overwritten
    tl.store(leaders + slots + 1, old, mask=(slots < end) & (best != 0))
    tl.store(leaders, latent, mask=best != 0)


@triton.jit(do_not_specialize=["batch"])
def token_step_kernel(
    hidden, encoder, decoder, edits, strength, stats, scratch, prompt, batch, d_model, d_sae, k,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, LAZY: tl.constexpr, X_PARTS: tl.constexpr,
    EDIT: tl.constexpr, GUARD: tl.constexpr, LATENTS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """One token for each row of a batch; see the module. `batch + passes + batch` programs."""
    groups = tl.cdiv(batch, TOKENS)
    passes = tl.cdiv(d_sae, LATENTS) * groups
    number = tl.atomic_add(scratch.counters + STARTED, 1, sem="relaxed")
    if number < batch:
        prepare(
            number, hidden, encoder, edits, strength, scratch, prompt, d_model, d_sae,
            ACTIVATION, NORMALIZATION, LAZY, EDIT, GUARD,
        )  # fmt: skip
        announce(scratch.counters + PREPARED)
    elif number < batch + passes:
        tile = (number - batch) // groups
        first_row = (number - batch) % groups * TOKENS
        pass_tile(
            tile, first_row, hidden, encoder, edits, strength, scratch, batch, d_model, d_sae,
            ACTIVATION, NORMALIZATION, LAZY, X_PARTS, LATENTS, MODEL,
        )  # fmt: skip
        announce(scratch.counters + PASSED)
    else:
        finish(
            number - batch - passes, passes, hidden, encoder, decoder, edits, strength, stats, scratch, batch,
            d_model, k, ACTIVATION, NORMALIZATION, LAZY,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class StepScratch:
    """The tensors of `Scratch`, for one SAE. Two steps of one SAE must not run at the same time."""

    counters: Tensor
    states: Tensor
    numbers: Tensor
    maxima: Tensor
    listed: Tensor
    ranks: Tensor
    leaders: Tensor

    @classmethod
    def allocate(cls, batch: int, k: int, device: torch.device) -> StepScratch:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            counters=zeros(4),
            states=zeros(batch),
            numbers=zeros(batch, NUMBERS.value, dtype=torch.float32),
            maxima=zeros(batch, dtype=torch.int64),
            listed=zeros(batch, k, dtype=torch.float32),
            ranks=zeros(batch, k),
            leaders=zeros(batch, LEADERS.value) - 1,
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the fields of `Scratch`."""
        return (self.counters, self.states, self.numbers, self.maxima, self.listed, self.ranks, self.leaders)

    def reset(self) -> None:
        """As it has to be found by a launch, whatever one before has left."""
        for tensor in (self.counters, self.maxima, self.ranks):
            tensor.zero_()


_scratch: WeakKeyDictionary[SaeWeights, dict[tuple[int, int], StepScratch]] = WeakKeyDictionary()


def scratch_of(sae: SaeWeights, batch: int, k: int) -> StepScratch:
    """The scratch of an SAE for lists of this length and at least this batch."""
    rows = rows_for(batch)
    return kept(_scratch, sae, (rows, k), lambda: StepScratch.allocate(rows, k, sae.device))


def run(
    hidden: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    b_dec: Tensor | None,
    decoder_norm: Tensor | None,
    magnitude_scale: Tensor | None,
    magnitude_bias: Tensor | None,
    activation: str,
    k: int,
    normalization: str,
    W_dec: Tensor,
    decoder_rows: Tensor | None,
    latents: Tensor,
    signs: Tensor,
    counts: Tensor,
    alpha: float,
    alpha_of_row: Tensor | None,
    enabled: Tensor | None,
    seen: Tensor | None,
    edited: Tensor | None,
    nonfinite: Tensor | None,
    maximum: Tensor | None,
    maximum_sum: Tensor | None,
    maximum_known: Tensor | None,
    latent_edits: Tensor | None,
    counters: Tensor,
    states: Tensor,
    numbers: Tensor,
    maxima: Tensor,
    listed: Tensor,
    ranks: Tensor,
    leaders: Tensor,
    lazy: bool,
    density: Tensor | None = None,
    row_offsets: Tensor | None = None,
    columns: Tensor | None = None,
    values: Tensor | None = None,
    d_sae_out: int = 0,
    k_prompt: int = 0,
    k_diff: int = 0,
    edit: str = "ablate",
    sign_guard: bool = False,
) -> None:
    """Launches the kernel: the operation as a function of nothing but tensors, numbers and names. With a density, the
    lists are looked up first, and written."""
    batch, d_model = hidden.shape
    d_sae = W_enc.shape[0]
    x_parts = triton_launch.parts_of(hidden.dtype, W_enc.dtype, normalization == "none" and b_dec is None)
    tile = triton_launch.tile_for("token_step", W_enc, x_parts)
    stats = None
    if seen is not None:
        stats = Stats(seen, edited, nonfinite, maximum, maximum_sum, maximum_known, latent_edits)  # pyright: ignore[reportArgumentType]
    prompt = None
    if density is not None:
        assert row_offsets is not None  # a map comes whole
        assert columns is not None
        assert values is not None
        prompt = prompt_of(density, row_offsets, columns, values, d_sae_out, k_prompt, k_diff)
    passes = blocks(d_sae, tile.latents) * blocks(batch, TOKENS.value)
    triton_launch.launch(
        token_step_kernel,
        batch + passes + batch,
        {
            "hidden": Hidden(hidden, hidden.stride(0), hidden.stride(1)),
            "encoder": Encoder(W_enc, b_enc, threshold, b_dec, decoder_norm, magnitude_scale, magnitude_bias),
            "decoder": Decoder(W_dec, decoder_rows),
            "edits": Edits(latents, signs, counts, latents.shape[1]),
            "strength": Strength(alpha, alpha_of_row, enabled),
            "stats": stats,
            "scratch": Scratch(counters, states, numbers, maxima, listed, ranks, leaders),
            "prompt": prompt,
            "batch": batch,
            "d_model": d_model,
            "d_sae": d_sae,
            "k": k,
            "ACTIVATION": triton_launch.activation_of(activation),
            "NORMALIZATION": normalization,
            "LAZY": lazy,
            "X_PARTS": x_parts,
            "EDIT": edit,
            "GUARD": sign_guard,
            "LATENTS": tile.latents,
            "MODEL": tile.model,
        },
        tile,
        hidden.device,
    )


_WRITTEN = (
    "hidden", "seen", "edited", "nonfinite", "maximum", "maximum_sum", "maximum_known", "latent_edits",
    "counters", "states", "numbers", "maxima", "listed", "ranks", "leaders",
)  # fmt: skip

# Compiled graphs see these operations; eager calls `run` itself, which spares them the bookkeeping.
operation = torch.library.custom_op("dspa_triton::token_step", run, mutates_args=_WRITTEN)
operation_with_lookup = torch.library.custom_op(
    "dspa_triton::token_step_with_lookup", run, mutates_args=(*_WRITTEN, "latents", "signs", "counts")
)


@operation_with_lookup.register_fake
@operation.register_fake
def _(*arguments: object, **options: object) -> None:
    """Everything happens in place, and no shape changes."""


def step_arguments(
    hidden: Tensor,
    sae: SaeWeights,
    lists: tuple[Tensor, Tensor, Tensor],
    alpha: float | Tensor,
    enabled: Tensor | None,
    stats: TokenStats | None,
    mode: StepMode | None,
) -> tuple[Any, ...]:
    """The arguments of `run`, up to the mode."""
    return (
        hidden,
        *encoder_arguments(sae),
        sae.W_dec,
        sae.decoder_rows,
        *lists,
        0.0 if isinstance(alpha, Tensor) else alpha,
        alpha.contiguous() if isinstance(alpha, Tensor) else None,
        None if enabled is None else enabled.contiguous(),
        *((None,) * 7 if stats is None else counters_of(stats)),
        *scratch_of(sae, lists[0].shape[0], lists[0].shape[1]).tensors(),
        mode != "dense",
    )


def call(compiled: Callable[..., None], sae: SaeWeights, *arguments: Any) -> None:
    """Runs a step, through the operation that a compiled graph sees or directly."""
    if torch.compiler.is_compiling():
        compiled(*arguments)
        return
    try:
        run(*arguments)
    except BaseException:
        for scratch in _scratch[sae].values():  # a launch that did not end leaves its counters anywhere
            scratch.reset()
        raise


def token_step(
    hidden: Tensor,
    sae: SaeWeights,
    edits: EditList,
    alpha: float | Tensor,
    enabled: Tensor | None,
    stats: TokenStats | None,
    mode: StepMode | None,
) -> None:
    """See `dspa.kernels.token_step`. "screened" is served as "lazy", which is also the default."""
    if hidden.shape[0] == 0:
        return
    lists = (edits.latents.contiguous(), edits.signs.contiguous(), edits.counts.contiguous())
    call(operation, sae, *step_arguments(hidden, sae, lists, alpha, enabled, stats, mode))


def token_step_with_lookup(
    hidden: Tensor,
    sae: SaeWeights,
    density: Tensor,
    conditional_map: CsrMap,
    k_prompt: int,
    k_diff: int,
    edit: EditKind,
    sign_guard: bool,
    alpha: float | Tensor,
    enabled: Tensor | None,
    stats: TokenStats | None,
    mode: StepMode | None,
) -> EditList:
    """See `dspa.kernels.token_step_with_lookup`. The lookup is part of the same launch."""
    lists = new_lists(density.shape[0], k_diff, edit, density.device)
    if hidden.shape[0] > 0:
        arguments = step_arguments(hidden, sae, lists, alpha, enabled, stats, mode)
        prompt = (density, *map_arguments(conditional_map), k_prompt, k_diff, edit, sign_guard)
        call(operation_with_lookup, sae, *arguments, *prompt)
    return EditList(*lists)
