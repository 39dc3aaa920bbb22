"""Comparators that are read off the hidden states of preference pairs, without training (docs/method.md, section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dspa.errors import InvalidInputError
from dspa.kernels import AdapterWeights
from dspa.methods.fsrl.policy import FsrlPolicy
from dspa.methods.policy import EditPositions
from dspa.methods.split_model import SplitModel
from dspa.methods.vector_policy import VectorPolicy
from dspa.offline.preferences import PreferenceTriple, PreferenceTriples
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.transformers_model import ModelFingerprint, check_layer_fits, check_sae_fits, device_of
from dspa.util.progress import track

TRIPLES_AT_ONCE = 16


@dataclass(frozen=True, eq=False)
class ResponseMeans:
    """Means over the response tokens of each triple, float64 on the CPU.

    Attributes:
        layer: the decoder layer, from 0.
        chosen, rejected: `[N, d_model]`, of the hidden states after the layer.
        latents_chosen, latents_rejected: `[N, d_sae]`, of the SAE's activations there; None without an SAE.
        model: the model.
        sae: the SAE.
    """

    layer: int
    chosen: Tensor
    rejected: Tensor
    latents_chosen: Tensor | None
    latents_rejected: Tensor | None
    model: ModelFingerprint
    sae: SparseAutoencoder | None


@torch.no_grad()
def response_means(
    model: nn.Module,
    triples: PreferenceTriples | Sequence[PreferenceTriple],
    layer: int,
    sae: SparseAutoencoder | None = None,
    *,
    progress: bool = False,
) -> ResponseMeans:
    """Runs the layers up to `layer` on all pairs.

    Args:
        model: a transformers model.
        triples: the pairs.
        layer: the decoder layer, from 0.
        sae: an SAE of that layer, for means of its activations.
        progress: whether to draw a progress bar.

    Raises:
        InvalidInputError: if there are no triples.
        MismatchError: if the layer or the SAE does not fit the model.
    """
    if not len(triples):
        raise InvalidInputError("there are no triples to take means of")
    fingerprint = ModelFingerprint.from_model(model)
    check_layer_fits("vector", layer, fingerprint)
    if sae is not None:
        check_sae_fits(sae, "output", layer, fingerprint)
    split, device = SplitModel(model, layer), device_of(model)
    sae = None if sae is None else sae.to(device)
    config: Any = model.config
    pad = int(getattr(config, "pad_token_id", None) or 0)
    means: dict[str, list[Tensor]] = {name: [] for name in ("chosen", "rejected")}
    latents: dict[str, list[Tensor]] = {name: [] for name in means}
    for first in track(range(0, len(triples), TRIPLES_AT_ONCE), "Reading pairs", enabled=progress, unit="batches"):
        part = [triples[index] for index in range(first, min(first + TRIPLES_AT_ONCE, len(triples)))]
        for side in means:
            rows = [(triple.prompt, getattr(triple, side)) for triple in part]
            width = max(len(prompt) + len(response) for prompt, response in rows)
            ids = torch.full((len(rows), width), pad)
            mask = torch.zeros_like(ids)
            for row, (prompt, response) in enumerate(rows):
                ids[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
                mask[row, : len(prompt) + len(response)] = 1
            states = split.states(ids.to(device), mask.to(device))
            for row, (prompt, response) in enumerate(rows):
                own = states[row, len(prompt) : len(prompt) + len(response)]
                means[side].append(own.double().mean(dim=0).cpu())
                if sae is not None:
                    latents[side].append(sae.encode(own).double().mean(dim=0).cpu())
    stacked = {side: torch.stack(rows) for side, rows in means.items()}
    of_latents = {side: torch.stack(rows) if rows else None for side, rows in latents.items()}
    return ResponseMeans(
        layer,
        stacked["chosen"],
        stacked["rejected"],
        of_latents["chosen"],
        of_latents["rejected"],
        fingerprint,
        sae,
    )


def mean_difference_policy(
    means: ResponseMeans, *, scale: float = 1.0, edit_positions: EditPositions = "from_last_prompt"
) -> VectorPolicy:
    """CAA: the mean over pairs of chosen minus rejected, in the units of the residual stream."""
    vector = (means.chosen - means.rejected).mean(dim=0).float()
    return VectorPolicy(vector, means.layer, scale, model=means.model, edit_positions=edit_positions)


def principal_directions(means: ResponseMeans, directions: int = 16) -> Tensor:
    """`[directions, d_model]` float64, unit rows: the principal directions of the paired differences about 0, the
    strongest first, each turned so that the mean difference has a positive product with it.

    Raises:
        InvalidInputError: if there are not as many.
    """
    differences = means.chosen - means.rejected
    most = min(differences.shape)
    if not 1 <= directions <= most:
        raise InvalidInputError(f"directions is {directions}; expected 1 to {most} for {len(differences)} pairs")
    found = torch.linalg.svd(differences, full_matrices=False).Vh[:directions]
    turned = found @ differences.mean(dim=0) < 0
    return torch.where(turned[:, None], -found, found)


def principal_directions_policy(
    means: ResponseMeans,
    *,
    directions: int = 16,
    scale: float = 0.5,
    edit_positions: EditPositions = "from_last_prompt",
) -> VectorPolicy:
    """RepE: the sum of the principal directions, each of length 1, times `scale`.

    Raises:
        InvalidInputError: if there are not as many directions.
    """
    vector = principal_directions(means, directions).sum(dim=0).float()
    return VectorPolicy(vector, means.layer, scale, model=means.model, edit_positions=edit_positions)


def latent_addition_policy(
    means: ResponseMeans,
    *,
    k: int = 16,
    scale: float = 0.5,
    edit_positions: EditPositions = "from_last_prompt",
) -> FsrlPolicy:
    """Static-SAE as an addition: of the mean difference of activations, the k largest and the k smallest entries are
    added to the latents of every token, which do not fall below 0.

    Raises:
        InvalidInputError: if the means were taken without an SAE, or k is out of range.
    """
    if means.sae is None or means.latents_chosen is None or means.latents_rejected is None:
        raise InvalidInputError("the means hold no latents; pass the SAE to response_means")
    if not 1 <= k <= means.sae.d_sae // 2:
        raise InvalidInputError(f"k is {k}; expected 1 to {means.sae.d_sae // 2}")
    difference = (means.latents_chosen - means.latents_rejected).mean(dim=0)
    order = difference.sort(stable=True).indices
    kept = torch.cat([order[:k], order[-k:]])
    vector = torch.zeros_like(difference)
    vector[kept] = difference[kept]
    return constant_latents_policy(vector, means.sae, means.layer, means.model, scale, edit_positions)


def constant_latents_policy(
    vector: Tensor,
    sae: SparseAutoencoder,
    layer: int,
    model: ModelFingerprint | None,
    scale: float,
    edit_positions: EditPositions,
) -> FsrlPolicy:
    """The same vector of latents, `[d_sae]`, added at every token: an adapter whose weight is 0."""
    small = torch.float64 if sae.dtype == torch.float64 else torch.float32
    bias = vector.to(small).contiguous()
    adapter = AdapterWeights(weight=torch.zeros_like(sae.W_enc), bias=bias, threshold=torch.zeros_like(bias))
    return FsrlPolicy(adapter, sae, layer, scale=scale, model=model, edit_positions=edit_positions)
