"""Some of the triples of a density store, in memory: to fit on folds, or on fewer triples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from numbers import Integral

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
    def from_store(cls, store: DensityStore | DensitySubset, triples: Iterable[int]) -> DensitySubset:
        """The triples of these numbers, which may repeat.

        Raises:
            InvalidInputError: if there are none, or one is no number from 0 to the last triple's.
            CorruptFileError: for a damaged shard.
        """
        count = store.run.triple_count
        numbers = list(triples)
        if not numbers or not all(isinstance(number, Integral) and 0 <= number < count for number in numbers):
            raise InvalidInputError(f"triples are {numbers[:8]}; expected numbers from 0 to {count - 1}, at least 1")
        chosen = [int(number) for number in numbers]
        shards = list(store.read())
        parts = [_rows(SparseCounts.concatenate([shard.part(part) for shard in shards]), chosen) for part in PARTS]
        name = hashlib.sha256(f"{store.run.triples} {chosen}".encode()).hexdigest()
        run = replace(store.run, triple_count=len(chosen), triples_per_shard=len(chosen), triples=name)
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
