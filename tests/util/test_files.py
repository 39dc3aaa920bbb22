"""Files that are whole or not there, and folders of tensors that are refused when anything about them is off."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from altered_records import change_record, tensors_file
from safetensors.torch import save

from dspa.errors import CorruptFileError, DspaError, InvalidInputError
from dspa.util import files
from dspa.util.files import TensorFolder, write_atomically


@dataclass(frozen=True)
class Config:
    answer: int


KIND, VERSION = "thing", 3
FOLDER = TensorFolder(KIND, VERSION, Config, version_without_checksum=2)
TENSORS = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor([1, 2], dtype=torch.int32)}


def write(folder: Path) -> Path:
    return FOLDER.write(folder, {"answer": 42}, TENSORS)


def change_config(folder: Path, **changes: Any) -> None:
    change_record(folder / "config.json", lambda config: config.update(changes))


def drop_key(folder: Path, key: str) -> None:
    change_record(folder / "config.json", lambda config: config.pop(key))


def damage(folder: Path, content: Callable[[bytes], bytes]) -> None:
    path = folder / "config.json"
    path.write_bytes(content(path.read_bytes()))


def damage_tensors(folder: Path, content: Callable[[bytes], bytes]) -> None:
    path = tensors_file(folder)
    path.write_bytes(content(path.read_bytes()))


def put_with_checksum(folder: Path, content: bytes) -> None:
    checksum = hashlib.sha256(content).hexdigest()
    tensors_file(folder).rename(folder / FOLDER.tensors_name(checksum))
    (folder / FOLDER.tensors_name(checksum)).write_bytes(content)
    change_config(folder, sha256=checksum)


def flip(content: bytes) -> bytes:
    return content[:-1] + bytes([content[-1] ^ 1])


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    config, tensors = FOLDER.read(write(tmp_path / "new" / "folder"))
    assert config == Config(42)
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    names = sorted(os.listdir(tmp_path / "new" / "folder"))
    assert names == ["config.json", tensors_file(tmp_path / "new" / "folder").name]


def test_tensors_that_share_memory_are_written(tmp_path: Path) -> None:
    base = torch.arange(8.0)
    tensors = {"whole": base, "same": base, "half": base[4:], "transposed": base.reshape(2, 4).T}
    _, read = FOLDER.read(FOLDER.write(tmp_path, {"answer": 42}, tensors))
    for name, tensor in tensors.items():
        assert torch.equal(read[name], tensor), name


@pytest.mark.parametrize(
    ("spoil", "error", "words"),
    [
        (lambda f: (f / "config.json").unlink(), InvalidInputError, "not a thing folder: config.json is missing"),
        (lambda f: damage(f, lambda c: c[: len(c) // 2]), CorruptFileError, "config.json"),
        (lambda f: damage(f, lambda c: b""), CorruptFileError, "config.json"),
        (lambda f: damage(f, lambda c: b"\xff\xfe\x00"), CorruptFileError, "config.json"),
        (lambda f: damage(f, lambda c: b"[]"), CorruptFileError, "config.json"),
        (lambda f: damage(f, lambda c: b"[1]"), CorruptFileError, "config.json"),
        (lambda f: damage(f, lambda c: b"null"), CorruptFileError, "config.json"),
        (lambda f: damage(f, lambda c: b'"kind"'), CorruptFileError, "config.json"),
        (lambda f: drop_key(f, "kind"), CorruptFileError, "kind"),
        (lambda f: drop_key(f, "format_version"), CorruptFileError, "format_version"),
        (lambda f: drop_key(f, "sha256"), CorruptFileError, "sha256"),
        (lambda f: change_config(f, kind="other"), InvalidInputError, "holds a other; expected a thing"),
        (lambda f: change_config(f, format_version=1), CorruptFileError, "version 1; this release reads 3"),
        (lambda f: change_config(f, format_version=2), CorruptFileError, "thing.safetensors is missing"),
        (lambda f: change_config(f, format_version="3"), CorruptFileError, "format version 3"),
        (lambda f: change_config(f, sha256="0" * 64), CorruptFileError, f"thing-{'0' * 16}.safetensors is missing"),
        (lambda f: change_config(f, sha256="../" * 21 + "."), CorruptFileError, "sha256 is not a checksum"),
        (lambda f: change_config(f, answer="42"), CorruptFileError, "answer: Input should be a valid integer"),
        (lambda f: change_config(f, answer=True), CorruptFileError, "answer: Input should be a valid integer"),
        (lambda f: change_config(f, surplus=1), CorruptFileError, "surplus"),
        (lambda f: drop_key(f, "answer"), CorruptFileError, "answer"),
        (lambda f: damage(f, lambda c: c.replace(b"42", b"43")), CorruptFileError, "its checksum differs"),
        (lambda f: damage(f, lambda c: b"[" * 10**6), CorruptFileError, "nested too deeply"),
        (lambda f: damage(f, lambda c: b'{"kind": ' * 10**5), CorruptFileError, "nested too deeply"),
        (lambda f: damage(f, lambda c: c.replace(b"42", b"9" * 5000)), CorruptFileError, "config.json"),
        (lambda f: damage(f, lambda c: c.replace(b"42", b"1e999")), CorruptFileError, "too large"),
        (lambda f: damage(f, lambda c: c.replace(b"42", b"NaN")), CorruptFileError, "it holds NaN"),
        (lambda f: damage(f, lambda c: c + b" " * 2**24), CorruptFileError, "larger than"),
        (lambda f: tensors_file(f).unlink(), CorruptFileError, ".safetensors is missing"),
        (lambda f: damage_tensors(f, lambda c: c[:-1]), CorruptFileError, ".safetensors"),
        (lambda f: damage_tensors(f, lambda c: c + b"\0"), CorruptFileError, ".safetensors"),
        (lambda f: damage_tensors(f, flip), CorruptFileError, ".safetensors"),
        (lambda f: put_with_checksum(f, b""), CorruptFileError, ".safetensors"),
        (lambda f: put_with_checksum(f, b"\xff" * 100), CorruptFileError, ".safetensors"),
        (lambda f: put_with_checksum(f, save(TENSORS)[:-1]), CorruptFileError, ".safetensors"),
    ],
)
def test_a_spoilt_folder_is_refused_in_one_line(
    tmp_path: Path, spoil: Callable[[Path], None], error: type[DspaError], words: str
) -> None:
    folder = write(tmp_path)
    spoil(folder)
    with pytest.raises(error) as raised:
        FOLDER.read(folder)
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


def test_a_symbolic_link_where_the_temporary_file_would_be_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if its name could be guessed."""
    victim = tmp_path / "victim"
    victim.write_text("precious")
    monkeypatch.setattr(secrets, "token_hex", lambda n: "0" * 16)
    (tmp_path / f"file.{'0' * 16}.partial").symlink_to(victim)
    with pytest.raises(DspaError, match="file cannot be written: File exists"):
        write_atomically(tmp_path / "file", b"new")
    assert victim.read_text() == "precious"
    monkeypatch.undo()
    (tmp_path / "file.partial").symlink_to(victim)
    (tmp_path / "file").symlink_to(victim)
    write_atomically(tmp_path / "file", b"new")
    assert victim.read_text() == "precious"
    assert ((tmp_path / "file").read_bytes(), (tmp_path / "file").is_symlink()) == (b"new", False)


