"""The second part: the pass of one tile of `W_enc` for some rows of the batch."""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from dspa.kernels.token_step.triton_kernel.rows import alpha_of, packed, packed_value, preparing
from dspa.kernels.token_step.triton_kernel.screening import possible_maxima, raise_to_floors, screen_tile
from dspa.kernels.token_step.triton_kernel.structures import (
    DISABLED,
    FACTOR,
    NUMBERS,
    PREPARED,
    SHIFT,
)
from dspa.kernels.triton_common.tiles import (
    fetch_rows,
    numbers_of,
    score_of,
    tile_products,
    wait_for,
)

COMPARED = tl.constexpr(1 << 12)  # pairs of a score and a listed one that are compared at a time
LOOKS = tl.constexpr(1024)  # at least 4 elements for each thread of a program


@triton.jit
def agreed(number):
    """The largest of what the threads of a program have found, each of them one number, 0 or more: all know it then.

    A reduction over elements that are spread over all warps has one result for all of them; one over few elements,
    which every warp holds, may not.
    """
    lanes = tl.arange(0, LOOKS)
    return tl.max(tl.where(lanes % 2 == 0, number, 0), axis=0)


@triton.jit
def any_unsettled(bars, rows, inside, strength, maxima):
    """Whether one of some rows still needs a maximum, by the maxima or floors that others have found so far.

    These rise meanwhile, so threads that look at one row may see different ones; yet all warps of a program have to
    decide alike, since products on tensor cores take them all (else: an illegal instruction).
    """
    floor = packed_value(tl.load(maxima + rows, mask=inside, other=0, volatile=True))
    settled = (bars < 0.0) | (bars <= alpha_of(strength, rows, inside) * floor)
    return agreed(tl.max((inside & ~settled).to(tl.int32), axis=0)) != 0


@triton.jit
def some_entries(rows, first, counts, edits, scratch, ENTRIES: tl.constexpr):
    """Some entries of the lists of some rows, `[rows, entries]`: their places, which are there, latents, and scores."""
    entries = first + tl.arange(0, ENTRIES)
    listed = entries[None, :] < counts[:, None]
    at = rows.to(tl.int64)[:, None] * edits.capacity + entries[None, :]
    latent = tl.load(edits.latents + at, mask=listed, other=-1)
    known = tl.load(scratch.listed + at, mask=listed, other=float("-inf"), cache_modifier=".cg")
    return at, listed, latent, known


