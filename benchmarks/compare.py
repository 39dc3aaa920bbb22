"""Compares two runs: `python benchmarks/compare.py earlier.json later.json`."""

from __future__ import annotations

import sys
from pathlib import Path

from table import rows_of


def main(earlier: Path, later: Path) -> None:
    before, after = rows_of(earlier), rows_of(later)
    print("| row | column | earlier ms | later ms | times faster |")
    print("|---|---|---|---|---|")
    for row, columns in after.items():
        known = {column["name"]: column for column in before.get(row, [])}
        for column in columns:
            old = known.get(column["name"])
            if old is not None:
                faster = old["median"] / column["median"]
                print(f"| {row} | {column['name']} | {old['median']:.3g} | {column['median']:.3g} | {faster:.2f} |")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
