"""Which positions of a batch are prompt, which of them are counted, and which are edited (docs/method.md, sections 2
and 4), row by row, on left-padded, right-padded and expanded batches.

A position is a column of the batch, padding included; a token's place in its own sequence is another number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.methods.policy import EditPositions


@dataclass(frozen=True, eq=False)
class PromptMask:
    """The part of a batch that was there before anything was generated, `P` positions wide, padding included.

    Attributes:
        counted: `[B, P]` bool, tokens whose latents make up the prompt's densities.
        edited: `[B, P]` bool, tokens that are edited.
        edited_positions: the positions at which some row is edited, ascending.
        known_after: for each of these, how many positions have to be read before the rows that are edited there have
            their densities: one more than the last counted position of any of them.
    """

    counted: Tensor
    edited: Tensor
    edited_positions: tuple[int, ...]
    known_after: tuple[int, ...]

    @classmethod
    def from_prompt(
        cls,
        token_ids: Tensor | None,
        attention_mask: Tensor,
        uncounted_token_ids: Tensor,
        edit_positions: EditPositions,
        prompt_lengths: Tensor | None = None,
    ) -> PromptMask:
        """The mask of a prompt, or of prompts with responses to be scored.

        Args:
            token_ids: `[B, n]` ids at the last n positions; None if the prompt was passed as embeddings.
            attention_mask: `[B, P]`, nonzero on tokens, zero on padding.
            uncounted_token_ids: `[m]` ids that never count, such as that of the beginning of the sequence.
            edit_positions: which positions the policy edits.
            prompt_lengths: `[B]` int64, how many tokens of each row are its prompt; the rest is edited as if it had
                been generated. None if all of them are.

        Raises:
            InvalidInputError: if the prompt is empty, or the attention mask is not `[B, P]`.
        """
        if attention_mask.ndim != 2 or attention_mask.shape[1] == 0:
            raise InvalidInputError(
                f"the prompt's attention mask is {tuple(attention_mask.shape)}; expected [B, P] with at least one token"
            )
        tokens = attention_mask.bool()
        prompt = tokens
        if prompt_lengths is not None:
            prompt = tokens & (tokens.cumsum(dim=1) <= prompt_lengths.to(tokens.device)[:, None])
        counted = prompt.clone()
        if token_ids is not None:
            cached = tokens.shape[1] - token_ids.shape[1]
            counted[:, :cached] = False  # they are in the cache already and are not computed again
            counted[:, cached:] &= ~torch.isin(token_ids, uncounted_token_ids.to(token_ids.device))
        edited = tokens & ~prompt
        if edit_positions != "generated":
            position = torch.arange(tokens.shape[1], device=tokens.device)
            last = (prompt * (position + 1)).argmax(dim=1)
            edited[torch.arange(len(prompt), device=tokens.device), last] |= prompt.any(dim=1)
        if edit_positions == "all":
            edited |= counted
        return cls._from_masks(counted, edited)

    @classmethod
    def from_rows(cls, masks: Sequence[PromptMask], row_choice: Tensor) -> PromptMask:
        """Each row from one of several masks of the same shape.

        Args:
            masks: what to choose from.
            row_choice: `[B]` int64, which of them; -1 for a row in which nothing is counted or edited.
        """
        counted, edited = torch.zeros_like(masks[0].counted), torch.zeros_like(masks[0].edited)
        for index, mask in enumerate(masks):
            chosen = (row_choice == index).to(counted.device)
            counted[chosen], edited[chosen] = mask.counted[chosen], mask.edited[chosen]
        return cls._from_masks(counted, edited)

    @classmethod
    def _from_masks(cls, counted: Tensor, edited: Tensor) -> PromptMask:
        position = torch.arange(1, counted.shape[1] + 1, device=counted.device)
        known_after = (counted * position).amax(dim=1, keepdim=True)
        positions = edited.any(dim=0).nonzero().flatten()
        needed = (edited * known_after).amax(dim=0)[positions] if len(counted) else positions
        return cls(counted, edited, tuple(positions.tolist()), tuple(needed.tolist()))

    @property
    def batch(self) -> int:
        return self.counted.shape[0]

    @property
    def width(self) -> int:
        return self.counted.shape[1]

    def expanded_to(self, batch: int) -> PromptMask:
        """With each row repeated as `generate` repeats it, for beams and for several sequences per prompt.

        Raises:
            InvalidInputError: if the batch is not a multiple of the prompts.
        """
        if batch == self.batch:
            return self
        if self.batch == 0 or batch % self.batch:
            raise InvalidInputError(f"a forward pass has {batch} rows for {self.batch} prompts; expected a multiple")
        repeats = batch // self.batch
        return PromptMask(
            self.counted.repeat_interleave(repeats, dim=0),
            self.edited.repeat_interleave(repeats, dim=0),
            self.edited_positions,
            self.known_after,
        )
