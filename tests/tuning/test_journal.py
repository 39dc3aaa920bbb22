"""The journal of a tuning: it survives being cut off, and belongs to one tuning."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dspa.errors import CorruptFileError, MismatchError
from dspa.tuning.journal import JOURNAL, Journal

RUN = {"examples": "a", "options": {"seed": 0}, "changes": ("x",)}


def test_evaluations_are_found_again(tmp_path: Path) -> None:
    values = {"margin": np.array([0.1, -2.5e-17]), "kl": np.zeros(0)}
    Journal(tmp_path, RUN).add("s", 0, 2, values)
    found = Journal(tmp_path, RUN).find("s", 0, 2)
    assert found is not None
    assert {name: array.tolist() for name, array in found.items()} == {"margin": [0.1, -2.5e-17], "kl": []}
    assert Journal(tmp_path, RUN).find("s", 0, 3) is None


@pytest.mark.parametrize("cut", range(1, 40, 7))
def test_a_line_that_was_cut_off_is_forgotten(tmp_path: Path, cut: int) -> None:
    journal = Journal(tmp_path, RUN)
    journal.add("s", 0, 1, {"margin": np.ones(1)})
    journal.add("t", 0, 1, {"margin": np.ones(1)})
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes()[:-cut])
    again = Journal(tmp_path, RUN)
    assert again.find("s", 0, 1) is not None
    assert again.find("t", 0, 1) is None
    again.add("t", 0, 1, {"margin": np.zeros(1)})
    assert Journal(tmp_path, RUN).find("t", 0, 1) is not None


def test_another_tuning_is_refused(tmp_path: Path) -> None:
    Journal(tmp_path, RUN)
    with pytest.raises(MismatchError, match="holds another tuning"):
        Journal(tmp_path, {**RUN, "examples": "b"})


@pytest.mark.parametrize("line", ["{", "[]", '{"setting": 1}', '{"setting": "s", "start": 0, "stop": 1, "values": 3}'])
def test_a_damaged_line_is_refused(tmp_path: Path, line: str) -> None:
    Journal(tmp_path, RUN).add("s", 0, 1, {"margin": np.ones(1)})
    with (tmp_path / JOURNAL).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(CorruptFileError, match="line 3 cannot be read"):
        Journal(tmp_path, RUN)
