"""Files that people bring: labels as neuronpedia.org exports them, and prompts. The rule where there is no label."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import tiny_model, tiny_policy, tiny_tokenizer

from dspa import InvalidInputError, MismatchError, audit
from dspa.auditing.classes import EditedTokens, token_kinds
from dspa.auditing.forward import Decoding
from dspa.auditing.labels import Label, read_labels
from dspa.auditing.prompts import read_prompts, tokenise

# As exported: the index is a string in some files and a number in others, and a latent may have several explanations.
EXPORTED: list[dict[str, Any]] = [
    {
        "modelId": "gemma-2-2b",
        "layer": "24-gemmascope-res-16k",
        "index": "3",
        "description": " polite closings ",
        "explanationModelName": "gpt-4o-mini",
        "typeName": "oai_token-act-pair",
        "embedding": [0.25, -0.5],
    },
    {"index": 7, "description": "dates", "class": "content"},
    {"index": "3", "description": "another explanation of the same latent"},
]
LABELS = {3: Label("polite closings", None), 7: Label("dates", "content")}


def lines(entries: list[Any]) -> bytes:
    return b"".join(json.dumps(entry).encode() + b"\n" for entry in entries)


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(EXPORTED).encode(),
        json.dumps({"modelId": "gemma-2-2b", "explanationsCount": 3, "explanations": EXPORTED}).encode(),
        lines(EXPORTED),
        gzip.compress(lines(EXPORTED)),
    ],
    ids=["list", "object", "lines", "gzip"],
)
def test_labels(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "labels"
    file.write_bytes(content)
    assert read_labels(file) == LABELS


def test_one_label_alone(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_bytes(lines(EXPORTED[1:2]))
    assert read_labels(file) == {7: Label("dates", "content")}


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "holds no label"),
        (b"[]", "holds no label"),
        (b"3", "holds no list of labels"),
        (b'{"labels": []}', "holds no list of labels"),
        (b'{"index": 1, "description": "a"}\nnonsense\n', ":2 is not JSON"),
        (b'[{"index": -1, "description": "a"}]', "entry 0 is no label"),
        (b'[{"index": true, "description": "a"}]', "entry 0 is no label"),
        (b'[{"index": 1, "description": null}]', "entry 0 is no label"),
        (b'[{"index": 1, "description": "a", "class": "tone"}]', "class 'tone'; expected discourse, style, content"),
        (b"\x1f\x8bnonsense", "cannot be read"),
    ],
)
def test_labels_that_cannot_be_used(tmp_path: Path, content: bytes, line: str) -> None:
    file = tmp_path / "labels"
    file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=line) as caught:
        read_labels(file)
    assert "\n" not in str(caught.value)


def test_labels_of_another_sae(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    file.write_bytes(lines(EXPORTED))
    assert read_labels(file, 8, "gemma-2-2b/24-gemmascope-res-16k") == LABELS
    with pytest.raises(MismatchError, match=r"labels.jsonl:2 labels latent 7; this SAE's are 0 to 6"):
        read_labels(file, 7)
    with pytest.raises(MismatchError, match=r":1 is of gemma-2-2b/24-gemmascope-res-16k; expected labels of gemma"):
        read_labels(file, 8, "gemma-2-2b/23-gemmascope-res-16k")


def test_labels_decide_before_the_rule(tmp_path: Path) -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    policy = tiny_policy(model)
    arguments: dict[str, Any] = {"prompts": ["w10 w11", "w12 w13 w14"], "decoding": Decoding(max_new_tokens=6)}
    plain = audit(policy, model, tokenizer, **arguments)
    edited = [latent for latent in plain.latents if latent.use is not None and latent.use.tokens_edited]
    assert {latent.class_by for latent in edited} == {"rule"}
    first, second = edited[0].latent, edited[1].latent
    file = tmp_path / "labels.json"
    file.write_bytes(
        lines([{"index": first, "description": "x", "class": "content"}, {"index": second, "description": "y"}])
    )
    labelled = audit(policy, model, tokenizer, labels=file, **arguments)
    told = labelled.latent(first)
    assert (told.label, told.latent_class, told.class_by) == ("x", "content", "label")
    told = labelled.latent(second)
    assert (told.label, told.latent_class, told.class_by) == ("y", plain.latent(second).latent_class, "rule")
    assert labelled.classes is not None
    assert edited[0].use is not None
    assert labelled.classes.by_label == pytest.approx(edited[0].use.edit_share)
    assert labelled.classes.by_rule == pytest.approx(1 - edited[0].use.edit_share)
    assert sum(labelled.classes.shares.values()) == pytest.approx(1)
    for name in ("discourse", "style", "content"):
        mine = sum(x.use.edit_share for x in labelled.latents if x.use is not None and x.latent_class == name)
        assert labelled.classes.shares[name] == pytest.approx(mine)

    of_map = audit(policy, labels=file).classes
    assert of_map is not None
    assert of_map.of == "mass of the map"
    assert plain.latent(first).map is not None
    assert of_map.shares["content"] == pytest.approx(plain.latent(first).map.share)  # type: ignore[union-attr]
    assert audit(policy).classes is None


def test_kinds_of_tokens() -> None:
    texts = ["<bos>", " My", " cat", " sat", ".", "<end>", " Yes", ",", " my", " Cat", "!", " So", "\n", "it"]
    special = [text.startswith("<") for text in texts]
    kinds = token_kinds(texts, special, prompt_tokens=6)
    structural = {text for text, on in zip(texts, kinds.structural, strict=True) if on}
    assert structural == {"<bos>", " My", ".", "<end>", " Yes", ",", "!", " So", "\n", "it"}
    assert [text for text, on in zip(texts, kinds.repeated, strict=True) if on] == [" my", " Cat"]


@pytest.mark.parametrize(
    ("edited", "structural", "repeated", "prompts", "all_prompts", "expected"),
    [
        (0, 0, 0, 0, 20, None),
        (10, 5, 0, 9, 20, "discourse"),
        (10, 4, 3, 9, 20, "content"),
        (10, 4, 2, 9, 20, "style"),
        (10, 4, 2, 1, 20, "content"),
        (10, 4, 2, 2, 20, "style"),
        (10, 4, 2, 1, 9, "style"),
    ],
)
def test_the_rule(
    edited: int, structural: int, repeated: int, prompts: int, all_prompts: int, expected: str | None
) -> None:
    assert EditedTokens(edited, structural, repeated, prompts).decide(all_prompts) == expected


def test_prompts_of_files(tmp_path: Path) -> None:
    text, records = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    text.write_text("w10 w11\n\nw12\n")
    conversation = [{"role": "user", "content": "w10"}]
    records.write_bytes(lines([{"prompt": "w10 w11", "kind": "k"}, {"prompt": conversation}, "w12"]))
    assert read_prompts(text) == ["w10 w11", "w12"]
    assert read_prompts(records) == ["w10 w11", conversation, "w12"]
    assert read_prompts(records, limit=1) == ["w10 w11"]
    tokenizer = tiny_tokenizer()
    chat, plain = (tokenise(read_prompts(records), tokenizer, chat) for chat in (True, False))
    assert tokenizer.decode(list(chat[0].ids)) == "<bos> user w10 w11 assistant"
    assert tokenizer.decode(list(chat[1].ids)) == tokenizer.decode(list(plain[1].ids)) == "<bos> user w10 assistant"
    assert tokenizer.decode(list(plain[0].ids)) == "w10 w11"
    assert [prompt.text for prompt in chat] == ["w10 w11", "w10", "w12"]


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        ("p.txt", b"\n\n", "holds no prompt"),
        ("p.txt", b"ok\n\xff\n", ":2 is not UTF-8"),
        ("p.jsonl", b'{"prompt": "a"}\n{\n', ":2 is not JSON"),
        ("p.jsonl", b'{"text": "a"}\n', ":1 has no prompt"),
        ("p.jsonl", b'{"prompt": []}\n', ":1 has no prompt"),
        ("p.jsonl", b'{"prompt": [1]}\n', ":1 has no prompt"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path: Path, name: str, content: bytes, line: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInputError, match=line):
        read_prompts(tmp_path / name)


def test_a_file_of_prompts_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot be read: No such file"):
        read_prompts(tmp_path / "nowhere.txt")
