"""A short form of `make soak`, of about a minute."""

from __future__ import annotations

from pathlib import Path

import pytest

from soak.__main__ import PARTS, run_part
from soak.deadline import Deadline

SHARES = {"files": 0.01, "kills": 0.06, "interrupts": 0.02, "operands": 0.02, "server": 0.02, "memory": 0.01}


@pytest.mark.long
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_the_campaign(part: str, tmp_path: Path) -> None:
    counts = run_part(part, SHARES[part], tmp_path, Deadline())
    assert sum(counts.values()) > 5


@pytest.mark.long
@pytest.mark.parametrize("part", PARTS)
def test_a_part_ends_at_its_deadline(part: str, tmp_path: Path) -> None:
    until = Deadline(0)
    run_part(part, 1.0, tmp_path, until)
    assert until.hit
