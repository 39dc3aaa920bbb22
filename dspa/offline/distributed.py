"""Filling a density store by one process or by many, on one machine or on several with a shared folder.

A single process appends shard after shard. Several divide the shards that are missing; each writes those it has
finished to a subfolder, and the first process, the only one that writes the store itself, takes them over in order.
So the store is the same whoever computed what, and what was finished before a run was killed is not done again.

The processes find each other as any torch program does: they join the process group that is there, or the one that
`torchrun` or `accelerate launch` announces in the environment.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch.distributed as distributed

from dspa.errors import DspaError
from dspa.offline.density_store import PARTS, CollectionRun, DensityShard, DensityStore, SparseCounts, shard_name
from dspa.util.files import make_folder, write_atomically
from dspa.util.progress import track

FINISHED = "finished"
"""The subfolder of shards that the store has not taken over yet."""

COLLECTIVE_TIMEOUT = timedelta(days=30)
"""How long the first process to finish waits for the others."""

ReadShard = Callable[[int], tuple[DensityShard, int]]
"""Computes the shard of an index, with its number of tokens that were not finite."""


def fill_store(out: str | Path, run: CollectionRun, read: ReadShard, *, progress: bool = False) -> DensityStore:
    """The complete store of a run; shards that are there already are kept.

    Raises:
        MismatchError, CorruptFileError: if the folder holds another run, or a manifest that cannot be read.
        DspaError: if a file cannot be written; finished shards stay usable.
    """
    with _processes() as processes:
        if processes.count == 1:
            store = _open(out, run)
            for index in track(range(len(store.shards), run.shard_count), LABEL, enabled=progress, unit="shards"):
                store = store.append(*(_read_finished(store, index) or read(index)))
            _take_over(store)
        else:
            store = _fill_together(out, run, read, processes, progress)
    return store


LABEL = "Collecting densities"


def device_of_process(device: str) -> str:
    """The device that this process of a launcher should use: with "cuda", each process of a machine has its own GPU."""
    local_rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{local_rank}" if device == "cuda" and local_rank is not None else device


def is_first_process() -> bool:
    """Whether this is the only process, or the one of rank 0: the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def _fill_together(
    out: str | Path, run: CollectionRun, read: ReadShard, processes: _Processes, progress: bool
) -> DensityStore:
    def prepare() -> list[int]:
        store = _take_over(_open(out, run))
        make_folder(store.folder / FINISHED)
        return [i for i in range(len(store.shards), run.shard_count) if _read_finished(store, i) is None]

    missing = processes.first_does(prepare)
    store = DensityStore.open(out)
    mine = missing[processes.rank :: processes.count]
    for index in track(mine, LABEL, enabled=progress and processes.rank == 0, unit=f"1 of {processes.count} processes"):
        _write_finished(store, index, *read(index))
    processes.wait()
    processes.first_does(lambda: _take_over(store))
    return DensityStore.open(out)


def _open(out: str | Path, run: CollectionRun) -> DensityStore:
    return DensityStore.create_or_resume(out, run).without_damaged()


def _take_over(store: DensityStore) -> DensityStore:
    """The store with the finished shards that follow its own; the subfolder goes when nothing is left to come."""
    while not store.complete and (found := _read_finished(store, len(store.shards))) is not None:
        store = store.append(*found)
    if store.complete:
        shutil.rmtree(store.folder / FINISHED, ignore_errors=True)
    return store


def _write_finished(store: DensityStore, index: int, shard: DensityShard, nonfinite_tokens: int) -> None:
    tensors = {f"{part}_{name}": value.contiguous() for part in PARTS for name, value in vars(shard.part(part)).items()}
    notes = {"run": _digest(store.run), "nonfinite_tokens": str(nonfinite_tokens)}
    content = safetensors.torch.save(tensors, notes)
    checksum = hashlib.sha256(content).hexdigest()
    write_atomically(store.folder / FINISHED / shard_name(index), checksum.encode() + content)


def _read_finished(store: DensityStore, index: int) -> tuple[DensityShard, int] | None:
    """A shard another process left in the subfolder, or None if it is not there, damaged, or another run's."""
    try:
        content = (store.folder / FINISHED / shard_name(index)).read_bytes()
    except OSError:
        return None
    checksum, content = content[:64], content[64:]
    if hashlib.sha256(content).hexdigest().encode() != checksum:
        return None
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
    if header["run"] != _digest(store.run):
        return None
    tensors = safetensors.torch.load(content)
    fields = ("offsets", "latents", "counts", "tokens")
    parts = [SparseCounts(*(tensors[f"{part}_{name}"] for name in fields)) for part in PARTS]
    return DensityShard(*parts), int(header["nonfinite_tokens"])


def _digest(run: CollectionRun) -> str:
    return hashlib.sha256(json.dumps(asdict(run), sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class _Processes:
    """The processes of this run, and which one this is."""

    rank: int = 0
    count: int = 1
    group: Any = None

    def first_does(self, action: Callable[[], Any]) -> Any:
        """Runs an action in the first process. All wait for it, and get what it returned or the error it raised."""
        outcome: list[Any] = [None]
        if self.rank == 0:
            try:
                outcome = [action()]
            except DspaError as error:
                outcome = [error]
        with _naming_the_lost():
            distributed.broadcast_object_list(outcome, src=0, group=self.group)
        if isinstance(outcome[0], DspaError):
            raise outcome[0]
        return outcome[0]

    def wait(self) -> None:
        """Returns once every process has come here.

        Raises:
            DspaError: if one of them has gone.
        """
        with _naming_the_lost():
            distributed.barrier(group=self.group)


@contextlib.contextmanager
def _naming_the_lost() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        raise DspaError(f"another process of this run has gone ({reason}); run again to go on") from error


@contextlib.contextmanager
def _processes() -> Iterator[_Processes]:
    launched = int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ
    if not distributed.is_available() or not (distributed.is_initialized() or launched):
        yield _Processes()
        return
    joined = not distributed.is_initialized()
    if joined:
        distributed.init_process_group("gloo")
    group: Any = distributed.new_group(backend="gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        yield _Processes(distributed.get_rank(), distributed.get_world_size(), group)
    finally:
        if joined:
            distributed.destroy_process_group()
        else:
            distributed.destroy_process_group(group)
