"""Changing what is on disk as somebody would who knows the checksums: the file is whole, what it says is not right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dspa.util.records import CHECKSUM, encode_record


def change_record(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes a record in place and computes its checksum again."""
    record = json.loads(path.read_text())
    del record[CHECKSUM]
    change(record)
    path.write_bytes(encode_record(record))


def tensors_file(folder: Path) -> Path:
    """The one file of tensors in a folder."""
    (file,) = folder.glob("*.safetensors")
    return file


def config_fields(folder: Path) -> dict[str, Any]:
    """What `TensorFolder.write` was called with."""
    record = json.loads((folder / "config.json").read_text())
    return {name: value for name, value in record.items() if name not in ("kind", "format_version", "sha256", CHECKSUM)}