@pytest.mark.long
@pytest.mark.parametrize("limit", [0, *(pytest.param(limit, marks=pytest.mark.long) for limit in (1, 4096))])
def test_a_limit_on_file_sizes_is_one_line(tmp_path: Path, limit: int) -> None:
    program = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from dspa import DspaError, VectorPolicy\n"
        "policy = VectorPolicy(torch.zeros(2048), 1)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "try:\n"
        "    policy.save_pretrained(sys.argv[1])\n"
        "except DspaError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "cannot be written: File too large" in run.stdout
    assert (run.stdout.count("\n"), run.stderr, list(tmp_path.iterdir())) == (1, "", [])


# --- generations ------------------------------------------------------------------------------------------------------

OTHERS = {"a": torch.zeros(3)}


def test_saving_over_a_folder_removes_the_tensors_it_replaces(tmp_path: Path) -> None:
    write(tmp_path)
    first = tensors_file(tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "model.safetensors").write_text("mine")
    FOLDER.write(tmp_path, {"answer": 1}, OTHERS)
    assert not first.exists()
    (tmp_path / "model.safetensors").rename(tmp_path / "model.st")
    assert torch.equal(FOLDER.read(tmp_path)[1]["a"], OTHERS["a"])
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.st", "notes.txt", tensors_file(tmp_path).name]


