"""Some of the triples of a density store, in memory: to fit on folds, or on fewer triples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from dspa.errors import InvalidInputError
from dspa.offline.density_store import PARTS, CollectionRun, DensityShard, DensityStore, SparseCounts


@dataclass(frozen=True, eq=False)
class DensitySubset:
    """Triples of a store, in an order of one's own. A map is fitted from it as from the store.

    Attributes:
        run: that of the store, with this number of triples.
        shard: their counts.
    """

    run: CollectionRun
    shard: DensityShard

    @classmethod
    def from_store(cls, store: DensityStore | DensitySubset, triples: Sequence[int]) -> DensitySubset:
        """The triples of these numbers.

        Raises:
            InvalidInputError: if there are none, or a number is out of range.
            CorruptFileError: for a damaged shard.
        """
        count = store.run.triple_count
        if not triples or not all(0 <= triple < count for triple in triples):
            raise InvalidInputError(
                f"triples are {list(triples)[:8]}; expected numbers from 0 to {count - 1}, at least 1"
            )
        shards = list(store.read())
        parts = [_rows(SparseCounts.concatenate([shard.part(part) for shard in shards]), triples) for part in PARTS]
        name = f"{store.run.triples} {list(triples)}"
        run = replace(store.run, triple_count=len(triples), triples_per_shard=len(triples), triples=name)
        return cls(run, DensityShard(*parts))

    def read(self) -> Iterator[DensityShard]:
        """All triples at once."""
        yield self.shard


def _rows(counts: SparseCounts, triples: Sequence[int]) -> SparseCounts:
    chosen = torch.tensor(triples)
    starts, lengths = counts.offsets[chosen], counts.offsets.diff()[chosen]
    offsets = torch.zeros(len(triples) + 1, dtype=torch.int64)
    offsets[1:] = lengths.cumsum(dim=0)
    entries = torch.arange(int(offsets[-1])) + (starts - offsets[:-1]).repeat_interleave(lengths)
    return SparseCounts(offsets, counts.latents[entries], counts.counts[entries], counts.tokens[chosen])
