"""The head to head on a few prompts: resumable, one row per method and number of triples, and its report."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import head_to_head
import head_to_head_report as report
import numpy as np
import pytest
from head_to_head import Bench, Try, choose

from dspa.organism.evaluation import Measurement

QUICK = ["--prompts", "6", "--validation-prompts", "4", "--methods", "CAA,FSRL"]


@pytest.mark.long
@pytest.mark.usefixtures("short_responses")
def test_a_run_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(head_to_head, "TRAINING_STEPS", 2)
    out = tmp_path / "report.json"
    head_to_head.main(["--out", str(out), "--triples", "20", *QUICK])
    first = json.loads(out.read_text())["rows"]
    names = ["unsteered", "CAA @ 20", "FSRL @ 20", "control: FSRL on random latents @ 20"]
    assert list(first) == names
    assert all(len(row["preferred"]) == 6 for row in first.values())
    assert [len(first[name]["tries"]) for name in names[1:3]] == [head_to_head.TRIES] * 2
    assert len(first["FSRL @ 20"]["history"]) == 2
    capsys.readouterr()
    head_to_head.main(["--out", str(out), "--triples", "20,24", *QUICK])
    computed = [line.split(" ", 1)[1].split(" @")[0] for line in capsys.readouterr().out.splitlines()]
    assert computed == ["CAA", "FSRL", "control: FSRL on random latents"]
    both = json.loads(out.read_text())
    assert {name: both["rows"][name] for name in names} == first
    assert report.counts_of(both) == [20, 24]
    assert len(report.gains_table(both)) == 2 + 3
    report.draw(both, tmp_path / "gains.png")
    assert (tmp_path / "gains.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="results of other settings"):
        head_to_head.main(["--out", str(out), "--triples", "20", *QUICK, "--seed", "1"])


@pytest.mark.long
@pytest.mark.usefixtures("short_responses")
@pytest.mark.parametrize("own_are_better", [False, True])
def test_a_method_with_more_tries_goes_on_from_a_row(
    own_are_better: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = "CAA, 8 tries"
    same = head_to_head.MoreTries("CAA", head_to_head.caa_tries)
    monkeypatch.setitem(head_to_head.WITH_MORE_TRIES, method, same)
    out = tmp_path / "report.json"
    arguments = ["--out", str(out), "--triples", "20", "--prompts", "6", "--validation-prompts", "4", "--methods"]
    with pytest.raises(SystemExit, match="needs the row CAA @ 20"):
        head_to_head.main([*arguments, "CAA; 8 tries"])
    head_to_head.main([*arguments, "CAA"])
    saved = json.loads(out.read_text())
    base = saved["rows"]["CAA @ 20"]
    if own_are_better:  # the same tries again, which are worse in the base
        for note in base["tries"]:
            note |= {"reward": note["reward"] - 100, "malformed": 1.0}
        out.write_text(json.dumps(saved))
    head_to_head.main([*arguments, "CAA; 8 tries"])
    rows = json.loads(out.read_text())["rows"]
    row = rows[f"{method} @ 20"]
    assert rows["CAA @ 20"] == base
    assert row["method"] == method
    assert row["tries"][:4] == base["tries"]
    assert [note["setting"] for note in row["tries"]] == 2 * [note["setting"] for note in base["tries"]]
    assert row["chosen"] == base["chosen"]
    assert row["preferred"] == base["preferred"]
    assert (row["seconds"] == base["seconds"]) != own_are_better


def measurement(reward: float, malformed: float) -> Measurement:
    """Of ten responses."""
    preferred = np.full(10, int(10 * reward))
    broken = np.arange(10) < round(10 * malformed)
    return Measurement("", preferred, np.zeros(10, dtype=np.int64), broken, np.ones(1), np.ones(2))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ([(0.1, 0.0), (0.5, 0.0), (0.3, 0.0)], 1),
        ([(0.1, 0.0), (0.5, 0.4), (0.3, 0.0)], 2),  # breaks too many responses
        ([(0.1, 0.6), (0.5, 0.4), (0.3, 0.9)], 1),  # all of them do: the one that breaks the fewest
    ],
)
def test_the_best_try_that_keeps_responses_whole_is_chosen(found: list[tuple[float, float]], expected: int) -> None:
    class Measured(Bench):
        """Finds what the table says."""

        def __init__(self) -> None:
            self.settings = head_to_head.Settings(4, 4, 0)
            self.model = None
            self.left = iter(found)

        def measured(self, policy: Any, prompts: Any, seed: int, neutral: int) -> Measurement:
            return measurement(*next(self.left))

    tries = [Try(f"try {index}", None) for index in range(len(found))]
    index, notes = choose(Measured(), tries, measurement(0.0, 0.0))
    assert index == expected
    assert [note["setting"] for note in notes] == ["try 0", "try 1", "try 2"]


def test_gains_are_paired() -> None:
    unsteered = {"preferred": [1, 5, 9], "dispreferred": [0, 1, 2]}
    row = {"preferred": [2, 6, 10], "dispreferred": [0, 1, 2]}
    gain = report.gain(row, unsteered)
    assert (gain.mean, gain.half_width) == (1.0, 0.0)
