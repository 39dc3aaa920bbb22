"""Which columns of a batch are prompt, which of them are counted, and which are edited: the rules of method.md,
sections 2 and 4, on left-padded, right-padded and expanded batches, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.methods.policy import EditPositions


@dataclass(frozen=True, eq=False)
class PromptMask:
    """The part of a batch that was there before anything was generated, `P` columns wide, padding included.

    Attributes:
        counted: `[B, P]` bool, tokens whose latents make up the prompt's densities.
        edited: `[B, P]` bool, tokens that are edited.
        edited_columns: the columns in which some row is edited, ascending.
        known_after: for each of these, how many columns have to be read before the rows that are edited there have
            their densities: one more than the last counted column of any of them.
    """

    counted: Tensor
    edited: Tensor
    edited_columns: tuple[int, ...]
    known_after: tuple[int, ...]

    @classmethod
    def from_prompt(
        cls,
        token_ids: Tensor | None,
        present: Tensor,
        uncounted_token_ids: Tensor,
        positions: EditPositions,
        prompt_tokens: Tensor | None = None,
    ) -> PromptMask:
        """The columns of a prompt, or of prompts with responses to be scored.

        Args:
            token_ids: `[B, n]` ids of the last n columns; None if the prompt was given as embeddings.
            present: `[B, P]`, nonzero on tokens, zero on padding.
            uncounted_token_ids: `[m]` ids that never count, such as that of the beginning of the sequence.
            positions: which positions the policy edits.
            prompt_tokens: `[B]` int64, how many tokens of each row are its prompt; the rest is edited as if it had been
                generated. None if all of them are.

        Raises:
            InvalidInputError: if the prompt is empty, or `present` is not `[B, P]`.
        """
        if present.ndim != 2 or present.shape[1] == 0:
            raise InvalidInputError(
                f"the prompt's attention mask is {tuple(present.shape)}; expected [B, P] with at least one token"
            )
        present = present.bool()
        prompt = present
        if prompt_tokens is not None:
            prompt = present & (present.cumsum(dim=1) <= prompt_tokens.to(present.device)[:, None])
        counted = prompt.clone()
        if token_ids is not None:
            unknown = present.shape[1] - token_ids.shape[1]
            counted[:, :unknown] = False  # they are in the cache already and will not come by
            counted[:, unknown:] &= ~torch.isin(token_ids, uncounted_token_ids.to(token_ids.device))
        edited = present & ~prompt
        if positions != "generated":
            column = torch.arange(present.shape[1], device=present.device)
            last = (prompt * (column + 1)).argmax(dim=1)
            edited[torch.arange(len(prompt), device=present.device), last] |= prompt.any(dim=1)
        if positions == "all":
            edited |= counted
        return cls._with_columns(counted, edited)

    @classmethod
    def from_rows(cls, choices: Sequence[PromptMask], row_choice: Tensor) -> PromptMask:
        """Each row from one of several of the same shape.

        Args:
            choices: what to choose from.
            row_choice: `[B]` int64, which of them; -1 for a row in which nothing is counted or edited.
        """
        counted, edited = torch.zeros_like(choices[0].counted), torch.zeros_like(choices[0].edited)
        for index, columns in enumerate(choices):
            chosen = (row_choice == index).to(counted.device)
            counted[chosen], edited[chosen] = columns.counted[chosen], columns.edited[chosen]
        return cls._with_columns(counted, edited)

    @classmethod
    def _with_columns(cls, counted: Tensor, edited: Tensor) -> PromptMask:
        column = torch.arange(1, counted.shape[1] + 1, device=counted.device)
        known_after = (counted * column).amax(dim=1, keepdim=True)
        columns = edited.any(dim=0).nonzero().flatten()
        needed = (edited * known_after).amax(dim=0)[columns] if len(counted) else columns
        return cls(counted, edited, tuple(columns.tolist()), tuple(needed.tolist()))

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
            self.edited_columns,
            self.known_after,
        )
