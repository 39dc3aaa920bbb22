"""Build entry point. Everything about the package stands in pyproject.toml; here is only its C++ library.

Where torch or a C++17 compiler is missing the package is installed without the library, and
`dspa.kernels.available()` says so. DSPA_BUILD=require makes that an error, DSPA_BUILD=skip does not try.
torch has to be importable while building: `pip install --no-build-isolation .`
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import setup

WISH = os.environ.get("DSPA_BUILD", "try")
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
    """The arguments of `setup` that build the C++ library; none where it cannot be built."""
    if WISH == "skip":
        return {}
    try:
        from torch.utils import cpp_extension
    except ImportError as error:
        return without_library(f"torch is not importable while building ({error}); pass --no-build-isolation")

    class BuildLibrary(cpp_extension.BuildExtension):
        def run(self) -> None:
            try:
                super().run()
            except Exception as error:  # the compilers' and torch's own failures have no common base
                without_library(f"the C++ library could not be built: {' '.join(str(error).split())[:500]}")

        def get_outputs(self) -> list[str]:
            return [path for path in super().get_outputs() if Path(path).exists()]

    root = Path(__file__).parent
    sources = ["csrc/bindings.cpp", *sorted(str(path.relative_to(root)) for path in root.glob("csrc/cpu/*.cpp"))]
    library = cpp_extension.CppExtension("dspa._C", sources, extra_compile_args=COMPILE_ARGS, py_limited_api=True)
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": BuildLibrary},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def without_library(reason: str) -> dict[str, Any]:
    """No arguments; says why, or fails if the library was required."""
    if WISH == "require":
        raise SystemExit(f"dspa: {reason}")
    print(f"dspa: {reason}; installing without it, the reference backend remains", file=sys.stderr)
    return {}


setup(**extension_options())
