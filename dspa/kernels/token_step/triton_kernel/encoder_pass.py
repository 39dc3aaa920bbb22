"""The second part: the pass of one tile of `W_enc` for some rows of the batch."""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from dspa.kernels.token_step.triton_kernel.rows import alpha_of, packed, packed_value
from dspa.kernels.token_step.triton_kernel.screening import possible_maxima, raise_to_floors, screen_tile
from dspa.kernels.token_step.triton_kernel.structures import (
    BAR,
    DISABLED,
    FACTOR,
    NUMBERS,
    OPEN,
    PREPARED,
    SHIFT,
)
from dspa.kernels.triton_common.tiles import (
    add_products,
    dot,
    encoder_input,
    fetch_ahead,
    fetch_rows,
    numbers_of,
    score_of,
    wait_for,
)

LOOKS = tl.constexpr(1024)  # at least 4 elements for each thread of a program


@triton.jit
def any_unsettled(first_row, batch, strength, scratch, maxima, TOKENS: tl.constexpr):
    """Whether one of some open rows still needs a maximum, by the maxima or floors that others have found so far.

    These rise meanwhile, so threads that look at one row may see different ones; yet all warps of a program have to
    decide alike, since products on tensor cores take them all (else: an illegal instruction). A reduction over elements
    that are spread over all warps has one result for all of them; one over few rows, which every warp holds, may not.
    """
    rows = first_row + tl.arange(0, LOOKS) % TOKENS
    inside = rows < batch
    state = tl.load(scratch.states + rows, mask=inside, other=DISABLED, cache_modifier=".cg")
    bar = tl.load(scratch.numbers + rows * NUMBERS + BAR, mask=inside, other=0.0, cache_modifier=".cg")
    floor = packed_value(tl.load(maxima + rows, mask=inside, other=0, volatile=True))
    settled = bar <= alpha_of(strength, rows, inside) * floor
    return tl.max(((state == OPEN) & ~settled).to(tl.int32), axis=0) != 0


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
def screen_rows(
    tile, first_row, hidden, encoder, strength, scratch, screen, batch, d_model, d_sae,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, X_PARTS: tl.constexpr,
    LATENTS: tl.constexpr, TOKENS: tl.constexpr, MODEL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Bounds the scores of one tile of latents, unless the floors of its rows are high enough already."""
    rows = first_row + tl.arange(0, TOKENS)
    is_open = rows < batch
    if AHEAD > 0:
        latents = tile * LATENTS + tl.arange(0, LATENTS)
        fetch_ahead(screen.codes + latents.to(tl.int64) * screen.width, AHEAD)
    wait_for(scratch.counters + PREPARED, batch)
    is_open &= tl.load(scratch.states + rows, mask=is_open, other=DISABLED, cache_modifier=".cg") == OPEN
    shift = 0.0
    factor = 1.0
    if NORMALIZATION != "none":
        numbers = scratch.numbers + rows * NUMBERS
        shift = tl.load(numbers + SHIFT, mask=is_open, other=0.0, cache_modifier=".cg")[:, None]
        factor = tl.load(numbers + FACTOR, mask=is_open, other=0.0, cache_modifier=".cg")[:, None]
    if any_unsettled(first_row, batch, strength, scratch, screen.floors, TOKENS):
        screen_tile(
            tile, rows, is_open, shift, factor, hidden, encoder, screen, d_model, d_sae,
            ACTIVATION, NORMALIZATION, X_PARTS, LATENTS, TOKENS, MODEL,
        )  # fmt: skip


@triton.jit
def pass_tile(
    tile, first_row, hidden, encoder, edits, strength, scratch, screen, batch, d_model, d_sae,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, LAZY: tl.constexpr, X_PARTS: tl.constexpr,
    LATENTS: tl.constexpr, TOKENS: tl.constexpr, MODEL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """Raises the maxima, and for topk the ranks, of some rows by the scores of one tile of latents; where a step is
    screened, by those that may be maxima. A score has the same bits whichever others are computed with it."""
    rows = first_row + tl.arange(0, TOKENS)
    is_open = rows < batch
    latents = tile * LATENTS + tl.arange(0, LATENTS)
    inside = latents < d_sae
    weights = encoder.W_enc + (tile * LATENTS).to(tl.int64) * d_model + tl.arange(0, LATENTS)[:, None] * d_model
    shift = 0.0
    factor = 1.0
    if LAZY or ACTIVATION == "topk" or NORMALIZATION != "none":  # it needs what the preparation finds out
        if AHEAD > 0 and screen is None:  # and begins to read meanwhile
            fetch_ahead(encoder.W_enc + tl.minimum(latents, d_sae - 1).to(tl.int64) * d_model, AHEAD)
        wait_for(scratch.counters + PREPARED, batch)
        states = tl.load(scratch.states + rows, mask=is_open, other=DISABLED, cache_modifier=".cg")
        if NORMALIZATION != "none":
            numbers = scratch.numbers + rows * NUMBERS
            shift = tl.load(numbers + SHIFT, mask=is_open, other=0.0, cache_modifier=".cg")[:, None]
            factor = tl.load(numbers + FACTOR, mask=is_open, other=0.0, cache_modifier=".cg")[:, None]
        is_open &= states == OPEN
    if screen is not None:
        wait_for(screen.counter, tl.cdiv(d_sae, LATENTS) * tl.cdiv(batch, TOKENS))
        inside &= possible_maxima(tile, rows, batch, strength, scratch, screen, LATENTS, TOKENS)
        needed = tl.max(inside.to(tl.int32), axis=0) != 0
        if tile == 0:
            raise_to_floors(rows, batch, scratch, screen)
    elif LAZY:
        needed = any_unsettled(first_row, batch, strength, scratch, scratch.maxima, TOKENS)
    else:
        needed = tl.max(is_open.to(tl.int32), axis=0) != 0
    if needed:
        if AHEAD > 0 and screen is not None:
            some = tl.max(tl.where(inside, latents, 0), axis=0)
            fetch_rows(encoder.W_enc + tl.where(inside, latents, some).to(tl.int64) * d_model, d_model)
        begin = hidden.rows + rows.to(tl.int64)[:, None] * hidden.row_stride
        of_latents = numbers_of(encoder, latents[:, None], inside[:, None], ACTIVATION)
        product = tl.zeros([LATENTS, TOKENS], tl.float32)
        rest = tl.zeros([LATENTS, TOKENS], tl.float32)
        for first in tl.range(0, d_model, MODEL):
            columns = first + tl.arange(0, MODEL)
            within = columns < d_model
            valid = is_open[:, None] & within[None, :]
            w = tl.load(weights + columns[None, :], mask=inside[:, None] & within[None, :], other=0.0)
            h = tl.load(begin + columns[None, :] * hidden.column_stride, mask=valid, other=0.0)
            if X_PARTS == 0:  # as they are loaded: both stay in shared memory, and the products are asynchronous
                product = dot(w, tl.trans(h), product)
            else:
                x = encoder_input(
                    h, shift, factor, encoder.b_dec, columns[None, :], within[None, :], valid, NORMALIZATION
                )  # fmt: skip
                product, rest = add_products(w, tl.trans(x), product, rest, X_PARTS)
        score = score_of(product + rest, of_latents, encoder, ACTIVATION)
        if ACTIVATION == "topk":
            score = count_ranks(score, latents, rows, is_open, edits, scratch)
        score = tl.where(inside[:, None] & (score > 0.0), score, 0.0)
        largest, where = tl.max(score, axis=0, return_indices=True)
        found = is_open & (largest > 0.0)
        tl.atomic_max(scratch.maxima + rows, packed(largest, tile * LATENTS + where), mask=found, sem="relaxed")
