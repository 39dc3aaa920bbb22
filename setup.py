"""Builds the C++ libraries of the package, one for the CPU and one for NVIDIA GPUs. All else is in pyproject.toml.

A library that cannot be built is left out; `dspa.kernels.available()` reports it.

DSPA_BUILD        try (default), require or skip: the library for the CPU. Needs a C++17 compiler and torch.
DSPA_CUDA         try (default), require or skip: the library for GPUs. Needs nvcc as well, on the PATH or in CUDA_HOME;
                  no GPU, and no torch with CUDA.
DSPA_CUDA_FLAGS   further flags for nvcc.
DSPA_CUDA_ARCHS   GPU architectures, such as "80;90a". Default: that of this machine's GPU, or 80;90a;100 without one.
"""

from __future__ import annotations

import importlib.util
import os
import site
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "csrc"))

from compile_cuda import (  # noqa: E402, found by the line above  # pyright: ignore[reportMissingImports]
    DEFAULT_ARCHITECTURES,
    CompilationError,
    compile_sources,
    find_nvcc,
    libraries_of,
)

CPU_LIBRARY, GPU_LIBRARY = "dspa._C", "dspa._C_cuda"
BUILD_MODE = {CPU_LIBRARY: os.environ.get("DSPA_BUILD", "try"), GPU_LIBRARY: os.environ.get("DSPA_CUDA", "try")}
OLDEST_TORCH = "0x020a000000000000"  # 2.10, the first with every part of the stable ABI that is used
COMPILE_ARGS = [
    "-std=c++17",
    "-O3",
    "-g0",  # Python's own flags may contain -g, and debug information is nine tenths of the library
    "-Wall",
    "-Wextra",
    "-fvisibility=hidden",
    "-ffp-contract=off",  # where a multiplication and an addition are fused is written out, and the same everywhere
    f"-DTORCH_TARGET_VERSION={OLDEST_TORCH}",
]


def extension_options() -> dict[str, Any]:
    """The arguments of `setup` that build the C++ libraries; none where they cannot be built."""
    if BUILD_MODE[CPU_LIBRARY] == "skip":  # the library for GPUs needs the one for the CPU
        return {}
    # A build requirement on torch would download gigabytes, past the user's constraints. The stable ABI fits any torch,
    # so the one that pip's build isolation hides is used. Where there is none, the first use of the kernels warns.
    if importlib.util.find_spec("torch") is None:
        site.addsitedir(sysconfig.get_path("platlib"))
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        leave_out(CPU_LIBRARY, f"torch cannot be imported ({error}); install it, or pass --no-build-isolation")
        return {}

    class BuildLibraries(cpp_extension.BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # the compilers' and torch's own failures have no common base
                leave_out(CPU_LIBRARY, f"the C++ library could not be built: {' '.join(str(error).split())[:500]}")

        def build_extension(self, ext: Any) -> None:
            if ext.name != GPU_LIBRARY:
                super().build_extension(ext)
                return
            shared_folder = self.build_temp
            try:
                self.add_kernels(ext)
                self.build_temp = str(Path(shared_folder) / "cuda")  # one ninja file per folder
                super().build_extension(ext)
            except Exception as error:  # as above
                leave_out(GPU_LIBRARY, f"the CUDA library could not be built: {' '.join(str(error).split())[:500]}")
            finally:
                self.build_temp = shared_folder

        def add_kernels(self, ext: Any) -> None:
            nvcc = find_nvcc()
            if nvcc is None:
                raise CompilationError("there is no nvcc on the PATH or in CUDA_HOME")
            architectures = gpu_architectures()
            ext.define_macros.append(("DSPA_CUDA_ARCHS", '"' + ", ".join(f"sm_{name}" for name in architectures) + '"'))
            ext.extra_objects += [str(compiled.object_file) for compiled in compile_sources(nvcc, architectures)]
            ext.library_dirs.append(str(libraries_of(nvcc)))

        def get_outputs(self) -> list[str]:
            return [path for path in super().get_outputs() if Path(path).exists()]

    sources = ["csrc/bindings.cpp", *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("csrc/cpu/*.cpp"))]
    libraries = [cpp_extension.CppExtension(CPU_LIBRARY, sources, extra_compile_args=COMPILE_ARGS, py_limited_api=True)]
    if can_build_gpu_library():
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


def can_build_gpu_library() -> bool:
    """Whether nvcc is there, or has to be."""
    if BUILD_MODE[GPU_LIBRARY] == "skip":
        return False
    if find_nvcc() is None and BUILD_MODE[GPU_LIBRARY] != "require":
        leave_out(GPU_LIBRARY, "there is no nvcc on the PATH or in CUDA_HOME")
        return False
    return True


def gpu_architectures() -> list[str]:
    """The architectures to compile for, by their nvcc names, such as "80" or "90a"."""
    chosen = os.environ.get("DSPA_CUDA_ARCHS")
    if chosen:
        return chosen.split(";")
    import torch

    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if f"{major}{minor}" in known_architectures():
            return [f"{major}{minor}a" if major == 9 else f"{major}{minor}"]
    return DEFAULT_ARCHITECTURES.split(";")


def known_architectures() -> set[str]:
    """The architectures that nvcc can compile for. Newer GPUs run the portable code of the default ones."""
    nvcc = find_nvcc()
    if nvcc is None:
        return set()
    listed = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout
    return {line.removeprefix("sm_") for line in listed.split()}


def leave_out(library: str, reason: str) -> None:
    """Prints why a library is not built, or fails if it is required."""
    if BUILD_MODE[library] == "require":
        raise SystemExit(f"dspa: {reason}")
    print(f"dspa: {reason}; installing without {library}", file=sys.stderr)


setup(**extension_options())
