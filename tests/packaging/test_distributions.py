"""The wheel and the sdist, installed into fresh environments: with the CPU kernels, or with a line on how to get them.

torch is not installed anew each time: the environments have a path to the one that runs the tests.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

import dspa
from dspa.kernels import available

ROOT = Path(__file__).parent.parent.parent
CHECK = Path(__file__).parent / "check_installed.py"
ENVIRONMENT_OF_TESTS = Path(sys.executable).parent.parent
LIBRARIES_OF_TORCH = {"libtorch_cpu.so", "libc10.so"}
HOW_TO_GET_KERNELS = "install a wheel of dspa, or, with a C++17 compiler, run DSPA_BUILD=require pip install ."

pytestmark = [
    pytest.mark.packaging,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="auditwheel is for Linux"),
    pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}"),
]


def run(*command: str | Path, cwd: Path, path: str | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command without the helpers of the tests on its path, and without build options of the environment."""
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in ("PYTHONPATH", "MAKEFLAGS", "MAKELEVEL") and not name.startswith("DSPA_")
    }
    environment = inherited | variables | ({} if path is None else {"PATH": path})
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)


class FreshEnvironment:
    """A virtual environment with nothing in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"
        self.path = str(folder / "bin")
        done = run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
        assert done.returncode == 0, done.stderr

    def add_torch(self) -> None:
        """Makes torch and the other dependencies of the environment of the tests importable."""
        packages = next(self.folder.glob("lib/python*/site-packages"))
        (packages / "torch_of_the_tests.pth").write_text(sysconfig.get_path("platlib") + "\n")

    def install(self, distribution: Path, **variables: str) -> subprocess.CompletedProcess[str]:
        """Installs a wheel or an sdist without its dependencies, with pip's build isolation and without CUDA."""
        words = ("-m", "pip", "--python", self.python, "install", "--ignore-installed", "--no-deps", distribution)
        return run(sys.executable, *words, cwd=self.folder, DSPA_CUDA="skip", **variables)

    def check(self) -> str:
        """What `check_installed.py` prints, with no compiler on the PATH."""
        done = run(self.python, CHECK, cwd=self.folder, path=self.path)
        assert done.returncode == 0, done.stderr
        return done.stdout


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make wheel` wrote."""
    folder = tmp_path_factory.mktemp("dist")
    installed = ENVIRONMENT_OF_TESTS / ".ready"
    done = run("make", "-o", installed, "wheel", f"VENV={ENVIRONMENT_OF_TESTS}", f"DIST={folder}", cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def wheel(distributions: Path) -> Path:
    (file,) = distributions.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def sdist(distributions: Path) -> Path:
    (file,) = distributions.glob("*.tar.gz")
    return file


@pytest.fixture
def fresh(tmp_path: Path) -> FreshEnvironment:
    return FreshEnvironment(tmp_path / "environment")


def test_wheel_holds_the_cpu_library_for_every_python(wheel: Path) -> None:
    from elftools.elf.dynamic import DynamicSection
    from elftools.elf.elffile import ELFFile
    from elftools.elf.sections import SymbolTableSection

    assert wheel.name.startswith(f"dspa-{dspa.__version__}-cp310-abi3-manylinux_")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        library = ELFFile(BytesIO(archive.read("dspa/_C.abi3.so")))
    assert [name for name in names if ".so" in name] == ["dspa/_C.abi3.so"]
    assert {"dspa/py.typed", f"dspa-{dspa.__version__}.dist-info/licenses/LICENSE"} <= names
    assert {name.partition("/")[0] for name in names} == {"dspa", f"dspa-{dspa.__version__}.dist-info"}

    dynamic, symbols = library.get_section_by_name(".dynamic"), library.get_section_by_name(".dynsym")
    assert isinstance(dynamic, DynamicSection)
    assert isinstance(symbols, SymbolTableSection)
    tags: list[Any] = list(dynamic.iter_tags())  # pyelftools adds their attributes at run time
    needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
    assert needed >= LIBRARIES_OF_TORCH
    assert not [name for name in needed if "python" in name]
    assert not [symbol.name for symbol in symbols.iter_symbols() if symbol.name.startswith(("Py", "_Py"))]


def test_wheel_needs_no_compiler(wheel: Path, fresh: FreshEnvironment) -> None:
    assert not [name for name in ("cc", "gcc", "c++", "g++", "clang++", "nvcc") if shutil.which(name, path=fresh.path)]
    fresh.add_torch()
    done = fresh.install(wheel, PIP_NO_INDEX="1")
    assert done.returncode == 0, done.stderr

    assert str(fresh.folder) in fresh.check()
    version = run(fresh.folder / "bin" / "dspa", "--version", cwd=fresh.folder, path=fresh.path)
    assert version.stdout == f"dspa {dspa.__version__}\n"


def test_isolated_build_finds_the_installed_torch(sdist: Path, fresh: FreshEnvironment) -> None:
    fresh.add_torch()
    done = fresh.install(sdist)
    assert done.returncode == 0, done.stderr
    assert str(fresh.folder) in fresh.check()


def test_built_without_torch_the_first_use_says_how_to_get_kernels(sdist: Path, fresh: FreshEnvironment) -> None:
    done = fresh.install(sdist)
    assert done.returncode == 0, done.stderr
    fresh.add_torch()
    twice = "import check_installed as check; [check.edited('auto') for _ in range(2)]"
    used = run(fresh.python, "-c", twice, cwd=fresh.folder, PYTHONPATH=str(CHECK.parent))
    assert used.returncode == 0, used.stderr
    assert [HOW_TO_GET_KERNELS in line for line in used.stderr.splitlines()].count(True) == 1


def test_kernels_required_without_torch(sdist: Path, fresh: FreshEnvironment) -> None:
    done = fresh.install(sdist, DSPA_BUILD="require")
    assert done.returncode != 0
    assert "dspa: torch cannot be imported" in done.stdout + done.stderr
