"""A launch that does nothing but read a matrix: what a pass over `W_enc` can be held against on a GPU."""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS, TIMES = 1024, 16  # elements at a time, and times; the fastest of a few on an H100


@triton.jit
def sum_blocks(matrix, sums, size, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    """One sum of `BLOCK * BLOCKS` elements for each program, so that the loads are not left out."""
    program = tl.program_id(0).to(tl.int64)
    total = tl.zeros([BLOCK], tl.float32)
    for block in tl.static_range(BLOCKS):
        at = (program * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(matrix + at, mask=at < size, other=0.0).to(tl.float32)
    tl.store(sums + program, tl.sum(total, axis=0))


def reading(matrix: Tensor) -> Callable[[], Tensor]:
    """What reads a contiguous matrix once, and returns sums of its elements, `[programs]` float32."""
    programs = -(-matrix.numel() // (ELEMENTS * TIMES))
    sums = torch.empty(programs, device=matrix.device)
    launch: Any = sum_blocks[(programs,)]

    def read() -> Tensor:
        launch(matrix, sums, matrix.numel(), ELEMENTS, TIMES, num_warps=4)
        return sums

    return read


def check_reading(matrix: Tensor) -> None:
    """Raises AssertionError if `reading` leaves anything out."""
    padded = torch.zeros(-(-matrix.numel() // (ELEMENTS * TIMES)), ELEMENTS * TIMES, device=matrix.device)
    padded.view(-1)[: matrix.numel()] = matrix.flatten()
    # The same numbers in another order: with W_enc's, sums differ by roundings of 1e-5; a block left out, by about 0.5.
    torch.testing.assert_close(reading(matrix)(), padded.sum(dim=1), rtol=1e-4, atol=1e-2)
