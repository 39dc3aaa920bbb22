"""`dspa bench`: from the files of benchmark runs to tables, comparisons and a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dspa.bench_records import Change, Run, compare, read_run
from dspa.bench_report import to_html
from dspa.errors import InvalidInputError
from dspa.util.files import write_atomically

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
        InvalidInputError: if there is no run, or matplotlib is missing and a page was asked for.
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
