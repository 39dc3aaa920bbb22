"""FSRL's objective: SimPO on mean log-probabilities of responses (docs/method.md, section 6)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def response_log_probabilities(logits: Tensor, ids: Tensor, response: Tensor) -> Tensor:
    """Mean log-probability per response token, `[B]`, in float32 (float64 of float64 logits).

    Args:
        logits: `[B, T, vocabulary]`.
        ids: `[B, T]` token ids.
        response: `[B, T]` bool, the tokens of the response; never the first of a row.
    """
    scored = response[:, 1:]
    chosen = logits[:, :-1][scored]  # [tokens, vocabulary]
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    losses = F.cross_entropy(chosen, ids[:, 1:][scored], reduction="none")
    row = scored.nonzero()[:, 0]
    sums = torch.zeros(len(ids), dtype=losses.dtype, device=losses.device).index_add(0, row, -losses)
    return sums / scored.sum(dim=1).clamp(min=1)


def simpo_losses(margins: Tensor, beta: float, gamma: float) -> Tensor:
    """`-log sigmoid(beta * margin - gamma)` of each pair, `[P]`; a margin is `lp_chosen - lp_rejected`."""
    return F.softplus(gamma - beta * margins)
