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
from dspa.kernels.triton_common.tiles import Encoder, dirty_inputs, is_finite, normalizer, scores, tile_products
from dspa.sae.weights import SaeWeights

MOST_SCORES = 16 << 20  # held at a time for topk: 64 MiB


@triton.jit
def tile_scores(
    hidden, row_stride, column_stride, encoder, rows, is_token, latents, is_latent, d_model,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, X_PARTS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """Scores of some tokens, see `tiles.scores`; NaN for a token whose encoder input is not finite.

    Args:
        rows, is_token: `[tokens]`, which rows of the hidden states, and whether there is such a row.
        latents, is_latent: the same for latents.

    Returns:
        `[latents, tokens]` float32.
    """
    begin = hidden + rows.to(tl.int64)[:, None] * row_stride
    shift, factor, _ = normalizer(begin, column_stride, d_model, is_token[:, None], NORMALIZATION, MODEL)
    product = tile_products(
        encoder.W_enc, latents, is_latent, begin, column_stride, is_token, shift, factor, encoder.b_dec, d_model,
        NORMALIZATION, X_PARTS, MODEL,
    )  # fmt: skip
    score = scores(product, encoder, latents[:, None], is_latent[:, None], ACTIVATION)

    # An input that is not finite leaves no product of its token finite, so it is looked for only where one is not.
    if tl.max((~is_finite(product)).to(tl.int32)) != 0:
        dirty = dirty_inputs(
            begin, column_stride, is_token, shift, factor, encoder.b_dec, d_model, NORMALIZATION, MODEL
        )  # fmt: skip
        score = tl.where(dirty[None, :] != 0, float("nan"), score)
    return score


@triton.jit
def segment_of(rows, is_token, offsets, segments):
    """The segment of each row: how many segments end at or before it."""
    low = tl.zeros(rows.shape, tl.int32)
    high = low + segments
    for _ in range(32):  # enough for any number of segments
        middle = (low + high) // 2
        ended = tl.load(offsets + middle + 1, mask=is_token & (low < high), other=0) <= rows
        open = low < high
        low = tl.where(open & ended, middle + 1, low)
        high = tl.where(open & ~ended, middle, high)
    return low


@triton.jit(do_not_specialize=["tokens", "segments"])
def count_gates(
    hidden, row_stride, column_stride, encoder, offsets, counts, tokens, segments, d_model, d_sae,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, X_PARTS: tl.constexpr,
    LATENTS: tl.constexpr, TOKENS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """One tile of latents and tokens. Neighbouring programs share their tokens' rows of `W_enc`."""
    groups = tl.cdiv(tokens, TOKENS)
    rows = tl.program_id(0) % groups * TOKENS + tl.arange(0, TOKENS)
    latents = tl.program_id(0) // groups * LATENTS + tl.arange(0, LATENTS)
    is_latent = latents < d_sae
    begin = tl.load(offsets)
    end = tl.load(offsets + segments)
    is_token = (rows >= begin) & (rows < end) & (rows < tokens)
    if tl.max(is_token.to(tl.int32), axis=0) != 0:
        score = tile_scores(
            hidden, row_stride, column_stride, encoder, rows, is_token, latents, is_latent, d_model,
            ACTIVATION, NORMALIZATION, X_PARTS, MODEL,
        )  # fmt: skip
        active = is_latent[:, None] & is_token[None, :] & (score > 0.0)
        segment = segment_of(rows, is_token, offsets, segments)
        first = tl.min(tl.where(is_token, segment, segments), axis=0)
        last = tl.max(tl.where(is_token, segment, -1), axis=0)
        for s in range(first, last + 1):
            count = tl.sum((active & (segment == s)[None, :]).to(tl.int32), axis=1)
            at = counts + tl.cast(s, tl.int64) * d_sae + latents
            tl.atomic_add(at, count, mask=is_latent & (count > 0), sem="relaxed")


@triton.jit(do_not_specialize=["first_token", "tokens"])
def write_scores(
    hidden, row_stride, column_stride, encoder, z, first_token, tokens, d_model, d_sae,
    NORMALIZATION: tl.constexpr, X_PARTS: tl.constexpr,
    LATENTS: tl.constexpr, TOKENS: tl.constexpr, MODEL: tl.constexpr,
):  # fmt: skip
    """The scores of topk for some tokens, `[tokens, d_sae]`."""
    groups = tl.cdiv(tokens, TOKENS)
    token = tl.program_id(0) % groups * TOKENS + tl.arange(0, TOKENS)
    latents = tl.program_id(0) // groups * LATENTS + tl.arange(0, LATENTS)
    score = tile_scores(
        hidden, row_stride, column_stride, encoder, first_token + token, token < tokens, latents, latents < d_sae,
        d_model, "topk", NORMALIZATION, X_PARTS, MODEL,
    )  # fmt: skip
    at = z + token.to(tl.int64)[None, :] * d_sae + latents[:, None]
    tl.store(at, score, mask=(token < tokens)[None, :] & (latents < d_sae)[:, None])


@triton.jit(do_not_specialize=["first_token", "segments", "k"])
def count_largest(z, offsets, counts, first_token, segments, d_sae, k):
    """Counts the positive ones of the k largest scores of one token, ties to the lower index."""
    row = first_token + tl.program_id(0)
    if (row >= tl.load(offsets)) & (row < tl.load(offsets + segments)):
        begin = z + tl.program_id(0).to(tl.int64) * d_sae
        here = tl.zeros([1], tl.int32) + row
        segment = tl.sum(segment_of(here, here >= 0, offsets, segments), axis=0)
        bound, ties = kth_best(begin, 1, d_sae, k, True)
        seen = 0
        for first in range(0, d_sae, SCAN):
            key, inside = keys_at(begin, 1, first, d_sae, True)
            selected, seen = are_selected(key, inside, bound, ties, seen)
            latents = first + tl.arange(0, SCAN)
            positive = tl.load(begin + latents, mask=inside, other=0.0) > 0.0
            one = tl.full([SCAN], 1, tl.int32)
            at = counts + segment.to(tl.int64) * d_sae + latents
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
