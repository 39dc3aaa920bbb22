"""The command line on the organism: collect, fit, generate; bad input ends with one line and exit code 2."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from altered_records import tensors_file

import dspa
from dspa import __version__, cli
from dspa.organism import DATA, sae_folder, triples_file

MODEL = str(DATA / "model")
PROMPT = "Please define a birdhouse for me. What does it mean?"


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of `dspa <arguments>`."""
    monkeypatch.setattr(sys, "argv", ["dspa", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return int(stop.value.code or 0)


def collect_arguments(out: Path, **changes: str) -> list[str]:
    options = {
        "model": MODEL,
        "preferences": str(triples_file()),
        "input-sae": str(sae_folder("input")),
        "output-sae": str(sae_folder("output")),
        "out": str(out),
        "limit": "12",
        **changes,
    }
    return ["collect", *[word for name, value in options.items() for word in (f"--{name}", value)], "--json"]


def fit_arguments(densities: Path, out: Path, **changes: str) -> list[str]:
    saes = {"input-sae": str(sae_folder("input")), "output-sae": str(sae_folder("output"))}
    options = {**saes, "out": str(out), **changes}
    return ["fit", str(densities), *[w for name, value in options.items() for w in (f"--{name}", value)], "--json"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Densities and a policy, made by the command line."""
    root = tmp_path_factory.mktemp("cli")
    patch = pytest.MonkeyPatch()
    assert run(patch, *collect_arguments(root / "densities")) == 0
    assert run(patch, *fit_arguments(root / "densities", root / "policy")) == 0
    patch.undo()
    return root / "densities", root / "policy"


def test_audit(
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    densities, policy = map(str, folders)
    assert run(monkeypatch, "audit", policy, "--json") == 0
    alone = json.loads(capsys.readouterr().out)
    assert (alone["measured"], alone["map"]["triples"]) == (None, 12)
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n{PROMPT}\nunread\n")
    with_model = ["--model", MODEL, "--prompts", str(tmp_path / "prompts.txt"), "--limit", "2", "--max-new-tokens", "4"]
    triples = ["--densities", densities, "--preferences", str(triples_file()), "--preference-limit", "12"]
    reports = ["--html", str(tmp_path / "a.html"), "--markdown", str(tmp_path / "a.md")]
    assert run(monkeypatch, "audit", policy, *with_model, *triples, *reports, "--json") == 0
    record = json.loads(capsys.readouterr().out)
    assert [prompt["text"] for prompt in record["measured"]["prompts"]] == [PROMPT, PROMPT]
    assert record["measured"]["overlap"]["mean"] == 1
    assert any(support["chosen"] for latent in record["latents"] for support in latent["support"])
    assert "<title>Audit of a SteeringPolicy</title>" in (tmp_path / "a.html").read_text()
    assert "## Output latents" in (tmp_path / "a.md").read_text()
    assert run(monkeypatch, "audit", policy) == 0
    assert "Rows of the map" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--prompts", "p.txt"], "--prompts needs a model to steer"),
        (["--preferences", "p.jsonl"], "pass --densities and --model as well"),
        (["--labels", "nowhere.json"], "labels nowhere.json cannot be read"),
        (["--densities", "nowhere"], "no densities in nowhere"),
    ],
)
def test_an_audit_that_cannot_be_done(
    folders: tuple[Path, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    line: str,
) -> None:
    assert run(monkeypatch, "audit", str(folders[1]), *arguments) == 2
    told = capsys.readouterr().err
    assert line in told
    assert told.count("\n") == 1


def test_generate(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", MODEL, "--policy", str(folders[1]), "--prompt", PROMPT, "--max-new-tokens", "8"]
    assert run(monkeypatch, "generate", *words, "--compare", "--json") == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["prompt"] == PROMPT
    assert record["steered"]
    assert record["unsteered"]
    assert record["summary"]["prompts"] == 1
    assert 1 <= record["summary"]["tokens_seen"] <= 8


def test_alpha_zero_says_the_same(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", MODEL, "--policy", str(folders[1]), "--prompt", PROMPT, "--alpha", "0", "--compare", "--json"]
    assert run(monkeypatch, "generate", *words, "--max-new-tokens", "8") == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert record["steered"] == record["unsteered"]
    assert record["summary"]["tokens_edited"] == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "no/such/model/here"}, "cannot be loaded"),
        ({"preferences": "nowhere.jsonl"}, "nowhere.jsonl"),
        ({"input-sae": "nowhere"}, "is no folder"),
        ({"input-sae": "no-such-release:layer_0"}, "no-such-release"),
        ({"input-layer": "3"}, "trained on layer 1"),
        ({"dtype": "float12"}, "float12"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used: "),
        ({"device": "gpu"}, "device 'gpu' cannot be used: "),
    ],
    ids=str,
)
def test_bad_collections_end_with_one_line(
    changes: dict[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(monkeypatch, *collect_arguments(tmp_path / "out", **changes)) == 2
    assert_one_line(capsys.readouterr().err, message)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gate-percentile": "101"}, "gate_percentile is 101"),
        ({"gate-rule": "gt"}, "gate_rule is 'gt'"),
        ({"k-diff": "100000"}, "k_diff is 100000"),
        ({"alpha": "-1"}, "alpha is -1"),
        ({"edit": "remove"}, "edit is 'remove'"),
        ({"input-sae": str(sae_folder("output"))}, "SAE"),
    ],
    ids=str,
)
def test_bad_fits_end_with_one_line(
    changes: dict[str, str],
    message: str,
    folders: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    capsys.readouterr()
    assert run(monkeypatch, *fit_arguments(folders[0], tmp_path / "out", **changes)) == 2
    assert_one_line(capsys.readouterr().err, message)


def test_fit_by_ridge_says_how_well_it_predicts(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"estimator": "ridge", "features": "40", "folds": "3", "k-diff": "9"}
    capsys.readouterr()
    assert run(monkeypatch, *fit_arguments(folders[0], tmp_path / "out", **options)) == 0
    record = json.loads(capsys.readouterr().out)
    expected = dspa.cross_validated_agreement(
        dspa.DensityStore.open(folders[0]), folds=3, k_diff=9, edit="ablate", estimator="ridge", features=40
    )
    assert (record["features"], record["estimator"], record["triples"]) == (40, "ridge", 12)
    assert (record["agreement"], record["agreement_half_width"]) == (expected.mean, expected.half_width)
    fitted = dspa.SteeringPolicy.from_pretrained(tmp_path / "out").conditional_map
    assert fitted.options == dspa.FitOptions(estimator="ridge", features=40, entries_per_side=32)


def test_altered_policy_ends_with_one_line(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in folders[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    file = tensors_file(tmp_path)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    words = ["--model", MODEL, "--policy", str(tmp_path), "--prompt", PROMPT]
    assert run(monkeypatch, "generate", *words) == 2
    assert_one_line(capsys.readouterr().err, "altered")


def test_installed_command_prints_help() -> None:
    command = Path(sys.executable).parent / "dspa"
    result = subprocess.run([command, "--help"], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0
    assert all(name in result.stdout for name in ("demo", "collect", "fit", "generate"))


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"dspa {__version__}\n"


def assert_one_line(text: str, message: str) -> None:
    """The last line is ours and names the trouble; no traceback comes with it."""
    lines = text.strip().splitlines()
    assert lines[-1].startswith("error: ")
    assert message in lines[-1]
    assert "Traceback" not in text


@pytest.mark.long
def test_fsrl_train_then_generate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", MODEL, "--preferences", str(triples_file()), "--sae", str(sae_folder("output")), "--limit", "8"]
    words += ["--out", str(tmp_path), "--epochs", "2", "--pairs-per-step", "4", "--no-edit-bos", "--json"]
    assert run(monkeypatch, "fsrl", "train", *words) == 0
    record = json.loads(capsys.readouterr().out)
    assert (record["triples"], record["steps"], record["best_step"]) == (8, 4, 4)
    words = ["--model", MODEL, "--policy", str(tmp_path), "--prompt", PROMPT, "--max-new-tokens", "4", "--json"]
    assert run(monkeypatch, "generate", *words) == 0
    (answer,) = json.loads(capsys.readouterr().out)
    assert answer["summary"]["tokens_edited"] > 4


@pytest.mark.parametrize(
    ("option", "value"), [("activation", "gelu"), ("l1-over", "rows"), ("edit-positions", "some"), ("epochs", "0")]
)
def test_fsrl_train_refuses_bad_options(
    option: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", MODEL, "--preferences", str(triples_file()), "--sae", str(sae_folder("output")), "--limit", "2"]
    assert run(monkeypatch, "fsrl", "train", *words, "--out", str(tmp_path), f"--{option}", value) == 2
    (line,) = [each for each in capsys.readouterr().err.splitlines() if each.startswith("error:")]
    assert f"{option.replace('-', '_')} is" in line


def test_a_wrong_name_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither the densities nor the SAEs have to be there."""
    for changes, message in (({"edit": "ablte"}, "edit is 'ablte'"), ({"edit-positions": "last"}, "edit_positions is")):
        assert run(monkeypatch, *fit_arguments(tmp_path / "none", tmp_path / "out", **changes)) == 2
        assert_one_line(capsys.readouterr().err, message)


def test_an_interrupted_collection_says_how_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("dspa.offline.collection.collect", interrupt)
    assert run(monkeypatch, *collect_arguments(tmp_path / "out")) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_help_prints_no_long_fraction(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "flops", "--help") == 0
    shown = capsys.readouterr().out
    assert "1/3" in shown
    assert "0.333" not in shown


def test_explain(
    folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["explain", "--model", MODEL, "--policy", str(folders[1]), "--prompt", PROMPT]
    capsys.readouterr()
    assert run(monkeypatch, *words, "--json") == 0
    (record,) = json.loads(capsys.readouterr().out)
    assert len(record["rows"]) == 32
    assert len(record["edits"]) == 16
    assert run(monkeypatch, *words) == 0
    assert "Latents to be edited" in capsys.readouterr().out
