"""What a tuning has evaluated so far, on disk: an interrupted one goes on, and evaluates nothing twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dspa.errors import CorruptFileError, MismatchError
from dspa.tuning.scoring import Floats
from dspa.util.files import make_folder

JOURNAL = "evaluations.jsonl"


class Journal:
    """Evaluations by setting and range of examples, a line each, in a folder.

    Raises:
        MismatchError: if the folder holds evaluations of another tuning.
        CorruptFileError: if a line other than the last, which may have been cut off, cannot be read.
    """

    def __init__(self, folder: str | Path, run: Mapping[str, Any]) -> None:
        """Opens the folder's journal; `run` is everything that decides its numbers."""
        self._path = make_folder(folder) / JOURNAL
        self._known: dict[tuple[str, int, int], dict[str, Floats]] = {}
        head = {"run": json.loads(json.dumps(run))}
        lines = self._path.read_text().split("\n") if self._path.exists() else []
        whole = lines[:-1]  # what follows the last line break was cut off
        for number, line in enumerate(whole):
            try:
                record = json.loads(line)
                if number:
                    key = record["setting"], record["start"], record["stop"]
                    self._known[key] = {name: np.array(values) for name, values in record["values"].items()}
                    continue
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise CorruptFileError(f"{self._path}: line {number + 1} cannot be read; delete the file") from error
            if record != head:
                before = record.get("run") if isinstance(record, dict) else None
                differing = [
                    name
                    for name in head["run"]
                    if not isinstance(before, dict) or before.get(name) != head["run"][name]
                ]
                raise MismatchError(
                    f"{folder} holds another tuning ({', '.join(differing)} differ); use another folder"
                )
        self._path.write_text("".join(f"{line}\n" for line in whole) if whole else f"{json.dumps(head)}\n")

    def find(self, setting: str, start: int, stop: int) -> dict[str, Floats] | None:
        """An evaluation that was made before, or None."""
        return self._known.get((setting, start, stop))

    def add(self, setting: str, start: int, stop: int, values: dict[str, Floats]) -> None:
        """Keeps an evaluation."""
        self._known[setting, start, stop] = values
        listed = {name: array.tolist() for name, array in values.items()}
        with self._path.open("a") as file:
            file.write(json.dumps({"setting": setting, "start": start, "stop": stop, "values": listed}) + "\n")
