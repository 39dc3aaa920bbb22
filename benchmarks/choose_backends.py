"""Writes down which GPU backend `backend="auto"` asks first, from a report of `make gpu`.

    python benchmarks/choose_backends.py benchmarks/results/DATE-COMMIT-gpu.json

For each operation and SAE, the backend with the lowest geometric mean of its times over the batches, or numbers of
tokens, that were measured. What the table says of other GPUs stays.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

from history.records import Run, read_run

from dspa.kernels.backends import measured as measured_backends

Key = tuple[int, int, bool]  # d_model, d_sae, whether it is a top-k SAE
BACKENDS = ("triton", "cuda")
_TOKEN_STEP = re.compile(r"(\d+)x(\d+)(-top\d+)?-\w+-batch\d+$")
_ENCODE_DENSITY = re.compile(r"(\d+)x(\d+)()-\w+, \d+ tokens$")


def main() -> int:
    parser = argparse.ArgumentParser(description="Choose the backends that auto asks first, from a GPU report.")
    parser.add_argument("report", type=Path, help="the JSON file of a report")
    parser.add_argument("--out", type=Path, default=Path(measured_backends.__file__), help="default: in the package")
    chosen = parser.parse_args()
    details = json.loads(chosen.report.read_text())
    architecture = details.get("architecture")
    if architecture is None:
        print(f"{chosen.report} names no architecture; expected a report of make gpu on a GPU", file=sys.stderr)
        return 2
    table = dict(measured_backends.FASTEST)
    found = fastest(read_run(chosen.report))
    table.pop(architecture, None)
    if any(found.values()):  # else one of the two was not measured, and `auto` has nothing to go by
        table[architecture] = found
    chosen.out.write_text(source(table))
    print(f"wrote {chosen.out}")
    return 0


def fastest(run: Run) -> dict[str, dict[Key, str]]:
    """The fastest backend of each operation and SAE, where both were measured side by side."""
    found: dict[str, dict[Key, str]] = {}
    for operation, pattern, column in (
        ("token_step", _TOKEN_STEP, "{}, dense"),
        ("encode_density", _ENCODE_DENSITY, "{}"),
    ):
        ratios: dict[Key, list[float]] = defaultdict(list)  # of the second backend's time to the first's
        for row in run.rows:
            shape, columns = pattern.search(row.name), [row.column(column.format(name)) for name in BACKENDS]
            first, second = columns
            if shape is None or first is None or second is None:
                continue
            key = (int(shape[1]), int(shape[2]), bool(shape[3]))
            ratios[key].append(math.log(second.measured.value / first.measured.value))
        found[operation] = {key: BACKENDS[sum(logarithms) < 0] for key, logarithms in sorted(ratios.items())}
    return found


def source(table: dict[str, dict[str, dict[Key, str]]]) -> str:
    """The module that holds a table."""
    lines = [
        '"""Which backend was the fastest on which GPU, by operation and SAE: d_model, d_sae, whether it is top-k.',
        "",
        "Written by benchmarks/choose_backends.py from reports of `make gpu`.",
        '"""',
        "",
        "FASTEST: dict[str, dict[str, dict[tuple[int, int, bool], str]]] = {",
    ]
    for architecture, operations in sorted(table.items()):
        lines.append(f'    "{architecture}": {{')
        for operation, by_sae in operations.items():
            lines.append(f'        "{operation}": {{')
            lines += [f'            {key}: "{backend}",' for key, backend in by_sae.items()]
            lines.append("        },")
        lines.append("    },")
    return "\n".join([*lines, "}"]) + "\n"


if __name__ == "__main__":
    sys.exit(main())
