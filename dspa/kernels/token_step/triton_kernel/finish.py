"""The last parts: the edit of a row, its counters, and the scratch cleared for the next launch."""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from dspa.kernels.token_step.triton_kernel.encoder_pass import agreed, any_unsettled
from dspa.kernels.token_step.triton_kernel.rows import (
    alpha_of,
    count_of,
    entries_of,
    packed_latent,
    packed_value,
    preparing,
)
from dspa.kernels.token_step.triton_kernel.structures import (
    DISABLED,
    FINISHED,
    LARGEST,
    NUMBERS,
    PASSED,
    PREPARED,
    RECENT,
    SCALE,
    SETTLED,
    SLICE,
)
from dspa.kernels.triton_common.rows import LISTED
from dspa.kernels.triton_common.tiles import is_finite, narrow, take_leave, wait_for, widen

CLEARED = tl.constexpr(256)  # elements cleared at a time


@triton.jit
def listed_scores(row, first, listed, edits, scratch):
    """Scores of 16 entries of a list."""
    at = row.to(tl.int64) * edits.capacity + first + tl.arange(0, LISTED)
    return tl.load(scratch.listed + at, mask=listed, other=0.0, cache_modifier=".cg")


@triton.jit
def activations_of(score, row, first, listed, edits, scratch, k, ACTIVATION: tl.constexpr):
    """Activations of 16 entries of a list with these scores; 0 where inactive. For topk the pass must be over."""
    if ACTIVATION == "topk":
        at = row.to(tl.int64) * edits.capacity + first + tl.arange(0, LISTED)
        rank = tl.load(scratch.ranks + at, mask=listed, other=0, cache_modifier=".cg")
        score = tl.where(rank < k, score, 0.0)
    return tl.where(score > 0.0, score, 0.0)


@triton.jit
def active_entries(row, first, count, edits, scratch, k, ACTIVATION: tl.constexpr):
    """16 entries of a list: latents, signs and activations; 0 where there is no entry."""
    latents, signs, listed = entries_of(edits, row, first, count)
    score = listed_scores(row, first, listed, edits, scratch)
    return latents, signs, activations_of(score, row, first, listed, edits, scratch, k, ACTIVATION)


@triton.jit
def difference(f, signs, step, needed):
    """`f~' - f~` of docs/method.md, section 4. Where M_t is not needed, all listed latents become 0."""
    lowered = f - step
    lowered = tl.where(needed & ((lowered > 0.0) | (lowered != lowered)), lowered, 0.0)
    moved = tl.where(signs > 0, f + step, lowered)
    return tl.where(f > 0.0, moved - f, 0.0)


@triton.jit
def stays(f, signs, step):
    """Whether some latent does not become 0, so that its new value depends on the step."""
    return tl.max(((f > 0.0) & ((signs > 0) | ~(f <= step))).to(tl.int32), axis=0) != 0


@triton.jit
def decoder_weights(latents, wanted, columns, inside, decoder, d_model):
    """Some columns of the rows of `W_dec` of 16 latents, `[16, columns]`."""
    if decoder.rows is None:
        rows = latents.to(tl.int64)
    else:
        rows = tl.load(decoder.rows + latents, mask=wanted, other=0).to(tl.int64)
    at = decoder.W_dec + rows[:, None] * d_model + columns[None, :]
    return tl.load(at, mask=wanted[:, None] & inside[None, :], other=0.0)


@triton.jit
def decode(w, change, latents, encoder, scale, NORMALIZATION: tl.constexpr):
    """The sum of 16 rows of decoder weights times the changes of their latents."""
    changed = change != 0.0
    if encoder.decoder_norm is not None:
        change = tl.div_rn(change, tl.load(encoder.decoder_norm + latents, mask=changed, other=1.0))
    if NORMALIZATION != "none":
        change = change * scale
    return tl.sum(tl.where(changed[:, None], widen(w), 0.0) * change[:, None], axis=0)


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
def clear(finishes, passes, batch, edits, scratch, ACTIVATION: tl.constexpr):
    """Leaves the scratch as a launch has to find it, once no other program uses it any more: all passes are over,
    including those that no row waited for, and those who finish have read what is cleared."""
    wait_for(scratch.counters + PASSED, passes)
    wait_for(scratch.counters + FINISHED, finishes)
    for first in range(0, batch, CLEARED):
        rows = first + tl.arange(0, CLEARED)
        tl.store(scratch.maxima + rows, tl.zeros([CLEARED], tl.int64), mask=rows < batch)
    if ACTIVATION == "topk":
        for first in range(0, batch * edits.capacity, CLEARED):
            entries = first + tl.arange(0, CLEARED)
            tl.store(scratch.ranks + entries, tl.zeros([CLEARED], tl.int32), mask=entries < batch * edits.capacity)
    tl.store(scratch.counters + tl.arange(0, 4), tl.zeros([4], tl.int32))


