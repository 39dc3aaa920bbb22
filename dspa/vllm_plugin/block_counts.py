"""What was read of the blocks of the KV cache: prompts that reuse a block need its counts without computing it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspa.errors import DspaError


@dataclass(frozen=True)
class Piece:
    """Consecutive positions of one block.

    Attributes:
        block: its number.
        start: the position in the block of the first of them.
        tokens: how many there are.
    """

    block: int
    start: int
    tokens: int


class BlockCounts:
    """For each block of the KV cache, on how many of its counted tokens each latent is active.

    A row is written when its block is computed, so that it is about the same tokens as the block's keys and values,
    whatever the block held before. How far each block was written is known on the host, so that nothing else is ever
    summed.

    Attributes:
        block_tokens: tokens of a block.
    """

    def __init__(self, blocks: int, block_tokens: int, d_sae: int, device: torch.device) -> None:
        self.block_tokens = block_tokens
        self._counts = torch.empty(blocks, d_sae, dtype=_dtype(block_tokens), device=device)
        self._written = np.zeros(blocks, dtype=np.int64)  # tokens from each block's beginning

    @staticmethod
    def bytes_per_block(block_tokens: int, d_sae: int) -> int:
        """How many bytes a block takes."""
        return d_sae * _dtype(block_tokens).itemsize

    @property
    def nbytes(self) -> int:
        return self._counts.nbytes

    def write(self, pieces: Sequence[Piece], counts: Tensor) -> None:
        """Stores what was read of pieces of blocks.

        Args:
            pieces: one at 0 replaces what its block held; another goes on where the block was written to.
            counts: `[pieces, d_sae]` int32.

        Raises:
            DspaError: if a piece does not follow on what was written.
        """
        new: list[int] = []
        old: list[int] = []
        for row, piece in enumerate(pieces):
            if piece.start not in (0, self._written[piece.block]):
                raise DspaError(
                    f"block {piece.block} of the KV cache goes on at token {piece.start}, and was read up to "
                    f"{self._written[piece.block]}; this is an error of dspa"
                )
            self._written[piece.block] = piece.start + piece.tokens
            (old if piece.start else new).append(row)
        for rows, begun in ((new, False), (old, True)):
            if not rows:
                continue
            index = torch.tensor([pieces[row].block for row in rows], device=counts.device)
            own = counts if len(rows) == len(counts) else counts[torch.tensor(rows, device=counts.device)]
            if begun:
                self._counts.index_add_(0, index, own.to(self._counts.dtype))
            else:
                self._counts[index] = own.to(self._counts.dtype)

    def total(self, blocks: Sequence[int]) -> Tensor:
        """The sum over some blocks, `[d_sae]` int32.

        Raises:
            DspaError: if one of them was not read to its end.
        """
        unread = [block for block in blocks if self._written[block] != self.block_tokens]
        if unread:
            raise DspaError(
                f"blocks {unread[:4]} of the KV cache are reused and were not read; this is an error of dspa"
            )
        index = torch.tensor(blocks, dtype=torch.int64, device=self._counts.device)
        return self._counts[index].sum(dim=0, dtype=torch.int32)


def _dtype(block_tokens: int) -> torch.dtype:
    return torch.uint8 if block_tokens < 256 else torch.int32
