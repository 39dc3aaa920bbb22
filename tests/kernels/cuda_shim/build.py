"""Compiling the CUDA sources and the shim with a C++ compiler: a library for torch, and programs of their own."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from cuda_shim import coverage

SHIM = Path(__file__).parent
ROOT = SHIM.parent.parent.parent
CSRC = ROOT / "csrc"
KERNEL_FLAGS = ("-std=c++20", "-fPIC", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall", "-Wextra")
SHIM_FLAGS = ("-Wno-unknown-pragmas", "-DDSPA_CUDA_SHIM", f"-I{SHIM}", f"-I{CSRC}")
BINDING_FLAGS = ("-std=c++17", "-O1", "-fPIC", "-Wall", "-Wextra", "-fvisibility=hidden")


def compiler() -> str | None:
    """A C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def counts_branches() -> bool:
    """Whether the kernels of `library` do."""
    return coverage.unavailable(compiler()) is None


@cache
def library() -> Path:
    """The operations `torch.ops.dspa_cuda_shim.*`, on CPU tensors, from the kernels and their binding as they are. The
    kernels count their branches if they can; see `branches_taken`."""
    counts = counts_branches()
    of_kernels = (*coverage.FLAGS, "-include", "optimized.h") if counts else ("-O2",)
    folder = _folder(("library", *of_kernels))
    built = folder / "dspa_cuda_shim.so"
    with _alone(folder):
        if not built.exists():
            _build_library(folder, of_kernels, counts, built)
    return built


def _build_library(folder: Path, of_kernels: tuple[str, ...], counts: bool, built: Path) -> None:
    include = Path(torch.__file__).parent / "include"
    target = "-DTORCH_TARGET_VERSION=0x020a000000000000"
    binding = [*BINDING_FLAGS, target, "-DDSPA_CUDA_SHIM", f"-I{CSRC}", "-isystem", str(include)]
    _run("-c", *KERNEL_FLAGS, *SHIM_FLAGS, *of_kernels, SHIM / "kernels_on_cpu.cpp", "-o", folder / "kernels.o")
    _run("-c", *KERNEL_FLAGS, "-O2", SHIM / "engine.cpp", "-o", folder / "engine.o")
    _run("-c", *binding, CSRC / "bindings_cuda.cpp", "-o", folder / "binding.o")
    objects = [folder / f"{name}.o" for name in ("engine", "kernels", "binding")]  # what both have is the engine's
    counting = ("--coverage", SHIM / "counters.cpp") if counts else ()
    torch_libraries = f"-L{include.parent / 'lib'}"
    unfinished = folder / f"{os.getpid()}.so"
    _run("-shared", "-fPIC", *objects, *counting, torch_libraries, "-ltorch_cpu", "-lc10", "-o", unfinished)
    unfinished.replace(built)


def branches_taken(into: Path) -> coverage.Coverage:
    """Of the kernels, by this process up to now. Once in a process; the counters are left in an empty folder."""
    os.environ["GCOV_PREFIX"], os.environ["GCOV_PREFIX_STRIP"] = str(into), "99"
    try:
        ctypes.CDLL(str(library())).cuda_shim_write_counters()
    finally:
        del os.environ["GCOV_PREFIX"], os.environ["GCOV_PREFIX_STRIP"]
    shutil.copy(library().parent / "kernels.gcno", into)
    return coverage.read([into / "kernels.gcda"], CSRC / "cuda")


def program(name: str, flags: tuple[str, ...]) -> Path:
    """One of the programs in this folder, with the shim, and the kernels if it asks for them."""
    folder = _folder((name, *flags))
    built = folder / name
    with _alone(folder):
        if not built.exists():
            unfinished = folder / f"{name}.{os.getpid()}"
            sources = [SHIM / f"{name}.cpp", SHIM / "engine.cpp"]
            _run(*KERNEL_FLAGS, *SHIM_FLAGS, *flags, *sources, "-pthread", "-o", unfinished)
            unfinished.replace(built)
    return built


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Other processes that want to build in this folder wait: the tests run in several."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _run(*arguments: str | Path) -> None:
    found = compiler()
    assert found is not None
    done = subprocess.run([found, *map(str, arguments)], capture_output=True, text=True)
    if done.returncode != 0 or "warning:" in done.stderr:
        raise RuntimeError(f"{' '.join(map(str, arguments))}:\n{done.stderr}")


def _folder(what: tuple[str, ...]) -> Path:
    """A folder for what follows from these flags and the present sources, so that nothing is compiled twice."""
    digest = hashlib.sha256("\n".join((*what, torch.__version__)).encode())
    sources = [*SHIM.glob("*.h"), *SHIM.glob("*.cpp"), *CSRC.glob("cuda/*"), *CSRC.glob("*.h"), *CSRC.glob("*.cpp")]
    for source in sorted([*sources, *CSRC.glob("common/*.h")]):
        digest.update(source.name.encode() + source.read_bytes())
    folder = ROOT / "build" / "cuda_shim" / digest.hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    return folder
