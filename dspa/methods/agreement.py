"""How well a map predicts triples that it was not fitted from (docs/method.md, section 2.2).

It chooses among estimators and options without a held-out prompt, without the model, and without generating.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels import EditKind, EditList
from dspa.methods.conditional_map import ConditionalDifferenceMap, dense_densities, differences
from dspa.offline.density_store import DensityStore, SparseCounts
from dspa.offline.density_subset import DensitySubset
from dspa.util.estimate import Estimate
from dspa.util.scalars import check_integer


@dataclass(frozen=True, eq=False)
class ListOptions:
    """How a policy makes a prompt's lists of a map's rows; fields as in `SteeringPolicy`."""

    k_prompt: int = 32
    k_diff: int = 16
    edit: EditKind = "ablate"
    sign_guard: bool = False
    editable: Tensor | None = None

    def of(self, fitted: ConditionalDifferenceMap, density: Tensor) -> EditList:
        edits = fitted.select(density, self.k_prompt, self.k_diff, self.edit, sign_guard=self.sign_guard)
        if self.editable is None:
            return edits
        return edits.where(self.editable[edits.latents.long()])


@dataclass(frozen=True, eq=False)
class Agreement:
    """Of lists with the differences of triples, triple by triple.

    Attributes:
        sums: `[N]`, over the latents of a triple's lists, D of the augmented minus D of the ablated.
        lengths: `[N]`, how many latents the lists have.
        fold: `[N]`, in which part of the triples each is.
    """

    sums: NDArray[np.float64]
    lengths: NDArray[np.int64]
    fold: NDArray[np.int64]

    @property
    def per_edit(self) -> NDArray[np.float64]:
        """`[N]`, the sums over the root of the lengths: D along the edit's direction, so that lists of different
        lengths can be compared."""
        return self.sums / np.sqrt(np.maximum(self.lengths, 1))

    def by_fold(self) -> tuple[float, ...]:
        """The mean of `per_edit` in each fold."""
        return tuple(float(self.per_edit[self.fold == each].mean()) for each in range(int(self.fold.max()) + 1))


@dataclass(frozen=True, eq=False)
class Folds:
    """Triples in parts, those of one prompt in the same one.

    Attributes:
        triples: all of them.
        fold: `[N]`, the part of each.
        count: how many parts there are.
        density: `[N, d_sae_in]` float64, of the prompts.
        difference: `[N, d_sae_out]` float64, D.
    """

    triples: DensitySubset
    fold: NDArray[np.int64]
    count: int
    density: Tensor
    difference: Tensor

    @classmethod
    def from_store(cls, store: DensityStore | DensitySubset, count: int, seed: int) -> Folds:
        """In random order of prompts.

        Raises:
            InvalidInputError: if there are fewer triples, or prompts, than parts.
        """
        check_integer("folds", count, 2)
        check_integer("seed", seed, 0)
        triples = store.run.triple_count
        if triples < count:
            raise InvalidInputError(f"there are {triples} triples; expected at least one for each of {count} folds")
        whole = DensitySubset.from_store(store, range(triples))
        prompt = _numbered_prompts(whole.shard.prompt)
        prompts = int(prompt.max()) + 1
        if prompts < count:
            raise InvalidInputError(
                f"there are {prompts} prompts of {triples} triples; expected at least one for each of {count} folds"
            )
        fold_of_prompt = np.empty(prompts, dtype=np.int64)
        fold_of_prompt[np.random.default_rng(seed).permutation(prompts)] = np.arange(prompts) % count
        difference = torch.cat([part for _, part in differences(whole)])
        density = dense_densities(whole.shard.prompt, store.run.d_sae_in)
        return cls(whole, fold_of_prompt[prompt], count, density, difference)

    def agreement(self, lists: Sequence[ListOptions], **fit: Any) -> list[Agreement]:
        """Of the lists that a map fitted from the other parts has for the prompts of each; one fit for all lists.

        Args:
            lists: how lists are made.
            fit: options of `ConditionalDifferenceMap.fit`.

        Raises:
            InvalidInputError: for an option out of range; with `ridge`, if the triples of some parts leave nothing to
                learn.
        """
        found = [
            Agreement(np.zeros(len(self.fold)), np.zeros(len(self.fold), dtype=np.int64), self.fold) for _ in lists
        ]
        for each in range(self.count):
            left_out, others = (np.flatnonzero(part) for part in (self.fold == each, self.fold != each))
            fitted = ConditionalDifferenceMap.fit(DensitySubset.from_store(self.triples, others.tolist()), **fit)
            for options, agreement in zip(lists, found, strict=True):
                edits = options.of(fitted, self.density[left_out])
                agreement.sums[left_out] = agreement_sums(edits, self.difference[left_out]).numpy()
                agreement.lengths[left_out] = edits.counts.numpy()
        return found


def agreement_sums(edits: EditList, difference: Tensor) -> Tensor:
    """`[B]` float64, over the latents of each list, D of the augmented minus D of the ablated.

    Args:
        edits: B lists.
        difference: `[B, d_sae_out]`, D of the triples that the lists are compared with.
    """
    signs = torch.where(edits.valid(), edits.signs.double(), 0)
    listed = difference.double().gather(1, torch.where(edits.valid(), edits.latents.long(), 0))
    return (signs * listed).sum(dim=1)


def cross_validated_agreement(
    store: DensityStore | DensitySubset,
    *,
    folds: int = 5,
    seed: int = 0,
    per_edit: bool = False,
    k_prompt: int = 32,
    k_diff: int = 16,
    edit: EditKind = "ablate",
    sign_guard: bool = False,
    **fit: Any,
) -> Estimate:
    """The mean over triples of `Σ_augment D_j - Σ_ablate D_j`, with the lists that a map fitted from the other folds
    selects for a triple's prompt: how far they go with a difference that they have not seen. Its interval is that of a
    mean over triples.

    Args:
        store: what `collect` returned.
        folds: into how many parts the triples are divided, those of one prompt together.
        seed: of the division.
        per_edit: divide each triple's sum by the root of the number of latents in it, so that lists of different
            lengths, as of other `k_diff`, can be compared.
        k_prompt: prompt latents that choose rows, as in a policy.
        k_diff: latents edited in each direction, as in a policy.
        edit: in which directions, as in a policy.
        sign_guard: as in a policy.
        fit: options of `ConditionalDifferenceMap.fit`.

    Raises:
        InvalidInputError: if there are fewer triples or prompts than folds, or an option is out of range; with `ridge`,
            if the triples of some folds leave nothing to learn.
    """
    lists = ListOptions(k_prompt, k_diff, edit, sign_guard)
    (found,) = Folds.from_store(store, folds, seed).agreement([lists], **fit)
    return Estimate.from_samples(found.per_edit if per_edit else found.sums)


def _numbered_prompts(counts: SparseCounts) -> NDArray[np.int64]:
    """`[N]`, the number of each triple's prompt, in the order in which they come. Prompts of the same counts, which no
    map tells apart, are one."""
    numbers: dict[bytes, int] = {}
    found: list[int] = []
    latents, values, tokens = (part.numpy() for part in (counts.latents, counts.counts, counts.tokens))
    for index, (start, end) in enumerate(zip(counts.offsets[:-1].tolist(), counts.offsets[1:].tolist(), strict=True)):
        key = b"".join(part.tobytes() for part in (tokens[index : index + 1], latents[start:end], values[start:end]))
        found.append(numbers.setdefault(key, len(numbers)))
    return np.array(found)
