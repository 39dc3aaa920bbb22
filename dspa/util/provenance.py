"""Which versions computed a report."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CODE = ("*.py", "../benchmarks/*.py", "../csrc")  # seen from the package; new files count as changes


@dataclass(frozen=True)
class Provenance:
    """What computed a report."""

    dspa: str
    commit: str
    python: str
    torch: str
    transformers: str

    @classmethod
    def here(cls) -> Provenance:
        return cls(*_version_and_commit(), platform.python_version(), *map(_version, ("torch", "transformers")))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _version_and_commit() -> tuple[str, str]:
    """The package's version, and the commit of its checkout, or "none" where it is not run from one."""
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return _version("dspa"), "none"
    changed = git("status", "--porcelain", "--", *CODE)
    return _version("dspa"), f"{git('rev-parse', 'HEAD')}{' and changes' if changed else ''}"
