"""Files that are whole or not there, and tensors on disk that are checked before they are used.

A folder of tensors is one generation of two files: `<kind>-<checksum>.safetensors`, and `config.json`, which names it
by its checksum. Saving over a folder writes the new tensors beside the old ones, replaces `config.json`, and removes
the old tensors last, so that at every moment the folder holds one whole generation.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Generic, TypeVar

import safetensors.torch
from torch import Tensor

from dspa.errors import CorruptFileError, DspaError, InvalidInputError
from dspa.util.records import check_checksum, encode_record, read_json, validated

CONFIG = "config.json"
TEMPORARY = re.compile(r"(?P<name>.+)\.[0-9a-f]{16}\.partial")
"""Names of files that are being written."""

ABANDONED_AFTER = 600.0  # seconds; a file that is written for longer than this belongs to a process that was killed
CHANGES_WHILE_READING = 1000  # generations that may follow each other while one is being read

SchemaT = TypeVar("SchemaT")


@dataclass(frozen=True)
class TensorFolder(Generic[SchemaT]):
    """A kind of folder.

    Attributes:
        kind: its name, in `config.json` and in the name of the tensors' file.
        version: the format that is written.
        schema: the dataclass of the configuration.
        version_without_checksum: an earlier version that is still read, whose configuration had no checksum and whose
            tensors were in `<kind>.safetensors`; None if there is none.
    """

    kind: str
    version: int
    schema: type[SchemaT]
    version_without_checksum: int | None = None

    @property
    def patterns(self) -> list[str]:
        """Shell patterns of the files that belong to such a folder."""
        return [CONFIG, f"{self.kind}.safetensors", f"{self.kind}-*.safetensors"]

    def tensors_name(self, sha256: str) -> str:
        return f"{self.kind}-{sha256[:16]}.safetensors"

    def owns(self, name: str) -> bool:
        """Whether a file of that name holds tensors of this kind, of some generation."""
        return re.fullmatch(rf"{re.escape(self.kind)}(-[0-9a-f]{{16}})?\.safetensors", name) is not None

    def write(self, folder: str | Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
        """Writes the tensors and, after them, the configuration; then removes what it replaces.

        Raises:
            DspaError: if a file cannot be written; what was there before is still there.
        """
        path = make_folder(folder)
        content = safetensors.torch.save(_in_own_memory(tensors))
        checksum = hashlib.sha256(content).hexdigest()
        name, replaced = self.tensors_name(checksum), self._tensors_named_in(path)
        write_atomically(path / name, content)
        record = {"kind": self.kind, "format_version": self.version, "sha256": checksum, **config}
        write_atomically(path / CONFIG, encode_record(record))
        self._remove_replaced(path, name, replaced)
        return path

    def read(self, folder: str | Path) -> tuple[SchemaT, dict[str, Tensor]]:
        """The configuration and the tensors, all of one generation.

        Raises:
            InvalidInputError: if the folder holds no such thing.
            CorruptFileError: if a file is missing, truncated, altered or of another version.
        """
        path = Path(folder)
        for _ in range(CHANGES_WHILE_READING):
            record = self._read_config(path)
            file, checksum = path / self._tensors_of(record), record.pop("sha256")
            try:
                content = read_file(file)
            except FileNotFoundError as error:
                if self._read_config(path).get("sha256") != checksum:
                    continue  # another generation was saved meanwhile
                raise CorruptFileError(f"{file} is missing; copy the whole folder") from error
            except OSError as error:
                raise CorruptFileError(f"{file} cannot be read: {error.strerror or error}") from error
            if hashlib.sha256(content).hexdigest() != checksum:
                raise CorruptFileError(f"{file} was truncated or altered (its checksum differs); copy or make it again")
            fields = {name: value for name, value in record.items() if name not in ("kind", "format_version")}
            try:
                config = validated(self.schema, fields)
            except ValueError as error:
                raise CorruptFileError(
                    f"{path / CONFIG} does not hold a whole {self.kind} ({error}); make it again"
                ) from error
            return config, load_tensors(content, file)
        raise CorruptFileError(f"{folder} is being written over and over; read it once that has ended")

    def _read_config(self, path: Path) -> dict[str, Any]:
        config = path / CONFIG
        if not config.is_file():
            raise InvalidInputError(f"{path} is not a {self.kind} folder: {CONFIG} is missing")
        try:
            record = read_json(config)
            found_kind, found_version = record["kind"], record["format_version"]
            if found_kind != self.kind:
                raise InvalidInputError(f"{path} holds a {str(found_kind)[:80]}; expected a {self.kind}")
            if found_version not in (self.version, self.version_without_checksum) or type(found_version) is not int:
                raise CorruptFileError(
                    f"{path} has format version {str(found_version)[:80]}; this release reads {self.version}"
                )
            if found_version == self.version:
                record = check_checksum(record)
            if type(record["sha256"]) is not str or re.fullmatch("[0-9a-f]{64}", record["sha256"]) is None:
                raise ValueError("sha256 is not a checksum")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptFileError(f"{config} cannot be read as a {self.kind} configuration ({error})") from error
        return record

    def _tensors_of(self, record: dict[str, Any]) -> str:
        if record["format_version"] == self.version:
            return self.tensors_name(record["sha256"])
        return f"{self.kind}.safetensors"

    def _tensors_named_in(self, path: Path) -> str | None:
        """The tensors' file of the generation that is there, if one is."""
        try:
            return self._tensors_of(self._read_config(path))
        except DspaError:
            return None

    def _remove_replaced(self, path: Path, name: str, replaced: str | None) -> None:
        """Removes the tensors of the generation that was replaced, and what killed processes left: regular files with
        names of this kind, and nothing else."""
        for entry in list(os.scandir(path)):
            temporary = TEMPORARY.fullmatch(entry.name)
            owned = self.owns(entry.name) or (
                temporary is not None and (temporary["name"] == CONFIG or self.owns(temporary["name"]))
            )
            with contextlib.suppress(OSError):
                if not owned or entry.name == name or not entry.is_file(follow_symlinks=False):
                    continue
                if entry.name == replaced or time.time() - entry.stat().st_mtime > ABANDONED_AFTER:
                    os.unlink(entry.path)


