"""Thousands of generate calls, and of steerings that come and go: the process does not grow."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import torch

from dspa.online.steering import steer
from soak.interrupts import Subject

ALLOWED = 8 * 2**20  # bytes; what allocators keep for reuse, however often something is called


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run(generates: int, attachings: int) -> dict[str, int]:
    torch.set_num_threads(1)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        subject = Subject()

        def generate(count: int) -> None:
            with steer(subject.model, subject.policies, select="a") as steering:
                for call in range(count):
                    steering.select("ab"[call % 2])
                    subject.generate()

        def attach(count: int) -> None:
            for _ in range(count):
                steer(subject.model, subject.policies, select="a").remove()

        generate(max(generates // 10, 20))
        attach(max(attachings // 10, 20))
        before = resident()
        generate(generates)
        attach(attachings)
        grown = resident() - before
    assert grown < ALLOWED, f"the process grew by {grown} bytes"
    return {"generate calls": generates, "attachings": attachings, "growth of the process, KiB": max(grown, 0) // 1024}
