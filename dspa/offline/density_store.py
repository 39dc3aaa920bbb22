"""Activation densities of preference triples on disk: one manifest and a row of shards, written atomically.

A shard holds, for each of its triples and for each of the three parts (prompt, chosen, rejected), the latents that
were active, on how many of the counted tokens, and how many tokens were counted. Shards hold the same triples and the
same bytes whenever and however often the run was interrupted.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import safetensors.torch
import torch
from torch import Tensor

from dspa.errors import CorruptFileError, DspaError, InvalidInputError, MismatchError
from dspa.kernels.types import offsets_rise
from dspa.transformers_model import ModelFingerprint
from dspa.util.files import TEMPORARY, load_tensors, make_folder, read_file, write_atomically
from dspa.util.records import check_checksum, encode_record, parse_json, read_json, validated

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
FINISHED = "finished"
"""The subfolder of shards that the store has not taken over yet; see `dspa.offline.distributed`."""
LOCK = ".lock"
"""Held by the process that writes the store. The file stays."""
NOTES = "dspa"
SHARD = re.compile(r"densities-\d{5,}\.safetensors")
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
        for name, least in (*((size, 1) for size in sizes), ("input_layer", 0), ("output_layer", 0)):
            value = getattr(self, name)
            if not least <= value < 2**31:
                raise InvalidInputError(
                    f"{name} is {value}; expected at least {least}" + ", below 2**31" * (value > least)
                )
        if any(not 0 <= token < 2**31 for token in self.uncounted_token_ids):
            raise InvalidInputError("uncounted_token_ids are not all from 0 to 2**31 - 1")

    def digest(self) -> str:
        """SHA-256 (hex) of the record; every shard carries that of its run."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()

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
        """Itself if all dtypes, sizes and indices are in bounds, else CorruptFileError."""
        tensors = (self.offsets, self.latents, self.counts, self.tokens)
        dtypes = (torch.int64, torch.int32, torch.int32, torch.int32)
        flat = all(tensor.ndim == 1 and tensor.dtype == dtype for tensor, dtype in zip(tensors, dtypes, strict=True))
        if not flat or not self._in_bounds(triples, d_sae):
            raise CorruptFileError(f"{name} holds counts out of their bounds; delete it and collect again")
        return self

    def _in_bounds(self, triples: int, d_sae: int) -> bool:
        entries = len(self.latents)
        if len(self.tokens) != triples or len(self.counts) != entries or len(self.offsets) != triples + 1:
            return False
        if not offsets_rise(self.offsets, entries) or bool((self.tokens < 1).any()):
            return False
        if entries and not 0 <= int(self.latents.min()) <= int(self.latents.max()) < d_sae:
            return False
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


@dataclass(frozen=True)
class _Manifest:
    """`manifest.json`."""

    format_version: Literal[2]
    run: CollectionRun
    shards: tuple[ShardRecord, ...]


@dataclass(frozen=True)
class _ShardNotes:
    """What the header of a shard's file says beside its tensors."""

    nonfinite_tokens: int
    run: str


def shard_name(index: int) -> str:
    return f"densities-{index:05d}.safetensors"


def encode_shard(shard: DensityShard, nonfinite_tokens: int, run: CollectionRun) -> bytes:
    """The content of a shard's file, the same whoever writes it."""
    tensors = {f"{part}_{name}": value.contiguous() for part in PARTS for name, value in vars(shard.part(part)).items()}
    notes = {"nonfinite_tokens": nonfinite_tokens, "run": run.digest()}
    return safetensors.torch.save(tensors, {NOTES: json.dumps(notes)})  # several entries would come in any order


def decode_shard(content: bytes, index: int, run: CollectionRun, name: str) -> tuple[DensityShard, int]:
    """A shard and its number of tokens that were not finite.

    Raises:
        CorruptFileError: if it is not a shard of that number of this run, or a number is out of its bounds.
    """
    tensors = load_tensors(content, f"shard {name}")  # so that the header is known to be one
    header = parse_json(content[8 : 8 + int.from_bytes(content[:8], "little")])
    try:
        notes = validated(_ShardNotes, parse_json(header.get("__metadata__", {}).get(NOTES, "").encode()))
    except ValueError as error:
        raise CorruptFileError(f"shard {name} does not say what it is ({error}); collect again") from error
    if notes.run != run.digest():
        raise CorruptFileError(f"shard {name} belongs to another run than the manifest; collect again")
    fields = ("offsets", "latents", "counts", "tokens")
    expected = {f"{part}_{field}" for part in PARTS for field in fields}
    if tensors.keys() != expected or notes.nonfinite_tokens < 0:
        raise CorruptFileError(f"shard {name} does not hold {len(expected)} tensors of counts; collect again")
    triples = min(run.triples_per_shard, run.triple_count - index * run.triples_per_shard)
    widths = {"prompt": run.d_sae_in, "chosen": run.d_sae_out, "rejected": run.d_sae_out}
    parts = [
        SparseCounts(*(tensors[f"{part}_{field}"] for field in fields)).check(triples, widths[part], name)
        for part in PARTS
    ]
    return DensityShard(*parts), notes.nonfinite_tokens