@triton.jit
def finish(
    row, piece, each, passes, hidden, encoder, decoder, edits, strength, stats, scratch, batch, d_model, k,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, LAZY: tl.constexpr,
):  # fmt: skip
    """Writes the edit of a row to some slices of its columns. The first program of a row counts it as well."""
    begin = hidden.rows + row.to(tl.int64) * hidden.row_stride
    first_column = piece * each * SLICE
    columns = first_column + tl.arange(0, SLICE)
    inside = columns < d_model
    numbers = scratch.numbers + row * NUMBERS
    alpha = alpha_of(strength, row, True)
    wait_for(scratch.counters + PREPARED, preparing(batch, ACTIVATION, LAZY))
    bar = tl.load(scratch.bars + row, cache_modifier=".cg")
    largest = tl.load(numbers + LARGEST, cache_modifier=".cg")
    scale = tl.load(numbers + SCALE, cache_modifier=".cg")
    finite = ~(bar < 0.0) | (bar == SETTLED)
    count = count_of(edits, row)
    if ~finite | (largest == 0.0):  # no listed latent is active
        count = 0

    # What the first entries may need is loaded before the pass is over.
    latents, signs, listed = entries_of(edits, row, 0, count)
    score = listed_scores(row, 0, listed, edits, scratch)
    w = decoder_weights(latents, score > 0.0, columns, inside, decoder, d_model)
    h = tl.load(begin + columns * hidden.column_stride, mask=inside & (count > 0), other=0.0)

    is_open = ~(bar < 0.0)
    best = tl.cast(0, tl.int64)
    if LAZY:
        zeros = tl.zeros([LISTED], tl.int32)
        was_open = is_open
        is_open = any_unsettled(bar + zeros, row + zeros, zeros == 0, strength, scratch.maxima)
        if was_open & ~is_open:  # by a maximum that may still rise
            best = agreed(tl.load(scratch.maxima + row, volatile=True))
    if is_open:
        wait_for(scratch.counters + PASSED, passes)
        best = tl.load(scratch.maxima + row, cache_modifier=".cg")
    maximum = tl.maximum(packed_value(best), largest)
    step = alpha * maximum
    f = activations_of(score, row, 0, listed, edits, scratch, k, ACTIVATION)
    needed = stays(f, signs, step)  # whether the edit depends on the value of M_t
    for first in range(LISTED, count, LISTED):
        _, more_signs, more = active_entries(row, first, count, edits, scratch, k, ACTIVATION)
        needed |= stays(more, more_signs, step)
    needed &= is_open
    finite &= is_finite(maximum) | ~needed
    change = difference(f, signs, step, needed)
    finite &= tl.max((~is_finite(change)).to(tl.int32), axis=0) == 0
    edited = tl.max((change != 0.0).to(tl.int32), axis=0) != 0
    for first in range(LISTED, count, LISTED):
        _, more_signs, more = active_entries(row, first, count, edits, scratch, k, ACTIVATION)
        more = difference(more, more_signs, step, needed)
        finite &= tl.max((~is_finite(more)).to(tl.int32), axis=0) == 0
        edited |= tl.max((more != 0.0).to(tl.int32), axis=0) != 0
    edited &= finite
    if ACTIVATION != "topk":  # it has read what will be cleared
        take_leave(scratch.counters + FINISHED)

    if edited:
        for ahead in range(SLICE, (each + 1) * SLICE, SLICE):
            decoded = tl.zeros([SLICE], tl.float32) + decode(w, change, latents, encoder, scale, NORMALIZATION)
            for first in range(LISTED, count, LISTED):
                others, more_signs, more = active_entries(row, first, count, edits, scratch, k, ACTIVATION)
                more = difference(more, more_signs, step, needed)
                more_w = decoder_weights(others, more != 0.0, columns, inside, decoder, d_model)
                decoded += decode(more_w, more, others, encoder, scale, NORMALIZATION)
            edited_h = narrow(widen(h) + decoded, hidden.rows.dtype.element_ty)
            tl.store(begin + columns * hidden.column_stride, edited_h, mask=inside)
            columns = first_column + ahead + tl.arange(0, SLICE)
            inside = (columns < d_model) & (ahead < each * SLICE)
            w = decoder_weights(latents, change != 0.0, columns, inside, decoder, d_model)
            h = tl.load(begin + columns * hidden.column_stride, mask=inside, other=0.0)
    if (piece == 0) & (bar != DISABLED):
        if stats is not None:
            for first in range(0, count, LISTED):
                others, more_signs, more = active_entries(row, first, count, edits, scratch, k, ACTIVATION)
                changed = edited & (difference(more, more_signs, step, needed) != 0.0)
                one = tl.full([LISTED], 1, tl.int64)
                tl.atomic_add(stats.latent_edits + others, one, mask=changed, sem="relaxed")
            known = finite
            if LAZY:
                known &= needed
            # Nobody else adds to them; an atomic addition is one that nothing waits for.
            tl.atomic_add(stats.seen + row, tl.cast(1, tl.int64), sem="relaxed")
            tl.atomic_add(stats.edited + row, edited.to(tl.int64), sem="relaxed")
            tl.atomic_add(stats.nonfinite + row, (~finite).to(tl.int64), sem="relaxed")
            tl.atomic_add(stats.maximum_known + row, known.to(tl.int64), sem="relaxed")
            tl.atomic_add(stats.maximum_sum + row, tl.where(known, maximum, 0.0).to(tl.float64), sem="relaxed")
            tl.store(stats.maximum + row, tl.where(known, maximum, float("nan")).to(tl.float64))
        if LAZY:
            remember(scratch.recent_argmax + row * RECENT, best)

    if ACTIVATION == "topk":
        take_leave(scratch.counters + FINISHED)
