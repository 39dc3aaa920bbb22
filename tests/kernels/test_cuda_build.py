"""Building and loading with and without nvcc, with and without a GPU: each says what it has."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "csrc"))

import compile_cuda  # pyright: ignore[reportMissingImports]

import dspa.kernels.native as native
from dspa.errors import BackendUnavailableError
from dspa.kernels import available

ROOT = Path(__file__).parent.parent.parent
NVCC = shutil.which("nvcc")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="there is no nvcc on the PATH")

pytestmark = [
    pytest.mark.compilers,
    pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}"),
]


def build(into: Path, with_nvcc: bool, **environment: str) -> subprocess.CompletedProcess[str]:
    """Builds the libraries into a folder, from the objects that the installation left where it can."""
    variables = {name: value for name, value in os.environ.items() if name not in ("CUDA_HOME", "DSPA_CUDA")}
    if not with_nvcc:
        variables["CUDA_HOME"] = str(into / "no_cuda_here")  # where it says nothing else is looked at
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(into)]
    return subprocess.run(command, cwd=ROOT, env=variables | environment, capture_output=True, text=True, timeout=500)


def what_it_has(folder: Path) -> str:
    """What the CUDA backend says of itself in a process that has the libraries of this folder."""
    program = (
        "import sys, pathlib, dspa.kernels.native as native;"
        "native._PACKAGE = pathlib.Path(sys.argv[1]) / 'dspa';"
        "from dspa.kernels import available;"
        "answers = available(); print(answers['cpu']); print(answers['cuda'])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    cpu, cuda = done.stdout.splitlines()
    assert cpu == "available"
    return cuda


def test_without_nvcc(tmp_path: Path) -> None:
    done = build(tmp_path, with_nvcc=False)
    assert done.returncode == 0, done.stderr
    assert "no nvcc on the PATH or in CUDA_HOME; installing without dspa._C_cuda" in done.stderr
    assert what_it_has(tmp_path).startswith(
        "the CUDA library is not built; with nvcc on the PATH, run DSPA_CUDA=require"
    )


def test_required_without_nvcc(tmp_path: Path) -> None:
    done = build(tmp_path, with_nvcc=False, DSPA_CUDA="require")
    assert done.returncode != 0
    assert "no nvcc" in done.stderr


@needs_nvcc
def test_with_nvcc(tmp_path: Path) -> None:
    done = build(tmp_path, with_nvcc=True, DSPA_CUDA="require", DSPA_CUDA_ARCHS="80;90a;100")
    assert done.returncode == 0, done.stderr
    expected = "available" if torch.cuda.is_available() else "built for sm_80, sm_90a, sm_100; no NVIDIA GPU found"
    assert what_it_has(tmp_path) == expected


@pytest.mark.parametrize(
    ("in_home", "on_path", "in_usual", "found"),
    [
        (True, True, True, "home"),
        (None, True, True, "path"),
        (None, False, True, "usual"),
        (None, False, False, None),
        (False, True, True, None),
    ],
)
def test_where_nvcc_is_looked_for(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    in_home: bool | None,
    on_path: bool,
    in_usual: bool,
    found: str | None,
) -> None:
    """In CUDA_HOME alone if it is set; else on the PATH, and then in the usual folder."""
    for name, there in (("home", in_home), ("path", on_path), ("usual", in_usual)):
        (tmp_path / name / "bin").mkdir(parents=True)
        if there:
            (tmp_path / name / "bin" / "nvcc").touch(mode=0o755)
    monkeypatch.setattr(compile_cuda, "USUAL_HOME", tmp_path / "usual")
    monkeypatch.setenv("PATH", str(tmp_path / "path" / "bin"))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    if in_home is not None:
        monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    expected = None if found is None else str(tmp_path / found / "bin" / "nvcc")
    assert compile_cuda.find_nvcc() == expected


@needs_nvcc
def test_nvcc_is_not_asked_if_it_must_not(tmp_path: Path) -> None:
    done = build(tmp_path, with_nvcc=True, DSPA_CUDA="skip")
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("dspa/_C_cuda*"))


@needs_nvcc
def test_what_cannot_be_compiled_is_left_out(tmp_path: Path) -> None:
    """An architecture that does not exist: the library for the CPU is there all the same."""
    done = build(tmp_path, with_nvcc=True, DSPA_CUDA_ARCHS="12345")
    assert done.returncode == 0, done.stderr
    assert "the CUDA library could not be built" in done.stderr
    assert list(tmp_path.glob("dspa/_C.*"))
    assert not list(tmp_path.glob("dspa/_C_cuda*"))


@pytest.mark.parametrize(
    ("built", "capability", "served"),
    [
        ("sm_80, sm_90a, sm_100", (8, 0), True),
        ("sm_80, sm_90a, sm_100", (8, 9), True),  # a later one of the same generation
        ("sm_80, sm_90a, sm_100", (9, 0), True),
        ("sm_80, sm_90a, sm_100", (12, 0), True),  # from the portable code of sm_100
        ("sm_80, sm_90a, sm_100", (7, 5), False),
        ("sm_90a", (10, 0), False),  # for that chip alone
        ("sm_90a", (9, 0), True),
        ("sm_86", (8, 0), False),
        ("sm_80", (9, 0), True),
    ],
)
def test_which_gpus_a_library_is_for(built: str, capability: tuple[int, int], served: bool) -> None:
    assert native._is_served(built.split(", "), capability) is served


def test_a_gpu_that_it_was_not_built_for(monkeypatch: pytest.MonkeyPatch) -> None:
    if "no NVIDIA GPU found" not in available()["cuda"]:
        pytest.skip(f"backend cuda: {available()['cuda']}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(BackendUnavailableError, match=r"built for sm_.*; this GPU is sm_75: build again"):
        native.load_cuda_library()


def test_triton_is_asked_before_cuda() -> None:
    """Until there are measurements that say where CUDA is faster; "auto" asks the last one first."""
    names = list(available())
    assert names.index("reference") < names.index("cuda")
    assert "triton" not in names or names.index("cuda") < names.index("triton")
