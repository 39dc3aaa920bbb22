"""Which columns of a batch are prompt, which of them are counted, and which are edited: the rules of method.md,
sections 2 and 4, on left-padded, right-padded and expanded batches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.policy import EditPositions


@dataclass(frozen=True, eq=False)
class PromptColumns:
    """The prompt part of a batch, `P` columns wide, padding included.

    Attributes:
        counted: `[B, P]` bool, tokens whose latents make up the prompt's densities.
        edited: `[B, P]` bool, prompt tokens that are edited.
        edited_columns: the columns in which some row is edited, ascending.
    """

    counted: Tensor
    edited: Tensor
    edited_columns: tuple[int, ...]

    @classmethod
    def of(
        cls, token_ids: Tensor | None, present: Tensor, uncounted_token_ids: Tensor, positions: EditPositions
    ) -> PromptColumns:
        """The columns of a prompt.

        Args:
            token_ids: `[B, n]` ids of the last n columns; None if the prompt was given as embeddings.
            present: `[B, P]`, nonzero on tokens, zero on padding.
            uncounted_token_ids: `[m]` ids that never count, such as that of the beginning of the sequence.
            positions: which positions the policy edits.

        Raises:
            InvalidInputError: if the prompt is empty, or `present` is not `[B, P]`.
        """
        if present.ndim != 2 or present.shape[1] == 0:
            raise InvalidInputError(
                f"the prompt's attention mask is {tuple(present.shape)}; expected [B, P] with at least one token"
            )
        present = present.bool()
        counted = present.clone()
        if token_ids is not None:
            unknown = present.shape[1] - token_ids.shape[1]
            counted[:, :unknown] = False  # they are in the cache already and will not come by
            counted[:, unknown:] &= ~torch.isin(token_ids, uncounted_token_ids.to(token_ids.device))
        column = torch.arange(present.shape[1], device=present.device)
        last = (present * (column + 1)).argmax(dim=1)
        edited = torch.zeros_like(present)
        if positions != "generated":
            edited[torch.arange(len(present), device=present.device), last] = present.any(dim=1)
        if positions == "all":
            edited |= counted
        return cls(counted, edited, tuple(edited.any(dim=0).nonzero().flatten().tolist()))

    @property
    def batch(self) -> int:
        return self.counted.shape[0]

    @property
    def width(self) -> int:
        return self.counted.shape[1]

    def expanded_to(self, batch: int) -> PromptColumns:
        """With each row repeated as `generate` repeats it, for beams and for several sequences per prompt.

        Raises:
            InvalidInputError: if the batch is not a multiple of the prompts.
        """
        if batch == self.batch:
            return self
        if self.batch == 0 or batch % self.batch:
            raise InvalidInputError(f"a forward pass has {batch} rows for {self.batch} prompts; expected a multiple")
        repeats = batch // self.batch
        return PromptColumns(
            self.counted.repeat_interleave(repeats, dim=0),
            self.edited.repeat_interleave(repeats, dim=0),
            self.edited_columns,
        )
