"""Which preference triples support an edit: the scores s_j of docs/method.md, section 3, taken apart by triple."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dspa.auditing.map_facts import MapByLatent
from dspa.auditing.records import Support
from dspa.errors import MismatchError
from dspa.methods.conditional_map import RidgeFit, differences
from dspa.offline.density_store import DensityStore, SparseCounts
from dspa.offline.triples import PreferenceTriples

SUPPORTS = 3  # triples named for a latent
SUPPORTED = 256  # latents for which triples are named: so many columns are dense at a time


def supporting_triples(
    by_latent: MapByLatent,
    latents: Sequence[int],
    store: DensityStore,
    picks: Mapping[tuple[int, int], int] | None,
    listed: Mapping[int, int] | None,
    texts: TripleTexts | None = None,
) -> dict[int, tuple[Support, ...]]:
    """The triples that contribute most to the edit of each latent.

    A score is the sum of A_ij over picked rows i, and A_ij the mean over triples of `g_i D_j`, so that triple k
    contributes `D_j(x_k) / N` once for each picked row that names j and whose gate it opens. A map by `ridge` weighs
    `D_j(x_k)`, less its mean, otherwise (section 2.1).

    Args:
        by_latent: the policy's map.
        latents: of the output SAE; the first `SUPPORTED` of them count.
        store: the densities that the map was fitted from.
        picks: on how many prompts a row was picked while a latent was listed; None for each row that names it, once.
        listed: on how many prompts each latent was listed; contributions are means over them. None without prompts.
        texts: what to show of triples.

    Raises:
        MismatchError: if the map was fitted from other densities, or its entries are not the means of gated differences
            that they stand for, as in a mixture of maps with different gates.
    """
    run = by_latent.map.run
    if store.run.digest() != run.digest():
        raise MismatchError(f"{store.folder} holds other densities than those the policy's map was fitted from")
    latents = latents[:SUPPORTED]
    contributions = _contributions(by_latent, latents, store, picks)
    found = {}
    for column, latent in enumerate(latents):
        times = 1 if listed is None else max(1, listed.get(latent, 0))
        mine = contributions[:, column] / times
        sign = {"augment": 1.0, "ablate": -1.0}.get(by_latent.policy.edit) or (1.0 if float(mine.sum()) > 0 else -1.0)
        best = (sign * mine).sort(descending=True, stable=True).indices[:SUPPORTS].tolist()
        found[latent] = [(triple, float(mine[triple])) for triple in best if sign * float(mine[triple]) > 0]
    wanted = {triple for each in found.values() for triple, _ in each}
    difference = _differences_of(store, wanted)
    return {
        latent: tuple(
            Support(triple, part, float(difference[triple][latent]), *(texts.of(triple) if texts else ()))
            for triple, part in each
        )
        for latent, each in found.items()
    }


class TripleTexts:
    """The texts of the triples of a store.

    Raises:
        MismatchError: if the densities are of other triples.
    """

    def __init__(self, triples: PreferenceTriples, store: DensityStore, tokenizer: Any) -> None:
        if triples.fingerprint() != store.run.triples:
            raise MismatchError(
                f"the preferences are not those whose densities {store.folder} holds; read them with the same options"
            )
        self._triples = triples
        self._tokenizer = tokenizer

    def of(self, number: int) -> tuple[str, str, str]:
        """Prompt, chosen and rejected response."""
        triple = self._triples[number]
        prompt, chosen, rejected = (
            self._tokenizer.decode(part, skip_special_tokens=True)
            for part in (triple.prompt, triple.chosen, triple.rejected)
        )
        return prompt, chosen, rejected


def _contributions(
    by_latent: MapByLatent, latents: Sequence[int], store: DensityStore, picks: Mapping[tuple[int, int], int] | None
) -> Tensor:
    """`[triples, latents]` float64, summed over prompts."""
    fitted, run = by_latent.map, store.run
    weights = torch.zeros(fitted.matrix.d_sae_in, len(latents), dtype=torch.float64)
    for column, latent in enumerate(latents):
        rows, _ = by_latent.entries_of(latent)
        times = [1 if picks is None else picks.get((row, latent), 0) for row in rows.tolist()]
        weights[rows, column] = torch.tensor(times, dtype=torch.float64)
    used = weights.any(dim=1).nonzero().flatten()
    weights, chosen = weights[used], torch.tensor(latents, dtype=torch.int64)
    if fitted.features is not None:
        ridge = RidgeFit.from_store(store, fitted.options.features, fitted.options.penalty)
        prompts = ridge.centred(0, run.d_sae_in)[:, used]
        _check_entries(by_latent, latents, used, weights, prompts.T @ ridge.predictions[:, chosen])
        return ridge.weights.T @ (prompts @ weights) * ridge.deviations[:, chosen]
    thresholds = fitted.gate_thresholds.cpu()[used]
    parts = []
    means = torch.zeros_like(weights)
    for shard, (_, difference) in zip(store.read(), differences(store), strict=True):
        density = _columns(shard.prompt, used, run.d_sae_in)
        gates = density >= thresholds
        if fitted.options.gate_rule == "positive_ge":
            gates &= density > 0
        parts.append(difference[:, chosen] * (gates.double() @ weights) / run.triple_count)
        means += gates.double().T @ difference[:, chosen] / run.triple_count
    _check_entries(by_latent, latents, used, weights, means)
    return torch.cat(parts)


def _check_entries(
    by_latent: MapByLatent, latents: Sequence[int], used: Tensor, weights: Tensor, means: Tensor
) -> None:
    """Raises MismatchError if entries that count are not what the triples add up to."""
    place = torch.full((by_latent.map.matrix.d_sae_in,), -1, dtype=torch.int64)
    place[used] = torch.arange(len(used))
    entries = torch.zeros_like(means)
    for column, latent in enumerate(latents):
        rows, values = by_latent.entries_of(latent)
        here = place[rows] >= 0
        entries[place[rows[here]], column] = values[here]
    # The map is float32.
    if not torch.allclose(torch.where(weights != 0, means, 0), torch.where(weights != 0, entries, 0), 1e-5, 1e-9):
        raise MismatchError(
            "the map's entries are no means over the triples under one gate for each row, as in a mixture of maps with "
            "different gates; audit it without densities, or each of its parts with them"
        )


def _columns(counts: SparseCounts, latents: Tensor, d_sae: int) -> Tensor:
    """Densities of some latents, `[triples, latents]` float64."""
    column = torch.full((d_sae,), -1, dtype=torch.int64)
    column[latents] = torch.arange(len(latents))
    at = column[counts.latents.long()]
    dense = torch.zeros(len(counts.tokens), len(latents), dtype=torch.float64)
    dense[counts.triple_of_entry[at >= 0], at[at >= 0]] = counts.densities()[at >= 0]
    return dense


def _differences_of(store: DensityStore, triples: set[int]) -> dict[int, Tensor]:
    """D of some triples, by number."""
    return {
        first + row: difference[row]
        for first, difference in differences(store)
        for row in range(len(difference))
        if first + row in triples
    }
