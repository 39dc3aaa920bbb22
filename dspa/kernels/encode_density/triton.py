"""`encode_density` in Triton: a tiled matrix product whose epilogue selects and counts.

A gate looks at one latent, so one launch counts all segments. topk compares all latents of a token: for some tokens at
a time, scores are written out, and a second kernel counts the k largest of each. Counts are integers, so the order in
which programs add to them changes nothing.
"""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspa.kernels.native import encoder_arguments
from dspa.kernels.triton_common.launch import (
    activation_of,
    aligned,
    launch,
    parts_of,
    row_stride_of,
    tile_for,
    with_aligned_rows,
)
from dspa.kernels.triton_common.select import SCAN, are_selected, keys_at, kth_best
from dspa.kernels.triton_common.table import blocks
from dspa.kernels.triton_common.tiles import (
    Encoder,
    dot,
    encoder_input,
    is_finite,
    normalizer,
    scores,
    tile_products,
)
from dspa.sae.weights import SaeWeights

MOST_SCORES = 16 << 20  # held at a time for topk: 64 MiB
TOKEN_TILES = tl.constexpr(8)  # that go through the rows of W_enc together


@triton.jit
def nan_where_dirty(
    begin, column_stride, is_token, shift, factor, b_dec, d_model,
    NORMALIZATION: tl.constexpr, LATENTS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """`[latents, tokens]` float32, NaN for a token whose encoder input is not finite and 0 for the others.

    Arguments as for `tile_products`. The entries that are not finite are counted by a product with ones, which leaves
    their numbers where those of the products will be.
    """
    ones = tl.full([LATENTS, MODEL], 1.0, tl.float16)
    count = tl.zeros([LATENTS, is_token.shape[0]], tl.float32)
    for first in tl.range(0, d_model, MODEL):
        columns = (first + tl.arange(0, MODEL))[None, :]
        within = columns < d_model
        valid = is_token[:, None] & within
        h = tl.load(begin + columns * column_stride, mask=valid, other=0.0)
        x = encoder_input(h, shift, factor, b_dec, columns, within, valid, NORMALIZATION)
        count = dot(ones, tl.trans((~is_finite(x)).to(tl.float16)), count)
    return tl.where(count > 0.0, float("nan"), 0.0)


@triton.jit
def tile_scores(
    hidden, row_stride, column_stride, encoder, rows, latents, d_model,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, X_PARTS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """Scores of some tokens, see `tiles.scores`; NaN for a token whose encoder input is not finite.

    Args:
        rows: `[tokens]`, which rows of the hidden states.
        latents: `[latents]`, which rows of the encoder. Both must be there; they may repeat.

    Returns:
        `[latents, tokens]` float32.
    """
    begin = hidden + rows.to(tl.int64)[:, None] * row_stride
    is_token = tl.full(rows.shape, True, tl.int1)
    is_latent = tl.full(latents.shape, True, tl.int1)
    shift, factor, _ = normalizer(begin, column_stride, d_model, is_token[:, None], NORMALIZATION, MODEL)
    product = tl.zeros([latents.shape[0], rows.shape[0]], tl.float32)
    product = tile_products(
        encoder.W_enc, latents, is_latent, begin, column_stride, is_token, shift, factor, encoder.b_dec, d_model,
        product, NORMALIZATION, X_PARTS, MODEL,
    )  # fmt: skip
    # An input that is not finite leaves no product of its token finite, so it is looked for only where one is not. The
    # products are then computed once more: kept meanwhile, they would leave too few registers.
    if tl.max((~is_finite(product)).to(tl.int32)) != 0:
        product = nan_where_dirty(
            begin, column_stride, is_token, shift, factor, encoder.b_dec, d_model,
            NORMALIZATION, latents.shape[0], MODEL,
        )  # fmt: skip
        product = tile_products(
            encoder.W_enc, latents, is_latent, begin, column_stride, is_token, shift, factor, encoder.b_dec, d_model,
            product, NORMALIZATION, X_PARTS, MODEL,
        )  # fmt: skip
    return scores(product, encoder, latents[:, None], is_latent[:, None], ACTIVATION)


@triton.jit
def tile_of_program(tokens, d_sae, LATENTS: tl.constexpr, TOKENS: tl.constexpr):
    """The first row and the first latent of this program's tile.

    Programs that run at the same time share few rows of `W_enc` and few tokens, so that both stay in the second-level
    cache: those of some tiles of tokens go through all of `W_enc` together, then those of the next.
    """
    token_tiles = tl.cdiv(tokens, TOKENS)
    latent_tiles = tl.cdiv(d_sae, LATENTS)
    group = tl.program_id(0) // (TOKEN_TILES * latent_tiles)
    within = tl.program_id(0) % (TOKEN_TILES * latent_tiles)
    size = tl.minimum(token_tiles - group * TOKEN_TILES, TOKEN_TILES)
    return (group * TOKEN_TILES + within % size) * TOKENS, within // size * LATENTS


@triton.jit
def segment_of(row, offsets, segments):
    """The segment of a row that is in one: how many segments end at or before it."""
    low = 0
    high = segments
    while low < high:
        middle = (low + high) // 2
        ended = tl.load(offsets + middle + 1) <= row
        low = tl.where(ended, middle + 1, low)
        high = tl.where(ended, high, middle)
    return low


@triton.jit(do_not_specialize=["tokens", "segments"])
def count_gates(
    hidden, row_stride, column_stride, encoder, offsets, counts, tokens, segments, d_model, d_sae,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, X_PARTS: tl.constexpr,
    LATENTS: tl.constexpr, TOKENS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """One tile of latents and tokens."""
    first_row, first_latent = tile_of_program(tokens, d_sae, LATENTS, TOKENS)
    rows = first_row + tl.arange(0, TOKENS)
    latents = first_latent + tl.arange(0, LATENTS)
    # The rows of this tile that are in a segment.
    begin = tl.maximum(tl.load(offsets), first_row).to(tl.int32)
    end = tl.minimum(tl.load(offsets + segments), tl.minimum(first_row + TOKENS, tokens)).to(tl.int32)
    if begin < end:
        # Rows and latents that are not there repeat the last that is, and are not counted.
        score = tile_scores(
            hidden, row_stride, column_stride, encoder, tl.maximum(tl.minimum(rows, end - 1), begin),
            tl.minimum(latents, d_sae - 1), d_model, ACTIVATION, NORMALIZATION, X_PARTS, MODEL,
        )  # fmt: skip
        active = score > 0.0
        segment = segment_of(begin, offsets, segments)
        while begin < end:
            until = tl.minimum(tl.load(offsets + segment + 1), end).to(tl.int32)
            counted = active & ((rows >= begin) & (rows < until))[None, :]
            count = tl.sum(counted.to(tl.int32), axis=1)
            at = counts + tl.cast(segment, tl.int64) * d_sae + latents
            tl.atomic_add(at, count, mask=(latents < d_sae) & (count > 0), sem="relaxed")
            begin = until
            segment += 1


@triton.jit(do_not_specialize=["first_token", "tokens"])
def write_scores(
    hidden, row_stride, column_stride, encoder, z, first_token, tokens, d_model, d_sae,
    NORMALIZATION: tl.constexpr, X_PARTS: tl.constexpr,
    LATENTS: tl.constexpr, TOKENS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """The scores of topk for some tokens, `[tokens, d_sae]`."""
    first_row, first_latent = tile_of_program(tokens, d_sae, LATENTS, TOKENS)
    token = first_row + tl.arange(0, TOKENS)
    latents = first_latent + tl.arange(0, LATENTS)
    score = tile_scores(
        hidden, row_stride, column_stride, encoder, first_token + tl.minimum(token, tokens - 1),
        tl.minimum(latents, d_sae - 1), d_model, "topk", NORMALIZATION, X_PARTS, MODEL,
    )  # fmt: skip
    begin = z + first_row.to(tl.int64) * d_sae
    at = (token - first_row)[None, :] * d_sae + latents[:, None]
    tl.store(begin + at, score, mask=(token < tokens)[None, :] & (latents < d_sae)[:, None])


@triton.jit(do_not_specialize=["first_token", "segments", "k"])
def count_largest(z, offsets, counts, first_token, segments, d_sae, k):
    """Counts the positive ones of the k largest scores of one token, ties to the lower index."""
    row = first_token + tl.program_id(0)
    if (row >= tl.load(offsets)) & (row < tl.load(offsets + segments)):
        begin = z + tl.program_id(0).to(tl.int64) * d_sae
        segment = segment_of(row, offsets, segments)
        bound, ties = kth_best(begin, 1, d_sae, k, True)
        seen = 0
        for first in range(0, d_sae, SCAN):
            key, inside = keys_at(begin, 1, first, d_sae, True)
            selected, seen = are_selected(key, inside, bound, ties, seen)
            latents = first + tl.arange(0, SCAN)
            positive = tl.load(begin + latents, mask=inside, other=0.0) > 0.0
            one = tl.full([SCAN], 1, tl.int32)
            at = counts + tl.cast(segment, tl.int64) * d_sae + latents
            tl.atomic_add(at, one, mask=selected & positive, sem="relaxed")


def run(
    hidden: Tensor,
    offsets: Tensor,
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
) -> Tensor:
    """Launches the kernels: the operation as a function of nothing but tensors, numbers and names."""
    tokens, segments = hidden.shape[0], offsets.shape[0] - 1
    d_sae, d_model = W_enc.shape
    counts = torch.zeros(segments, d_sae, dtype=torch.int32, device=hidden.device)
    if tokens == 0 or segments == 0:
        return counts
    hidden, offsets = with_aligned_rows(hidden), aligned(offsets)
    x_parts = parts_of(hidden.dtype, W_enc.dtype, normalization == "none" and b_dec is None)
    tile = tile_for("encode_density", W_enc, x_parts)
    shared: dict[str, object] = {
        "hidden": hidden,
        "row_stride": row_stride_of(hidden),
        "column_stride": hidden.stride(1),
        "encoder": Encoder(W_enc, b_enc, threshold, b_dec, decoder_norm, magnitude_scale, magnitude_bias),
        "d_model": d_model,
        "d_sae": d_sae,
        "NORMALIZATION": normalization,
        "X_PARTS": x_parts,
        "LATENTS": tile.latents,
        "TOKENS": tile.tokens,
        "MODEL": tile.model,
    }
    if activation != "topk":
        programs = blocks(tokens, tile.tokens) * blocks(d_sae, tile.latents)
        arguments: dict[str, object] = {
            "offsets": offsets,
            "counts": counts,
            "tokens": tokens,
            "segments": segments,
            "ACTIVATION": activation_of(activation),
        }
        launch(count_gates, programs, shared | arguments, tile, hidden.device)
        return counts
    at_once = min(tokens, max(1, MOST_SCORES // d_sae // tile.tokens) * tile.tokens)
    z = torch.empty(at_once, d_sae, dtype=torch.float32, device=hidden.device)
    for first in range(0, tokens, at_once):
        count = min(at_once, tokens - first)
        programs = blocks(count, tile.tokens) * blocks(d_sae, tile.latents)
        arguments = {"z": z, "first_token": first, "tokens": count}
        launch(write_scores, programs, shared | arguments, tile, hidden.device)
        arguments = {"z": z, "offsets": offsets, "counts": counts, "first_token": first, "segments": segments}
        launch(count_largest, count, arguments | {"d_sae": d_sae, "k": k}, tile, hidden.device)
    return counts


operation = torch.library.custom_op("dspa_triton::encode_density", run, mutates_args=())


@operation.register_fake
def _(hidden: Tensor, offsets: Tensor, W_enc: Tensor, *_: object) -> Tensor:
    return hidden.new_empty(offsets.shape[0] - 1, W_enc.shape[0], dtype=torch.int32)


def encode_density(hidden: Tensor, offsets: Tensor, sae: SaeWeights) -> Tensor:
    """See `dspa.kernels.encode_density`."""
    step: Callable[..., Tensor] = operation if torch.compiler.is_compiling() else run
    return step(hidden, offsets.contiguous(), *encoder_arguments(sae))
