"""Compiling the CUDA sources with nvcc, for the build and for the tests that read the assembler's report.

Objects and the assembler's report are kept under `build/cuda`, by a digest of the sources and the command, so that
neither an unchanged checkout nor its tests compile anything twice.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
DEFAULT_ARCHITECTURES = "80;90a;100"
USUAL_HOME = Path("/usr/local/cuda")
SOURCES = ("token_step", "encode_density", "lookup", "adapter_step")
FLAGS = (
    "-std=c++17",
    "-O3",
    "--fmad=false",  # fused multiply-adds are written out, the same in every kernel
    "-Xptxas",
    "-v",
    "-Xcompiler",
    "-fPIC,-fvisibility=hidden",
)


class CompilationError(Exception):
    """nvcc failed, with this message."""


@dataclass(frozen=True)
class Compiled:
    """One source file, compiled for all architectures.

    Attributes:
        object_file: to be linked.
        report: of the assembler, for each kernel: registers, stack frame, spills.
    """

    object_file: Path
    report: str


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, or else the one on the PATH, or else that of the usual folder; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    if home:
        return _nvcc_of(Path(home))
    return shutil.which("nvcc") or _nvcc_of(USUAL_HOME)


def _nvcc_of(home: Path) -> str | None:
    nvcc = home / "bin" / "nvcc"
    return str(nvcc) if nvcc.exists() else None


def libraries_of(nvcc: str) -> Path:
    """The folder with the CUDA runtime to link against.

    Raises:
        CompilationError: if nvcc does not print its location.
    """
    done = subprocess.run([nvcc, "--dryrun", "none.cu"], capture_output=True, text=True)
    for line in done.stderr.splitlines():
        if line.startswith("#$ TOP="):
            top = Path(line.removeprefix("#$ TOP=").strip())
            for folder in ("lib64", "lib", "targets/x86_64-linux/lib"):
                if (top / folder / "libcudart_static.a").exists():
                    return top / folder
    raise CompilationError(f"{nvcc} does not print the folder of libcudart_static.a; expected a CUDA toolkit")


def architecture_flags(architectures: Sequence[str]) -> list[str]:
    """Flags for machine code of each, and for portable code of the newest without an "a", for later GPUs."""
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in architectures]
    portable = [name for name in architectures if name.isdigit()]
    if portable:
        newest = max(portable, key=int)
        flags.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
    return flags


def compile_sources(nvcc: str, architectures: Sequence[str]) -> list[Compiled]:
    """Compiles all sources for all architectures, such as "80" or "90a", unless they are cached; as many at a time as
    there are cores. DSPA_CUDA_FLAGS holds further flags for nvcc.

    Raises:
        CompilationError: with nvcc's message.
    """
    flags = [*FLAGS, *os.environ.get("DSPA_CUDA_FLAGS", "").split(), *architecture_flags(architectures)]
    command = [nvcc, *flags, f"--threads={min(4, os.cpu_count() or 1)}", "-c"]
    folder = ROOT / "build" / "cuda" / _digest(command)
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // len(architectures))) as pool:
        return list(pool.map(lambda name: _compile(command, name, folder), SOURCES))


def _compile(command: list[str], name: str, folder: Path) -> Compiled:
    object_file, report = folder / f"{name}.o", folder / f"{name}.txt"
    if not report.exists():  # written last
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / f"{name}.{os.getpid()}.o"
        source = ROOT / "csrc" / "cuda" / f"{name}.cu"
        done = subprocess.run([*command, str(source), "-o", str(unfinished)], capture_output=True, text=True)
        if done.returncode != 0:
            raise CompilationError(f"nvcc could not compile {name}.cu: {done.stderr.strip()}")
        unfinished.replace(object_file)
        report.write_text(done.stdout + done.stderr)
    return Compiled(object_file, report.read_text())


def _digest(command: list[str]) -> str:
    digest = hashlib.sha256("\n".join(command).encode())
    version = subprocess.run([command[0], "--version"], capture_output=True, check=True)
    digest.update(version.stdout)
    folder = ROOT / "csrc"
    for source in sorted([*folder.glob("cuda/*.cu*"), *folder.glob("cuda/*.h"), *folder.glob("common/*.h")]):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]
