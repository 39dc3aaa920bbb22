"""The state of one prompt and of what continues it: which policy each row has, and what has been read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.methods.policy import Policy
from dspa.online.layer_editor import LayerEditor
from dspa.online.prompt_mask import PromptMask
from dspa.online.prompt_reader import PromptReader


class Prompt:
    """The prompts of one batch, from their first token until the next prompts begin.

    Attributes:
        mask: which positions are counted and edited, a row per row of the passes.
        row_policies: the policy of each row; None for rows that are not steered.
        repeats: rows of each prompt, for beams and several sequences.
        attention_mask: `[prompts, P]`, nonzero where a prompt has a token.
        lengths: `[prompts]`, how many of these tokens are prompt; None for all.
        cache: returns the cache the prompt is kept in, or None where it is in none; None while that is not known.
        counted_until: positions before this one have been counted; without a cache they are computed again.
        unread: readers of policies whose prompt has not been read to its end.
    """

    def __init__(
        self,
        mask: PromptMask,
        prompt_policies: Sequence[str | None],
        attention_mask: Tensor,
        lengths: Tensor | None,
        readers: Sequence[PromptReader],
        policies: Mapping[str, Policy],
    ) -> None:
        self.mask = mask
        self.repeats = mask.batch // max(len(prompt_policies), 1)
        self.row_policies = [name for name in prompt_policies for _ in range(self.repeats)]
        self.attention_mask = attention_mask
        self.lengths = lengths
        self.cache: Callable[[], object | None] | None = None
        self.counted_until = 0
        self.unread: list[PromptReader] = []
        self._policies = policies
        self._rows = {
            policy: torch.tensor([row for row, name in enumerate(self.row_policies) if name == policy]).long()
            for policy in policies
        }
        for reader in readers:
            reader.begin_prompt()
            if any(len(self._rows[name]) for name in reader.group.names):
                self.unread.append(reader)

    @property
    def steered(self) -> bool:
        """Whether some row has a policy."""
        return any(name is not None for name in self.row_policies)

    def read(
        self, layer: int, hidden: Tensor, start: int, *, edited_now: bool, editor_of: Mapping[str, LayerEditor]
    ) -> int:
        """Reads prompt positions after a layer. When a prompt has been read, or one of its tokens is edited in this
        pass, its policies select their edits.

        Args:
            layer: the decoder layer.
            hidden: `[B, T, d_model]`, positions `start` to `start + T`.
            start: the first position of the pass.
            edited_now: whether a prompt token is edited in this pass.
            editor_of: which editor each policy's selection goes to.

        Returns:
            How many rows' prompts have been read to their end.
        """
        finished_rows = 0
        for reader in [reader for reader in self.unread if reader.group.layer == layer]:
            names = [name for name in reader.group.names if len(self._rows[name])]
            rows = torch.zeros(self.mask.batch, dtype=torch.bool)
            for name in names:
                rows[self._rows[name]] = True
            reader.read(hidden, self.mask, rows, start)
            finished = reader.positions_read == self.mask.width
            if (finished or edited_now) and reader.counts is not None:
                for name in names:
                    selection = reader.select(self._policies[name], self._rows[name], self.repeats)
                    editor_of[name].set_selection(selection, self._rows[name])
            if finished:
                self.unread.remove(reader)
                finished_rows += int(rows.sum())
        return finished_rows

    def check_read(self, editor: LayerEditor, known_after: int) -> None:
        """Raises InvalidInputError if a token is to be edited whose prompt has not been read as far as needed. Policies
        without an observation need nothing of it."""
        positions_read = [
            reader.positions_read
            for reader in self.unread
            if reader.group.sae is not None and set(reader.group.names) & set(editor.group.names)
        ]
        if positions_read and min(positions_read) < known_after:
            raise InvalidInputError(
                f"a token to be edited was computed before the whole prompt of {self.mask.width} tokens was read; pass "
                "the prompt in one piece (no prefill_chunk_size), or use edit_positions='from_last_prompt'"
            )
