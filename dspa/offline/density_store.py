"""Activation densities of preference triples on disk: one manifest and a row of shards, written atomically.

A shard holds, for each of its triples and for each of the three parts (prompt, chosen, rejected), the latents that
were active, on how many of the counted tokens, and how many tokens were counted. Shards hold the same triples and the
same bytes whenever and however often the run was interrupted.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import safetensors.torch
import torch
from torch import Tensor

from dspa.errors import CorruptFileError, InvalidInputError, MismatchError
from dspa.transformers_model import ModelFingerprint
from dspa.util.files import TEMPORARY_SUFFIX, make_folder, write_atomically

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
PARTS = ("prompt", "chosen", "rejected")


@dataclass(frozen=True)
class CollectionRun:
    """Everything that decides the numbers in a store. Two runs with equal records write equal bytes.

    Raises:
        InvalidInputError: if there are no triples, no latents, or none to a batch or shard.
    """

    model: ModelFingerprint
    input_layer: int
    output_layer: int
    input_sae: str
    output_sae: str
    d_sae_in: int
    d_sae_out: int
    triples: str
    triple_count: int
    triples_per_shard: int
    triples_per_batch: int
    count_bos: bool
    count_template: bool
    count_eos: bool
    uncounted_token_ids: tuple[int, ...]
    dtype: str
    model_weights: str = ""
    tokens_per_batch: int = 16384

    def __post_init__(self) -> None:
        sizes = ("triple_count", "triples_per_shard", "triples_per_batch", "tokens_per_batch", "d_sae_in", "d_sae_out")
        for name in sizes:
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected at least 1")

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> CollectionRun:
        """From the output of `asdict` after a round trip through JSON.

        Raises:
            KeyError, TypeError: if a field is missing, unknown, or of another type.
            InvalidInputError: if a number is out of range.
        """
        fields = {
            **record,
            "model": ModelFingerprint(**record["model"]),
            "uncounted_token_ids": tuple(record["uncounted_token_ids"]),
        }
        for name, expected in get_type_hints(cls).items():
            if expected in (int, bool, str) and type(fields.get(name, expected())) is not expected:
                raise TypeError(f"{name} is {fields[name]!r}; expected {expected.__name__}")
        if any(type(token) is not int for token in fields["uncounted_token_ids"]):
            raise TypeError("uncounted_token_ids are not all int")
        return cls(**fields)

    @property
    def shard_count(self) -> int:
        return -(-self.triple_count // self.triples_per_shard)


@dataclass(frozen=True, eq=False)
class SparseCounts:
    """Token counts of one part of a shard's triples, by compressed rows.

    Attributes:
        offsets: `[n + 1]` int64; triple t holds entries `offsets[t]` to `offsets[t + 1]`.
        latents: `[entries]` int32, ascending within a triple.
        counts: `[entries]` int32, tokens on which the latent was active.
        tokens: `[n]` int32, tokens counted: the density is `counts / tokens`.
    """

    offsets: Tensor
    latents: Tensor
    counts: Tensor
    tokens: Tensor

    @classmethod
    def from_dense(cls, counts: Tensor, tokens: Tensor) -> SparseCounts:
        """From dense counts `[n, d_sae]` and token numbers `[n]`."""
        row, latent = counts.nonzero(as_tuple=True)
        offsets = torch.zeros(counts.shape[0] + 1, dtype=torch.int64)
        offsets[1:] = (counts > 0).sum(dim=1).cumsum(dim=0).cpu()
        return cls(offsets, latent.int().cpu(), counts[row, latent].int().cpu(), tokens.int().cpu())

    @classmethod
    def concatenate(cls, parts: list[SparseCounts]) -> SparseCounts:
        lengths = torch.cat([part.offsets.diff() for part in parts])
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int64)
        offsets[1:] = lengths.cumsum(dim=0)
        return cls(
            offsets,
            torch.cat([part.latents for part in parts]),
            torch.cat([part.counts for part in parts]),
            torch.cat([part.tokens for part in parts]),
        )

    @property
    def triple_of_entry(self) -> Tensor:
        """`[entries]` int64, the triple each entry belongs to."""
        return torch.arange(len(self.tokens)).repeat_interleave(self.offsets.diff())

    def densities(self) -> Tensor:
        """`[entries]` float64, the share of counted tokens on which each entry's latent was active."""
        return self.counts.double() / self.tokens.double()[self.triple_of_entry]

    def check(self, triples: int, d_sae: int, name: str) -> SparseCounts:
        """Itself if all sizes and indices are in bounds, else CorruptFileError."""
        rising = len(self.offsets) == triples + 1 and self.offsets[0] == 0 and bool((self.offsets.diff() >= 0).all())
        sized = len(self.latents) == len(self.counts) == int(self.offsets[-1]) and len(self.tokens) == triples
        bounded = not len(self.latents) or (int(self.latents.min()) >= 0 and int(self.latents.max()) < d_sae)
        if not (rising and sized and bounded) or bool((self.tokens < 1).any()) or not self._counts_possible():
            raise CorruptFileError(f"{name} holds counts out of their bounds; delete it and collect again")
        return self

    def _counts_possible(self) -> bool:
        return bool(((self.counts >= 1) & (self.counts <= self.tokens[self.triple_of_entry])).all())


@dataclass(frozen=True, eq=False)
class DensityShard:
    """The counts of a run of consecutive triples."""

    prompt: SparseCounts
    chosen: SparseCounts
    rejected: SparseCounts

    def part(self, name: str) -> SparseCounts:
        return getattr(self, name)


