"""Finding the k largest or smallest of a long row, for the Triton kernels: by the digits of sortable integers, so that
ties are broken by index and the result does not depend on how the work is split."""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from dspa.kernels.triton_common.tiles import widen

SCAN = tl.constexpr(1024)  # elements read at a time


@triton.jit
def sort_key(x, LARGEST: tl.constexpr):
    """uint32 keys: the larger, the better. As torch sorts: 0.0 and -0.0 are equal, NaN counts as the largest number."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.uint32, bitcast=True)
    key = tl.where(bits >= 0x80000000, bits ^ 0xFFFFFFFF, bits | 0x80000000)
    key = tl.where(x == x, key, 0xFFFFFFFF)
    if not LARGEST:
        key = key ^ 0xFFFFFFFF
    return key


@triton.jit
def keys_at(row, stride, first, size, LARGEST: tl.constexpr):
    """The keys of one block of a row, and which of them are inside the row."""
    at = first + tl.arange(0, SCAN)
    inside = at < size
    return sort_key(widen(tl.load(row + at * stride, mask=inside, other=0.0)), LARGEST), inside


@triton.jit
def kth_best(row, stride, size, k, LARGEST: tl.constexpr):
    """The k-th best key of a row, 0 <= k <= size, and how many of those equal to it are among the k best."""
    bound = tl.cast(0, tl.uint32)
    left = k
    for digit in tl.static_range(4):  # the leading byte first
        shift = 24 - 8 * digit
        counts = tl.zeros([256], tl.int32)
        for first in range(0, size, SCAN):
            key, inside = keys_at(row, stride, first, size, LARGEST)
            if digit > 0:
                inside = inside & ((key >> (shift + 8)) == (bound >> (shift + 8)))
            counts += tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=inside)
        bytes = tl.arange(0, 256)
        at_least = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
        chosen = tl.max(tl.where(at_least >= left, bytes, 0), axis=0)
        left -= tl.sum(tl.where(bytes > chosen, counts, 0), axis=0)
        bound |= chosen.to(tl.uint32) << shift
    return bound, left


@triton.jit
def are_selected(key, inside, bound, ties, ties_before):
    """Which elements of a block are among the k best, ties to the lower index, and how many ties there are so far."""
    tied = inside & (key == bound)
    rank = ties_before + tl.cumsum(tied.to(tl.int32), axis=0)
    selected = inside & ((key > bound) | (tied & (rank <= ties)))
    return selected, ties_before + tl.sum(tied.to(tl.int32), axis=0)
