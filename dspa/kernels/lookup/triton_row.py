"""The Triton lookup of one prompt, for `lookup` and for the token step that contains it."""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from dspa.kernels.triton_common.launch import row_stride_of, with_aligned_rows
from dspa.kernels.triton_common.select import SCAN, are_selected, keys_at, kth_best, sort_key
from dspa.kernels.types import CsrMap

CHUNK = tl.constexpr(16)  # entries of a list that are compared with each other at a time


class Prompt(NamedTuple):
    """Prompt features, the map, and scratch for the lookup of each row.

    Attributes:
        density: `[B, d_sae_in]`, with its two strides.
        row_offsets, columns, entries: of the `CsrMap`, the last its values.
        d_sae_in, d_sae_out: its shape.
        k_prompt, k_diff: see `lookup`.
        rows: `[B, k_prompt]` int32 scratch, the chosen rows of the map.
        score: `[B, d_sae_out]` float32 scratch, their sum.
        chosen: `[B, 2, k_diff]` int32 scratch, latents to augment and to ablate.
        kept: `[B, 2, k_diff]` int32 scratch, 1 for those that stay.
    """

    density: Tensor
    row_stride: int
    column_stride: int
    row_offsets: Tensor
    columns: Tensor
    entries: Tensor
    d_sae_in: int
    d_sae_out: int
    k_prompt: int
    k_diff: int
    rows: Tensor
    score: Tensor
    chosen: Tensor
    kept: Tensor


@triton.jit
def write_best(values, stride, size, k, to, LARGEST: tl.constexpr):
    """Writes the indices of the k best elements of a row in ascending order."""
    bound, ties = kth_best(values, stride, size, k, LARGEST)
    tied = 0
    written = 0
    for first in range(0, size, SCAN):
        key, inside = keys_at(values, stride, first, size, LARGEST)
        selected, tied = are_selected(key, inside, bound, ties, tied)
        position = written + tl.cumsum(selected.to(tl.int32), axis=0) - 1
        tl.store(to + position, first + tl.arange(0, SCAN), mask=selected)
        written += tl.sum(selected.to(tl.int32), axis=0)
    tl.debug_barrier()  # what one thread wrote, others read


@triton.jit
def add_rows(prompt, rows, score):
    """Sums rows of the map in the order of `rows`. A column occurs once in a row, so rows are added in turn."""
    for first in range(0, prompt.d_sae_out, SCAN):
        at = first + tl.arange(0, SCAN)
        tl.store(score + at, tl.zeros([SCAN], tl.float32), mask=at < prompt.d_sae_out)
    tl.debug_barrier()
    for i in range(prompt.k_prompt):
        row = tl.load(rows + i)
        end = tl.load(prompt.row_offsets + row + 1)
        for begin in range(tl.load(prompt.row_offsets + row), end, SCAN):
            at = begin + tl.arange(0, SCAN)
            column = tl.load(prompt.columns + at, mask=at < end, other=0)
            total = tl.load(score + column, mask=at < end, other=0.0)
            tl.store(score + column, total + tl.load(prompt.entries + at, mask=at < end, other=0.0), mask=at < end)
        tl.debug_barrier()


@triton.jit
def chunk_of(chosen, score, k_diff, first, LARGEST: tl.constexpr):
    """Some chosen latents with their keys, and which of them are there."""
    at = first + tl.arange(0, CHUNK)
    inside = at < k_diff
    latents = tl.load(chosen + at, mask=inside, other=-1)
    value = tl.load(score + latents, mask=inside, other=0.0)
    return latents, value, sort_key(value, LARGEST), inside


@triton.jit
def is_allowed(value, inside, GUARD: tl.constexpr, LARGEST: tl.constexpr):
    """Which scores the sign guard lets into the list of the largest, or of the smallest."""
    if GUARD:
        inside = inside & ((value > 0.0) if LARGEST else (value < 0.0))
    return inside


@triton.jit
def write_kept(chosen, others, kept, score, k_diff, GUARD: tl.constexpr, BOTH: tl.constexpr, LARGEST: tl.constexpr):
    """Marks the chosen latents that stay: those that are allowed and not in the other list too."""
    for first in range(0, k_diff, CHUNK):
        latents, value, _, inside = chunk_of(chosen, score, k_diff, first, LARGEST)
        keep = is_allowed(value, inside, GUARD, LARGEST)
        if BOTH:
            for start in range(0, k_diff, CHUNK):
                other, value, _, inside = chunk_of(others, score, k_diff, start, LARGEST)
                same = latents[:, None] == other[None, :]
                same = same & is_allowed(value, inside, GUARD, not LARGEST)[None, :]
                keep = keep & (tl.max(same.to(tl.int32), axis=1) == 0)
        at = first + tl.arange(0, CHUNK)
        tl.store(kept + at, keep.to(tl.int32), mask=at < k_diff)
    tl.debug_barrier()


