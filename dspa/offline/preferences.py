"""Preference triples: a prompt, a chosen and a rejected response, as token ids, from any of the usual sources.

Rows follow TRL's conventions. Columns `chosen` and `rejected`, with or without `prompt`, hold strings ("standard") or
lists of `{"role", "content"}` messages ("conversational"). Without `prompt`, the beginning that `chosen` and
`rejected` share is the prompt. UltraFeedback-binarized is the mixed case: `prompt` is a string, and `chosen` and
`rejected` hold the whole conversation, which is then what counts. Other columns are ignored.

TRL's dataset formats: https://huggingface.co/docs/trl/dataset_formats
"""

from __future__ import annotations

import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspa.errors import InvalidInputError
from dspa.offline.chat_template import (
    Message,
    chat_prompt,
    chat_response,
    plain_prompt,
    plain_response,
    special_token_ids,
    uncounted_prompt_ids,
)
from dspa.offline.triples import PreferenceTriple, PreferenceTriples, SkippedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# A row's name ("prefs.jsonl:17") and its columns, or the error that says why there are none.
_Row = tuple[str, object]


def load_preferences(
    source: str | os.PathLike[str] | Iterable[Mapping[str, Any]] | Mapping[str, Iterable[Mapping[str, Any]]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: str = "train",
    skip_bad: bool = False,
    max_length: int | None = None,
    count_bos: bool = False,
    count_template: bool = True,
    count_eos: bool = True,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    limit: int | None = None,
    progress: bool = False,
    chat: bool | None = None,
) -> PreferenceTriples:
    """Read preference rows and turn them into token ids.

    Args:
        source: a `.jsonl`, `.json` (one object per line) or `.parquet` file; a folder written by
            `Dataset.save_to_disk` or one that `datasets.load_dataset` reads; a `datasets.Dataset`; rows as mappings;
            splits of any of these by name; or the name of a dataset on the Hugging Face hub.
        tokenizer: the model's, with its chat template where rows are conversations.
        split: which split to read where the source has several; `"train"` also finds `"train_prefs"`.
        skip_bad: collect rows that cannot be used in `skipped` instead of raising at the first one.
        max_length: the model's context in tokens; a row whose prompt and longer response exceed it is bad.
        count_bos: whether a prompt's beginning-of-sequence token counts.
        count_template: whether the chat template's special tokens count, see
            `dspa.offline.chat_template.uncounted_prompt_ids`.
        count_eos: whether the end-of-turn and end-of-sequence tokens at the end of a response count.
        chat_template_kwargs: options for the chat template, such as `{"enable_thinking": False}` for Qwen3.
        limit: stop after this many triples.
        progress: show a progress bar on stderr.
        chat: whether rows of plain strings with a prompt are turns of a conversation, to which the chat template is
            applied, as `dspa generate` does. By default they are text as it is; if the tokenizer has a chat template, a
            warning says so.

    Returns:
        The triples in the order of the rows.

    Raises:
        InvalidInputError: the source cannot be found or read; a row cannot be used (file, line and reason); no row can.
    """
    if limit is not None and limit < 1:
        raise InvalidInputError(f"limit is {limit}, expected at least 1")
    name, rows, total = _open(source, split)
    if progress:
        rows = _with_progress(rows, total if limit is None else min(limit, total or limit))

    uncounted = uncounted_prompt_ids(tokenizer, count_bos=count_bos, count_template=count_template)
    uncounted_at_end = frozenset() if count_eos else special_token_ids(tokenizer)
    plain_rows = 0
    triples: list[PreferenceTriple] = []
    skipped: list[SkippedRow] = []
    for row_name, row in rows:
        try:
            if chat:
                row = _as_conversation(row)
            prompt, chosen, rejected = _tokenise(row, tokenizer, chat_template_kwargs or {})
            triple = PreferenceTriple(
                prompt,
                chosen,
                rejected,
                chosen_counted=_count_leading(chosen, uncounted_at_end),
                rejected_counted=_count_leading(rejected, uncounted_at_end),
                source=row_name,
            )
            _check(triple, uncounted, max_length)
        except InvalidInputError as error:
            reason = " ".join(str(error).split())
            if not skip_bad:
                raise InvalidInputError(f"{row_name}: {reason}") from error
            skipped.append(SkippedRow(row_name, reason))
            continue
        triples.append(triple)
        plain_rows += isinstance(row, Mapping) and isinstance(row["chosen"], str)
        if len(triples) == limit:
            break

    if not triples:
        if not skipped:
            raise InvalidInputError(f"{name}: no rows")
        reason, count = Counter(row.reason for row in skipped).most_common(1)[0]
        raise InvalidInputError(
            f"{name}: none of the {len(skipped)} rows is a valid preference; most frequent reason ({count}): {reason}"
        )
    if plain_rows and chat is None and tokenizer.chat_template:
        warnings.warn(
            f"{plain_rows} rows of {name} are plain strings and were read without the chat template, which dspa "
            "generate applies; pass chat=True (--chat) to apply it here, or chat=False and generate with --no-chat",
            stacklevel=2,
        )
    return PreferenceTriples(tuple(triples), uncounted, count_bos, count_template, count_eos, tuple(skipped))


def _as_conversation(row: object) -> object:
    """A row of strings as one of messages; other rows as they are.

    Raises:
        InvalidInputError: if it has no prompt of its own, so that the turns of its text are not known.
    """
    if not isinstance(row, Mapping) or not isinstance(row.get("chosen"), str):
        return row
    if not isinstance(row.get("prompt"), str):
        raise InvalidInputError("strings without a prompt column cannot be made a conversation; pass chat=False")
    chosen, rejected = _text(row["chosen"], "chosen"), _text(row.get("rejected"), "rejected")
    return {
        "prompt": [{"role": "user", "content": _text(row["prompt"], "prompt")}],
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


# --- One row -> prompt and two responses ------------------------------------------------------------------------------


def split_implicit_prompt(chosen: str, rejected: str) -> tuple[str, str, str]:
    """The prompt two texts share, and what is left of each (TRL's rule).

    The prompt is the longest common prefix, without the space it may end in, and never a whole text: both responses
    keep at least one character.
    """
    length = _common_prefix_length(chosen, rejected)
    if chosen[:length].endswith(" "):
        length -= 1
    return chosen[:length], chosen[length:], rejected[length:]


def _common_prefix_length(chosen: Sequence[object], rejected: Sequence[object]) -> int:
    """Number of leading items two sequences share, leaving at least one item of each."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(limit) if chosen[i] != rejected[i]), max(limit, 0))


def _tokenise(
    row: object, tokenizer: PreTrainedTokenizerBase, chat_template_kwargs: Mapping[str, Any]
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    if isinstance(row, InvalidInputError):
        raise row
    if not isinstance(row, Mapping):
        raise InvalidInputError(f"a row is an object with columns, found {type(row).__name__}")
    missing = [column for column in ("chosen", "rejected") if row.get(column) is None]
    if missing:
        raise InvalidInputError(
            f"no value in column {' and '.join(missing)}; found columns {', '.join(map(str, row)) or 'none'}, "
            "expected chosen, rejected and optionally prompt"
        )
    if not isinstance(row["chosen"], (str, list, tuple)):
        raise InvalidInputError(f"chosen is {type(row['chosen']).__name__}, expected a string or a list of messages")
    if isinstance(row["chosen"], str):
        prompt, chosen, rejected = _split_standard(row)
        return plain_prompt(tokenizer, prompt), plain_response(tokenizer, chosen), plain_response(tokenizer, rejected)

    messages, chosen, rejected = _split_conversational(row)
    return (
        chat_prompt(tokenizer, messages, **chat_template_kwargs),
        chat_response(tokenizer, messages, chosen, **chat_template_kwargs),
        chat_response(tokenizer, messages, rejected, **chat_template_kwargs),
    )


def _split_standard(row: Mapping[str, Any]) -> tuple[str, str, str]:
    chosen, rejected = _text(row["chosen"], "chosen"), _text(row["rejected"], "rejected")
    if row.get("prompt") is not None:
        prompt = _text(row["prompt"], "prompt")
    elif chosen == rejected:
        raise InvalidInputError("chosen and rejected are equal and there is no prompt column to say where they begin")
    else:
        prompt, chosen, rejected = split_implicit_prompt(chosen, rejected)
    for column, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not text.strip():
            raise InvalidInputError(f"empty {column}")
    return prompt, chosen, rejected


def _split_conversational(row: Mapping[str, Any]) -> tuple[list[Message], Message, Message]:
    chosen, rejected = _messages(row["chosen"], "chosen"), _messages(row["rejected"], "rejected")
    prompt = row.get("prompt")
    if isinstance(prompt, str) and len(chosen) == len(rejected) == 1:
        messages: list[Message] = [{"role": "user", "content": _text(prompt, "prompt")}]
    elif prompt is None or isinstance(prompt, str):
        shared = _common_prefix_length(chosen, rejected)
        messages, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
    else:
        messages = _messages(prompt, "prompt")
        if chosen[: len(messages)] == rejected[: len(messages)] == messages:  # the prompt and the whole conversation
            chosen, rejected = chosen[len(messages) :], rejected[len(messages) :]

    for column, response in (("chosen", chosen), ("rejected", rejected)):
        if [message["role"] for message in response] != ["assistant"]:
            raise InvalidInputError(f"{column} is not one assistant message after the prompt")
        if not response[0]["content"].strip():
            raise InvalidInputError(f"empty {column}")
    if not messages or not messages[-1]["content"].strip():
        raise InvalidInputError("empty prompt")
    if messages[-1]["role"] == "assistant":
        raise InvalidInputError("the prompt ends with an assistant message")
    return messages, chosen[0], rejected[0]


def _text(value: object, column: str) -> str:
    if not isinstance(value, str):
        raise InvalidInputError(f"{column} is {type(value).__name__}, expected a string because chosen is one")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InvalidInputError(f"{column} is not valid Unicode (it holds half of a surrogate pair)") from None
    return value


def _messages(value: object, column: str) -> list[Message]:
    if not isinstance(value, (list, tuple)):
        raise InvalidInputError(
            f"{column} is {type(value).__name__}, expected a list of messages because chosen is one"
        )
    for message in value:
        for key in ("role", "content"):
            if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
                raise InvalidInputError(f"{column} has a message without a {key} string")
            _text(message[key], column)
    # Tables fill the keys that only other rows have with None; a template would take it for a value.
    return [{key: item for key, item in message.items() if item is not None} for message in value]


def _count_leading(response: tuple[int, ...], uncounted_at_end: frozenset[int]) -> int:
    counted = len(response)
    while counted and response[counted - 1] in uncounted_at_end:
        counted -= 1
    return counted


def _check(triple: PreferenceTriple, uncounted: tuple[int, ...], max_length: int | None) -> None:
    if set(triple.prompt) <= set(uncounted):
        raise InvalidInputError("the prompt has no token that counts")
    if not triple.chosen_counted or not triple.rejected_counted:
        raise InvalidInputError("a response has no token that counts")
    if max_length is not None and len(triple.prompt) + max(len(triple.chosen), len(triple.rejected)) > max_length:
        raise InvalidInputError(f"prompt and response are longer than {max_length} tokens")


# --- A source -> its rows ---------------------------------------------------------------------------------------------


def _open(source: Any, split: str) -> tuple[str, Iterable[_Row], int | None]:
    """The source's name for messages, its rows, and how many there are where that is known."""
    if isinstance(source, (str, os.PathLike)):
        name, path = os.fspath(source), Path(source)
        if path.is_dir() or (isinstance(source, str) and not path.exists() and _is_hub_name(source)):
            return _number(_choose_split(_load_dataset(name), split, name), name)
        if not path.is_file():
            raise InvalidInputError(f"{name}: no such file or folder")
        if path.suffix in (".jsonl", ".json"):
            return name, _json_lines(path, name), None
        if path.suffix == ".parquet":
            return name, _parquet(path, name), None
        raise InvalidInputError(f"{name}: expected a file that ends in .jsonl, .json or .parquet")
    if isinstance(source, Mapping):
        return _number(_choose_split(source, split, "dataset"), "dataset")
    if isinstance(source, Iterable):
        return _number(source, "dataset")
    raise InvalidInputError(f"preferences come from a path, a hub name or rows, found {type(source).__name__}")


def _number(rows: Iterable[Any], name: str) -> tuple[str, Iterable[_Row], int | None]:
    """Rows of a table are named by index from 0, as one would look them up; lines of a file by number from 1."""
    named = ((f"{name}[{index}]", row) for index, row in enumerate(rows))
    return name, named, len(rows) if isinstance(rows, Sized) else None


def _json_lines(path: Path, name: str) -> Iterator[_Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if line := line.rstrip():
                yield f"{name}:{number}", _parse_json(line)


def _parse_json(line: bytes) -> object:
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        return InvalidInputError(f"not UTF-8 (byte {error.start + 1} of the line)")
    except json.JSONDecodeError as error:
        return InvalidInputError(f"not one JSON object per line ({error.msg}, column {error.colno})")
    except (ValueError, RecursionError):
        return InvalidInputError("not one JSON object per line (a number or a nesting beyond all bounds)")


def _parquet(path: Path, name: str) -> Iterator[_Row]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise _missing_extra("a parquet file", "pyarrow") from error
    index = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for row in map(batch.slice, range(batch.num_rows), repeat(1)):
                    yield f"{name}[{index}]", _arrow_row(row)
                    index += 1
    except Exception as error:  # beside its own, what a header that is not UTF-8 or not plausible leads to
        raise InvalidInputError(f"{name}: cannot be read as parquet ({_first_line(error)})") from error


def _arrow_row(row: Any) -> object:
    try:
        return row.to_pylist()[0]
    except UnicodeDecodeError:
        return InvalidInputError("not UTF-8")


def _load_dataset(name: str) -> Any:
    """A folder or hub dataset, read by `datasets`: one table or several by split."""
    try:
        import datasets
    except ImportError as error:
        raise _missing_extra(f"{name!r}", "datasets") from error
    path = Path(name)
    try:
        if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
            return datasets.load_from_disk(name)
        try:
            return datasets.load_dataset(name)
        except ConnectionError:
            return datasets.load_dataset(_cached_snapshot(name))
    except Exception as error:  # the library raises many kinds; the reader wants the source and one line
        place = "folder" if path.is_dir() else "local file, folder or hub dataset"
        raise InvalidInputError(f"{name}: not a {place} that can be read ({_first_line(error)})") from error


def _cached_snapshot(name: str) -> str:
    """Folder of a dataset repository in the hub cache, which `datasets` itself does not look into when offline."""
    from huggingface_hub import snapshot_download

    return snapshot_download(name, repo_type="dataset", local_files_only=True)


def _choose_split(splits: Any, split: str, name: str) -> Any:
    if not isinstance(splits, Mapping):
        return splits
    for candidate in (split, f"{split}_prefs"):  # the second as UltraFeedback-binarized names them
        if candidate in splits:
            return splits[candidate]
    raise InvalidInputError(f"{name}: no split {split!r}; there are {', '.join(map(str, splits))}")


def _is_hub_name(name: str) -> bool:
    return bool(re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name)) and not name.endswith((".jsonl", ".json", ".parquet"))


def _missing_extra(what: str, package: str) -> InvalidInputError:
    return InvalidInputError(f"reading {what} needs the package {package}: pip install 'dspa[data]'")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _with_progress(rows: Iterable[_Row], total: int | None) -> Iterable[_Row]:
    from rich.console import Console
    from rich.progress import track

    return track(rows, "Reading preferences", total=total, console=Console(stderr=True))
