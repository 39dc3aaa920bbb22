"""Controls: what a method's gain has to be compared with (docs/method.md, section 7)."""

from __future__ import annotations

from dataclasses import replace

import torch

from dspa.kernels import EditList
from dspa.methods.fsrl.policy import FsrlPolicy


def random_latents(lists: EditList, d_sae: int, seed: int) -> EditList:
    """Lists of the same lengths and signs, of latents drawn at random: one permutation of all latents, so that latents
    which lists share stay shared."""
    order = torch.randperm(d_sae, generator=torch.Generator().manual_seed(seed))
    latents = order.to(lists.latents.device)[lists.latents.long()].to(torch.int32)
    return EditList(torch.where(lists.valid(), latents, 0), lists.signs.clone(), lists.counts.clone())


def with_permuted_latents(policy: FsrlPolicy, seed: int) -> FsrlPolicy:
    """The same adapter on other latents: each row of it steers a latent drawn at random, none of them two."""
    order = torch.randperm(policy.sae.d_sae, generator=torch.Generator().manual_seed(seed))
    adapter = policy.adapter
    order = order.to(adapter.device)
    moved = {name: getattr(adapter, name)[order].contiguous() for name in ("weight", "bias", "threshold")}
    return replace(policy, adapter=replace(adapter, **moved))
