"""The shim that runs CUDA kernels on the CPU: it does what CUDA does, and the sanitizers see through it."""

from __future__ import annotations

import subprocess

import pytest
from cuda_shim import build

pytestmark = pytest.mark.skipif(build.compiler() is None, reason="there is no C++ compiler")

SANITIZERS = {
    "plain": ("-O1",),
    "threads": ("-O1", "-g1", "-fsanitize=thread"),
    "addresses": ("-O0", "-g1", "-fsanitize=address"),
}


def run(sanitizer: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    built = build.program("shim_test", SANITIZERS[sanitizer])
    return subprocess.run([str(built), *arguments], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("sanitizer", "engine"), [("plain", "fibers"), ("plain", "threads"), ("threads", "threads")])
def test_it_does_what_cuda_does(sanitizer: str, engine: str) -> None:
    done = run(sanitizer, engine)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_race_is_found() -> None:
    done = run("threads", "race")
    assert done.returncode != 0
    assert "data race" in done.stderr


def test_an_overrun_of_shared_memory_is_found() -> None:
    done = run("addresses", "overrun")
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr
