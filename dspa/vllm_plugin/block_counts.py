"""What was read of the blocks of the KV cache: prompts that reuse a block need its counts without computing it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class BlockCounts:
    """For each block of the KV cache, on how many of its counted tokens each latent is active.

    A row is written when its block is computed, so that it is about the same tokens as the block's keys and values,
    whatever the block held before.

    Attributes:
        block_tokens: tokens of a block.
    """

    def __init__(self, blocks: int, block_tokens: int, d_sae: int, device: torch.device) -> None:
        self.block_tokens = block_tokens
        dtype = torch.uint8 if block_tokens < 256 else torch.int32
        self._counts = torch.empty(blocks, d_sae, dtype=dtype, device=device)  # rows are written before they are read

    @property
    def nbytes(self) -> int:
        return self._counts.nbytes

    def write(self, blocks: Sequence[int], starts: Sequence[int], counts: Tensor) -> None:
        """Stores what was read of pieces of blocks.

        Args:
            blocks: of each piece.
            starts: the position in its block where each piece starts; one at 0 replaces what was there.
            counts: `[pieces, d_sae]` int32.
        """
        index = torch.tensor(blocks, dtype=torch.int64)
        begun = torch.tensor([start > 0 for start in starts])
        new = (~begun).nonzero().flatten()
        device = counts.device
        if len(new):
            self._counts[index[new].to(device)] = counts[new.to(device)].to(self._counts.dtype)
        if len(new) < len(index):
            old = begun.nonzero().flatten()
            self._counts.index_add_(0, index[old].to(device), counts[old.to(device)].to(self._counts.dtype))

    def total(self, blocks: Sequence[int]) -> Tensor:
        """The sum over some blocks, `[d_sae]` int32."""
        index = torch.tensor(blocks, dtype=torch.int64, device=self._counts.device)
        return self._counts[index].sum(dim=0, dtype=torch.int32)
