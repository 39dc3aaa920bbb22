"""Whether the counts of `encode_density` are right, gate by gate."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from dspa.kernels import SaeWeights
from dspa.sae.encode import activations, encoder_input

ROUNDINGS = 16  # of float32: far more than sums in blocks err by, relative to the norms of what is multiplied


def check_counts(found: Tensor, hidden: Tensor, offsets: Tensor, sae: SaeWeights) -> None:
    """Counts `[segments, d_sae]` may differ from those in float64 only by gates that rounding can flip.

    Raises:
        AssertionError: if they differ by more, or so many gates are within rounding that nothing is checked.
    """
    doubled = {name: tensor.double() for name, tensor in sae.tensors().items() if tensor.is_floating_point()}
    exact = replace(sae, **doubled)
    x, _ = encoder_input(hidden.double(), exact)
    product = x @ exact.W_enc.T
    active = activations(product, exact) > 0
    error = ROUNDINGS * torch.finfo(torch.float32).eps * x.norm(dim=1, keepdim=True) * exact.W_enc.norm(dim=1)
    undecided = _distance(product, exact) <= error
    for segment, (start, end) in enumerate(itertools.pairwise(offsets.tolist())):
        difference = (found[segment].long() - active[start:end].sum(0)).abs()
        assert (difference <= undecided[start:end].sum(0)).all(), "counts differ by more than rounding"
    assert undecided.double().mean() < 1e-3, "too many gates are within rounding"


def _distance(product: Tensor, sae: SaeWeights) -> Tensor:
    """How far products `[N, d_sae]` are from where a gate opens or closes."""
    z = product + sae.b_enc
    if sae.activation == "gated":
        assert sae.magnitude_scale is not None  # SaeWeights checks it
        assert sae.magnitude_bias is not None
        magnitude = (product * sae.magnitude_scale + sae.magnitude_bias) / sae.magnitude_scale.abs()
        return torch.minimum(z.abs(), magnitude.abs())
    scores = z if sae.decoder_norm is None else z * sae.decoder_norm
    if sae.activation == "topk":
        assert sae.k is not None  # SaeWeights checks it
        last = scores.topk(sae.k, dim=1).values[:, -1:]
        next_ = scores.topk(min(sae.k + 1, sae.d_sae), dim=1).values[:, -1:]
        distance = torch.minimum((scores - (last + next_) / 2).abs(), scores.abs())
    else:
        distance = torch.minimum((scores - sae.threshold).abs(), scores.abs())
    return distance if sae.decoder_norm is None else distance / sae.decoder_norm
