"""Collection by several processes: the same bytes as by one, also when one of them is killed.

Run as a program, this file forks processes that collect together, and writes what happened:
    python test_distributed.py <folder>
`torchrun` and `accelerate launch` run it with `collect <folder>`.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_collection as tiny
import torch

import dspa
import dspa.offline.distributed as shard_processes
from dspa.errors import DspaError
from dspa.offline.density_store import DensityStore
from dspa.offline.distributed import device_of_process, is_first_process

TRIPLES, PER_SHARD, SHARDS = 15, 2, 8
MODEL = tiny.tiny_model()
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"],
}


def collect(folder: Path, triples: int = TRIPLES) -> DensityStore:
    return dspa.collect(
        MODEL,
        None,
        tiny.tiny_triples(triples),
        input_sae=tiny.tiny_sae(tiny.D_SAE_IN, 1),
        output_sae=tiny.tiny_sae(tiny.D_SAE_OUT, 2),
        input_layer=1,
        output_layer=2,
        out=folder,
        triples_per_shard=PER_SHARD,
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def together(count: int, action: Callable[[int], object], folder: Path) -> list[str]:
    """Runs an action in `count` forked processes; how each ended: "ok", "killed", or its error."""
    port, children = str(free_port()), []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, WORLD_SIZE=str(count), RANK=str(rank))
            answer = folder.parent / f"answer-{rank}"
            try:
                action(rank)
                answer.write_text("ok")
            except DspaError as error:
                answer.write_text(f"DspaError: {error}")
            except BaseException as error:
                answer.write_text(f"{type(error).__name__}: {error}")
            os._exit(0)
        children.append(child)
    endings = []
    for rank, child in enumerate(children):
        status = os.waitpid(child, 0)[1]
        answer = folder.parent / f"answer-{rank}"
        endings.append("killed" if os.WIFSIGNALED(status) else answer.read_text())
        answer.unlink(missing_ok=True)
    return endings


def killed_after(folder: Path, rank: int, victim: int, shards: int) -> None:
    """Collects, and dies in the victim's process when it has written so many shards."""
    write, written = shard_processes._write_finished, 0

    def counting(*args: Any) -> None:
        nonlocal written
        if rank == victim and written == shards:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args)
        written += 1

    shard_processes._write_finished = counting
    collect(folder)


def main(root: Path) -> None:
    torch.set_num_threads(1)
    one = root / "one"
    together(1, lambda rank: collect(one), one)
    whole = tiny.folder_bytes(one)
    outcome: dict[str, Any] = {"files": sorted(whole)}

    def different(folder: Path) -> list[str]:
        found = tiny.folder_bytes(folder)
        return sorted(name for name in found.keys() | whole.keys() if found.get(name) != whole.get(name))

    for count in (2, 3, 9):
        folder = root / f"{count}"
        endings = together(count, lambda rank, f=folder: collect(f), folder)
        outcome[f"{count} processes"] = {"endings": endings, "different": different(folder)}
    for name, victim, shards, again in (("last", 1, 2, 3), ("first", 0, 1, 1), ("none done", 2, 0, 2)):
        folder = root / f"killed {name}"
        endings = together(3, lambda rank, f=folder, v=victim, s=shards: killed_after(f, rank, v, s), folder)
        done = len(list((folder / "finished").glob("*.safetensors")))
        resumed = together(again, lambda rank, f=folder: collect(f), folder)
        outcome[f"killed {name}"] = {
            "endings": endings,
            "done": done,
            "resumed": resumed,
            "different": different(folder),
        }
    outcome["another run"] = together(2, lambda rank: collect(one, triples=14), one)
    damaged = root / "damaged"
    together(2, lambda rank: killed_after(damaged, rank, 1, 2), damaged)
    for path, content in zip(
        sorted((damaged / "finished").glob("*.safetensors")), (b"", b"\0" * 99, None), strict=False
    ):
        path.write_bytes(path.read_bytes()[:-1] if content is None else content)
    outcome["damaged"] = {
        "resumed": together(2, lambda rank: collect(damaged), damaged),
        "different": different(damaged),
    }
    (root / "outcome.json").write_text(json.dumps(outcome))


# --- its tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    subprocess.run([sys.executable, __file__, str(folder)], check=True, timeout=300)
    return folder


@pytest.fixture(scope="module")
def outcome(root: Path) -> dict[str, Any]:
    return json.loads((root / "outcome.json").read_text())


@pytest.mark.long
def test_one_process_leaves_the_store_and_nothing_else(outcome: dict[str, Any]) -> None:
    assert outcome["files"] == [".lock", *(f"densities-{n:05d}.safetensors" for n in range(SHARDS)), "manifest.json"]


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 3, 9])
def test_the_same_bytes_by_any_number_of_processes(outcome: dict[str, Any], count: int) -> None:
    """With 9 there are more processes than shards."""
    assert outcome[f"{count} processes"] == {"endings": ["ok"] * count, "different": []}


@pytest.mark.long
@pytest.mark.parametrize(("name", "victim"), [("last", 1), ("first", 0), ("none done", 2)])
def test_one_is_killed_and_the_run_goes_on_with_another_number(outcome: dict[str, Any], name: str, victim: int) -> None:
    run = outcome[f"killed {name}"]
    assert run["endings"][victim] == "killed"
    others = [ending for rank, ending in enumerate(run["endings"]) if rank != victim]
    assert all(ending.startswith("DspaError: another process of this run has gone") for ending in others), others
    assert all("\n" not in ending for ending in others)
    assert 0 < run["done"] < SHARDS
    assert set(run["resumed"]) == {"ok"}
    assert run["different"] == []


@pytest.mark.long
def test_every_process_names_what_does_not_fit(outcome: dict[str, Any]) -> None:
    assert len(outcome["another run"]) == 2
    assert all("holds densities of another run" in ending for ending in outcome["another run"])


@pytest.mark.long
def test_damaged_finished_shards_are_computed_again(outcome: dict[str, Any]) -> None:
    assert outcome["damaged"] == {"resumed": ["ok", "ok"], "different": []}


@pytest.mark.long
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launched_as_people_launch(root: Path, launcher: str) -> None:
    pytest.importorskip("accelerate" if launcher == "accelerate" else "torch")
    folder = root / launcher
    command = [sys.executable, *LAUNCHERS[launcher], __file__, "collect", str(folder)]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert tiny.folder_bytes(folder) == tiny.folder_bytes(root / "one")
    shutil.rmtree(folder)


if __name__ == "__main__":
    if sys.argv[1] == "collect":
        torch.set_num_threads(1)
        collect(Path(sys.argv[2]))
    else:
        main(Path(sys.argv[1]))


@pytest.mark.parametrize(
    ("device", "local_rank", "chosen"),
    [("cuda", None, "cuda"), ("cuda", "1", "cuda:1"), ("cuda:0", "1", "cuda:0"), ("cpu", "1", "cpu")],
)
def test_each_process_has_its_own_gpu(
    monkeypatch: pytest.MonkeyPatch, device: str, local_rank: str | None, chosen: str
) -> None:
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank is not None:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert device_of_process(device) == chosen


@pytest.mark.parametrize(("rank", "first"), [(None, True), ("0", True), ("2", False)])
def test_one_process_prints(monkeypatch: pytest.MonkeyPatch, rank: str | None, first: bool) -> None:
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_first_process() == first