def make_folder(folder: str | Path) -> Path:
    """The folder, made if it is not there.

    Raises:
        DspaError: if it cannot be made, or a file is in its place.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DspaError(f"{folder} cannot be used as a folder: {error.strerror or error}") from error
    return path


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file under a name that nothing else has, forces it to disk and renames it: whole or not there.

    Raises:
        DspaError: if it cannot be written; nothing is left behind under either name.
    """
    temporary = path.with_name(f"{path.name}.{secrets.token_hex(8)}.partial")
    try:
        with create_file(temporary) as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _force_folder_to_disk(path.parent)
    except OSError as error:
        _forget(temporary)
        raise DspaError(f"{path} cannot be written: {error.strerror or error}; free space and run again") from error
    except BaseException:
        _forget(temporary)
        raise


def create_file(path: Path) -> BinaryIO:
    """A new file, open for writing. Whatever has its name already, a symbolic link included, is an OSError."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL
    for name in ("O_NOFOLLOW", "O_CLOEXEC", "O_BINARY"):
        flags |= getattr(os, name, 0)
    return os.fdopen(os.open(path, flags, 0o666), "wb")


def read_file(path: Path) -> bytes:
    """The content of a regular file; OSError for everything else."""
    if path.exists() and not path.is_file():
        raise OSError("not a regular file")
    return path.read_bytes()


def load_tensors(content: bytes, name: object) -> dict[str, Tensor]:
    """The tensors in the content of a safetensors file.

    Raises:
        CorruptFileError: if it is not one, or holds what torch cannot; `name` is in the message.
    """
    try:
        return safetensors.torch.load(content)
    except MemoryError:
        raise
    except Exception as error:  # the library raises many kinds
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CorruptFileError(f"{name} is not a safetensors file ({reason}); copy or make it again") from error


def _forget(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)


def _force_folder_to_disk(folder: Path) -> None:
    """After a rename, so that the name lasts as well. Not every system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a file.

    Raises:
        CorruptFileError: if it cannot be read.
    """
    try:
        return safetensors.torch.load(file.read_bytes())
    except (OSError, safetensors.SafetensorError, ValueError) as error:
        raise CorruptFileError(f"{file} is not a safetensors file ({error}); copy or make it again") from error


def _in_own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors on the CPU, contiguous, and none of them in the memory of another, which safetensors refuses."""
    taken: set[int] = set()
    result = {}
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.untyped_storage().data_ptr() in taken:
            tensor = tensor.clone()
        taken.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result
