"""SIGKILL at random moments of collecting, fitting and saving: the same bytes after going on, and at every moment a
whole policy, the old one or the new one."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny_collection as tiny
import torch

import dspa
from soak.deadline import Deadline

UNFINISHED_STORE = "with an unfinished store"
UNFINISHED_POLICY = "with files of an unfinished save"


def _collect(folder: Path) -> None:
    dspa.collect(
        _collect.model,  # type: ignore[attr-defined]
        None,
        tiny.tiny_triples(40),
        input_sae=tiny.tiny_sae(tiny.D_SAE_IN, 1),
        output_sae=tiny.tiny_sae(tiny.D_SAE_OUT, 2),
        input_layer=1,
        output_layer=2,
        out=folder,
        triples_per_batch=2,
        triples_per_shard=3,
    )


def _saes() -> tuple[Any, Any]:
    return tiny.tiny_sae(tiny.D_SAE_IN, 1), tiny.tiny_sae(tiny.D_SAE_OUT, 2)


def _fit(store: Path, folder: Path) -> None:
    fitted = dspa.ConditionalDifferenceMap.fit(store, entries_per_side=3)
    dspa.SteeringPolicy(fitted, *_saes(), k_prompt=5, k_diff=3).save_pretrained(folder)


def killed(action: Callable[[], object], after: float) -> bool:
    """Runs an action in a forked process and kills it after so many seconds; whether it was in the middle."""
    process = os.fork()
    if process == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(3)
    time.sleep(after)
    os.kill(process, signal.SIGKILL)
    status = os.waitpid(process, 0)[1]
    if os.WIFSIGNALED(status):
        return True
    assert os.WEXITSTATUS(status) == 0, "the process failed of itself"
    return False


def duration(action: Callable[[], object]) -> float:
    began = time.monotonic()
    process = os.fork()
    if process == 0:
        action()
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0
    return time.monotonic() - began


def contents(folder: Path) -> dict[str, bytes]:
    """Its files, without what a killed process left under names of its own."""
    return {name: content for name, content in tiny.folder_bytes(folder).items() if not name.endswith(".partial")}


def run(kills: int, root: Path, seed: int = 0, *, until: Deadline | None = None) -> dict[str, int]:
    """A third of the kills for each of collecting, fitting and saving over a policy."""
    torch.set_num_threads(1)
    rng, until = random.Random(seed), until or Deadline()
    _collect.model = tiny.tiny_model()  # type: ignore[attr-defined]
    whole_store, whole_policy = root / "whole-store", root / "whole-policy"
    takes_collect = duration(lambda: _collect(whole_store))
    takes_fit = duration(lambda: _fit(whole_store, whole_policy))
    counts = {f"kills of {what}": 0 for what in ("collect", "fit", "save")}
    counts |= {f"of these, {what}": 0 for what in (UNFINISHED_STORE, UNFINISHED_POLICY)} | {"reads beside saves": 0}

    folder, whole = root / "collect", tiny.folder_bytes(whole_store)
    while not until.passed and counts["kills of collect"] < -(-kills // 3):
        shutil.rmtree(folder, ignore_errors=True)
        for _ in range(rng.choice((1, 1, 2, 4))):
            in_the_middle = killed(lambda: _collect(folder), rng.uniform(0, takes_collect))
            counts["kills of collect"] += in_the_middle
            counts[f"of these, {UNFINISHED_STORE}"] += in_the_middle and tiny.folder_bytes(folder) not in ({}, whole)
        _collect(folder)
        assert tiny.folder_bytes(folder) == whole, "a resumed collection has other bytes"

    folder = root / "fit"
    while not until.passed and counts["kills of fit"] < kills // 3:
        shutil.rmtree(folder, ignore_errors=True)
        counts["kills of fit"] += killed(lambda: _fit(whole_store, folder), rng.uniform(0, takes_fit))
        _fit(whole_store, folder)
        assert contents(folder) == tiny.folder_bytes(whole_policy), "a fit after a killed one has other bytes"

    old = dspa.SteeringPolicy.from_pretrained(whole_policy)
    vectors = [dspa.VectorPolicy(torch.full((50_000,), float(n)), n) for n in range(2)]
    folder = root / "save"

    def save_over_and_over() -> None:
        for n in range(10**6):
            vectors[n % 2].save_pretrained(folder)

    while not until.passed and counts["kills of save"] < kills - kills // 3 - -(-kills // 3):
        shutil.rmtree(folder, ignore_errors=True)
        vectors[0].save_pretrained(folder)
        files = len(list(folder.iterdir()))
        process = os.fork()
        if process == 0:
            save_over_and_over()
        killed_at = time.monotonic() + rng.uniform(0.002, 0.06)
        while time.monotonic() < killed_at:
            _check_vector(folder)
            counts["reads beside saves"] += 1
        os.kill(process, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
        counts["kills of save"] += 1
        counts[f"of these, {UNFINISHED_POLICY}"] += len(list(folder.iterdir())) > files
        _check_vector(folder)
    assert old.k_prompt == 5
    return counts


def _check_vector(folder: Path) -> None:
    """One whole generation: the number in its vector is that of its layer."""
    policy = dspa.VectorPolicy.from_pretrained(folder)
    assert bool((policy.vector == policy.layer).all()), "a mixture of two generations was read"
