"""Shows runs of `make bench` from their files: the latest as tables, what moved since another, the history as a page.

    python -m history.command [FILE_OR_FOLDER ...] [--base FILE] [--all] [--html PAGE] [--json]

with `benchmarks` on the path; `make bench-report` and `make bench-compare BASE=...` run it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console

from dspa.errors import DspaError, InvalidInputError
from dspa.util.files import write_atomically
from history.records import Change, Run, compare, read_run
from history.report import change_table, print_run, to_html

RESULTS = Path("benchmarks/results")


@dataclass(frozen=True)
class BenchHistory:
    """Runs from the earliest to the latest, and how the latest differs from `base`."""

    runs: tuple[Run, ...]
    base: Run | None
    changes: tuple[Change, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2)


def read_history(files: Sequence[Path], base: Path | None, html: Path | None) -> BenchHistory:
    """Reads runs, compares the latest with `base`, and writes the page.

    Args:
        files: JSON files of runs, or folders of them.
        base: the run to compare the latest with.
        html: where the page goes; None for no page.

    Raises:
        InvalidInputError: if there is no run, or a page without matplotlib.
        DspaError: if a file cannot be read or written.
    """
    found = [path for file in files for path in (sorted(file.glob("*.json")) if file.is_dir() else [file])]
    if not found:
        raise InvalidInputError(f"no benchmark run in {', '.join(map(str, files))}; run make bench in a checkout first")
    runs = sorted((read_run(path) for path in found), key=lambda run: run.time)
    earlier = None if base is None else read_run(base)
    if html is not None:
        write_atomically(html, to_html(runs).encode())
    changes = () if earlier is None else tuple(compare(earlier, runs[-1]))
    return BenchHistory(tuple(runs), earlier, changes)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 2 with one line on the error stream for bad input."""
    parser = argparse.ArgumentParser(prog="python -m history.command", description="Shows runs of make bench.")
    parser.add_argument("results", nargs="*", type=Path, default=[RESULTS], help="files of runs, or folders of them")
    parser.add_argument("--base", type=Path, help="an earlier run: shows what moved beyond its noise")
    parser.add_argument("--all", action="store_true", help="with --base, also what did not move")
    parser.add_argument("--html", type=Path, help="write the history of all runs as a self-contained page")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    chosen = parser.parse_args(arguments)
    try:
        history = read_history(chosen.results, chosen.base, chosen.html)
    except DspaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    console = Console(width=None if sys.stdout.isatty() else 160)
    if chosen.json:
        print(history.to_json())
    elif history.base is None:
        print_run(console, history.runs[-1])
    else:
        change_table(history.base, history.runs[-1], history.changes, everything=chosen.all).print(console)
    return 0


if __name__ == "__main__":
    sys.exit(main())
