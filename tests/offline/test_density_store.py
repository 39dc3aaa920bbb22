"""Density stores on disk: interrupted at every step and resumed to the same bytes, damaged, full, and refused.

Run as a program, this file collects in child processes that are killed or run out of space, and writes what happened:
    python test_density_store.py <folder>
"""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_collection as tiny
import torch
from altered_records import change_record
from tiny_collection import one_thread  # noqa: F401

import dspa
from dspa.errors import CorruptFileError, DspaError, InvalidInputError, MismatchError
from dspa.offline.density_store import CollectionRun, DensityShard, DensityStore, SparseCounts
from dspa.transformers_model import decoder_stack
from dspa.util import files

TRIPLES, PER_SHARD, SHARDS = 8, 3, 3
STEPS_PER_FILE = 5  # opened, half written, written, on disk, renamed
FILES_WRITTEN = 1 + 2 * SHARDS  # the manifest at the start, then a shard and the manifest each
KILL_STEPS = STEPS_PER_FILE * FILES_WRITTEN
COMPUTING_KILLS = 8
FULL_AT = [(file, ("half written", "written")[file // 2 % 2]) for file in range(FILES_WRITTEN)]


# --- the program ------------------------------------------------------------------------------------------------------


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
        triples_per_batch=2,
        triples_per_shard=PER_SHARD,
    )


def on_disk_steps(step: Callable[[str], None]) -> None:
    """Calls `step` at each of the moments of writing a file, in the order of STEPS_PER_FILE."""
    create_file, fsync, move = files.create_file, os.fsync, os.replace

    class Halting:
        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Halting:
            return self

        def __exit__(self, *error: object) -> None:
            self.file.close()

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

        def write(self, content: bytes) -> None:
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            step("half written")
            self.file.write(content[len(content) // 2 :])

    def patched_create(path: Path) -> Any:
        file = create_file(path)
        step("opened")
        return Halting(file)

    def patched_fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            return
        step("written")
        fsync(descriptor)
        step("on disk")

    def patched_move(*args: Any, **kwargs: Any) -> None:
        move(*args, **kwargs)
        step("renamed")

    files.create_file, os.fsync, os.replace = patched_create, patched_fsync, patched_move  # type: ignore[assignment]


def on_computing(step: Callable[[str], None]) -> None:
    """Calls `step` whenever an MLP of the model runs."""
    for layer in decoder_stack(MODEL).layers:
        layer.get_submodule("mlp").register_forward_pre_hook(lambda module, args: step("computing"))


def in_child(action: Callable[[], object], report: Path) -> int:
    """Runs an action in a forked process and returns its wait status; an error's message goes to `report`."""
    process = os.fork()
    if process == 0:
        try:
            action()
            os._exit(0)
        except DspaError as error:
            report.write_text(str(error))
            os._exit(2)
        except BaseException as error:
            report.write_text(f"{type(error).__name__}: {error}")
            os._exit(3)
    return os.waitpid(process, 0)[1]


def kill_at(steps: int) -> Callable[[str], None]:
    seen = 0

    def step(name: str) -> None:
        nonlocal seen
        seen += 1
        if seen == steps:
            os.kill(os.getpid(), signal.SIGKILL)

    return step


def full_at(file: int, moment: str) -> Callable[[str], None]:
    """Space runs out at one of the moments of writing the file of that number."""
    seen = 0

    def step(name: str) -> None:
        nonlocal seen
        seen += name == moment
        if seen == file + 1 and name == moment:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    return step


def interrupted(folder: Path, step: Callable[[str], None]) -> None:
    on_disk_steps(step)
    collect(folder)


def computing(folder: Path, step: Callable[[str], None]) -> None:
    on_computing(step)
    collect(folder)


def counted(folder: Path, into: Path) -> None:
    """Collects, and writes down how often an MLP ran."""
    steps: list[str] = []
    computing(folder, steps.append)
    into.write_text(str(len(steps)))


def limited(folder: Path, size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    collect(folder)


def main(root: Path) -> None:
    torch.set_num_threads(1)  # a forked process has no other threads
    report = root / "report"
    outcome: dict[str, Any] = {}
    in_child(lambda: counted(root / "whole", root / "steps"), report)
    steps = int((root / "steps").read_text())
    whole = tiny.folder_bytes(root / "whole")

    def resumed(folder: Path) -> list[str]:
        """The files that differ from those of the run nobody interrupted."""
        assert in_child(lambda: collect(folder), report) == 0, report.read_text()
        found = tiny.folder_bytes(folder)
        shutil.rmtree(folder)
        return sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))

    def scenario(kind: str, name: object, action: Callable[[Path], object]) -> None:
        folder = root / "interrupted"
        report.write_text("")
        status = in_child(lambda: action(folder), report)
        usable = len(DensityStore.open(folder).without_damaged().shards) if (folder / "manifest.json").exists() else -1
        leftovers = sorted(path.name for path in folder.glob("*.partial"))
        outcome[f"{kind} {name}"] = {
            "killed": os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL,
            "code": os.WEXITSTATUS(status) if os.WIFEXITED(status) else None,
            "message": report.read_text(),
            "usable": usable,
            "leftovers": leftovers,
            "different": resumed(folder),
        }

    for number in range(1, KILL_STEPS + 2):
        scenario("step", number, lambda folder, n=number: interrupted(folder, kill_at(n)))
    for number in range(COMPUTING_KILLS):  # from the first time that an MLP runs to the last
        step = 1 + number * (steps - 1) // (COMPUTING_KILLS - 1)
        scenario("computing", number, lambda folder, n=step: computing(folder, kill_at(n)))
    for number, moment in FULL_AT:
        scenario("full", number, lambda folder, n=number, m=moment: interrupted(folder, full_at(n, m)))
    sizes = [len(whole[f"densities-{index:05d}.safetensors"]) for index in range(SHARDS)]
    scenario("limit", 0, lambda folder: limited(folder, max(sizes) - 1))

    # Killed again and again, each time one step later, in one folder.
    folder, kills = root / "again", 0
    while in_child(lambda n=kills: interrupted(folder, kill_at(n + 3)), report):
        kills += 1
    outcome["again and again"] = {"kills": kills, "different": resumed(folder)}
    outcome["sizes"] = sizes
    (root / "outcome.json").write_text(json.dumps(outcome))


# --- its tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("interrupted")
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=300)
    return json.loads((folder / "outcome.json").read_text())


@pytest.mark.long
@pytest.mark.parametrize("step", range(1, KILL_STEPS + 1))
def test_killed_at_a_step_and_resumed(outcome: dict[str, Any], step: int) -> None:
    run = outcome[f"step {step}"]
    assert run["killed"]
    file, moment = divmod(step - 1, STEPS_PER_FILE)  # manifest, shard, manifest, shard, manifest ...
    renamed = file if moment == STEPS_PER_FILE - 1 else file - 1
    assert run["usable"] == (-1 if renamed < 0 else renamed // 2)
    assert len(run["leftovers"]) == (moment != STEPS_PER_FILE - 1)
    assert run["different"] == []


@pytest.mark.long
def test_there_are_no_other_steps(outcome: dict[str, Any]) -> None:
    run = outcome[f"step {KILL_STEPS + 1}"]
    assert (run["killed"], run["code"], run["usable"], run["different"]) == (False, 0, SHARDS, [])


@pytest.mark.long
def test_killed_while_computing_and_resumed(outcome: dict[str, Any]) -> None:
    """Between two files: what was written is whole."""
    runs = [outcome[f"computing {number}"] for number in range(COMPUTING_KILLS)]
    assert all(run["killed"] for run in runs)
    assert [run["leftovers"] for run in runs] == [[]] * COMPUTING_KILLS
    assert [run["different"] for run in runs] == [[]] * COMPUTING_KILLS
    usable = [run["usable"] for run in runs]
    assert usable == sorted(usable)
    assert set(usable) == set(range(SHARDS))


@pytest.mark.long
def test_killed_again_and_again(outcome: dict[str, Any]) -> None:
    run = outcome["again and again"]
    assert run["different"] == []
    assert run["kills"] >= SHARDS


@pytest.mark.long
@pytest.mark.parametrize(("file", "moment"), FULL_AT)
def test_disk_full_and_resumed(outcome: dict[str, Any], file: int, moment: str) -> None:
    run = outcome[f"full {file}"]
    assert run["code"] == 2
    assert "cannot be written: No space left on device" in run["message"]
    assert "\n" not in run["message"]
    assert run["usable"] == (-1 if file == 0 else (file - 1) // 2)
    assert run["leftovers"] == []
    assert run["different"] == []


@pytest.mark.long
def test_a_real_limit_on_file_sizes(outcome: dict[str, Any]) -> None:
    """As disk full, without a patch: the largest shard does not fit."""
    run, sizes = outcome["limit 0"], outcome["sizes"]
    assert sizes.index(max(sizes)) > 0
    assert run["code"] == 2
    assert "cannot be written: File too large" in run["message"]
    assert run["usable"] == sizes.index(max(sizes))
    assert run["leftovers"] == []
    assert run["different"] == []


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected")
    collect(folder)
    return folder


@pytest.fixture
def folder(collected: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(collected, tmp_path / "store"))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


SHARD = "densities-00002.safetensors"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda path: path.unlink(), "cannot be read"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "altered"),
        (lambda path: path.write_bytes(b""), "altered"),
        (lambda path: path.write_bytes(path.read_bytes() + b"\0"), "altered"),
        (lambda path: flip(path, 3), "altered"),
        (lambda path: flip(path, -1), "altered"),
        (lambda path: path.write_bytes((path.parent / "densities-00001.safetensors").read_bytes()), "altered"),
    ],
    ids=["missing", "truncated", "empty", "longer", "header", "value", "another shard"],
)
def test_a_damaged_shard_is_named_and_collected_again(
    folder: Path, collected: Path, damage: Callable[[Path], object], words: str
) -> None:
    damage(folder / SHARD)
    for use in (lambda: list(DensityStore.open(folder).read()), lambda: dspa.ConditionalDifferenceMap.fit(folder)):
        with pytest.raises(CorruptFileError, match=rf"^shard \S*{SHARD} [^\n]*{words}[^\n]*; collect again$"):
            use()
    assert len(DensityStore.open(folder).without_damaged().shards) == 2
    collect(folder)
    assert tiny.folder_bytes(folder) == tiny.folder_bytes(collected)


def change_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    change_record(folder / "manifest.json", change)


@pytest.mark.parametrize(
    "damage",
    [
        lambda f: (f / "manifest.json").write_bytes(b""),
        lambda f: (f / "manifest.json").write_bytes((f / "manifest.json").read_bytes()[:-30]),
        lambda f: (f / "manifest.json").write_bytes(b"\xff\x00"),
        lambda f: (f / "manifest.json").write_text("[]"),
        lambda f: (f / "manifest.json").write_text("null"),
        lambda f: change_manifest(f, lambda m: m.pop("run")),
        lambda f: change_manifest(f, lambda m: m.pop("shards")),
        lambda f: change_manifest(f, lambda m: m.pop("format_version")),
        lambda f: change_manifest(f, lambda m: m.update(format_version=1)),
        lambda f: change_manifest(f, lambda m: m.update(format_version=3)),
        lambda f: change_manifest(f, lambda m: m["run"].update(d_sae_in=2**31)),
        lambda f: (f / "manifest.json").write_text("[" * 10**5),
        lambda f: change_manifest(f, lambda m: m["run"].pop("d_sae_in")),
        lambda f: change_manifest(f, lambda m: m["run"].update(surplus=1)),
        lambda f: change_manifest(f, lambda m: m["run"].update(d_sae_in="48")),
        lambda f: change_manifest(f, lambda m: m["run"].update(d_sae_out=0)),
        lambda f: change_manifest(f, lambda m: m["run"].update(triples_per_shard=0)),
        lambda f: change_manifest(f, lambda m: m["run"].update(count_bos=1)),
        lambda f: change_manifest(f, lambda m: m["run"].update(uncounted_token_ids=["2"])),
        lambda f: change_manifest(f, lambda m: m["run"].update(uncounted_token_ids=3)),
        lambda f: change_manifest(f, lambda m: m["run"].update(model=[])),
        lambda f: change_manifest(f, lambda m: m.update(run=[1])),
        lambda f: change_manifest(f, lambda m: m["shards"].append("x")),
        lambda f: change_manifest(f, lambda m: m["shards"].append(m["shards"][0])),
        lambda f: change_manifest(f, lambda m: m["shards"].reverse()),
        lambda f: change_manifest(
            f, lambda m: m["shards"].append(m["shards"][0] | {"file": "densities-00003.safetensors"})
        ),
        lambda f: change_manifest(f, lambda m: m["shards"][0].update(file="../densities-00000.safetensors")),
    ],
)
def test_a_damaged_manifest_is_refused_and_nothing_is_lost(folder: Path, damage: Callable[[Path], object]) -> None:
    damage(folder)
    before = tiny.folder_bytes(folder)
    for use in (lambda: DensityStore.open(folder), lambda: collect(folder)):
        with pytest.raises(CorruptFileError, match=r"^\S*manifest\.json [^\n]*$"):
            use()
    assert tiny.folder_bytes(folder) == before


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"input_layer": 0}, "input_layer"),
        ({"output_sae": "x"}, "output_sae"),
        ({"triples": "x", "triple_count": 12}, "triples, triple_count"),
        ({"count_bos": True}, "count_bos"),
        ({"uncounted_token_ids": ()}, "uncounted_token_ids"),
        ({"triples_per_batch": 9}, "triples_per_batch"),
        ({"dtype": "bfloat16"}, "dtype"),
        ({"model": replace(tiny.FINGERPRINT, vocab_size=7)}, "model"),
        ({"model_weights": "x"}, "model_weights"),
    ],
)
def test_another_runs_folder_is_refused_and_left_alone(tmp_path: Path, change: dict[str, Any], name: str) -> None:
    run = tiny.collection_run(10, 8, 8, 4)
    DensityStore.create_or_resume(tmp_path, run)
    before = tiny.folder_bytes(tmp_path)
    with pytest.raises(MismatchError, match=rf"^\S* holds densities of another run \(different {name}\); [^\n]*$"):
        DensityStore.create_or_resume(tmp_path, replace(run, **change))
    assert tiny.folder_bytes(tmp_path) == before
    assert DensityStore.create_or_resume(tmp_path, run).run == run


