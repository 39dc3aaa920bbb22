"""`make soak`: the campaign, bounded in time, with its counts as a table.

python -m soak [--minutes 20] [--part files|kills|interrupts|operands|memory|server ...]
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from soak import files, interrupts, kills, memory, operands, server

PARTS: dict[str, Callable[[float, Path], dict[str, int]]] = {
    "files": lambda share, root: files.run(round(100_000 * share), root, seconds=60 * 13 * share),
    "kills": lambda share, root: kills.run(max(3, round(200 * share)), root),
    "interrupts": lambda share, root: interrupts.run(every=max(1, round(1 / share))),
    "operands": lambda share, root: operands.run(round(50_000 * share)),
    "server": lambda share, root: server.run(max(5, round(500 * share)), root),
    "memory": lambda share, root: memory.run(round(10_000 * share), round(1000 * share)),
}
"""Each takes the share of the whole campaign that it is to run, and an empty folder."""

FULL = 20.0  # minutes


def main() -> None:
    parser = argparse.ArgumentParser(prog="make soak", description="A hostile campaign against the package.")
    parser.add_argument("--minutes", type=float, default=FULL, help="how long all parts may take; 20 runs them in full")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    options = parser.parse_args()
    share = min(1.0, options.minutes / FULL)
    for name in options.part or PARTS:
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as root:
            counts = PARTS[name](share, Path(root))
        print(f"{name}, {time.monotonic() - began:.0f} s")
        for what, count in counts.items():
            print(f"  {what:44} {count:>9,}", flush=True)


if __name__ == "__main__":
    main()
