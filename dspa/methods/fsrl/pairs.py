"""Preference pairs as padded batches with the hidden states of the layer, which are computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspa.methods.policy import EditPositions
from dspa.methods.split_model import SplitModel
from dspa.offline.preferences import PreferenceTriple

TRIPLES_AT_ONCE = 16
"""Triples whose states are computed together."""


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Rows 0 to P - 1 are prompts with their chosen responses, rows P to 2P - 1 with the rejected ones.

    Attributes:
        ids: `[2P, T]` int64, padded on the right.
        mask: `[2P, T]` bool, tokens.
        response: `[2P, T]` bool, response tokens.
        edited: `[2P, T]` bool, positions that the adapter edits.
        hidden: `[2P, T, d_model]` after the layer.
    """

    ids: Tensor
    mask: Tensor
    response: Tensor
    edited: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class EditedTokens:
    """Which tokens of a sequence are edited in training: the same as in generation.

    Attributes:
        positions: as in the policy.
        uncounted_token_ids: prompt tokens that "all" leaves out.
    """

    positions: EditPositions
    uncounted_token_ids: tuple[int, ...]

    def of(self, prompt: Sequence[int], response: Sequence[int]) -> list[bool]:
        """One entry per token of prompt and response."""
        if self.positions == "all":
            before = [token not in self.uncounted_token_ids for token in prompt]
        else:
            before = [False] * len(prompt)
        if self.positions != "generated":
            before[-1] = True
        return [*before, *[True] * len(response)]


class PairSource:
    """Batches of some triples for one model and layer.

    Attributes:
        triples: the triples, by index.
    """

    def __init__(
        self,
        split: SplitModel,
        triples: Sequence[PreferenceTriple],
        edited: EditedTokens,
        *,
        device: torch.device,
        pad_token_id: int,
        cached: bool,
        padding_too: bool,
    ) -> None:
        """See `TrainingOptions` for `cached` (cache_states) and `padding_too` (l1_over)."""
        self.triples = triples
        self._split = split
        self._edited = edited
        self._device = device
        self._pad = pad_token_id
        self._cached = cached and not padding_too
        self._padding_too = padding_too
        self._states: dict[tuple[int, int], Tensor] = {}  # (triple, side): [T, d_model] on the CPU

    def edited_tokens(self, indices: Sequence[int]) -> int:
        """How many positions of these pairs the l1 mean runs over."""
        if self._padding_too:
            return 2 * len(indices) * self.widest(indices)
        return sum(sum(self._edited.of(*row)) for index in indices for row in self._rows(index))

    def widest(self, indices: Sequence[int]) -> int:
        """Tokens of the longest of their sequences."""
        return max(len(prompt) + len(response) for index in indices for prompt, response in self._rows(index))

    def batch(self, indices: Sequence[int], width: int | None = None) -> PairBatch:
        """The batch of some pairs.

        Args:
            indices: which triples.
            width: T, where it is to be larger than the longest row.
        """
        sides = [(index, side) for side in (0, 1) for index in indices]
        rows = [self._rows(index)[side] for index, side in sides]
        width = max(width or 0, max(len(prompt) + len(response) for prompt, response in rows))
        ids = torch.full((len(rows), width), self._pad)
        mask, response, edited = (torch.zeros(ids.shape, dtype=torch.bool) for _ in range(3))
        for row, (before, after) in enumerate(rows):
            length = len(before) + len(after)
            ids[row, :length] = torch.tensor([*before, *after])
            mask[row, :length] = True
            response[row, len(before) : length] = True
            edited[row, :length] = torch.tensor(self._edited.of(before, after))
        if self._padding_too:
            edited[:] = True
        hidden = self._hidden(sides, ids, mask)
        ids, mask, response, edited = (each.to(self._device) for each in (ids, mask, response, edited))
        return PairBatch(ids, mask, response, edited, hidden)

    def _rows(self, index: int) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
        triple = self.triples[index]
        return (triple.prompt, triple.chosen), (triple.prompt, triple.rejected)

    def _hidden(self, sides: Sequence[tuple[int, int]], ids: Tensor, mask: Tensor) -> Tensor:
        if not self._cached:
            return self._split.states(ids.to(self._device), mask.to(self._device))
        for index, side in sides:
            if (index, side) not in self._states:
                self._compute(index // TRIPLES_AT_ONCE)
        first = self._states[sides[0]]
        hidden = torch.zeros(*ids.shape, first.shape[-1], dtype=first.dtype)
        for row, side in enumerate(sides):
            states = self._states[side]
            hidden[row, : len(states)] = states
        return hidden.to(self._device)

    def _compute(self, group: int) -> None:
        """Keeps the states of a group of consecutive triples: always the same together, so that their bits depend
        neither on the order of training nor on where it was resumed."""
        members = range(group * TRIPLES_AT_ONCE, min((group + 1) * TRIPLES_AT_ONCE, len(self.triples)))
        rows = [(index, side, *self._rows(index)[side]) for index in members for side in (0, 1)]
        lengths = [len(prompt) + len(response) for _, _, prompt, response in rows]
        ids = torch.full((len(rows), max(lengths)), self._pad)
        mask = torch.zeros(ids.shape, dtype=torch.bool)
        for row, (_, _, prompt, response) in enumerate(rows):
            ids[row, : lengths[row]] = torch.tensor([*prompt, *response])
            mask[row, : lengths[row]] = True
        found = self._split.states(ids.to(self._device), mask.to(self._device)).cpu()
        for row, (index, side, _, _) in enumerate(rows):
            self._states[index, side] = found[row, : lengths[row]].clone()
