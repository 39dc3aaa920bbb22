"""How well a map predicts triples that it was not fitted from (docs/method.md, section 2.2).

It chooses among estimators and options without a held-out prompt, without the model, and without generating.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels import EditKind, EditList
from dspa.methods.conditional_map import ConditionalDifferenceMap, dense_densities, differences
from dspa.offline.density_store import DensityStore
from dspa.offline.density_subset import DensitySubset
from dspa.util.estimate import Estimate
from dspa.util.scalars import check_integer


def cross_validated_agreement(
    store: DensityStore | DensitySubset,
    *,
    folds: int = 5,
    seed: int = 0,
    k_prompt: int = 32,
    k_diff: int = 16,
    edit: EditKind = "both",
    **fit: Any,
) -> Estimate:
    """The mean over triples of `Σ_augment D_j - Σ_ablate D_j`, with the lists that a map fitted from the other folds
    selects for a triple's prompt: how far they go with a difference that they have not seen. Its interval is that of a
    mean over triples.

    Args:
        store: what `collect` returned.
        folds: into how many parts the triples are divided.
        seed: of the division.
        k_prompt: prompt latents that choose rows, as in a policy.
        k_diff: latents edited in each direction, as in a policy.
        edit: in which directions.
        fit: options of `ConditionalDifferenceMap.fit`.

    Raises:
        InvalidInputError: if there are fewer triples than folds, or an option is out of range.
    """
    check_integer("folds", folds, 2)
    count = store.run.triple_count
    if count < folds:
        raise InvalidInputError(f"there are {count} triples; expected at least one for each of {folds} folds")
    whole = DensitySubset.from_store(store, range(count))
    density = dense_densities(whole.shard.prompt, store.run.d_sae_in)
    difference = torch.cat([part for _, part in differences(whole)])
    order, agreement = np.random.default_rng(seed).permutation(count), np.zeros(count)
    for fold in range(folds):
        left_out = np.sort(order[fold::folds])
        others = np.setdiff1d(order, left_out)
        fitted = ConditionalDifferenceMap.fit(DensitySubset.from_store(whole, others.tolist()), **fit)
        edits = fitted.select(density[left_out], k_prompt, k_diff, edit)
        agreement[left_out] = _agreement(edits, difference[left_out]).numpy()
    return Estimate.from_samples(agreement)


def _agreement(edits: EditList, difference: Tensor) -> Tensor:
    """`[B]` float64."""
    signs = torch.where(edits.valid(), edits.signs.double(), 0)
    listed = difference.gather(1, torch.where(edits.valid(), edits.latents.long(), 0))
    return (signs * listed).sum(dim=1)
