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
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as distributed

from dspa.errors import CorruptFileError, DspaError
from dspa.offline.density_store import (
    FINISHED,
    LOCK,
    CollectionRun,
    DensityShard,
    DensityStore,
    decode_shard,
    encode_shard,
    remove_own_files,
    shard_name,
    store_folder,
)
from dspa.util.files import make_folder, read_file, write_atomically
from dspa.util.progress import track

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
    with _processes() as processes, contextlib.ExitStack() as held:
        if processes.count > 1:
            return _fill_together(out, run, read, processes, progress, held)
        store = _open(out, run, held)
        for index in track(range(len(store.shards), run.shard_count), LABEL, enabled=progress, unit="shards"):
            store = store.append(*(_read_finished(store, index) or read(index)))
        return _take_over(store)


LABEL = "Collecting densities"


def device_of_process(device: str) -> str:
    """The device that this process of a launcher should use: with "cuda", each process of a machine has its own GPU."""
    local_rank = os.environ.get("LOCAL_RANK")
    return f"cuda:{local_rank}" if device == "cuda" and local_rank is not None else device


def is_first_process() -> bool:
    """Whether this is the only process, or the one of rank 0: the one that prints."""
    return os.environ.get("RANK", "0") == "0"


def _fill_together(
    out: str | Path,
    run: CollectionRun,
    read: ReadShard,
    processes: _Processes,
    progress: bool,
    held: contextlib.ExitStack,
) -> DensityStore:
    def prepare() -> list[int]:
        store = _take_over(_open(out, run, held))
        _make_finished_folder(store)
        return [i for i in range(len(store.shards), run.shard_count) if _read_finished(store, i) is None]

    missing = processes.first_does(prepare)
    store = DensityStore.open(out)
    mine = missing[processes.rank :: processes.count]
    for index in track(mine, LABEL, enabled=progress and processes.rank == 0, unit=f"1 of {processes.count} processes"):
        _write_finished(store, index, *read(index))
    processes.wait()
    processes.first_does(lambda: _take_over(store))
    return DensityStore.open(out)


def _open(out: str | Path, run: CollectionRun, held: contextlib.ExitStack) -> DensityStore:
    """The store, locked for as long as `held` is open."""
    held.enter_context(_sole_writer(store_folder(out)))
    return DensityStore.create_or_resume(out, run).without_damaged()


@contextlib.contextmanager
def _sole_writer(folder: Path) -> Iterator[None]:
    """Keeps other collections out of a folder.

    Raises:
        DspaError: if one is there already, or the folder cannot be locked.
    """
    from filelock import FileLock, Timeout

    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise DspaError(
            f"another dspa collect is writing to {folder}; wait for its end, or choose another folder"
        ) from None
    except OSError as error:
        raise DspaError(f"{folder} cannot be locked: {error.strerror or error}") from error
    try:
        yield
    finally:
        lock.release()


def _take_over(store: DensityStore) -> DensityStore:
    """The store with the finished shards that follow its own; the subfolder goes when nothing is left to come, unless
    somebody put something else into it."""
    while not store.complete and (found := _read_finished(store, len(store.shards))) is not None:
        store = store.append(*found)
    folder = store.folder / FINISHED
    if store.complete and folder.is_dir() and not folder.is_symlink():
        with contextlib.suppress(OSError):
            remove_own_files(folder, shards=True)
            folder.rmdir()
    return store


def _make_finished_folder(store: DensityStore) -> None:
    folder = store.folder / FINISHED
    if folder.is_symlink():
        raise DspaError(f"{folder} is a symbolic link; expected a folder of this store: remove the link")
    make_folder(folder)


def _write_finished(store: DensityStore, index: int, shard: DensityShard, nonfinite_tokens: int) -> None:
    content = encode_shard(shard, nonfinite_tokens, store.run)
    checksum = hashlib.sha256(content).hexdigest()
    write_atomically(store.folder / FINISHED / shard_name(index), checksum.encode() + content)


def _read_finished(store: DensityStore, index: int) -> tuple[DensityShard, int] | None:
    """A shard another process left in the subfolder, or None if it is not there, damaged, or another run's."""
    path = store.folder / FINISHED / shard_name(index)
    try:
        content = read_file(path)
        if hashlib.sha256(content[64:]).hexdigest().encode() != content[:64]:
            return None
        return decode_shard(content[64:], index, store.run, str(path))
    except (OSError, CorruptFileError):
        return None


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
