"""Each script of examples/ runs on the organism, and prints what the package computes."""

from __future__ import annotations

import re
import runpy
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import dspa
from dspa import organism

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
MOST_LINES = 60
PROMPT = "My snowball is broken. How do I fix it?"


@contextmanager
def arguments(*values: object) -> Iterator[None]:
    """The command line of a script."""
    before = sys.argv
    sys.argv = ["example", *map(str, values)]
    try:
        yield
    finally:
        sys.argv = before


def run(name: str, *values: object) -> None:
    with arguments(*values):
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first example wrote its policy."""
    out = tmp_path_factory.mktemp("examples")
    run("first_policy.py", "--triples", 50, "--out", out)
    return out


@pytest.fixture(scope="module")
def policy(folder: Path) -> Path:
    return folder / "policy"


@pytest.fixture(scope="module")
def model() -> Any:
    return organism.load_model()[0]


def respond(model: Any) -> str:
    tokenizer = organism.load_model()[1]
    inputs: Any = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    output = model.generate(**inputs, do_sample=False, max_new_tokens=64)
    return str(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


@pytest.fixture(scope="module")
def expected(model: Any, policy: Path) -> dict[str, str]:
    """Greedy responses to the scripts' prompt, each policy alone."""
    published = dspa.SteeringPolicy.from_pretrained(policy)
    policies: dict[str, dspa.Policy] = {
        "published": published,
        "stronger": dspa.SteeringPolicy.from_pretrained(policy, edit="both", alpha=0.3),
        "static": dspa.StaticPolicy.from_mean_difference(published),
    }
    responses = {"unsteered": respond(model)}
    for name, one in policies.items():
        with dspa.steer(model, one):
            responses[name] = respond(model)
    return responses


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda script: script.name)
def test_scripts_are_short_and_use_public_names(script: Path) -> None:
    text = script.read_text()
    assert len(text.splitlines()) <= MOST_LINES
    assert text.startswith('"""')
    assert set(re.findall(r"^(?:from|import) (dspa[\w.]*)", text, re.MULTILINE)) - {"dspa.evaluation"} == {"dspa"}
    assert script.name in Path(__file__).read_text()  # each one is run below


@pytest.mark.long
def test_first_policy(folder: Path, expected: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    run("first_policy.py", "--triples", 50, "--out", folder)  # the densities are there already
    printed = capsys.readouterr().out
    assert f"unsteered: {expected['unsteered']}\n" in printed
    assert f"steered: {expected['published']}\n" in printed
    assert re.search(r"prompts 1, tokens seen [1-9]\d*, edited [1-9]\d*", printed)


@pytest.mark.long
def test_rows(policy: Path, expected: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    run("rows.py", "--policy", policy)
    printed = capsys.readouterr().out
    for name, response in expected.items():
        assert f"{name}: {response}\n" in printed
    assert len(set(expected.values())) >= 3


@pytest.mark.long
def test_trace_plot(policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib", reason="the heat map needs dspa[plot]")
    picture = tmp_path / "made" / "trace.png"
    run("trace_plot.py", "--policy", policy, "--png", picture)
    printed = capsys.readouterr().out
    assert "Steering trace" in printed
    assert re.search(r"most latents edited: [1-9]\d*, at position \d+", printed)
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_score_lm_eval(
    policy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("lm_eval", reason="scoring with lm-eval needs dspa[examples]")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path)
    run("score_lm_eval.py", "--policy", policy, "--limit", 8)
    printed = capsys.readouterr().out
    shares = [float(share) for share in re.findall(r"chosen preferred ([01]\.\d{3})", printed)]
    assert len(shares) == 2
    assert all(share * 8 == round(share * 8) for share in shares)


@pytest.mark.long
def test_serve_openai(policy: Path, expected: dict[str, str], capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("openai", reason="the server needs dspa[serve]")
    pytest.importorskip("uvicorn", reason="the server needs dspa[serve]")
    run("serve_openai.py", "--policy", policy)
    printed = capsys.readouterr().out
    assert f"model: {expected['unsteered']}\n" in printed
    assert f"model@kind: {expected['published']}\n" in printed
