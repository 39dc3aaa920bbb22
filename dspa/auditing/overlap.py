"""How alike the edit lists of prompts are: Jaccard overlaps, and clusters of prompts by average linkage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor

from dspa.auditing.records import ListCluster, ListOverlap

Listed = tuple[int, int]  # a latent and the sign of its edit

ALIKE = 0.5  # prompts are joined while their clusters overlap by at least this much on average


def jaccard(sets: Sequence[frozenset[Listed]]) -> Tensor:
    """`[n, n]` float64, the size of the intersection over that of the union; 1 for two empty sets."""
    names = {name: column for column, name in enumerate(sorted(frozenset[Listed]().union(*sets)))}
    member = torch.zeros(len(sets), max(len(names), 1), dtype=torch.float64)
    for row, each in enumerate(sets):
        member[row, [names[name] for name in each]] = 1
    shared, sizes = member @ member.T, member.sum(dim=1)
    union = sizes[:, None] + sizes[None, :] - shared
    return torch.where(union > 0, shared / union.clamp(min=1), 1.0)


def clustered(overlaps: Tensor) -> list[list[int]]:
    """Clusters by average linkage: the two clusters whose members overlap most on average are joined, as long as that
    is at least `ALIKE`. Largest first; of equals, the one with the lowest member."""
    members = [[index] for index in range(len(overlaps))]
    between = overlaps.clone().fill_diagonal_(-1)
    sizes = torch.ones(len(overlaps), dtype=torch.float64)
    while len(overlaps) and float(between.max()) >= ALIKE:
        first, second = divmod(int(between.argmax()), len(overlaps))
        first, second = min(first, second), max(first, second)
        total = sizes[first] + sizes[second]
        joined = (sizes[first] * between[first] + sizes[second] * between[second]) / total
        joined[[first, second]] = -1
        joined[between[first] < 0] = -1
        joined[between[second] < 0] = -1
        between[first], between[:, first] = joined, joined
        between[second], between[:, second] = -1, -1
        members[first] += members[second]
        members[second] = []
        sizes[first] = total
    return sorted((sorted(each) for each in members if each), key=lambda each: (-len(each), each[0]))


def list_overlap(lists: Sequence[frozenset[Listed]]) -> ListOverlap | None:
    """The overlaps of the edit lists of prompts; None for fewer than two. A latent that one prompt augments and another
    ablates is not in both."""
    if len(lists) < 2:
        return None
    overlaps = jaccard(lists)
    clusters = clustered(overlaps)
    order = [prompt for cluster in clusters for prompt in cluster]
    pairs = overlaps[torch.ones_like(overlaps).triu(1).bool()]
    return ListOverlap(
        mean=float(pairs.mean()),
        order=tuple(order),
        matrix=tuple(tuple(row) for row in overlaps[order][:, order].tolist()),
        clusters=tuple(_described(cluster, overlaps, lists) for cluster in clusters),
    )


def _described(cluster: list[int], overlaps: Tensor, lists: Sequence[frozenset[Listed]]) -> ListCluster:
    inside = overlaps[cluster][:, cluster]
    size = len(cluster)
    alike = float((inside.sum() - size) / (size * (size - 1))) if size > 1 else 1.0
    counts = Counter(listed for prompt in cluster for listed in lists[prompt])
    shared = sorted((listed for listed in counts if 2 * counts[listed] >= size), key=lambda x: (-counts[x], x))
    return ListCluster(tuple(cluster), alike, tuple(latent for latent, _ in shared))
