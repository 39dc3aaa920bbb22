"""Which commit a report names."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dspa.util import provenance
from dspa.util.provenance import Provenance


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with a package, whose `provenance.py` is the one that runs."""
    for name in ("dspa/__init__.py", "dspa/util/provenance.py", "README.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1\n")
    run = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*run, *arguments], cwd=tmp_path, check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "dspa" / "util" / "provenance.py"))
    return tmp_path


@pytest.mark.parametrize(
    ("file", "counts"),
    [
        (None, False),
        ("dspa/__init__.py", True),
        ("dspa/methods/new.py", True),
        ("benchmarks/study/new.py", True),
        ("csrc/kernel.cpp", True),
        ("README.md", False),
        ("benchmarks/results/new.json", False),
    ],
)
def test_changed_and_new_code_is_named(checkout: Path, file: str | None, counts: bool) -> None:
    if file is not None:
        (checkout / file).parent.mkdir(parents=True, exist_ok=True)
        (checkout / file).write_text("2\n")
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=checkout, capture_output=True, text=True, check=True)
    assert Provenance.here().commit == commit.stdout.strip() + (" and changes" if counts else "")


def test_a_package_outside_a_repository_has_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dspa" / "util").mkdir(parents=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "dspa" / "util" / "provenance.py"))
    assert Provenance.here().commit == "none"
