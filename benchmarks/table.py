"""The results of a run as a table: milliseconds, GB/s, share of the read bandwidth, ratio to sae-lens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

READ = "read W_enc"
BASELINE = "sae-lens with error term"
Row = Mapping[str, Any]


def rows_of(path: Path) -> dict[str, list[Row]]:
    """The columns of each row in a JSON file of pytest-benchmark."""
    benchmarks = json.loads(path.read_text())["benchmarks"]
    return {b["extra_info"]["row"]: b["extra_info"]["columns"] for b in benchmarks if "columns" in b["extra_info"]}


def markdown(results: Mapping[str, Sequence[Row]]) -> str:
    lines = ["| row | column | ms (quartiles) | GB/s | of read bandwidth | times faster than the baseline |"]
    lines.append("|---|---|---|---|---|---|")
    for row, columns in results.items():
        by_name = {column["name"]: column for column in columns}
        baseline = by_name.get(BASELINE, columns[0])["median"]
        read = bandwidth(by_name[READ]) if READ in by_name else None
        for column in columns:
            speed = bandwidth(column)
            share = f"{speed / read:.0%}" if speed and read else ""
            spread = f"{column['median']:.3g} ({column['low']:.3g} to {column['high']:.3g})"
            ratio = f"{baseline / column['median']:.3g}"
            lines.append(
                f"| {row} | {column['name']} | {spread} | {f'{speed:.3g}' if speed else ''} | {share} | {ratio} |"
            )
    return "\n".join(lines)


def bandwidth(column: Row) -> float | None:
    """GB/s; None where only a few rows are read and the time is not spent on that."""
    read = column["bytes_read"]
    return read / column["median"] / 1e6 if read and read > 1 << 23 else None
