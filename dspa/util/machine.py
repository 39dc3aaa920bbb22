"""What a measurement depends on beside the code."""

from __future__ import annotations

import platform
from pathlib import Path


def processor_name() -> str:
    """The processor as the kernel of the operating system names it, else its architecture."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.is_file() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.machine()
