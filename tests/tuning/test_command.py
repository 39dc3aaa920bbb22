"""`dspa tune` and `dspa compare` on the organism."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from dspa import SteeringPolicy, cli
from dspa.errors import InvalidInputError
from dspa.organism import DATA, sae_folder, triples_file
from dspa.tuning.command import load_function

MODEL = str(DATA / "model")


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `dspa <arguments>`."""
    monkeypatch.setattr(sys, "argv", ["dspa", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Densities of 12 triples, a policy, and other preferences."""
    root, patch = tmp_path_factory.mktemp("tune"), pytest.MonkeyPatch()
    saes = ["--input-sae", str(sae_folder("input")), "--output-sae", str(sae_folder("output"))]
    lines = triples_file().read_text().splitlines(keepends=True)
    (root / "train.jsonl").write_text("".join(lines[:12]))
    (root / "held-out.jsonl").write_text("".join(lines[12:24]))
    collected = ["--model", MODEL, "--preferences", str(root / "train.jsonl"), *saes, "--out", str(root / "densities")]
    assert run(patch, "collect", *collected, "--json") == 0
    assert run(patch, "fit", str(root / "densities"), *saes, "--out", str(root / "policy"), "--json") == 0
    patch.undo()
    return root


def tune_arguments(folder: Path, out: str, **changes: str) -> list[str]:
    options = {
        "model": MODEL,
        "policy": str(folder / "policy"),
        "preferences": str(folder / "held-out.jsonl"),
        "out": str(folder / out),
        "alpha": "0.1,0.5",
        "edit": "both",
        "k-diff": "16",
        **changes,
    }
    return ["tune", *(word for name, value in options.items() for word in (f"--{name}", value))]


@pytest.mark.long
def test_tune_with_other_gates(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "reward.py").write_text("def words(prompt, response):\n    return len(response.split()) / 100\n")
    changes = {
        "densities": str(folder / "densities"),
        "output-sae": str(sae_folder("output")),
        "alpha": "0.3",
        "gate-rule": "ge,positive_ge",
        "reward": f"{folder / 'reward.py'}:words",
        "max-new-tokens": "12",
    }
    assert run(monkeypatch, *tune_arguments(folder, "tuned", **changes), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["choosing"]) == 2
    assert report["choosing_examples"] == report["reporting_examples"] == 6
    assert all(row["reward"] and row["margin"] for row in report["choosing"])
    made = SteeringPolicy.from_pretrained(folder / "tuned" / "policy")
    assert made.alpha == report["chosen"]["alpha"]
    assert made.conditional_map.options.gate_rule == report["chosen"]["gate_rule"]


@pytest.mark.long
def test_tune_ranks_lists_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"densities": str(folder / "densities"), "output-sae": str(sae_folder("output")), "tries": "2"}
    changes |= {"penalty": "0.5,2", "gate-rule": "ge,positive_ge", "folds": "3"}
    assert run(monkeypatch, *tune_arguments(folder, "ranked", **changes), "--json") == 0
    report = json.loads(capsys.readouterr().out)
    rows = report["ranking"]["rows"]
    assert [row["tried"] for row in rows] == [True, False, False, False]
    means = [row["agreement"]["mean"] for row in rows]
    assert means[0] == max(means)
    assert len(report["choosing"]) == 2
    assert all(row["setting"]["estimator"] == rows[0]["lists"]["estimator"] for row in report["choosing"])
    changes.pop("tries")
    assert run(monkeypatch, *tune_arguments(folder, "whole", **changes, estimator="ridge"), "--no-rank", "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert report["ranking"] is None
    assert [row["setting"]["penalty"] for row in report["choosing"]] == [0.5, 2, 0.5, 2]


@pytest.mark.long
def test_tune_prints_tables(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, *tune_arguments(folder, "printed", alpha="0.3", edit="ablate")) == 0
    text = capsys.readouterr().out
    assert "On 6 examples that the choice did not see" in text
    assert "Chosen: ablate, alpha 0.3, k_prompt 32, k_diff 16, percentile 90, ge" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"alpha": "0.1;0.2"}, "alpha has '0.1;0.2'"),
        ({"edit": "remove"}, "edit has 'remove'; expected some of ablate, augment, both"),
        ({"gate-percentile": "50"}, "pass the folder of densities"),
        ({"estimator": "lasso"}, "estimator has 'lasso'; expected some of mean_difference, ridge"),
        ({"estimator": "ridge"}, "needs another map; pass the folder of densities"),
        ({"penalty": "2"}, "penalty is an option of ridge, which is not tried"),
        ({"tries": "4"}, "lists cannot be ranked by agreement: no densities were passed"),
        ({"reward": "nothing.py:f"}, "names no function"),
        ({"neutral": "none.txt"}, "cannot be read"),
    ],
)
def test_bad_input_ends_with_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, str],
    words: str,
) -> None:
    assert run(monkeypatch, *tune_arguments(folder, "bad", **changes)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line


def test_functions_are_found_in_modules() -> None:
    assert load_function("operator:eq") is not None
    with pytest.raises(InvalidInputError, match="is a str"):
        load_function("dspa:__version__")


@pytest.mark.parametrize(
    "content", ["def f(p, r)\n  return 1\n", "x = undefined\n", "x = 1 / 0\n", "import nothing_here\n"]
)
def test_a_file_that_cannot_be_run_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "reward.py").write_text(content)
    with pytest.raises(InvalidInputError, match="names no function") as found:
        load_function(f"{tmp_path / 'reward.py'}:f")
    assert "\n" not in str(found.value)


def test_compare(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", MODEL, "--prompts", str(folder / "held-out.jsonl"), "--limit", "2", "--max-new-tokens", "12"]
    assert run(monkeypatch, "compare", str(folder / "policy"), *words, "--html", str(folder / "page.html")) == 0
    assert "unsteered" in capsys.readouterr().out
    assert (folder / "page.html").read_text().startswith("<!doctype html>")
    assert run(monkeypatch, "compare", str(folder / "policy"), *words, "--no-unsteered", "--json") == 0
    records = json.loads(capsys.readouterr().out)
    assert [[answer["policy"] for answer in record["answers"]] for record in records] == [["policy"]] * 2
