"""Whose files are in a store's folder: what is not ours is never touched, and one process at a time writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_collection as tiny
import torch
from altered_records import change_record
from safetensors.torch import load_file, save
from tiny_collection import one_thread  # noqa: F401

import dspa
from dspa.errors import CorruptFileError, DspaError, InvalidInputError
from dspa.offline.density_store import DensityStore, SparseCounts
from dspa.offline.distributed import fill_store
from dspa.util.records import encode_record

TRIPLES, PER_SHARD = 8, 3
MODEL = tiny.tiny_model()


def collect(folder: Path) -> DensityStore:
    return dspa.collect(
        MODEL,
        None,
        tiny.tiny_triples(TRIPLES),
        input_sae=tiny.tiny_sae(tiny.D_SAE_IN, 1),
        output_sae=tiny.tiny_sae(tiny.D_SAE_OUT, 2),
        input_layer=1,
        output_layer=2,
        out=folder,
        triples_per_shard=PER_SHARD,
    )


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected")
    collect(folder)
    return folder


@pytest.fixture
def folder(collected: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(collected, tmp_path / "store"))


def put(path: Path, content: bytes = b"mine") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


# --- files that are not ours ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "names",
    [
        ("finished/thesis.tex", "film.partial"),
        ("film.partial",),
        ("finished/thesis.tex",),
        ("densities-00000.safetensors",),
        (".hidden",),
    ],
)
def test_a_folder_that_is_neither_empty_nor_a_store_is_refused_and_left_alone(
    tmp_path: Path, names: tuple[str, ...]
) -> None:
    for name in names:
        put(tmp_path / name)
    before = tiny.folder_bytes(tmp_path)
    with pytest.raises(InvalidInputError, match=r"^\S* is neither empty nor a folder of densities [^\n]*$"):
        collect(tmp_path)
    assert tiny.folder_bytes(tmp_path) == before


def test_strangers_files_in_a_store_are_left_alone(folder: Path, collected: Path) -> None:
    strangers = (
        "film.partial",
        "densities-00001.safetensors.partial",
        "notes.txt",
        f"thesis.tex.{'a' * 16}.partial",
        "finished/thesis.tex",
        "finished/film.partial",
        "finished/densities-1.safetensors",
    )
    for name in strangers:
        put(folder / name)
    (folder / "x.partial").mkdir()
    (folder / f"manifest.json.{'a' * 16}.partial").mkdir()
    put(folder / "finished" / "densities-00001.safetensors")
    put(folder / "finished" / f"densities-00001.safetensors.{'a' * 16}.partial")
    assert collect(folder).complete
    assert tiny.folder_bytes(folder) == {**tiny.folder_bytes(collected), **dict.fromkeys(strangers, b"mine")}
    assert (folder / "x.partial").is_dir()


def test_links_in_the_place_of_our_files_are_not_followed(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    put(elsewhere / "densities-00000.safetensors")
    (folder / "finished").symlink_to(elsewhere)
    link = folder / f"manifest.json.{'a' * 16}.partial"
    link.symlink_to(elsewhere / "densities-00000.safetensors")
    collect(folder)
    assert (elsewhere / "densities-00000.safetensors").read_bytes() == b"mine"
    assert link.is_symlink()


@pytest.mark.parametrize(
    "odd",
    [
        lambda path: put(path, b"\xff" * 300),
        lambda path: put(path, b"0" * 64),
        lambda path: path.mkdir(),
        lambda path: os.mkfifo(path),
        lambda path: path.symlink_to(path),
        lambda path: path.symlink_to("/dev/zero"),
    ],
    ids=["bytes", "zeros", "folder", "pipe", "loop", "device"],
)
def test_odd_content_in_finished_is_as_good_as_none(folder: Path, collected: Path, odd: Callable[[Path], None]) -> None:
    change_record(folder / "manifest.json", lambda m: m["shards"].pop())
    (folder / "densities-00002.safetensors").unlink()
    (folder / "finished").mkdir()
    odd(folder / "finished" / "densities-00002.safetensors")
    assert collect(folder).complete
    for name in ("manifest.json", "densities-00002.safetensors"):
        assert (folder / name).read_bytes() == (collected / name).read_bytes()


# --- two at once ------------------------------------------------------------------------------------------------------


def test_a_second_collection_into_one_folder_is_one_line(tmp_path: Path, collected: Path) -> None:
    run = DensityStore.open(collected).run
    shards = list(DensityStore.open(collected).read())
    errors: list[str] = []

    def read(index: int) -> tuple[Any, int]:
        other = threading.Thread(target=second)
        other.start()
        other.join()
        return shards[index], 0

    def second() -> None:
        with pytest.raises(DspaError) as error:
            fill_store(tmp_path, run, read)
        errors.append(str(error.value))

    assert fill_store(tmp_path, run, read).complete
    assert len(errors) == 3
    assert all("another dspa collect is writing to" in error and "\n" not in error for error in errors)
    assert tiny.folder_bytes(tmp_path) == tiny.folder_bytes(collected)


@pytest.mark.long
def test_the_lock_goes_with_the_process_that_held_it(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from dspa.offline.distributed import _sole_writer\n"
        "with _sole_writer(Path(sys.argv[1])):\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)]).returncode == -9
    assert os.listdir(tmp_path) == [".lock"]
    assert collect(tmp_path).complete


# --- shards and manifests that contradict each other -----------------------------------------------------------------


def put_shard(folder: Path, content: bytes) -> None:
    """A shard whose checksum is right."""
    import hashlib

    (folder / "densities-00000.safetensors").write_bytes(content)
    checksum = hashlib.sha256(content).hexdigest()
    change_record(folder / "manifest.json", lambda m: m["shards"][0].update(sha256=checksum))


def with_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], bytes]:
    def spoilt(path: Path) -> bytes:
        tensors = load_file(path)
        content = path.read_bytes()
        notes = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        change(tensors)
        return save(tensors, notes)

    return spoilt


def with_notes(notes: dict[str, str] | None) -> Callable[[Path], bytes]:
    return lambda path: save(load_file(path), notes)


@pytest.mark.parametrize(
    "spoil",
    [
        with_tensors(lambda t: t.pop("prompt_tokens")),
        with_tensors(lambda t: t.update(surplus=torch.zeros(1))),
        with_tensors(lambda t: t.update(prompt_tokens=t["prompt_tokens"].double())),
        with_tensors(lambda t: t.update(prompt_offsets=t["prompt_offsets"].int())),
        with_tensors(lambda t: t.update(prompt_latents=t["prompt_latents"].reshape(1, -1))),
        with_tensors(lambda t: t.update(prompt_tokens=torch.tensor(3, dtype=torch.int32))),
        with_tensors(lambda t: t.update(prompt_latents=torch.tensor(3, dtype=torch.int32))),
        with_tensors(lambda t: t.update(prompt_latents=t["prompt_latents"][:0])),
        with_tensors(lambda t: t["prompt_offsets"].__setitem__(slice(1, 3), torch.tensor([2**63 - 1, -2]))),
        with_notes(None),
        with_notes({"dspa": "{}"}),
        with_notes({"dspa": "[" * 10**5}),
        with_notes({"dspa": json.dumps({"run": "another", "nonfinite_tokens": 0})}),
        lambda path: b"",
        lambda path: b"\xff" * 8 + b"{}",
        lambda path: (10**5).to_bytes(8, "little") + b"[" * 10**5,
        lambda path: (2).to_bytes(8, "little") + b"{}",
        lambda path: (2).to_bytes(8, "little") + b"[]",
    ],
)
def test_a_shard_that_is_none_is_one_line_though_its_checksum_is_right(
    folder: Path, collected: Path, spoil: Callable[[Path], bytes]
) -> None:
    put_shard(folder, spoil(folder / "densities-00000.safetensors"))
    with pytest.raises(CorruptFileError, match=r"^[^\n]*densities-00000[^\n]*$"):
        dspa.ConditionalDifferenceMap.fit(folder)
    collect(folder)
    assert tiny.folder_bytes(folder) == tiny.folder_bytes(collected)


@pytest.mark.parametrize("change", [{"d_sae_in": 2**30}, {"d_sae_out": 2**30}, {"count_bos": True}, {"dtype": "int8"}])
def test_a_manifest_is_compared_with_its_shards_before_anything_is_allocated(
    folder: Path, change: dict[str, Any]
) -> None:
    change_record(folder / "manifest.json", lambda m: m["run"].update(change))
    with pytest.raises(CorruptFileError, match="belongs to another run than the manifest"):
        dspa.ConditionalDifferenceMap.fit(folder)


def test_a_store_of_the_first_version_is_refused_in_one_line(folder: Path) -> None:
    change_record(folder / "manifest.json", lambda m: m.update(format_version=1))
    with pytest.raises(CorruptFileError, match=r"format version 1, [^\n]*collect again into another folder$"):
        DensityStore.open(folder)


@pytest.mark.long
def test_every_single_bit_of_a_manifest_is_covered(tmp_path: Path) -> None:
    DensityStore.create_or_resume(tmp_path, replace(tiny.collection_run(3, 3, 3, 3), triples="t"))
    path = tmp_path / "manifest.json"
    content = path.read_bytes()
    assert content == encode_record({k: v for k, v in json.loads(content).items() if k != "checksum"})
    for bit in range(8 * len(content)):
        altered = bytearray(content)
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        with pytest.raises(CorruptFileError):
            DensityStore.open(tmp_path)


def test_offsets_that_wrap_around_are_refused() -> None:
    """Summed with the step after it, each difference is positive: 2**63 - 1, then 1 - 2**63 - 2 = 2**63 - 1 again."""
    ones = torch.ones(3, dtype=torch.int32)
    offsets = torch.tensor([0, 2**63 - 1, -2, 3])
    assert bool((offsets.diff() >= 0).all())
    with pytest.raises(CorruptFileError, match="out of their bounds"):
        SparseCounts(offsets, ones, ones, ones).check(3, 5, "x")