def test_what_killed_processes_left_is_removed_once_it_is_old(tmp_path: Path) -> None:
    names = (f"thing-{'a' * 16}.safetensors", f"config.json.{'b' * 16}.partial", "thing.safetensors")
    others = ("thing-b.safetensors", "config.json.partial", f"notes.{'b' * 16}.partial")
    for name in (*names, *others):
        (tmp_path / name).write_bytes(b"x")
    write(tmp_path)
    assert {*names, *others} < set(os.listdir(tmp_path))  # another process may be writing them
    for name in (*names, *others):
        os.utime(tmp_path / name, (0, 0))
    FOLDER.write(tmp_path, {"answer": 1}, OTHERS)
    left = set(os.listdir(tmp_path))
    assert not left & set(names)
    assert set(others) < left


def test_a_save_that_fails_at_any_file_leaves_the_old_generation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    create = files.create_file
    for fails_at in range(2):
        made: list[Path] = []

        def limited(path: Path, made: list[Path] = made, fails_at: int = fails_at) -> Any:
            made.append(path)
            if len(made) > fails_at:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return create(path)

        monkeypatch.setattr(files, "create_file", limited)
        with pytest.raises(DspaError, match="No space left"):
            FOLDER.write(tmp_path, {"answer": 1}, OTHERS)
        monkeypatch.undo()
        assert FOLDER.read(tmp_path)[0] == Config(42)


def test_a_reader_follows_a_generation_that_replaces_the_one_it_began_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path)
    read, saves = files.read_file, 0

    def saved_meanwhile(path: Path) -> bytes:
        nonlocal saves
        if saves < 3:
            saves += 1
            FOLDER.write(tmp_path, {"answer": saves}, {"a": torch.full((3,), float(saves))})
        return read(path)

    monkeypatch.setattr(files, "read_file", saved_meanwhile)
    config, tensors = FOLDER.read(tmp_path)
    assert config == Config(3)
    assert tensors["a"].tolist() == [3, 3, 3]


def test_an_earlier_version_without_checksums_is_read(tmp_path: Path) -> None:
    content = save(TENSORS)
    (tmp_path / "thing.safetensors").write_bytes(content)
    record = {"kind": KIND, "format_version": 2, "sha256": hashlib.sha256(content).hexdigest(), "answer": 42}
    (tmp_path / "config.json").write_text(json.dumps(record))
    config, tensors = FOLDER.read(tmp_path)
    assert config == Config(42)
    assert tensors.keys() == TENSORS.keys()
    FOLDER.write(tmp_path, {"answer": 42}, TENSORS)
    assert sorted(os.listdir(tmp_path)) == ["config.json", FOLDER.tensors_name(record["sha256"])]


@pytest.mark.long
def test_every_single_bit_of_a_configuration_is_covered(tmp_path: Path) -> None:
    """A flipped bit is refused, or says the same: an exponent in capitals is the only such one in JSON."""
    write(tmp_path)
    path = tmp_path / "config.json"
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        with pytest.raises((CorruptFileError, InvalidInputError)):
            FOLDER.read(tmp_path)