@dataclass(frozen=True)
class ShardRecord:
    """A finished shard as the manifest names it."""

    file: str
    sha256: str
    nonfinite_tokens: int


def shard_name(index: int) -> str:
    return f"densities-{index:05d}.safetensors"


@dataclass(frozen=True)
class DensityStore:
    """A folder of density shards.

    Attributes:
        folder: where it is.
        run: what was collected, and how.
        shards: the finished shards, in order.
    """

    folder: Path
    run: CollectionRun
    shards: tuple[ShardRecord, ...]

    @classmethod
    def open(cls, folder: str | Path) -> DensityStore:
        """Reads a store's manifest.

        Raises:
            InvalidInputError: if there is none.
            CorruptFileError: if it cannot be read.
        """
        path = Path(folder) / MANIFEST
        if not path.is_file():
            raise InvalidInputError(f"no densities in {folder}: {MANIFEST} is missing; run dspa collect first")
        try:
            record = json.loads(path.read_text())
            if record["format_version"] != FORMAT_VERSION:
                raise CorruptFileError(
                    f"{path} has format version {record['format_version']}; this version reads {FORMAT_VERSION}"
                )
            shards = tuple(ShardRecord(**shard) for shard in record["shards"])
            run = CollectionRun.from_json(record["run"])
            if [shard.file for shard in shards] != [shard_name(index) for index in range(len(shards))]:
                raise ValueError("the shards are not in order")
            if len(shards) > run.shard_count:
                raise ValueError(f"{len(shards)} shards; expected {run.shard_count}")
            return cls(Path(folder), run, shards)
        except (OSError, ValueError, KeyError, TypeError, InvalidInputError) as error:
            raise CorruptFileError(f"{path} cannot be read ({error}); delete the folder and collect again") from error

    @classmethod
    def create_or_resume(cls, folder: str | Path, run: CollectionRun) -> DensityStore:
        """The store for a run: the one that is there if it belongs to the same run, else a new one.

        Raises:
            MismatchError: if the folder holds another run's densities.
            CorruptFileError: if its manifest cannot be read.
            DspaError: if the folder cannot be written.
        """
        path = make_folder(folder)
        for leftover in path.glob(f"*{TEMPORARY_SUFFIX}"):
            leftover.unlink()
        if not (path / MANIFEST).exists():
            store = cls(path, run, ())
            store._write_manifest()
            return store
        store = cls.open(path)
        if store.run != run:
            mine, theirs = asdict(run), asdict(store.run)
            names = ", ".join(name for name in mine if mine[name] != theirs[name])
            raise MismatchError(f"{folder} holds densities of another run (different {names}); choose another folder")
        return store

    @property
    def complete(self) -> bool:
        return len(self.shards) == self.run.shard_count

    @property
    def nonfinite_tokens(self) -> int:
        """Counted tokens whose hidden state held NaN or Inf; they activate no latent."""
        return sum(shard.nonfinite_tokens for shard in self.shards)

    def append(self, shard: DensityShard, nonfinite_tokens: int) -> DensityStore:
        """The store with one more shard, on disk when this returns.

        Raises:
            DspaError: if it cannot be written (disk full); the shards before it stay usable.
        """
        tensors = {
            f"{part}_{field}": tensor.contiguous() for part in PARTS for field, tensor in vars(shard.part(part)).items()
        }
        content = safetensors.torch.save(tensors)
        name = shard_name(len(self.shards))
        write_atomically(self.folder / name, content)
        record = ShardRecord(name, hashlib.sha256(content).hexdigest(), nonfinite_tokens)
        store = replace(self, shards=(*self.shards, record))
        store._write_manifest()
        return store

    def read(self) -> Iterator[DensityShard]:
        """The shards in order, each checked against the manifest.

        Raises:
            InvalidInputError: if the run is not complete.
            CorruptFileError: if a shard is missing, truncated or altered.
        """
        if not self.complete:
            raise InvalidInputError(
                f"{self.folder} holds {len(self.shards)} of {self.run.shard_count} shards; "
                "run dspa collect again to finish it"
            )
        yield from map(self._read_shard, range(len(self.shards)))

    def _read_shard(self, index: int) -> DensityShard:
        record = self.shards[index]
        path = self.folder / record.file
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CorruptFileError(f"shard {path} cannot be read ({error.strerror}); collect again") from error
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise CorruptFileError(f"shard {path} was altered (its checksum differs); collect again")
        tensors = safetensors.torch.load(content)
        first = index * self.run.triples_per_shard
        triples = min(self.run.triples_per_shard, self.run.triple_count - first)
        widths = {"prompt": self.run.d_sae_in, "chosen": self.run.d_sae_out, "rejected": self.run.d_sae_out}
        return DensityShard(
            **{
                part: SparseCounts(
                    **{name: tensors[f"{part}_{name}"] for name in ("offsets", "latents", "counts", "tokens")}
                ).check(triples, width, str(path))
                for part, width in widths.items()
            }
        )

    def without_damaged(self) -> DensityStore:
        """The store up to the first shard that is missing or altered, so that a run can go on from there."""
        for index in range(len(self.shards)):
            try:
                self._read_shard(index)
            except CorruptFileError:
                return replace(self, shards=self.shards[:index])
        return self

    def _write_manifest(self) -> None:
        record = {
            "format_version": FORMAT_VERSION,
            "run": asdict(self.run),
            "shards": [asdict(shard) for shard in self.shards],
        }
        write_atomically(self.folder / MANIFEST, (json.dumps(record, indent=1, sort_keys=True) + "\n").encode())
