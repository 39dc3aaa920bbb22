"""Thousands of generate calls, and of steerings that come and go: the process does not grow."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path

import torch

from dspa.online.steering import steer
from soak.deadline import Deadline
from soak.interrupts import Subject

ALLOWED = 8 * 2**20  # bytes; what allocators keep for reuse, however often something is called


def resident() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def run(generates: int, attachings: int, *, until: Deadline | None = None) -> dict[str, int]:
    torch.set_num_threads(1)
    until = until or Deadline()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        subject = Subject()

        def attach(count: int) -> int:
            done = 0
            while done < count and not until.passed:
                steer(subject.model, subject.policies, select="a").remove()
                done += 1
            return done

        def generate(count: int) -> int:
            done = 0
            with steer(subject.model, subject.policies, select="a") as steering:
                while done < count and not until.passed:
                    steering.select("ab"[done % 2])
                    subject.generate()
                    done += 1
            return done

        attach(max(attachings // 10, 20))
        generate(max(generates // 10, 20))
        before = resident()
        attached, generated = attach(attachings), generate(generates)
        grown = resident() - before
    assert grown < ALLOWED, f"the process grew by {grown} bytes"
    return {"generate calls": generated, "attachings": attached, "growth of the process, KiB": max(grown, 0) // 1024}
