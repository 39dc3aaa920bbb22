"""What the command line prints with."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


def console(quiet: bool) -> Console:
    """A rich console; a quiet one writes to the error stream, and leaves the other to JSON."""
    from rich.console import Console

    # A pipe has no width of its own; wide enough for the tables.
    width = None if sys.stdout.isatty() else 160
    return Console(stderr=quiet, width=width)


def print_record(record: Mapping[str, Any], as_json: bool) -> None:
    """Prints names and values, as lines or as JSON."""
    print(json.dumps(record, indent=2) if as_json else "\n".join(f"{name}: {value}" for name, value in record.items()))
