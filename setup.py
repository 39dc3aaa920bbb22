"""Build entry point. Everything about the package stands in pyproject.toml; here are only its C++ libraries.

One is for the CPU, the other for NVIDIA GPUs. What cannot be built is left out, and `dspa.kernels.available()` says so.

DSPA_BUILD        try (default), require or skip: the library for the CPU. Needs torch, importable while building
                  (`pip install --no-build-isolation .`), and a C++17 compiler.
DSPA_CUDA         try (default), require or skip: the library for GPUs. Needs nvcc, on the PATH or in CUDA_HOME; no GPU,
                  and no torch with CUDA.
DSPA_CUDA_FLAGS   further flags for nvcc.
DSPA_CUDA_ARCHS   which GPUs it is for, "80;90a" say. Default: this machine's own, or 80;90a;100 where there is none.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))

from compile_cuda import (  # noqa: E402, it stands beside the sources  # pyright: ignore[reportMissingImports]
    DEFAULT_ARCHITECTURES,
    CompilationError,
    compile_sources,
    find_nvcc,
    libraries_of,
)

CPU_LIBRARY, GPU_LIBRARY = "dspa._C", "dspa._C_cuda"
WISHES = {CPU_LIBRARY: os.environ.get("DSPA_BUILD", "try"), GPU_LIBRARY: os.environ.get("DSPA_CUDA", "try")}
WHAT_REMAINS = {CPU_LIBRARY: "the reference backend remains", GPU_LIBRARY: "the other backends remain"}
OLDEST_TORCH = "0x020a000000000000"  # 2.10, the first with every part of the stable ABI that is used
COMPILE_ARGS = [
    "-std=c++17",
    "-O3",
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # where a multiplication and an addition are fused is written out, and the same everywhere
    f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}",
]


def extension_options() -> dict[str, Any]:
    """The arguments of `setup` that build the C++ libraries; none where they cannot be built."""
    if WISHES[CPU_LIBRARY] == "skip":  # the library for GPUs needs the one for the CPU
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        left_out(CPU_LIBRARY, f"torch is not importable while building ({error}); pass --no-build-isolation")
        return {}

    class BuildLibraries(cpp_extension.BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # the compilers' and torch's own failures have no common base
                left_out(CPU_LIBRARY, f"the C++ library could not be built: {' '.join(str(error).split())[:500]}")

        def build_extension(self, ext: Any) -> None:
            if ext.name != GPU_LIBRARY:
                super().build_extension(ext)
                return
            shared_folder = self.build_temp
            try:
                self.add_kernels(ext)
                self.build_temp = str(Path(shared_folder) / "cuda")  # ninja keeps one account of a folder
                super().build_extension(ext)
            except Exception as error:  # as above
                left_out(GPU_LIBRARY, f"the CUDA library could not be built: {' '.join(str(error).split())[:500]}")
            finally:
                self.build_temp = shared_folder

        def add_kernels(self, ext: Any) -> None:
            nvcc = find_nvcc()
            if nvcc is None:
                raise CompilationError("there is no nvcc on the PATH or in CUDA_HOME")
            architectures = wanted_architectures()
            ext.define_macros.append(("DSPA_CUDA_ARCHS", '"' + ", ".join(f"sm_{name}" for name in architectures) + '"'))
            ext.extra_objects += [str(compiled.object_file) for compiled in compile_sources(nvcc, architectures)]
            ext.library_dirs.append(str(libraries_of(nvcc)))

        def get_outputs(self) -> list[str]:
            return [path for path in super().get_outputs() if Path(path).exists()]

    sources = ["csrc/bindings.cpp", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp"))]
    libraries = [cpp_extension.CppExtension(CPU_LIBRARY, sources, extra_compile_args=COMPILE_ARGS, py_limited_api=True)]
    if wants_gpu_library():
        libraries.append(
            cpp_extension.CppExtension(
                GPU_LIBRARY,
                ["csrc/bindings_cuda.cpp"],
                extra_compile_args=COMPILE_ARGS,
                py_limited_api=True,
                libraries=["cudart_static", "rt", "dl", "pthread"],
                optional=True,  # so that nothing is copied where nothing was built
            )
        )
    return {
        "ext_modules": libraries,
        "cmdclass": {"build_ext": BuildLibraries},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def wants_gpu_library() -> bool:
    """Whether to try; says so where there is nothing to try with."""
    if WISHES[GPU_LIBRARY] == "skip":
        return False
    if find_nvcc() is None and WISHES[GPU_LIBRARY] != "require":
        left_out(GPU_LIBRARY, "there is no nvcc on the PATH or in CUDA_HOME")
        return False
    return True


def wanted_architectures() -> list[str]:
    """Names as nvcc has them, such as "80" or "90a"."""
    asked = os.environ.get("DSPA_CUDA_ARCHS")
    if asked:
        return asked.split(";")
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if f"{major}{minor}" in known_architectures():
            return [f"{major}{minor}a" if major == 9 else f"{major}{minor}"]
    return DEFAULT_ARCHITECTURES.split(";")


def known_architectures() -> set[str]:
    """Those that nvcc compiles for. What is newer runs the portable code of the default ones."""
    nvcc = find_nvcc()
    if nvcc is None:
        return set()
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    return {line.removeprefix("sm_") for line in listed.split()}


def left_out(library: str, reason: str) -> None:
    """Says why a library is not built, or fails if it was required."""
    if WISHES[library] == "require":
        raise SystemExit(f"dspa: {reason}")
    print(f"dspa: {reason}; installing without {library}, {WHAT_REMAINS[library]}", file=sys.stderr)


setup(**extension_options())
