"""Counters of one editor: those of speculative positions count once their tokens are accepted."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from dspa.kernels import TokenStats


class PositionCounters:
    """Counters by size of batch, allocated once and updated in place.

    A generate call with drafts computes several positions in one pass before it is known which of their tokens are
    accepted. Their counts are kept apart until `commit`.
    """

    def __init__(self, latents: int, device: torch.device) -> None:
        self._latents = latents
        self._device = device
        self._by_batch: dict[int, TokenStats] = {}
        self._speculative: dict[int, TokenStats] = {}
        self._spare: list[TokenStats] = []

    def of_batch(self, batch: int) -> TokenStats:
        """The counters of batches of so many rows."""
        if batch not in self._by_batch:
            self._by_batch[batch] = self._zeros(batch)
        return self._by_batch[batch]

    def of_position(self, batch: int, position: int, *, speculative: bool) -> TokenStats:
        """What the tokens at a position are added to."""
        if not speculative:
            return self.of_batch(batch)
        stats = self._speculative[position] = self._spare_zeros(batch)
        return stats

    def begin_prompt(self) -> None:
        """Drops what is speculative."""
        self._speculative.clear()

    def commit(self, accepted: int, batch: int) -> None:
        """Counts the speculative positions before position `accepted`, and drops the others."""
        for position, stats in self._speculative.items():
            if position < accepted:
                _add(self.of_batch(batch), stats)
            self._spare.append(stats)
        self._speculative.clear()

    def all(self) -> list[TokenStats]:
        """The counters of every size of batch."""
        return list(self._by_batch.values())

    def totals(self) -> Tensor:
        """Tokens seen, edited and not finite so far, `[3]` int64."""
        sums = [torch.stack([s.seen.sum(), s.edited.sum(), s.nonfinite.sum()]) for s in self.all()]
        return torch.stack(sums).sum(dim=0) if sums else torch.zeros(3, dtype=torch.int64, device=self._device)

    def _zeros(self, batch: int) -> TokenStats:
        with torch.inference_mode(False):  # they are written in later calls, which may not be in inference mode
            return TokenStats.zeros(batch, self._latents, self._device)

    def _spare_zeros(self, batch: int) -> TokenStats:
        while self._spare:
            stats = self._spare.pop()
            if len(stats.seen) == batch:
                for field in fields(stats):
                    getattr(stats, field.name).zero_()
                return stats
        return self._zeros(batch)


def _add(total: TokenStats, more: TokenStats) -> None:
    total.maximum.copy_(torch.where(more.seen > 0, more.maximum, total.maximum))
    for field in fields(total):
        if field.name != "maximum":
            getattr(total, field.name).add_(getattr(more, field.name))