@triton.jit
def write_list(chosen, kept, score, k_diff, latents_to, signs_to, LARGEST: tl.constexpr):
    """Writes the kept latents, best first, ties to the lower index. Returns how many they are."""
    count = 0
    for first in range(0, k_diff, CHUNK):
        latents, _, key, inside = chunk_of(chosen, score, k_diff, first, LARGEST)
        keep = tl.load(kept + first + tl.arange(0, CHUNK), mask=inside, other=0)
        ahead = tl.zeros([CHUNK], tl.int32)
        for start in range(0, k_diff, CHUNK):
            other, _, others_key, there = chunk_of(chosen, score, k_diff, start, LARGEST)
            stays = tl.load(kept + start + tl.arange(0, CHUNK), mask=there, other=0)
            better = others_key[None, :] > key[:, None]
            tied = (others_key[None, :] == key[:, None]) & (other[None, :] < latents[:, None])
            ahead += tl.sum(((better | tied) & (stays[None, :] != 0)).to(tl.int32), axis=1)
        tl.store(latents_to + ahead, latents, mask=keep != 0)
        sign = tl.full([CHUNK], 1 if LARGEST else -1, tl.int8)
        tl.store(signs_to + ahead, sign, mask=keep != 0)
        count += tl.sum(keep, axis=0)
    return count


@triton.jit
def lookup_row(row, prompt, latents, signs, counts, capacity, EDIT: tl.constexpr, GUARD: tl.constexpr):
    """The list of one prompt; docs/method.md, section 3."""
    number = row.to(tl.int64)
    rows = prompt.rows + number * prompt.k_prompt
    score = prompt.score + number * prompt.d_sae_out
    up = prompt.chosen + number * 2 * prompt.k_diff
    down = up + prompt.k_diff
    kept_up = prompt.kept + number * 2 * prompt.k_diff
    kept_down = kept_up + prompt.k_diff
    latents_to = latents + number * capacity
    signs_to = signs + number * capacity

    density = prompt.density + number * prompt.row_stride
    write_best(density, prompt.column_stride, prompt.d_sae_in, prompt.k_prompt, rows, True)
    add_rows(prompt, rows, score)
    if EDIT != "ablate":
        write_best(score, 1, prompt.d_sae_out, prompt.k_diff, up, True)
    if EDIT != "augment":
        write_best(score, 1, prompt.d_sae_out, prompt.k_diff, down, False)
    count = 0
    if EDIT != "ablate":
        write_kept(up, down, kept_up, score, prompt.k_diff, GUARD, EDIT == "both", True)
        count += write_list(up, kept_up, score, prompt.k_diff, latents_to, signs_to, True)
    if EDIT != "augment":
        write_kept(down, up, kept_down, score, prompt.k_diff, GUARD, EDIT == "both", False)
        count += write_list(
            down, kept_down, score, prompt.k_diff, latents_to + count, signs_to + count, False
        )  # fmt: skip
    for first in range(0, capacity, CHUNK):
        at = first + tl.arange(0, CHUNK)
        padding = (at >= count) & (at < capacity)
        tl.store(latents_to + at, tl.zeros([CHUNK], tl.int32), mask=padding)
        tl.store(signs_to + at, tl.zeros([CHUNK], tl.int8), mask=padding)
    tl.store(counts + row, count)
    tl.debug_barrier()  # what one thread wrote, others may read


def prompt_of(
    density: Tensor,
    row_offsets: Tensor,
    columns: Tensor,
    values: Tensor,
    d_sae_out: int,
    k_prompt: int,
    k_diff: int,
) -> Prompt:
    """The arguments of a lookup, with new scratch."""
    batch = density.shape[0]
    density = with_aligned_rows(density)

    def scratch(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(batch, *shape, dtype=dtype, device=density.device)

    return Prompt(
        density,
        row_stride_of(density),
        density.stride(1),
        row_offsets,
        columns,
        values,
        density.shape[1],
        d_sae_out,
        k_prompt,
        k_diff,
        rows=scratch(k_prompt),
        score=scratch(d_sae_out, dtype=torch.float32),
        chosen=scratch(2, k_diff),
        kept=scratch(2, k_diff),
    )


def new_lists(batch: int, k_diff: int, edit: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The tensors of an `EditList`, yet to be written, padding included."""
    k = 2 * k_diff if edit == "both" else k_diff
    return (
        torch.empty(batch, k, dtype=torch.int32, device=device),
        torch.empty(batch, k, dtype=torch.int8, device=device),
        torch.empty(batch, dtype=torch.int32, device=device),
    )


def map_arguments(conditional_map: CsrMap) -> tuple[Tensor, Tensor, Tensor, int]:
    """A map as the operations take it."""
    return (
        conditional_map.row_offsets,
        conditional_map.columns,
        conditional_map.values,
        conditional_map.d_sae_out,
    )
