"""Files that are whole or not there, and folders of tensors that are refused when anything about them is off."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from dspa.errors import CorruptFileError, DspaError, InvalidInputError
from dspa.util.files import read_tensor_folder, write_atomically, write_tensor_folder

KIND, VERSION = "thing", 3
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int32)}


def write(folder: Path) -> Path:
    return write_tensor_folder(folder, KIND, VERSION, {"answer": 42}, TENSORS)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def drop_key(folder: Path, key: str) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))


def damage(folder: Path, name: str, content: Callable[[bytes], bytes]) -> None:
    (folder / name).write_bytes(content((folder / name).read_bytes()))


def put_with_checksum(folder: Path, content: bytes) -> None:
    (folder / f"{KIND}.safetensors").write_bytes(content)
    change_config(folder, sha256=hashlib.sha256(content).hexdigest())


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    config, tensors = read_tensor_folder(write(tmp_path / "new" / "folder"), KIND, VERSION)
    assert config == {"answer": 42}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == ["config.json", "thing.safetensors"]


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    base = torch.arange(8.0)
    tensors = {"whole": base, "same": base, "half": base[4:], "transposed": base.reshape(2, 4).T}
    _, read = read_tensor_folder(write_tensor_folder(tmp_path, KIND, VERSION, {}, tensors), KIND, VERSION)
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda f: (f / "config.json").unlink(), InvalidInputError, "not a thing folder: config.json is missing"),
        (lambda f: damage(f, "config.json", lambda c: c[: len(c) // 2]), CorruptFileError, "config.json"),
        (lambda f: damage(f, "config.json", lambda c: b""), CorruptFileError, "config.json"),
        (lambda f: damage(f, "config.json", lambda c: b"\xff\xfe\x00"), CorruptFileError, "config.json"),
        (lambda f: damage(f, "config.json", lambda c: b"[]"), CorruptFileError, "config.json"),
        (lambda f: damage(f, "config.json", lambda c: b"[1]"), CorruptFileError, "config.json"),
        (lambda f: damage(f, "config.json", lambda c: b"null"), CorruptFileError, "config.json"),
        (lambda f: damage(f, "config.json", lambda c: b'"kind"'), CorruptFileError, "config.json"),
        (lambda f: drop_key(f, "kind"), CorruptFileError, "kind"),
        (lambda f: drop_key(f, "format_version"), CorruptFileError, "format_version"),
        (lambda f: drop_key(f, "sha256"), CorruptFileError, "sha256"),
        (lambda f: change_config(f, kind="other"), InvalidInputError, "holds a other; expected a thing"),
        (lambda f: change_config(f, format_version=2), CorruptFileError, "version 2; this release reads 3"),
        (lambda f: change_config(f, sha256="0" * 64), CorruptFileError, "thing.safetensors"),
        (lambda f: (f / "thing.safetensors").unlink(), CorruptFileError, "thing.safetensors is missing"),
        (lambda f: damage(f, "thing.safetensors", lambda c: c[:-1]), CorruptFileError, "thing.safetensors"),
        (lambda f: damage(f, "thing.safetensors", lambda c: c + b"\0"), CorruptFileError, "thing.safetensors"),
        (lambda f: damage(f, "thing.safetensors", flip), CorruptFileError, "thing.safetensors"),
        (lambda f: put_with_checksum(f, b""), CorruptFileError, "thing.safetensors"),
        (lambda f: put_with_checksum(f, b"\xff" * 100), CorruptFileError, "thing.safetensors"),
        (lambda f: put_with_checksum(f, save(TENSORS)[:-1]), CorruptFileError, "thing.safetensors"),
    ],
)
def test_a_spoilt_folder_is_refused_in_one_line(
    tmp_path: Path, spoil: Callable[[Path], None], error: type[DspaError], words: str
) -> None:
    folder = write(tmp_path)
    spoil(folder)
    with pytest.raises(error) as raised:
        read_tensor_folder(folder, KIND, VERSION)
    assert words in str(raised.value)
    assert str(tmp_path) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(os, call, fail)
    with pytest.raises(DspaError, match=r"file cannot be written: No space left on device; .*run again$"):
        write_atomically(path, b"new")
    monkeypatch.undo()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"old"}
    write_atomically(path, b"new")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"file": b"new"}


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "below"):
        with pytest.raises(DspaError, match=r"taken.* cannot be used as a folder: [^\n]*$"):
            write(folder)
