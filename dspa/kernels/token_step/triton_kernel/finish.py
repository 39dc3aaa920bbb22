"""The last part: the edit of a row, its counters, and the scratch cleared for the next launch."""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from dspa.kernels.token_step.triton_kernel.rows import alpha_of, count_of, entries_of, packed_latent, packed_value
from dspa.kernels.token_step.triton_kernel.structures import (
    DISABLED,
    FINISHED,
    LARGEST,
    NONFINITE,
    NUMBERS,
    OPEN,
    PASSED,
    PREPARED,
    RECENT,
    SCALE,
    SETTLED,
)
from dspa.kernels.triton_common.rows import LISTED, ROW, add_to
from dspa.kernels.triton_common.tiles import announce, is_finite, narrow, wait_for, widen


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
    """`f~' - f~` of docs/method.md, section 4. Where M_t is not needed, all listed latents become 0."""
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
def remember(recent_argmax, best):
    """Moves the latent of a maximum, if there is one, to the front of a row's recent argmax latents; the least recent
    one is dropped."""
    latent = packed_latent(best)
    slots = tl.arange(0, RECENT)
    old = tl.load(recent_argmax + slots)
    end = tl.min(tl.where(old == latent, slots, RECENT - 1), axis=0)
    tl.debug_barrier()  # all threads have read what is now overwritten
    tl.store(recent_argmax + slots + 1, old, mask=(slots < end) & (best != 0))
    tl.store(recent_argmax, latent, mask=best != 0)


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
            remember(scratch.recent_argmax + row * RECENT, best)

    tl.debug_barrier()  # all threads have read what is now cleared
    tl.store(scratch.maxima + row, 0)
    if ACTIVATION == "topk":
        for first in range(0, edits.capacity, LISTED):
            entries = first + tl.arange(0, LISTED)
            zero = tl.zeros([LISTED], tl.int32)
            tl.store(scratch.ranks + row * edits.capacity + entries, zero, mask=entries < edits.capacity)
    if announce(scratch.counters + FINISHED) == batch - 1:
        # The counters are cleared when no program uses them: after all passes, including those no row waited for.
        wait_for(scratch.counters + PASSED, passes)
        tl.store(scratch.counters + tl.arange(0, 4), tl.zeros([4], tl.int32))
