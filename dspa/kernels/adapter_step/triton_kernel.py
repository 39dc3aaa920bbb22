"""The three Triton kernels of an adapter step, launched one after the other.

`fire` multiplies one tile of the adapter's weight with 16 tokens and lists the latents of the tile that fire, for each
token. `change` turns the lists of a token's tiles into one, by ascending latent, and with the clip computes the
activations of latents that fall. `decode` adds the decoded changes to some columns of a row.

No sum depends on the order of programs, and nothing about a row on the batch: each row is one column of a product that
always has 16, and its list is its own.
"""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from dspa.kernels.triton_common.rows import LISTED, ROW, TOKENS, add_to, products_of
from dspa.kernels.triton_common.tiles import dirty_inputs, is_finite, narrow, normalizer, scores, tile_products, widen

NUMBERS = tl.constexpr(3)  # of a token: what normalises it (shift, factor), and the scale of its decoded difference


class Adapter(NamedTuple):
    """The tensors of `AdapterWeights`."""

    weight: Tensor
    bias: Tensor
    threshold: Tensor


class Lists(NamedTuple):
    """What the kernels exchange; each launch writes what the next one reads.

    Attributes:
        fired: `[B, tiles]` int32, latents of a tile that fire.
        bad: `[B, tiles]` int32, 1 where a tile found something that is not finite.
        numbers: `[B, 3]` float32, see `NUMBERS`.
        tile_latents, tile_values: `[B, d_sae]` int32 and float32, the latents that fire and their `v`, by ascending
            latent from the first latent of each tile on.
        latents, changes: `[B, d_sae]` int32 and float32, the same latents without gaps, and by how much each changes.
    """

    fired: Tensor
    bad: Tensor
    numbers: Tensor
    tile_latents: Tensor
    tile_values: Tensor
    latents: Tensor
    changes: Tensor


class Counters(NamedTuple):
    """The tensors of `TokenStats` that an adapter step adds to."""

    seen: Tensor
    edited: Tensor
    nonfinite: Tensor
    latent_edits: Tensor


