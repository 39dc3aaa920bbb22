"""`make soak`: the campaign, bounded in time, with its counts as a table.

python -m soak [--minutes 20] [--part files|interrupts|memory|server|kills|operands ...]

Each part is a process of its own; as many run at once as there are cores.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

from soak.deadline import Deadline

Run = Callable[[ModuleType, float, Path, Deadline], dict[str, int]]
PARTS: dict[str, Run] = {
    "files": lambda part, share, root, until: part.run(round(100_000 * share), root, until=until),
    "interrupts": lambda part, share, root, until: part.run(every=max(1, round(1 / share)), until=until),
    "memory": lambda part, share, root, until: part.run(round(10_000 * share), round(1000 * share), until=until),
    "server": lambda part, share, root, until: part.run(max(5, round(500 * share)), root, until=until),
    "kills": lambda part, share, root, until: part.run(max(3, round(200 * share)), root, until=until),
    "operands": lambda part, share, root, until: part.run(round(50_000 * share), until=until),
}
"""Each takes its module, the share of the whole campaign that it runs, an empty folder, and its deadline. The longest
come first."""

IN_MEMORY = Path("/dev/shm")  # where there is one, for the many small folders of mutated files
FULL = 20.0  # minutes
SPARE = 20.0  # seconds of the time that are left for starting and ending


def run_part(name: str, share: float, root: Path, until: Deadline) -> dict[str, int]:
    """Runs one part here."""
    return PARTS[name](importlib.import_module(f"soak.{name}"), share, root, until)


def report(name: str, share: float, seconds: float) -> str:
    """Runs one part here; its counts as lines."""
    began, until = time.monotonic(), Deadline(seconds)
    with tempfile.TemporaryDirectory(dir=IN_MEMORY if name == "files" and IN_MEMORY.is_dir() else None) as root:
        counts = run_part(name, share, Path(root), until)
    ending = ", stopped by the limit of time" if until.hit else ""
    lines = [f"{name}, {time.monotonic() - began:.0f} s{ending}"]
    return "\n".join([*lines, *(f"  {what:44} {count:>9,}" for what, count in counts.items())])


def main() -> None:
    parser = argparse.ArgumentParser(prog="make soak", description="A hostile campaign against the package.")
    parser.add_argument("--minutes", type=float, default=FULL, help="how long all parts may take; 20 runs them in full")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--seconds", type=float, help="how long a single part may take; by default, all of the time")
    options = parser.parse_args()
    ends, names = time.monotonic() + 60 * options.minutes - SPARE, options.part or list(PARTS)
    if len(names) == 1:
        share, seconds = min(1.0, options.minutes / FULL), options.seconds or ends - time.monotonic()
        print(report(names[0], share, seconds), flush=True)
        return

    def run(name: str) -> int:
        command = [sys.executable, "-m", "soak", "--minutes", str(options.minutes), "--part", name]
        command += ["--seconds", str(max(1.0, ends - time.monotonic()))]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(process.communicate()[0], end="", flush=True)
        return process.returncode

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        failed = [name for name, code in zip(names, pool.map(run, names), strict=True) if code]
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
