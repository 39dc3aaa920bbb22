"""Counting active latents, in plain torch."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from dspa.sae.encode import activations, encoder_input
from dspa.sae.weights import SaeWeights

TOKENS_PER_BLOCK = 512


def encode_density(hidden: Tensor, offsets: Tensor, sae: SaeWeights) -> Tensor:
    """See `dspa.kernels.encode_density`."""
    bounds = offsets.tolist()
    counts = torch.zeros(len(bounds) - 1, sae.d_sae, dtype=torch.int32, device=hidden.device)
    W_enc = None
    for segment, (start, end) in enumerate(itertools.pairwise(bounds)):
        for block in hidden[start:end].split(TOKENS_PER_BLOCK):
            x, _ = encoder_input(block, sae)
            x = x[x.isfinite().all(dim=-1)]
            W_enc = sae.W_enc.to(x.dtype) if W_enc is None else W_enc
            counts[segment] += (activations(x @ W_enc.T, sae) > 0).sum(dim=0, dtype=torch.int32)
    return counts
