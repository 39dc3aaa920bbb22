"""Reading prompts after one layer: which latents are active on how many of their counted tokens."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dspa.kernels import EditList, encode_density
from dspa.methods.policy import Policy
from dspa.online.policy_groups import ReadingGroup
from dspa.online.prompt_mask import PromptMask


class PromptReader:
    """Counts, for each row of a batch, the prompt tokens on which each latent is active (docs/method.md, section 3).

    Attributes:
        group: whose prompts are read.
        counts: `[B, d_sae]` int32; None before the first pass.
        tokens: `[B]` int64, counted tokens of each row; None before the first pass.
        positions_read: prompt positions that have been read.
    """

    def __init__(self, group: ReadingGroup, device: torch.device, backend: str) -> None:
        self.group = group
        self._sae = None if group.sae is None else group.sae.to(device)
        self._backend = backend
        self.begin_prompt()

    def begin_prompt(self) -> None:
        """Starts from zero."""
        self.counts: Tensor | None = None
        self.tokens: Tensor | None = None
        self.positions_read = 0

    def prepare(self, policies: Mapping[str, Policy], dtype: torch.dtype) -> None:
        """Compiles what reading prompts of hidden states of a dtype needs, and selecting by them, on a prompt without
        an active latent."""
        if self._sae is None:
            return
        sae = self._sae
        hidden = torch.zeros(1, sae.d_model, dtype=dtype, device=sae.device)
        counts = encode_density(hidden, torch.tensor([0, 1], device=sae.device), sae, backend=self._backend)
        for name in self.group.names:
            policies[name].select(torch.zeros_like(counts, dtype=torch.float32))

    def read(self, hidden: Tensor, mask: PromptMask, rows: Tensor, start: int) -> None:
        """Counts the prompt positions of a pass that were not read before.

        Args:
            hidden: `[B, T, d_model]`, positions `start` to `start + T`.
            mask: which positions count.
            rows: `[B]` bool, the rows of this group.
            start: the first position of the pass.
        """
        first, end = max(start, self.positions_read), min(start + hidden.shape[1], mask.width)
        if first >= end:
            return
        counted = (mask.counted[:, first:end] & rows.to(mask.counted.device)[:, None]).to(hidden.device)
        tokens = counted.sum(dim=1)
        if self._sae is None:
            counts = torch.zeros(len(tokens), 0, dtype=torch.int32, device=hidden.device)
        else:
            self._sae = self._sae.to(hidden.device)
            offsets = torch.zeros(len(tokens) + 1, dtype=torch.int64, device=hidden.device)
            offsets[1:] = tokens.cumsum(dim=0)
            kept = hidden.detach()[:, first - start : end - start][counted]
            counts = encode_density(kept, offsets, self._sae, backend=self._backend)
        self.counts = counts if self.counts is None else self.counts + counts
        self.tokens = tokens if self.tokens is None else self.tokens + tokens
        self.positions_read = end

    def select(self, policy: Policy, rows: Tensor, repeats: int = 1) -> EditList | None:
        """What a policy selects for some rows, `rows [n]` int64; empty lists for rows without a counted token.

        A policy without an observation may have a list for each prompt of the batch, of which there are `repeats` rows
        each."""
        assert self.counts is not None
        assert self.tokens is not None
        if self._sae is None:
            edits = policy.select(self.counts[::repeats].float())
            return None if edits is None else edits.rows(rows.to(edits.latents.device) // repeats)
        if len(rows) < len(self.tokens):
            counts, tokens = self.counts[rows.to(self.counts.device)], self.tokens[rows.to(self.tokens.device)]
        else:
            counts, tokens = self.counts, self.tokens
        edits = policy.select(counts / tokens.clamp(min=1)[:, None])
        if edits is None:
            return None
        return EditList(edits.latents, edits.signs, edits.counts * (tokens > 0).to(edits.counts.device))
