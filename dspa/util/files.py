"""Files that are whole or not there, and tensors on disk that are checked before they are used."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from dspa.errors import CorruptFileError, DspaError, InvalidInputError

CONFIG = "config.json"
TEMPORARY_SUFFIX = ".partial"


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
    """Writes a file under a temporary name, forces it to disk and renames it: whole or not there.

    Raises:
        DspaError: if it cannot be written; nothing is left behind under either name.
    """
    temporary = path.with_name(path.name + TEMPORARY_SUFFIX)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise DspaError(f"{path} cannot be written: {error.strerror or error}; free space and run again") from error


def write_tensor_folder(
    folder: str | Path, kind: str, version: int, config: dict[str, Any], tensors: dict[str, Tensor]
) -> Path:
    """Writes `<kind>.safetensors` and, after it, `config.json`, which names the kind, the version and a checksum.

    Raises:
        DspaError: if a file cannot be written.
    """
    path = make_folder(folder)
    content = safetensors.torch.save(_in_own_memory(tensors))
    write_atomically(path / f"{kind}.safetensors", content)
    record = {"kind": kind, "format_version": version, "sha256": hashlib.sha256(content).hexdigest(), **config}
    write_atomically(path / CONFIG, (json.dumps(record, indent=2) + "\n").encode())
    return path


def read_tensor_folder(folder: str | Path, kind: str, version: int) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What `write_tensor_folder` wrote: the configuration and the tensors.

    Raises:
        InvalidInputError: if the folder holds no such thing.
        CorruptFileError: if a file is missing, truncated, altered or of another version.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise InvalidInputError(f"{folder} is not a {kind} folder: {CONFIG} is missing")
    try:
        config = json.loads((path / CONFIG).read_text())
        found_kind, found_version, checksum = config.pop("kind"), config.pop("format_version"), config.pop("sha256")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptFileError(f"{path / CONFIG} cannot be read as a {kind} configuration ({error})") from error
    if found_kind != kind:
        raise InvalidInputError(f"{folder} holds a {found_kind}; expected a {kind}")
    if found_version != version:
        raise CorruptFileError(f"{folder} has format version {found_version}; this release reads {version}")
    file = path / f"{kind}.safetensors"
    if not file.is_file():
        raise CorruptFileError(f"{file} is missing; copy the whole folder")
    try:
        content = file.read_bytes()
    except OSError as error:
        raise CorruptFileError(f"{file} cannot be read: {error.strerror or error}") from error
    if hashlib.sha256(content).hexdigest() != checksum:
        raise CorruptFileError(f"{file} was truncated or altered (its checksum differs); copy or make it again")
    try:
        return config, safetensors.torch.load(content)
    except (safetensors.SafetensorError, ValueError) as error:
        raise CorruptFileError(f"{file} is not a safetensors file ({error}); copy or make it again") from error


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
