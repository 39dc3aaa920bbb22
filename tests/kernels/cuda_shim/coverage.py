"""Which branches of the CUDA sources a run on the shim took, from the counters that the compiler put in.

A line has one list of branches for each function that was made of it: templates are compiled once for each of their
arguments. Lists of the same source function, line and length are the same branches, and are added up; where a
condition is constant for some arguments the list is shorter, and stands for itself. For a lambda, gcov gives one list
with the branches of all arguments, each of which counts. The minimum or maximum of two numbers, written as a
conditional expression, is one instruction and no branch; functions that nothing calls are not compiled and not seen.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Without optimisation, so that branches are those of the source, and without those that exceptions, the start of local
# statics, and && of two cheap conditions add or take away.
FLAGS = (
    "-O0",
    "--coverage",
    "-fno-exceptions",
    "-fno-threadsafe-statics",
    "--param=logical-op-non-short-circuit=0",
)


@dataclass(frozen=True, order=True)
class Place:
    """One list of branches: `function` is where the source function around it begins, line and column."""

    file: str
    line: int
    function: tuple[int, int]
    length: int


@dataclass
class Coverage:
    """How often each branch was taken, by the place of its list."""

    taken: dict[Place, list[int]] = field(default_factory=dict[Place, list[int]])

    def add(self, place: Place, counts: list[int]) -> None:
        before = self.taken.get(place, [0] * place.length)
        self.taken[place] = [sum(pair) for pair in zip(before, counts, strict=True)]

    def missing(self) -> list[str]:
        """A line of text for each place with branches that were not taken, in order."""
        found = []
        for place, counts in sorted(self.taken.items()):
            never = [str(index) for index, count in enumerate(counts) if count == 0]
            if never:
                found.append(f"{place.file}:{place.line}: of {place.length} branches not taken: {', '.join(never)}")
        return found

    def by_file(self) -> dict[str, tuple[int, int]]:
        """Of each file, how many branches were taken, and how many there are."""
        taken: Counter[str] = Counter()
        there: Counter[str] = Counter()
        for place, counts in self.taken.items():
            taken[place.file] += sum(count > 0 for count in counts)
            there[place.file] += len(counts)
        return {file: (taken[file], there[file]) for file in sorted(there)}


def unavailable(compiler: str | None) -> str | None:
    """Why branches cannot be counted, or None: gcov reads only what a compiler of its own version wrote."""
    if compiler is None:
        return "there is no C++ compiler"
    gcov = shutil.which("gcov")
    if gcov is None:
        return "there is no gcov"
    wanted = _output(compiler, "-dumpfullversion").strip()
    version = _output(gcov, "--version").splitlines()[0].split()[-1]
    return None if version == wanted else f"gcov is of version {version}, the compiler ({compiler}) of {wanted}"


def read(counters: Iterable[Path], sources: Path) -> Coverage:
    """From .gcda files, each with its .gcno beside it, what is known about the sources in a folder and below it."""
    coverage = Coverage()
    gcov = shutil.which("gcov")
    assert gcov is not None
    for path in counters:
        written = _output(gcov, "--branch-probabilities", "--json-format", "--stdout", str(path))
        document = json.loads(written)
        for file in document["files"]:
            source = (Path(document["current_working_directory"]) / file["file"]).resolve()
            if source.is_relative_to(sources.resolve()):
                _add_file(coverage, str(source.relative_to(sources.resolve())), file)
    return coverage


def _add_file(coverage: Coverage, name: str, file: dict[str, Any]) -> None:
    begins = {function["name"]: (function["start_line"], function["start_column"]) for function in file["functions"]}
    for line in file["lines"]:
        branches = line["branches"]
        if branches:
            place = Place(name, line["line_number"], begins.get(line.get("function_name"), (0, 0)), len(branches))
            coverage.add(place, [branch["count"] for branch in branches])


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