@triton.jit
def count_ranks(score, latents, rows, is_open, edits, scratch, LATENTS: tl.constexpr, TOKENS: tl.constexpr):
    """Adds to the ranks of the listed latents how many of this tile are ahead of them.

    Returns the scores with those of listed latents replaced by the ones that were prepared: a latent has one score.
    """
    ENTRIES: tl.constexpr = min(16, max(1, COMPARED // (LATENTS * TOKENS)))  # pyright: ignore[reportAssignmentType]
    counts = tl.minimum(tl.load(edits.counts + rows, mask=is_open, other=0), edits.capacity)
    most = tl.max(counts, axis=0)
    for first in range(0, most, ENTRIES):
        _, _, latent, known = some_entries(rows, first, counts, edits, scratch, ENTRIES)
        same = latents[:, None, None] == latent[None, :, :]
        prepared = tl.max(tl.where(same, known[None, :, :], float("-inf")), axis=2)
        score = tl.where(tl.max(same.to(tl.int32), axis=2) != 0, prepared, score)
    for first in range(0, most, ENTRIES):
        at, listed, latent, known = some_entries(rows, first, counts, edits, scratch, ENTRIES)
        other = score[:, :, None]
        tied = (other == known[None, :, :]) & (latents[:, None, None] < latent[None, :, :])
        ahead = tl.sum(((other > known[None, :, :]) | tied).to(tl.int32), axis=0)
        tl.atomic_add(scratch.ranks + at, ahead, mask=listed & (known > 0.0) & (ahead > 0), sem="relaxed")
    return score


@triton.jit
def screen_rows(
    tile, first_row, hidden, encoder, strength, scratch, screen, batch, d_model, d_sae,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, X_PARTS: tl.constexpr,
    LATENTS: tl.constexpr, TOKENS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """Bounds the scores of one tile of latents, unless the floors of its rows are high enough already."""
    rows = first_row + tl.arange(0, TOKENS)
    is_open = rows < batch
    wait_for(scratch.counters + PREPARED, preparing(batch, ACTIVATION, True))
    bars = tl.load(scratch.bars + rows, mask=is_open, other=DISABLED, cache_modifier=".cg")
    is_open &= ~(bars < 0.0)
    shift = 0.0
    factor = 1.0
    if NORMALIZATION != "none":
        numbers = scratch.numbers + rows * NUMBERS
        shift = tl.load(numbers + SHIFT, mask=is_open, other=0.0, cache_modifier=".cg")[:, None]
        factor = tl.load(numbers + FACTOR, mask=is_open, other=0.0, cache_modifier=".cg")[:, None]
    if any_unsettled(bars, rows, is_open, strength, screen.floors):
        screen_tile(
            tile, rows, is_open, shift, factor, hidden, encoder, screen, d_model, d_sae,
            ACTIVATION, NORMALIZATION, X_PARTS, LATENTS, TOKENS, MODEL,
        )  # fmt: skip


@triton.jit
def pass_tile(
    tile, first_row, hidden, encoder, edits, strength, scratch, screen, batch, d_model, d_sae,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, LAZY: tl.constexpr, X_PARTS: tl.constexpr,
    LATENTS: tl.constexpr, TOKENS: tl.constexpr, MODEL: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """Raises the maxima, and for topk the ranks, of some rows by the scores of one tile of latents; where a step is
    screened, by those that may be maxima. A score has the same bits whichever others are computed with it.

    Args:
        EARLY: whether it multiplies before it waits for the preparation.
    """
    rows = first_row + tl.arange(0, TOKENS)
    is_open = rows < batch
    latents = tile * LATENTS + tl.arange(0, LATENTS)
    inside = latents < d_sae
    begin = hidden.rows + rows.to(tl.int64)[:, None] * hidden.row_stride
    product = tl.zeros([LATENTS, TOKENS], tl.float32)
    shift = 0.0
    factor = 1.0
    bars = tl.zeros([TOKENS], tl.float32)
    if EARLY:
        product = tile_products(
            encoder.W_enc, latents, inside, begin, hidden.column_stride, is_open, shift, factor, encoder.b_dec, d_model,
            product, NORMALIZATION, X_PARTS, MODEL,
        )  # fmt: skip
    if LAZY or ACTIVATION == "topk" or NORMALIZATION != "none":  # it needs what the preparation finds out
        wait_for(scratch.counters + PREPARED, preparing(batch, ACTIVATION, LAZY))
        bars = tl.load(scratch.bars + rows, mask=is_open, other=DISABLED, cache_modifier=".cg")
        if NORMALIZATION != "none":
            numbers = scratch.numbers + rows * NUMBERS
            shift = tl.load(numbers + SHIFT, mask=is_open, other=0.0, cache_modifier=".cg")[:, None]
            factor = tl.load(numbers + FACTOR, mask=is_open, other=0.0, cache_modifier=".cg")[:, None]
        is_open &= ~(bars < 0.0)
    if screen is not None:
        wait_for(screen.counter, tl.cdiv(d_sae, LATENTS) * tl.cdiv(batch, TOKENS))
        inside &= possible_maxima(tile, rows, batch, strength, scratch, screen, LATENTS, TOKENS)
        needed = tl.max(inside.to(tl.int32), axis=0) != 0
        if tile == 0:
            raise_to_floors(rows, batch, scratch, screen)
    elif LAZY:
        needed = any_unsettled(bars, rows, is_open, strength, scratch.maxima)
    else:
        needed = tl.max(is_open.to(tl.int32), axis=0) != 0
    if needed:
        if AHEAD > 0 and screen is not None:
            some = tl.max(tl.where(inside, latents, 0), axis=0)
            fetch_rows(encoder.W_enc + tl.where(inside, latents, some).to(tl.int64) * d_model, d_model)
        of_latents = numbers_of(encoder, latents[:, None], inside[:, None], ACTIVATION)
        if not EARLY:
            product = tile_products(
                encoder.W_enc, latents, inside, begin, hidden.column_stride, is_open, shift, factor, encoder.b_dec,
                d_model, product, NORMALIZATION, X_PARTS, MODEL,
            )  # fmt: skip
        score = score_of(product, of_latents, encoder, ACTIVATION)
        if ACTIVATION == "topk":
            score = count_ranks(score, latents, rows, is_open, edits, scratch, LATENTS, TOKENS)
        score = tl.where(inside[:, None] & (score > 0.0), score, 0.0)
        largest, where = tl.max(score, axis=0, return_indices=True)
        found = is_open & (largest > 0.0)
        tl.atomic_max(scratch.maxima + rows, packed(largest, tile * LATENTS + where), mask=found, sem="relaxed")
