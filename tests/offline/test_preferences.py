"""Every source and every column convention gives the same triples, and a bad row is named."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from dspa.errors import InvalidInputError
from dspa.offline.chat_template import chat_prompt, chat_response, plain_prompt, special_token_ids, uncounted_prompt_ids
from dspa.offline.preferences import PreferenceTriples, load_preferences, split_implicit_prompt

GEMMA = """{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('No system role here') }}{% endif %}
{%- for m in messages -%}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}
{{ m.content | trim }}<end_of_turn>
{% endfor %}{% if add_generation_prompt %}<start_of_turn>model
{% endif %}"""

LLAMA = """{% for m in messages %}{{ bos_token if loop.first }}<|start|>{{ m.role }}<|end|>

{{ m.content | trim }}<|eot|>{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>

{% endif %}"""

QWEN = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if loop.last and m.role == 'assistant' %}<think>
{{ m.reasoning_content }}
</think>

{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""

# Opens a thinking block in the prompt and drops it from the history: no response of a row could follow that prompt.
STRIPPING = """{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}
{%- if add_generation_prompt %}<assistant><think>{% endif %}"""


def make_tokenizer(
    template: str | None, special: list[str], *, bos: str | None = "<bos>", eos: str = "<eos>"
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with two merges and, like the real ones, a BOS put before every plain text."""
    vocabulary = {symbol: index for index, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    for merged in ("Ġb", "in", ".<"):
        vocabulary[merged] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, merges=[("Ġ", "b"), ("i", "n"), (".", "<")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.chat_template = template
    if bos is not None:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
        )
    return tokenizer


TOKENIZERS = {
    "gemma": make_tokenizer(GEMMA, ["<start_of_turn>", "<end_of_turn>"]),
    "llama": make_tokenizer(LLAMA, ["<|start|>", "<|end|>", "<|eot|>"]),
    "qwen": make_tokenizer(QWEN, ["<|im_start|>", "<|im_end|>"], bos=None, eos="<|im_end|>"),
}
GEMMA_TOKENIZER = TOKENIZERS["gemma"]
GPT2_TOKENIZER = make_tokenizer(None, [], bos="<|endoftext|>", eos="<|endoftext|>")


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return TOKENIZERS[request.param]


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


PAIRS = [
    ("What colour is the sky?", "It is blue.", "No idea."),
    ("Name an animal.\nOne only.", "A goat é", "Zebra, bee, 雨"),
]

# The same preferences as strings ...
STANDARD = {
    "explicit": [{"prompt": p, "chosen": f" {c}", "rejected": f" {r}"} for p, c, r in PAIRS],
    "implicit": [{"chosen": f"{p} {c}", "rejected": f"{p} {r}"} for p, c, r in PAIRS],
    "null prompt": [{"prompt": None, "chosen": f"{p} {c}", "rejected": f"{p} {r}"} for p, c, r in PAIRS],
}
# ... and as conversations.
CONVERSATIONAL = {
    "explicit": [{"prompt": [user(p)], "chosen": [assistant(c)], "rejected": [assistant(r)]} for p, c, r in PAIRS],
    "implicit": [{"chosen": [user(p), assistant(c)], "rejected": [user(p), assistant(r)]} for p, c, r in PAIRS],
    "prompt text": [{"prompt": p, "chosen": [assistant(c)], "rejected": [assistant(r)]} for p, c, r in PAIRS],
    "prompt repeated": [
        {"prompt": [user(p)], "chosen": [user(p), assistant(c)], "rejected": [user(p), assistant(r)]}
        for p, c, r in PAIRS
    ],
    "null keys": [
        {
            "prompt": [user(p)],
            "chosen": [{**user(p), "reasoning_content": None}, assistant(c)],
            "rejected": [user(p), {**assistant(r), "reasoning_content": None}],
        }
        for p, c, r in PAIRS
    ],
    "ultrafeedback": [
        {
            "prompt": p,
            "prompt_id": "0f",
            "chosen": [user(p), assistant(c)],
            "rejected": [user(p), assistant(r)],
            "messages": [user(p), assistant(c)],
            "score_chosen": 8.5,
            "score_rejected": 3.0,
        }
        for p, c, r in PAIRS
    ],
}


def ids_of(triples: PreferenceTriples) -> list[tuple[tuple[int, ...], ...]]:
    return [(triple.prompt, triple.chosen, triple.rejected) for triple in triples]


def text_of(tokenizer: PreTrainedTokenizerFast, ids: tuple[int, ...]) -> str:
    return str(tokenizer.decode(list(ids)))


def write_json_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def save_to_disk(path: Path, table: Any) -> Path:
    table.save_to_disk(path)
    return path


# --- Columns and sources ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", STANDARD.values(), ids=STANDARD)
def test_standard_columns(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> None:
    eos = (tokenizer.eos_token_id,)
    expected = [
        (
            tuple(tokenizer(p).input_ids),
            tuple(tokenizer(f" {c}", add_special_tokens=False).input_ids) + eos,
            tuple(tokenizer(f" {r}", add_special_tokens=False).input_ids) + eos,
        )
        for p, c, r in PAIRS
    ]
    assert ids_of(load_preferences(rows, tokenizer)) == expected


@pytest.mark.parametrize("rows", CONVERSATIONAL.values(), ids=CONVERSATIONAL)
def test_conversational_columns(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> None:
    triples = load_preferences(rows, tokenizer)
    for triple, (prompt, chosen, rejected) in zip(triples, PAIRS, strict=True):
        online: Any = tokenizer.apply_chat_template([user(prompt)], add_generation_prompt=True, tokenize=True)
        assert list(triple.prompt) == online["input_ids"]
        for response, text in ((triple.chosen, chosen), (triple.rejected, rejected)):
            conversation = tokenizer.apply_chat_template([user(prompt), assistant(text)], tokenize=False)
            assert text_of(tokenizer, triple.prompt + response) == str(conversation).rstrip()


SOURCES = {
    "jsonl": lambda folder, rows: write_json_lines(folder / "p.jsonl", rows),
    "json, str": lambda folder, rows: str(write_json_lines(folder / "p.json", rows)),
    "parquet": lambda folder, rows: write_parquet(folder / "p.parquet", rows),
    "dataset": lambda folder, rows: datasets.Dataset.from_list(rows),
    "streamed": lambda folder, rows: datasets.Dataset.from_list(rows).to_iterable_dataset(),
    "splits": lambda folder, rows: datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    ),
    "saved": lambda folder, rows: save_to_disk(folder / "d", datasets.Dataset.from_list(rows)),
    "saved splits": lambda folder, rows: save_to_disk(
        folder / "s", datasets.DatasetDict({"train_prefs": datasets.Dataset.from_list(rows)})
    ),
    "generator": lambda folder, rows: (row for row in rows),
}


@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("rows", [STANDARD["explicit"], CONVERSATIONAL["ultrafeedback"]], ids=["standard", "chat"])
def test_every_source_gives_the_same_triples(tmp_path: Path, make: Any, rows: list[dict[str, Any]]) -> None:
    expected = load_preferences(rows, GEMMA_TOKENIZER)
    loaded = load_preferences(make(tmp_path, rows), GEMMA_TOKENIZER)
    assert ids_of(loaded) == ids_of(expected)
    assert loaded.fingerprint() == expected.fingerprint()


HUB_SCRIPT = """
import json, sys
from test_preferences import GEMMA_TOKENIZER
from dspa.errors import DspaError
from dspa.offline.preferences import load_preferences
for name, split in json.loads(sys.argv[1]):
    try:
        triples = load_preferences(name, GEMMA_TOKENIZER, split=split)
        print(json.dumps([triples.fingerprint(), triples[0].source]))
    except DspaError as error:
        print(json.dumps([type(error).__name__, str(error)]))
"""


@pytest.mark.long
def test_hub_name_offline(tmp_path: Path) -> None:
    """A repository in the hub cache is found by name without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub" / "datasets--Org--feedback"
    data = repository / "snapshots" / commit / "data"
    data.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    rows = CONVERSATIONAL["ultrafeedback"]
    for split in ("train_prefs", "test_prefs"):
        write_parquet(data / f"{split}-00000-of-00001.parquet", rows if split == "train_prefs" else rows[:1])
    files = "".join(f"  - split: {s}\n    path: data/{s}-*\n" for s in ("train_prefs", "test_prefs"))
    (data.parent / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{files}---\n")

    names = [("Org/feedback", "train"), ("Org/feedback", "test_prefs"), ("Org/feedback", "dev"), ("Org/none", "train")]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    for variable in ("HF_HUB_CACHE", "HF_DATASETS_CACHE", "HUGGINGFACE_HUB_CACHE"):
        environment.pop(variable, None)
    tests = Path(__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(tests), str(tests / "offline"), str(tests.parent)])
    run = subprocess.run(
        [sys.executable, "-c", HUB_SCRIPT, json.dumps(names)], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    train, test, no_split, no_dataset = map(json.loads, run.stdout.splitlines())
    assert train == [load_preferences(rows, GEMMA_TOKENIZER).fingerprint(), "Org/feedback[0]"]
    assert test[0] == load_preferences(rows[:1], GEMMA_TOKENIZER).fingerprint()
    assert no_split[1] == "Org/feedback: no split 'dev'; there are train_prefs, test_prefs"
    assert no_dataset[0] == "InvalidInputError"
    assert no_dataset[1].startswith("Org/none: not a local file, folder or hub dataset that can be read")
    assert "\n" not in no_dataset[1]


def test_rows_are_named_by_line_or_index(tmp_path: Path) -> None:
    rows = STANDARD["explicit"]
    lines = write_json_lines(tmp_path / "p.jsonl", rows)
    lines.write_text("\ufeff" + lines.read_text(encoding="utf-8").replace("\n", "\n\n"), encoding="utf-8")
    assert [t.source for t in load_preferences(lines, GEMMA_TOKENIZER)] == [f"{lines}:1", f"{lines}:3"]
    table = write_parquet(tmp_path / "p.parquet", rows)
    assert [t.source for t in load_preferences(table, GEMMA_TOKENIZER)] == [f"{table}[0]", f"{table}[1]"]
    assert [t.source for t in load_preferences(rows, GEMMA_TOKENIZER)] == ["dataset[0]", "dataset[1]"]


# --- Token ids --------------------------------------------------------------------------------------------------------


def test_one_bos(tokenizer: PreTrainedTokenizerFast) -> None:
    bos = tokenizer.bos_token_id
    rendered = str(tokenizer.apply_chat_template([user("Hi")], tokenize=False, add_generation_prompt=True))
    for prompt in (
        chat_prompt(tokenizer, [user("Hi")]),
        plain_prompt(tokenizer, "Hi"),
        plain_prompt(tokenizer, rendered),
    ):
        assert prompt.count(bos) == (bos is not None)
        assert bos is None or prompt[0] == bos


@pytest.mark.parametrize(
    ("response", "endings"), [("A", 1), ("A<eos>", 1), ("A<end_of_turn>", 1), ("A<end_of_turn>\n", 1)]
)
def test_eos_ends_a_plain_response_once(response: str, endings: int) -> None:
    rows = [{"prompt": "Q", "chosen": response, "rejected": "B"}]
    chosen = load_preferences(rows, GEMMA_TOKENIZER)[0].chosen
    assert chosen[-1] == GEMMA_TOKENIZER.eos_token_id
    assert chosen.count(GEMMA_TOKENIZER.eos_token_id) == endings


@pytest.mark.parametrize(
    ("name", "options", "message", "prompt_end", "response"),
    [
        ("gemma", {}, assistant("Blue. "), "<start_of_turn>model\n", "Blue.<end_of_turn>"),
        ("llama", {}, assistant("Blue."), "<|end|>\n\n", "Blue.<|eot|>"),
        ("qwen", {}, assistant("Blue."), "assistant\n", "<think>\n\n</think>\n\nBlue.<|im_end|>"),
        (
            "qwen",
            {},
            {**assistant("Blue."), "reasoning_content": "Rain?"},
            "assistant\n",
            "<think>\nRain?\n</think>\n\nBlue.<|im_end|>",
        ),
        ("qwen", {"enable_thinking": False}, assistant("Blue."), "</think>\n\n", "Blue.<|im_end|>"),
    ],
)
def test_what_the_template_adds(
    name: str, options: dict[str, Any], message: dict[str, Any], prompt_end: str, response: str
) -> None:
    tokenizer = TOKENIZERS[name]
    prompt = chat_prompt(tokenizer, [user("Sky?")], **options)
    assert text_of(tokenizer, prompt).endswith(prompt_end)
    assert text_of(tokenizer, chat_response(tokenizer, [user("Sky?")], message, **options)) == response
    row = {"prompt": [user("Sky?")], "chosen": [message], "rejected": [assistant("Red.")]}
    triple = load_preferences([row], tokenizer, chat_template_kwargs=options)[0]
    assert (triple.prompt, text_of(tokenizer, triple.chosen)) == (prompt, response)


def test_earlier_turns_belong_to_the_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    history = [user("Hi"), assistant("Hello."), user("Sky?")]
    row = {"chosen": [*history, assistant("Blue.")], "rejected": [*history, assistant("Blue.")]}  # equal is allowed
    triple = load_preferences([row], tokenizer)[0]
    assert triple.prompt == chat_prompt(tokenizer, history)
    assert triple.chosen == triple.rejected


@given(st.text(min_size=1), st.text(min_size=1))
def test_prompt_is_an_exact_prefix_in_ids_and_text(prompt: str, response: str) -> None:
    row = {"prompt": prompt, "chosen": response, "rejected": f"x{response}"}
    triples = load_preferences([row, {"prompt": "p", "chosen": "c", "rejected": "r"}], GEMMA_TOKENIZER, skip_bad=True)
    if prompt.strip() and response.strip():
        decoded = text_of(GEMMA_TOKENIZER, triples[0].prompt + triples[0].chosen)
        assert decoded == f"<bos>{prompt}{response}<eos>"
    else:
        assert len(triples.skipped) == 1


@given(st.text("ab ", min_size=1), st.text("ab ", min_size=1))
def test_implicit_prompt_rule(chosen: str, rejected: str) -> None:
    prompt, chosen_response, rejected_response = split_implicit_prompt(chosen, rejected)
    assert (prompt + chosen_response, prompt + rejected_response) == (chosen, rejected)
    assert min(len(chosen_response), len(rejected_response)) > 0
    # No longer prompt would do: the responses begin differently, or one would be empty, or a space was moved back.
    assert (
        chosen_response[0] != rejected_response[0]
        or min(len(chosen_response), len(rejected_response)) == 1
        or chosen_response[0] == " "
    )


# --- Which tokens count -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tokenizer", "count_bos", "count_template", "uncounted"),
    [
        (GEMMA_TOKENIZER, False, True, ["<bos>"]),
        (GEMMA_TOKENIZER, True, True, []),
        (GEMMA_TOKENIZER, False, False, ["<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"]),
        (GEMMA_TOKENIZER, True, False, ["<eos>", "<start_of_turn>", "<end_of_turn>"]),
        (TOKENIZERS["qwen"], False, True, []),
        (TOKENIZERS["qwen"], False, False, ["<|im_start|>", "<|im_end|>"]),
        (GPT2_TOKENIZER, False, True, ["<|endoftext|>"]),
    ],
)
def test_uncounted_prompt_tokens(
    tokenizer: PreTrainedTokenizerFast, count_bos: bool, count_template: bool, uncounted: list[str]
) -> None:
    expected = tuple(sorted(tokenizer.get_vocab()[token] for token in uncounted))
    assert uncounted_prompt_ids(tokenizer, count_bos=count_bos, count_template=count_template) == expected
    triples = load_preferences(STANDARD["explicit"], tokenizer, count_bos=count_bos, count_template=count_template)
    assert triples.uncounted_token_ids == expected


@pytest.mark.parametrize(
    ("tokenizer", "rows"),
    [
        (GEMMA_TOKENIZER, STANDARD["explicit"]),
        (GPT2_TOKENIZER, STANDARD["explicit"]),  # BOS and EOS are one: only the end of a response matters here
        *((tokenizer, CONVERSATIONAL["explicit"]) for tokenizer in TOKENIZERS.values()),
    ],
)
def test_count_eos(tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> None:
    for triple in load_preferences(rows, tokenizer):
        assert (triple.chosen_counted, triple.rejected_counted) == (len(triple.chosen), len(triple.rejected))
    for triple in load_preferences(rows, tokenizer, count_eos=False):
        assert triple.chosen_counted == len(triple.chosen) - 1
        assert triple.rejected_counted == len(triple.rejected) - 1
        assert triple.chosen[-1] in special_token_ids(tokenizer)


def test_a_response_that_is_only_its_end_does_not_count() -> None:
    rows = [{"prompt": "p", "chosen": "<end_of_turn>", "rejected": "r"}]
    assert load_preferences(rows, GEMMA_TOKENIZER)[0].chosen_counted == 2
    with pytest.raises(InvalidInputError, match=r"dataset\[0\]: a response has no token that counts"):
        load_preferences(rows, GEMMA_TOKENIZER, count_eos=False)


def test_added_tokens_are_special_only_where_marked_so() -> None:
    tokenizer = make_tokenizer(QWEN, [])
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_tokens(["<|turn|>"], special_tokens=True)
    special = special_token_ids(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|turn|>") in special
    assert tokenizer.convert_tokens_to_ids("<think>") not in special


def test_fingerprint_is_of_ids_and_rules_alone() -> None:
    rows = STANDARD["explicit"]
    triples = load_preferences(rows, GEMMA_TOKENIZER)
    reference = triples.fingerprint()
    with_bad = load_preferences(["bad", *rows], GEMMA_TOKENIZER, skip_bad=True)  # pyright: ignore[reportArgumentType]
    assert with_bad.fingerprint() == reference
    others = [
        dataclasses.replace(triples, triples=(dataclasses.replace(triples[0], chosen_counted=1), triples[1])),
        load_preferences(rows, GEMMA_TOKENIZER, count_bos=True),
        load_preferences(rows, GEMMA_TOKENIZER, count_template=False),
        load_preferences(rows, GEMMA_TOKENIZER, count_eos=False),
        load_preferences(rows[::-1], GEMMA_TOKENIZER),
        triples[:1],
        load_preferences(CONVERSATIONAL["explicit"], GEMMA_TOKENIZER),
    ]
    assert len({reference, *(triples.fingerprint() for triples in others)}) == 1 + len(others)


# --- Bad input --------------------------------------------------------------------------------------------------------

BAD_ROWS: dict[str, tuple[Any, str]] = {
    "no columns": ({}, "no value in column chosen and rejected; found columns none, expected chosen"),
    "other columns": ({"text": "a", "label": 1}, "found columns text, label"),
    "no rejected": ({"prompt": "p", "chosen": "c"}, "no value in column rejected"),
    "null chosen": ({"prompt": "p", "chosen": None, "rejected": "r"}, "no value in column chosen"),
    "not an object": ("text", "a row is an object with columns, found str"),
    "number": ({"prompt": "p", "chosen": 3, "rejected": "r"}, "chosen is int"),
    "mixed": ({"prompt": "p", "chosen": "c", "rejected": [assistant("r")]}, "rejected is list, expected a string"),
    "mixed the other way": ({"prompt": "p", "chosen": [assistant("c")], "rejected": "r"}, "rejected is str"),
    "chat prompt, plain text": ({"prompt": [user("p")], "chosen": "c", "rejected": "r"}, "prompt is list"),
    "prompt number": ({"prompt": 3, "chosen": [assistant("c")], "rejected": [assistant("r")]}, "prompt is int"),
    "list of text": ({"chosen": ["c"], "rejected": ["r"]}, "chosen has a message without a role string"),
    "no content": ({"chosen": [{"role": "user"}], "rejected": []}, "chosen has a message without a content string"),
    "empty prompt": ({"prompt": "", "chosen": "c", "rejected": "r"}, "empty prompt"),
    "blank prompt": ({"prompt": " \n", "chosen": "c", "rejected": "r"}, "empty prompt"),
    "empty chosen": ({"prompt": "p", "chosen": "", "rejected": "r"}, "empty chosen"),
    "empty rejected": ({"prompt": "p", "chosen": "c", "rejected": " "}, "empty rejected"),
    "nothing shared": ({"chosen": "c", "rejected": "r"}, "empty prompt"),
    "equal, implicit": ({"chosen": "abc", "rejected": "abc"}, "chosen and rejected are equal and there is no prompt"),
    "empty list": ({"prompt": [user("p")], "chosen": [], "rejected": []}, "chosen is not one assistant message"),
    "empty message": (
        {"prompt": [user("p")], "chosen": [assistant("c")], "rejected": [assistant(" ")]},
        "empty rejected",
    ),
    "empty user message": ({"prompt": [user("")], "chosen": [assistant("c")], "rejected": [assistant("r")]}, "prompt"),
    "no messages before": ({"chosen": [assistant("c")], "rejected": [assistant("r")]}, "empty prompt"),
    "other conversation": (
        {"chosen": [user("p"), assistant("c")], "rejected": [user("q"), assistant("r")]},
        "chosen is not one assistant message after the prompt",
    ),
    "assistant last": (
        {"prompt": [user("p"), assistant("a")], "chosen": [assistant("c")], "rejected": [assistant("r")]},
        "the prompt ends with an assistant message",
    ),
    "user response": ({"prompt": [user("p")], "chosen": [user("c")], "rejected": [assistant("r")]}, "chosen is not"),
    "system role": (
        {
            "prompt": [{"role": "system", "content": "s"}, user("p")],
            "chosen": [assistant("c")],
            "rejected": [assistant("r")],
        },
        "the chat template refuses the messages: No system role here",
    ),
    "surrogate": ({"prompt": "p\ud800", "chosen": "c", "rejected": "r"}, "prompt is not valid Unicode"),
    "too long": ({"prompt": "p" * 40, "chosen": "c" * 30, "rejected": "r"}, "prompt and response are longer than 64"),
    "only BOS": ({"prompt": "<bos>", "chosen": "c", "rejected": "r"}, "the prompt has no token that counts"),
}


@pytest.mark.parametrize(("row", "reason"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_row(row: Any, reason: str) -> None:
    rows = [*STANDARD["explicit"], row]
    with pytest.raises(InvalidInputError) as error:
        load_preferences(rows, GEMMA_TOKENIZER, max_length=64)
    message = str(error.value)
    assert message.startswith("dataset[2]: ")
    assert reason in message
    assert "\n" not in message

    triples = load_preferences(rows, GEMMA_TOKENIZER, max_length=64, skip_bad=True)
    assert len(triples) == 2
    assert [f"{skipped.source}: {skipped.reason}" for skipped in triples.skipped] == [message]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "p", "chosen":', "not one JSON object per line (Expecting value, column 26)"),
        (b'[{"prompt": "p"}]', "a row is an object with columns, found list"),
        (b'{"prompt": "p\xff"}', "not UTF-8 (byte 14 of the line)"),
        (b"[" * 200_000, "not one JSON object per line"),
        (b"9" * 5_000, "not one JSON object per line"),
        (b'{"prompt": "p", "chosen": "\\ud800", "rejected": "r"}', "chosen is not valid Unicode"),
    ],
    ids=["truncated", "a list", "not UTF-8", "nesting", "number", "surrogate"],
)
def test_bad_line(tmp_path: Path, line: bytes, reason: str) -> None:
    path = write_json_lines(tmp_path / "p.jsonl", STANDARD["explicit"])
    with path.open("ab") as file:
        file.write(line + b"\n" + json.dumps(STANDARD["explicit"][0]).encode())
    with pytest.raises(InvalidInputError) as error:
        load_preferences(path, GEMMA_TOKENIZER)
    assert str(error.value).startswith(f"{path}:3: {reason}")
    triples = load_preferences(path, GEMMA_TOKENIZER, skip_bad=True)
    assert [t.source for t in triples] == [f"{path}:1", f"{path}:2", f"{path}:4"]
    assert [row.source for row in triples.skipped] == [f"{path}:3"]


def test_bad_parquet_row(tmp_path: Path) -> None:
    columns = {name: pa.array([b"a", b"\xff", b"c"]).view(pa.string()) for name in ("prompt", "chosen", "rejected")}
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table(columns), path)
    triples = load_preferences(path, GEMMA_TOKENIZER, skip_bad=True)
    assert [t.source for t in triples] == [f"{path}[0]", f"{path}[2]"]
    assert [(row.source, row.reason) for row in triples.skipped] == [(f"{path}[1]", "not UTF-8")]


def test_template_that_rewrites_the_prompt_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"dataset\[0\]: the chat template renders the prompt differently"):
        load_preferences(CONVERSATIONAL["explicit"], make_tokenizer(STRIPPING, []))


def test_conversation_without_a_template() -> None:
    with pytest.raises(InvalidInputError, match="the tokenizer has no chat template"):
        load_preferences(CONVERSATIONAL["explicit"], GPT2_TOKENIZER)


def test_no_valid_row_names_the_most_frequent_reason() -> None:
    rows = [{"prompt": "", "chosen": "c", "rejected": "r"}] * 2 + [{"prompt": "p", "chosen": "", "rejected": "r"}]
    with pytest.raises(InvalidInputError) as error:
        load_preferences(rows, GEMMA_TOKENIZER, skip_bad=True)
    expected = "dataset: none of the 3 rows is a valid preference; most frequent reason (2): empty prompt"
    assert str(error.value) == expected


def test_bad_sources(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected\n")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    names = write_parquet(tmp_path / "names.parquet", STANDARD["explicit"]).read_bytes()
    (tmp_path / "names.parquet").write_bytes(names.replace(b"prompt", b"pr\xffmpt"))  # not UTF-8
    (tmp_path / "folder").mkdir()
    table: list[tuple[Any, str]] = [
        (tmp_path / "none.jsonl", "none.jsonl: no such file or folder"),
        (str(tmp_path / "none"), "none: no such file or folder"),
        ("none.parquet", "none.parquet: no such file or folder"),
        (tmp_path / "empty.jsonl", "empty.jsonl: no rows"),
        (tmp_path / "p.csv", "expected a file that ends in .jsonl, .json or .parquet"),
        (tmp_path / "broken.parquet", "cannot be read as parquet"),
        (tmp_path / "names.parquet", "cannot be read as parquet"),
        (tmp_path / "folder", "not a folder that can be read"),
        ([], "dataset: no rows"),
        ({"test": []}, "no split 'train'; there are test"),
        (3, "found int"),
    ]
    for source, reason in table:
        with pytest.raises(InvalidInputError) as error:
            load_preferences(source, GEMMA_TOKENIZER)
        assert reason in str(error.value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(("package", "source"), [("pyarrow", "p.parquet"), ("datasets", "folder")])
def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, source: str) -> None:
    write_parquet(tmp_path / "p.parquet", STANDARD["explicit"])
    (tmp_path / "folder").mkdir()
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InvalidInputError, match=rf"needs the package {package}: pip install 'dspa\[data\]'"):
        load_preferences(tmp_path / source, GEMMA_TOKENIZER)


# --- The rest ---------------------------------------------------------------------------------------------------------


def test_limit_counts_triples_and_stops_reading(capsys: pytest.CaptureFixture[str]) -> None:
    def rows() -> Any:
        yield {"prompt": "", "chosen": "c", "rejected": "r"}
        yield from STANDARD["explicit"]
        pytest.fail("read past the limit")

    triples = load_preferences(rows(), GEMMA_TOKENIZER, skip_bad=True, limit=2, progress=True)
    assert (len(triples), len(triples.skipped)) == (2, 1)
    assert capsys.readouterr().out == ""
    with pytest.raises(InvalidInputError, match="limit is 0"):
        load_preferences(STANDARD["explicit"], GEMMA_TOKENIZER, limit=0)


def test_triples_are_an_immutable_sequence() -> None:
    triples = load_preferences(STANDARD["explicit"], GEMMA_TOKENIZER, count_eos=False)
    assert list(triples) == [triples[0], triples[-1]]
    assert list(triples[1:]) == [triples[1]]
    assert triples[1:].count_eos is False
    with pytest.raises(dataclasses.FrozenInstanceError):
        triples[0].prompt = ()  # pyright: ignore[reportAttributeAccessIssue]


def test_import_is_light() -> None:
    heavy = ("datasets", "pyarrow", "transformers")
    script = f"import sys, dspa.offline.preferences; print([m for m in {heavy} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert run.stdout == "[]\n", run.stderr
