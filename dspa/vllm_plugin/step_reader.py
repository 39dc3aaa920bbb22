"""Reading the prompts of a step: one `encode_density` over the prompt tokens of all requests that read alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels import EditList, encode_density
from dspa.methods.policy import Policy
from dspa.online.policy_groups import ReadingGroup
from dspa.sae.weights import SaeWeights
from dspa.vllm_plugin.block_counts import BlockCounts, Piece
from dspa.vllm_plugin.step import RequestState, Segment, stream_at


@dataclass(frozen=True)
class _Reading:
    """A request that reads some of its prompt in this step, and which of the step's pieces are its own."""

    segment: Segment
    state: RequestState
    end: int
    first_piece: int
    last_piece: int


class StepReader:
    """Counts, for each request of a group, the prompt tokens on which each latent is active, over as many steps as its
    prompt takes, and has the policy select its edits when the last of them was read (docs/method.md, section 3).

    Attributes:
        layer: the decoder layer after which prompts are read.
        names: whose prompts are read.
    """

    def __init__(self, group: ReadingGroup, policies: Mapping[str, Policy], device: torch.device, backend: str) -> None:
        assert group.sae is not None
        self.layer = group.layer
        self.names = frozenset(group.names)
        self._policies = policies
        self._sae: SaeWeights = group.sae.to(device)
        self._device = device
        self._backend = backend
        self._blocks: BlockCounts | None = None
        self._readings: list[_Reading] = []

    def keep_by_block(self, blocks: int, block_tokens: int) -> int:
        """From now on, what is read is kept for each block of the KV cache as well.

        Returns:
            How many bytes that takes.
        """
        self._blocks = BlockCounts(blocks, block_tokens, self._sae.d_sae, self._device)
        return self._blocks.nbytes

    def bytes_per_block(self, block_tokens: int) -> int:
        """How many bytes `keep_by_block` takes for each block."""
        return BlockCounts.bytes_per_block(block_tokens, self._sae.d_sae)

    def step_bytes(self, tokens: int, requests: int, block_tokens: int) -> int:
        """How many bytes it takes at most to read the prompts of a step of so many tokens and requests."""
        pieces = tokens // block_tokens + 2 * requests
        per_piece = self._sae.d_sae * (4 + 4 + 1)  # counts, those of a request together, those of a block
        return pieces * per_piece + 2 * 4 * tokens * self._sae.d_model

    def begin_step(self, segments: list[tuple[Segment, RequestState]]) -> bool:
        """Finds the tokens to read.

        Returns:
            Whether there are any.
        """
        self._readings = []
        self._in_blocks: list[Piece] = []
        rows: list[np.ndarray] = []
        for segment, state in segments:
            end = min(segment.end, state.prompt_tokens)
            if segment.policy not in self.names or segment.start >= end or (state.selected and self._blocks is None):
                continue
            first_piece = len(rows)
            for piece_start, piece_end in self._pieces(segment, end):
                counted = np.flatnonzero(state.counted[piece_start:piece_end])
                rows.append(counted + (segment.first_row + piece_start - segment.start))
            self._readings.append(_Reading(segment, state, end, first_piece, len(rows)))
        if self._readings:
            self._rows = torch.from_numpy(np.concatenate(rows)).to(self._device)
            self._offsets = torch.from_numpy(np.cumsum([0, *map(len, rows)])).to(self._device)
        return bool(self._readings)

    def read(self, hidden: Tensor, residual: Tensor | None) -> None:
        """Reads them, `hidden` and `residual` `[N, d_model]` of all tokens of the step."""
        stream = stream_at(self._rows, hidden, residual)
        counts = encode_density(stream, self._offsets, self._sae, backend=self._backend)
        if self._blocks is not None:  # before any is summed: requests may share blocks that this step computes
            self._blocks.write(self._in_blocks, counts)
        finished: dict[str, list[RequestState]] = {}
        for reading in self._readings:
            state = reading.state
            if state.selected:
                continue
            own = counts[reading.first_piece : reading.last_piece].sum(dim=0, dtype=torch.int32)
            before = self._counts_before(reading)
            state.counts = own if before is None else before + own
            state.read_until = reading.end
            if reading.end == state.prompt_tokens:
                finished.setdefault(state.policy, []).append(state)
        for name, states in finished.items():
            self._select(self._policies[name], states)

    def _pieces(self, segment: Segment, end: int) -> Iterator[tuple[int, int]]:
        """Half-open ranges of positions that are counted apart: one, or one for each block they reach into."""
        if self._blocks is None:
            yield segment.start, end
            return
        size, start = self._blocks.block_tokens, segment.start
        while start < end:
            stop = min(end, (start // size + 1) * size)
            self._in_blocks.append(Piece(segment.blocks[start // size], start % size, stop - start))
            yield start, stop
            start = stop

    def _counts_before(self, reading: _Reading) -> Tensor | None:
        """The counts of the positions before a segment: read in earlier steps, or by whoever computed the blocks that
        it reuses."""
        start, state = reading.segment.start, reading.state
        if start == 0:
            return None
        if start == state.read_until:
            return state.counts
        if self._blocks is None or start % self._blocks.block_tokens:
            raise InvalidInputError(
                f"request {reading.segment.request} continues at position {start}, which was not read before; expected "
                f"{state.read_until}"
            )
        return self._blocks.total(reading.segment.blocks[: start // self._blocks.block_tokens])

    def _select(self, policy: Policy, states: list[RequestState]) -> None:
        """What the policy selects for requests whose prompts were read; empty lists without a counted token."""
        counts = torch.stack([state.counts for state in states if state.counts is not None])
        tokens = torch.tensor([int(state.counted.sum()) for state in states], device=counts.device)
        edits = policy.select(counts / tokens.clamp(min=1)[:, None])
        if edits is not None:
            edits = EditList(edits.latents, edits.signs, edits.counts * (tokens > 0).to(edits.counts.dtype))
        for row, state in enumerate(states):
            state.select(None if edits is None else edits.rows(torch.tensor([row], device=edits.latents.device)))