def is_leftover(name: str) -> bool:
    """Whether a file of that name is what a killed run left while it wrote a file of a store."""
    match = TEMPORARY.fullmatch(name)
    return match is not None and (match["name"] == MANIFEST or SHARD.fullmatch(match["name"]) is not None)


def remove_own_files(folder: Path, *, shards: bool = False) -> None:
    """Removes what killed runs left in a folder of a store, and with `shards` its shards as well: regular files with
    names of this package's own, and nothing else."""
    for entry in list(os.scandir(folder)):
        owned = is_leftover(entry.name) or (shards and SHARD.fullmatch(entry.name) is not None)
        if owned and entry.is_file(follow_symlinks=False):
            os.unlink(entry.path)


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
            record = read_json(path)
            version = record["format_version"]
            if version == 1:
                raise CorruptFileError(
                    f"{path} has format version 1, whose shards do not say which run they belong to; collect again "
                    "into another folder"
                )
            if version != FORMAT_VERSION:
                raise CorruptFileError(
                    f"{path} has format version {str(version)[:80]}; this version reads {FORMAT_VERSION}"
                )
            manifest = validated(_Manifest, check_checksum(record))
            if [shard.file for shard in manifest.shards] != [shard_name(n) for n in range(len(manifest.shards))]:
                raise ValueError("the shards are not in order")
            if len(manifest.shards) > manifest.run.shard_count:
                raise ValueError(f"{len(manifest.shards)} shards; expected {manifest.run.shard_count}")
            return cls(Path(folder), manifest.run, manifest.shards)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(f"{path} cannot be read ({error}); delete the folder and collect again") from error

    @classmethod
    def create_or_resume(cls, folder: str | Path, run: CollectionRun) -> DensityStore:
        """The store for a run: the one that is there if it belongs to the same run, else a new one. Of what is in the
        folder, only what a killed run left is removed, and only once the manifest says that this is a store.

        Raises:
            InvalidInputError: if the folder is neither empty nor a store.
            MismatchError: if the folder holds another run's densities.
            CorruptFileError: if its manifest cannot be read.
            DspaError: if the folder cannot be written.
        """
        path = store_folder(folder)
        if (path / MANIFEST).exists():
            store = cls.open(path)
            if store.run != run:
                mine, theirs = asdict(run), asdict(store.run)
                names = ", ".join(name for name in mine if mine[name] != theirs[name])
                raise MismatchError(
                    f"{folder} holds densities of another run (different {names}); choose another folder"
                )
        else:
            store = cls(path, run, ())
            store._write_manifest()
        try:
            remove_own_files(path)
        except OSError as error:
            raise DspaError(f"{folder} cannot be tidied up: {error.strerror or error}") from error
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
        content = encode_shard(shard, nonfinite_tokens, self.run)
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
            content = read_file(path)
        except OSError as error:
            reason = error.strerror or error
            raise CorruptFileError(f"shard {path} cannot be read ({reason}); collect again") from error
        if hashlib.sha256(content).hexdigest() != record.sha256:
            raise CorruptFileError(f"shard {path} was altered (its checksum differs); collect again")
        return decode_shard(content, index, self.run, str(path))[0]

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
        write_atomically(self.folder / MANIFEST, encode_record(record))


def store_folder(folder: str | Path) -> Path:
    """The folder of a store, made if it is not there.

    Raises:
        InvalidInputError: if it is neither empty nor a store; nothing in it was touched.
        DspaError: if it cannot be made or read.
    """
    path = make_folder(folder)
    try:
        names = sorted(entry.name for entry in os.scandir(path))
    except OSError as error:
        raise DspaError(f"{folder} cannot be used as a folder: {error.strerror or error}") from error
    foreign = [name for name in names if name != LOCK and not is_leftover(name)]
    if foreign and MANIFEST not in names:
        raise InvalidInputError(
            f"{folder} is neither empty nor a folder of densities (it holds {foreign[0]}); choose another folder"
        )
    return path
