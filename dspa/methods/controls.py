"""Controls: what a method's gain has to be compared with (docs/method.md, section 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels import EditList
from dspa.methods.fsrl.policy import FsrlPolicy
from dspa.offline.density_store import DensityStore
from dspa.offline.density_subset import DensitySubset

ALIKE = 16  # at least so many latents, next to each other by density, are exchanged


def lists_of_other_prompts(lists: EditList, kinds: Sequence[str], seed: int) -> EditList:
    """Each prompt with the list of a prompt of another kind, drawn at random.

    Args:
        lists: one for each prompt.
        kinds: of the prompts.
        seed: of the draw.

    Raises:
        InvalidInputError: if all prompts are of one kind.
    """
    if len(set(kinds)) < 2:
        raise InvalidInputError("all prompts are of one kind; expected two kinds, to exchange their lists")
    generator, kind_of = np.random.default_rng(seed), np.array(kinds)
    others = [generator.choice(np.flatnonzero(kind_of != kind)) for kind in kind_of]
    return lists.rows(torch.tensor(others, device=lists.latents.device))


def random_latents(lists: EditList, density: Tensor, seed: int) -> EditList:
    """Lists of the same lengths and signs, of other latents that fire about as often: an edit acts on active latents
    alone, so that lists of rarer ones edit less.

    Latents are sorted by density, and those of each group of neighbours are exchanged at random, none of them keeping
    its place. That is one permutation of all latents, so that latents which lists share stay shared.

    Args:
        lists: of the output SAE's latents.
        density: `[d_sae]`, how often each latent is active, such as the mean over responses.
        seed: of the permutation.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(len(density), dtype=torch.int64)
    for group in density.cpu().sort(stable=True).indices.tensor_split(max(1, len(density) // ALIKE)):
        shuffled = group[torch.randperm(len(group), generator=generator)]
        order[shuffled] = shuffled.roll(1)
    latents = order.to(lists.latents.device)[lists.latents.long()].to(torch.int32)
    return EditList(torch.where(lists.valid(), latents, 0), lists.signs.clone(), lists.counts.clone())


def response_density(store: DensityStore | DensitySubset) -> Tensor:
    """`[d_sae_out]` float64, how often each output latent is active: the mean density over the responses of triples."""
    total = torch.zeros(store.run.d_sae_out, dtype=torch.float64)
    for shard in store.read():
        for part in (shard.chosen, shard.rejected):
            total.index_add_(0, part.latents.long(), part.densities())
    return total / (2 * store.run.triple_count)


def with_permuted_latents(policy: FsrlPolicy, seed: int) -> FsrlPolicy:
    """The same adapter on other latents: each row of it steers a latent drawn at random, none of them two."""
    order = torch.randperm(policy.sae.d_sae, generator=torch.Generator().manual_seed(seed))
    adapter = policy.adapter
    order = order.to(adapter.device)
    moved = {name: getattr(adapter, name)[order].contiguous() for name in ("weight", "bias", "threshold")}
    return replace(policy, adapter=replace(adapter, **moved))
