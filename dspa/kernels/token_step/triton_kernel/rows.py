"""Device functions that the parts share: a row's flag, strength and list, and maxima packed with their latents."""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from dspa.kernels.token_step.triton_kernel.structures import FINISHING
from dspa.kernels.triton_common.rows import LISTED


@triton.jit
def preparing(batch, ACTIVATION: tl.constexpr, LAZY: tl.constexpr):
    """How many programs come before all others: one for each row and, where M_t is bounded, another one."""
    programs = batch
    if LAZY and ACTIVATION != "topk":
        programs = 2 * batch
    return programs


@triton.jit
def slices_each(batch, slices):
    """How many slices of a row a program finishes."""
    return tl.minimum(slices, tl.cdiv(batch * slices, FINISHING))


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
def places_of(edits, row, first):
    """What 16 places of a list hold, latents and signs: anything, where there is no entry."""
    entries = first + tl.arange(0, LISTED)
    at = row.to(tl.int64) * edits.capacity + entries
    latents = tl.load(edits.latents + at, mask=entries < edits.capacity, other=0)
    signs = tl.load(edits.signs + at, mask=entries < edits.capacity, other=0)
    return latents, signs.to(tl.int32)


@triton.jit
def entries_of(edits, row, first, count):
    """16 entries of a list: latents, signs, and which of them are there; latent 0 where none is. The loads do not wait
    for the count."""
    latents, signs = places_of(edits, row, first)
    listed = first + tl.arange(0, LISTED) < count
    return tl.where(listed, latents, 0), signs, listed


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
