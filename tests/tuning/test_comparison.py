"""Answers side by side: what `generate` says under each policy, with the tokens that were edited marked."""

from __future__ import annotations

import io
import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from naive_generation import generate, naive_generate, naive_lists
from rich.console import Console
from tiny_models import OUTPUT_LAYER, tiny_model, tiny_policy, tiny_tokenizer

from dspa.errors import InvalidInputError
from dspa.online.steering import steer
from dspa.online.trace import TracedEdit
from dspa.tuning.comparison import Answer, AnswerToken, ComparedPrompt, Comparison, compare
from dspa.util.texts import read_texts

MODEL: Any = tiny_model("llama")
TOKENIZER: Any = tiny_tokenizer()
POLICIES = {"weak": tiny_policy(MODEL, alpha=0.1, k_diff=1, edit="ablate"), "strong": tiny_policy(MODEL, alpha=0.9)}
PROMPTS = ["w10 w11 w12", "w20 w21 w22 w23"]


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(MODEL, TOKENIZER, POLICIES, PROMPTS, max_new_tokens=6)


def test_answers_are_what_a_naive_loop_says(comparison: Comparison) -> None:
    for prompt, compared in zip(PROMPTS, comparison.prompts, strict=True):
        ids = TOKENIZER.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)[
            "input_ids"
        ]
        assert [answer.policy for answer in compared.answers] == ["unsteered", "weak", "strong"]
        expected = [generate(MODEL, [ids], 6)[0]]
        expected += [naive_generate(MODEL, policy, [ids], 6)[0] for policy in POLICIES.values()]
        for answer, new in zip(compared.answers, expected, strict=True):
            assert answer.text == TOKENIZER.decode(new, skip_special_tokens=True)
            assert len(answer.tokens) == 6


def test_a_token_is_marked_by_the_edit_of_the_state_that_chose_it(comparison: Comparison) -> None:
    ids = TOKENIZER.apply_chat_template([{"role": "user", "content": PROMPTS[0]}], add_generation_prompt=True)[
        "input_ids"
    ]
    for answer in comparison.prompts[0].answers[1:]:
        policy = POLICIES[answer.policy]
        with steer(MODEL, policy, trace=True) as steering:
            generate(MODEL, [ids], 6)
        traced = {token.position: token.edits for token in steering.trace().sequences[0].tokens}
        assert [token.edits for token in answer.tokens] == [traced[len(ids) - 1 + at] for at in range(6)]
        listed = {*naive_lists(MODEL, policy, ids)[0], *naive_lists(MODEL, policy, ids)[1]}
        assert {edit.latent for token in answer.tokens for edit in token.edits} <= listed
    assert comparison.prompts[0].answers[0].edited == 0
    assert comparison.prompts[0].answers[2].edited > comparison.prompts[0].answers[1].edited


def edit(latent: int = 3) -> TracedEdit:
    return TracedEdit(latent, OUTPUT_LAYER, 1.0, 0.5)


ANSWER = Answer(
    "a<b",
    (
        AnswerToken("One", ()),
        AnswerToken(" two", (edit(),)),
        AnswerToken(" three", (edit(4),)),
        AnswerToken(" <four>", ()),
        AnswerToken("", (edit(),)),
    ),
)


def test_neighbouring_edits_are_marked_as_one_run() -> None:
    assert [(text, bool(edits), edited) for text, edits, edited in ANSWER.runs()] == [
        ("One", False, False),
        (" ", False, False),
        ("two three", True, True),
        (" <four>", False, False),
    ]
    console = Console(file=io.StringIO(), width=80)
    Comparison((ComparedPrompt("[red]p", (ANSWER,)),)).print(console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "One «two three» <four>" in text
    assert "[red]p" in text


class Marks(HTMLParser):
    """What a page marks, and its text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.marked: list[tuple[str, str]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "mark":
            self.marked.append((dict(attrs)["title"] or "", ""))
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "mark":
            title, text = self.marked[-1]
            self.marked[-1] = (title, text + data)


def test_the_page_marks_tokens_and_says_what_was_edited() -> None:
    page = Marks()
    page.feed(Comparison((ComparedPrompt("p & q", (ANSWER,)),)).to_html())
    assert page.open == []
    assert page.marked == [("3: 1 → 0.5", "two"), ("4: 1 → 0.5", "three")]
    assert "One two three <four>" in page.text
    assert "a<b" in page.text
    assert "p & q" in page.text


def test_json_has_everything(comparison: Comparison) -> None:
    records = json.loads(comparison.to_json())
    assert [record["prompt"] for record in records] == PROMPTS
    assert records[0]["answers"][2]["text"] == comparison.prompts[0].answers[2].text
    assert any(token["edits"] for token in records[0]["answers"][2]["tokens"])


def test_sampled_answers_share_their_noise() -> None:
    same = {"a": POLICIES["strong"], "b": POLICIES["strong"].with_options(sign_guard=False)}
    found = compare(MODEL, TOKENIZER, same, PROMPTS[:1], sample=True, seed=3, max_new_tokens=8, unsteered=False)
    a, b = found.prompts[0].answers
    assert a.tokens == b.tokens


def test_what_cannot_be_compared_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="nothing to compare"):
        compare(MODEL, TOKENIZER, {}, PROMPTS, unsteered=False)
    with pytest.raises(InvalidInputError, match="max_new_tokens is 0"):
        compare(MODEL, TOKENIZER, POLICIES, PROMPTS, max_new_tokens=0)
    with steer(MODEL, POLICIES["weak"]), pytest.raises(InvalidInputError, match="is steered"):
        compare(MODEL, TOKENIZER, POLICIES, PROMPTS)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\n\n two \n", ["one", " two "]),
        ("a.jsonl", '{"prompt": "one"}\n{"prompt": [{"role": "user", "content": "two"}]}\n', ["one", "two"]),
    ],
)
def test_texts_are_lines_or_a_column(name: str, content: str, expected: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    assert read_texts(tmp_path / name, "prompt") == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "holds no text"), ('{"prompt": 3}', ":1 has no 'prompt'"), ('{"prompt": "a"}\n{}', ":2 has no 'prompt'")],
)
def test_texts_that_cannot_be_read_are_refused(content: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    with pytest.raises(InvalidInputError, match=words):
        read_texts(tmp_path / "a.jsonl", "prompt")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read_texts(tmp_path / "none.txt", "prompt")