def test_an_incomplete_store_is_not_fitted(folder: Path) -> None:
    change_manifest(folder, lambda manifest: manifest["shards"].pop())
    store = DensityStore.open(folder)
    assert not store.complete
    with pytest.raises(InvalidInputError, match=r"holds 2 of 3 shards; run dspa collect again"):
        dspa.ConditionalDifferenceMap.fit(store)


def test_leftovers_of_a_killed_run_are_removed_from_a_finished_store(folder: Path, collected: Path) -> None:
    for name in (f"densities-00001.safetensors.{'0a' * 8}.partial", f"manifest.json.{'f3' * 8}.partial"):
        (folder / name).write_bytes(b"half")
    collect(folder)
    assert tiny.folder_bytes(folder) == tiny.folder_bytes(collected)


def test_there_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"no densities in \S*: manifest.json is missing"):
        DensityStore.open(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(DspaError, match=r"file cannot be used as a folder"):
        DensityStore.create_or_resume(tmp_path / "file", tiny.collection_run(1, 1, 1, 1))


@pytest.mark.parametrize("name", ["triple_count", "triples_per_shard", "triples_per_batch", "d_sae_in", "d_sae_out"])
def test_a_run_of_nothing(name: str) -> None:
    changes: dict[str, Any] = {name: 0}
    with pytest.raises(InvalidInputError, match=f"^{name} is 0; expected at least 1$"):
        replace(tiny.collection_run(3, 3, 3, 3), **changes)


def test_what_was_appended_is_read(tmp_path: Path) -> None:
    densities = tiny.random_densities(7, 9, 5, seed=0, lengths=(1, 3, 7), active=0.5)
    store = tiny.write_store(tmp_path, densities, per_shard=3)
    shards = list(DensityStore.open(tmp_path).read())
    assert store.complete
    assert [len(shard.prompt.tokens) for shard in shards] == [3, 3, 1]
    for name in ("prompt", "chosen", "rejected"):
        expected: tiny.Part = getattr(densities, name)
        sparse = SparseCounts.concatenate([shard.part(name) for shard in shards])
        dense = np.zeros_like(expected.counts)
        for triple in range(7):
            for entry in range(int(sparse.offsets[triple]), int(sparse.offsets[triple + 1])):
                dense[triple, sparse.latents[entry]] = sparse.counts[entry]
                assert sparse.densities()[entry] == sparse.counts[entry].item() / sparse.tokens[triple].item()
        assert (dense == expected.counts).all()
        assert (sparse.tokens.numpy() == expected.tokens).all()
        assert len(sparse.latents) == (expected.counts > 0).sum()


@pytest.mark.parametrize(
    "changes",
    [
        {"offsets": [0, 2, 1, 3]},
        {"offsets": [0, 2**63 - 1, -2, 3]},  # whose differences wrap around
        {"offsets": [1, 1, 2, 3]},
        {"offsets": [0, 1, 2, 4]},
        {"offsets": [0, 1, 3]},
        {"latents": [0, 1, 5]},
        {"latents": [0, -1, 2]},
        {"latents": [0, 1]},
        {"counts": [1, 0, 1]},
        {"counts": [1, -1, 1]},
        {"counts": [1, 5, 1]},
        {"counts": [1, 1]},
        {"tokens": [4, 0, 4]},
        {"tokens": [4, 4]},
    ],
)
def test_counts_out_of_bounds_are_refused_though_the_checksum_is_right(
    tmp_path: Path, changes: dict[str, list[int]]
) -> None:
    def counts(**changed: list[int]) -> SparseCounts:
        values = {"offsets": [0, 1, 2, 3], "latents": [0, 1, 2], "counts": [1, 2, 3], "tokens": [4, 4, 4]} | changed
        return SparseCounts(
            **{k: torch.tensor(v, dtype=torch.int64 if k == "offsets" else torch.int32) for k, v in values.items()}
        )

    run: CollectionRun = tiny.collection_run(3, 5, 5, 3)
    store = DensityStore.create_or_resume(tmp_path / "good", run)
    assert len(list(store.append(DensityShard(counts(), counts(), counts()), 0).read())) == 1
    store = DensityStore.create_or_resume(tmp_path / "bad", run)
    store = store.append(DensityShard(counts(), counts(**changes), counts()), 0)
    with pytest.raises(CorruptFileError, match=r"densities-00000\.safetensors [^\n]*out of their bounds[^\n]*$"):
        list(store.read())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