@triton.jit(do_not_specialize=["batch"])
def fire(
    hidden, adapter, b_dec, enabled, lists, batch, d_model, d_sae,
    SOFT: tl.constexpr, NORMALIZATION: tl.constexpr, X_PARTS: tl.constexpr, LATENTS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """Which latents of one tile fire for 16 tokens. Neighbouring programs share rows of the weight."""
    groups = tl.cdiv(batch, TOKENS)
    tiles = tl.cdiv(d_sae, LATENTS)
    tile = tl.program_id(0) // groups
    rows = tl.program_id(0) % groups * TOKENS + tl.arange(0, TOKENS)
    inside = rows < batch
    is_token = inside
    if enabled is not None:
        is_token &= tl.load(enabled + rows, mask=inside, other=0) != 0
    slot = rows * tiles + tile
    if tl.max(is_token.to(tl.int32), axis=0) == 0:
        tl.store(lists.fired + slot, tl.zeros([TOKENS], tl.int32), mask=inside)
    else:
        latents = tile * LATENTS + tl.arange(0, LATENTS)
        is_latent = latents < d_sae
        begin = hidden.rows + rows.to(tl.int64)[:, None] * hidden.row_stride
        shift, factor, scale = normalizer(
            begin, hidden.column_stride, d_model, is_token[:, None], NORMALIZATION, MODEL
        )  # fmt: skip
        product = tl.zeros([LATENTS, TOKENS], tl.float32)
        product = tile_products(
            adapter.weight, latents, is_latent, begin, hidden.column_stride, is_token, shift, factor, b_dec, d_model,
            product, NORMALIZATION, X_PARTS, MODEL,
        )  # fmt: skip
        y = product + tl.load(adapter.bias + latents, mask=is_latent, other=0.0)[:, None]
        threshold = tl.load(adapter.threshold + latents, mask=is_latent, other=float("inf"))[:, None]  # masked
        least = tl.where(threshold < 0.0, 0.0, threshold)
        masked = ~(least < float("inf"))
        if SOFT:
            size = tl.abs(y)
            value = tl.where(y < 0.0, least - size, size - least)
        else:
            size = y
            value = y
        fires = ~(size <= least) & ~masked & is_token[None, :]
        bad = ~is_finite(y) & (threshold != float("inf")) & is_token[None, :]
        place = tl.cumsum(fires.to(tl.int32), axis=0) - 1
        at = rows.to(tl.int64)[None, :] * d_sae + tile * LATENTS + place
        tl.store(lists.tile_latents + at, tl.broadcast_to(latents[:, None], fires.shape), mask=fires)
        tl.store(lists.tile_values + at, value, mask=fires)
        dirty = tl.max(bad.to(tl.int32), axis=0)
        if tile == 0:  # it sees to what concerns the tokens themselves
            numbers = lists.numbers + rows[:, None] * NUMBERS
            tl.store(numbers, shift, mask=is_token[:, None])
            tl.store(numbers + 1, factor, mask=is_token[:, None])
            tl.store(numbers + 2, scale, mask=is_token[:, None])
            dirty |= dirty_inputs(
                begin, hidden.column_stride, is_token, shift, factor, b_dec, d_model, NORMALIZATION, MODEL
            )  # fmt: skip
            dirty |= tl.max((~is_finite(scale)).to(tl.int32), axis=1)
        tl.store(lists.fired + slot, tl.sum(fires.to(tl.int32), axis=0), mask=inside)
        tl.store(lists.bad + slot, dirty, mask=inside)


@triton.jit
def change(
    hidden, encoder, lists, d_model, d_sae,
    CLIP: tl.constexpr, ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, LATENTS: tl.constexpr,
    TILES: tl.constexpr,
):  # fmt: skip
    """By how much the latents of one tile change for one token: `delta`, at their place in the token's list."""
    tiles = tl.cdiv(d_sae, LATENTS)
    tile = tl.program_id(0) % tiles
    row = tl.program_id(0) // tiles
    count = tl.load(lists.fired + row * tiles + tile)
    if count > 0:
        others = tl.arange(0, TILES)
        before = tl.sum(tl.load(lists.fired + row * tiles + others, mask=others < tile, other=0), axis=0)
        begin = hidden.rows + row.to(tl.int64) * hidden.row_stride
        shift = tl.load(lists.numbers + row * NUMBERS)
        factor = tl.load(lists.numbers + row * NUMBERS + 1)
        of_row = row.to(tl.int64) * d_sae
        bad = 0
        for first in range(0, count, LISTED):
            entries = first + tl.arange(0, LISTED)
            listed = entries < count
            at = of_row + tile * LATENTS + entries
            latents = tl.load(lists.tile_latents + at, mask=listed, other=0)
            delta = tl.load(lists.tile_values + at, mask=listed, other=0.0)
            if CLIP:
                falls = delta < 0.0
                if tl.max(falls.to(tl.int32), axis=0) != 0:
                    product, _, _ = products_of(
                        latents, falls, begin, hidden.column_stride, encoder, shift, factor, d_model, NORMALIZATION
                    )
                    f = scores(product, encoder, latents, falls, ACTIVATION)
                    bad |= tl.max((falls & (~is_finite(product) | ~is_finite(f))).to(tl.int32), axis=0)
                    delta = tl.where(falls & (delta < -f), -f, delta)
            to = of_row + before + entries
            tl.store(lists.latents + to, latents, mask=listed)
            tl.store(lists.changes + to, delta, mask=listed)
        if bad != 0:
            tl.store(lists.bad + row * tiles + tile, bad)


@triton.jit
def decode(
    hidden, decoder, decoder_norm, enabled, counters, lists, d_model, d_sae,
    NORMALIZATION: tl.constexpr, LATENTS: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Adds the decoded changes of one token to some columns of its row; the first program of a token counts it."""
    slices = tl.cdiv(d_model, ROW)
    tiles = tl.cdiv(d_sae, LATENTS)
    piece = tl.program_id(0) % slices
    row = tl.program_id(0) // slices
    on = True
    if enabled is not None:
        on = tl.load(enabled + row) != 0
    if on:
        others = tl.arange(0, TILES)
        slot = row * tiles + others
        count = tl.sum(tl.load(lists.fired + slot, mask=others < tiles, other=0), axis=0)
        bad = tl.max(tl.load(lists.bad + slot, mask=others < tiles, other=0), axis=0)
        scale = tl.load(lists.numbers + row * NUMBERS + 2)
        if bad != 0:
            count = 0
        columns = piece * ROW + tl.arange(0, ROW)
        inside = columns < d_model
        decoded = tl.zeros([ROW], tl.float32)
        edited = 0
        for first in range(0, count, LISTED):
            entries = first + tl.arange(0, LISTED)
            at = row.to(tl.int64) * d_sae + entries
            latents = tl.load(lists.latents + at, mask=entries < count, other=0)
            delta = tl.load(lists.changes + at, mask=entries < count, other=0.0)
            changed = delta != 0.0
            edited |= tl.max(changed.to(tl.int32), axis=0)
            if counters is not None:
                one = tl.full([LISTED], 1, tl.int64)
                tl.atomic_add(counters.latent_edits + latents, one, mask=changed & (piece == 0), sem="relaxed")
            if decoder_norm is not None:
                delta = tl.div_rn(delta, tl.load(decoder_norm + latents, mask=changed, other=1.0))
            if NORMALIZATION != "none":
                delta = delta * scale
            decoder_row = latents.to(tl.int64)
            if decoder.rows is not None:
                decoder_row = tl.load(decoder.rows + latents, mask=changed, other=-1).to(tl.int64)
            is_row = changed & (decoder_row >= 0)
            w = tl.load(
                decoder.W_dec + decoder_row[:, None] * d_model + columns[None, :],
                mask=is_row[:, None] & inside[None, :],
                other=0.0,
            )
            decoded += tl.sum(widen(w) * delta[:, None], axis=0)
        if edited != 0:
            at = hidden.rows + row.to(tl.int64) * hidden.row_stride + columns * hidden.column_stride
            sum = widen(tl.load(at, mask=inside, other=0.0)) + decoded
            tl.store(at, narrow(sum, hidden.rows.dtype.element_ty), mask=inside)
        if counters is not None:
            is_first = piece == 0
            if is_first:
                add_to(counters.seen + row, 1)
                if edited != 0:
                    add_to(counters.edited + row, 1)
                if bad != 0:
                    add_to(counters.nonfinite + row, 1)
