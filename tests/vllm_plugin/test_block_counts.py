"""Counts of blocks of the KV cache: nothing that was not written is ever summed."""

from __future__ import annotations

import pytest
import torch

from dspa.errors import DspaError
from dspa.vllm_plugin.block_counts import BlockCounts, Piece

TOKENS, D_SAE = 4, 3


@pytest.fixture
def counts() -> BlockCounts:
    made = BlockCounts(5, TOKENS, D_SAE, torch.device("cpu"))
    made._counts.fill_(255)  # as memory may be
    return made


def ones(pieces: int, value: int = 1) -> torch.Tensor:
    return torch.full((pieces, D_SAE), value, dtype=torch.int32)


def test_pieces_add_up(counts: BlockCounts) -> None:
    counts.write([Piece(0, 0, 4), Piece(3, 0, 1), Piece(2, 0, 4)], ones(3))
    counts.write([Piece(3, 1, 3), Piece(4, 0, 2)], ones(2, 2))
    assert counts.total([0, 3, 2]).tolist() == [5] * D_SAE
    counts.write([Piece(0, 0, 4)], ones(1, 7))  # computed anew for others
    assert counts.total([0, 3]).tolist() == [10] * D_SAE


@pytest.mark.parametrize("blocks", [[1], [0, 1], [4], [0, 4]])
def test_blocks_that_were_not_read_to_their_end_are_not_summed(counts: BlockCounts, blocks: list[int]) -> None:
    counts.write([Piece(0, 0, 4), Piece(4, 0, 3)], ones(2))
    with pytest.raises(DspaError, match=rf"blocks \[{blocks[-1]}\] of the KV cache are reused and were not read"):
        counts.total(blocks)


@pytest.mark.parametrize("start", [1, 3])
def test_a_piece_follows_on_what_was_written(counts: BlockCounts, start: int) -> None:
    counts.write([Piece(0, 0, 2)], ones(1))
    with pytest.raises(DspaError, match=f"goes on at token {start}, and was read up to 2"):
        counts.write([Piece(0, start, 1)], ones(1))


def test_bytes() -> None:
    for tokens, size in ((16, 1), (255, 1), (256, 4)):
        made = BlockCounts(2, tokens, D_SAE, torch.device("cpu"))
        assert made.nbytes == 2 * BlockCounts.bytes_per_block(tokens, D_SAE) == 2 * D_SAE * size
