"""Texts in files: a line each, or a column of JSON Lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dspa.errors import InvalidInputError


def read_texts(file: Path, column: str) -> list[str]:
    """The texts of a file: of JSON Lines a column, otherwise each line that is not empty.

    Raises:
        InvalidInputError: if it cannot be read, or a line has no such column.
    """
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInputError(f"{file} cannot be read as text ({error})") from error
    if not lines:
        raise InvalidInputError(f"{file} holds no text")
    if file.suffix not in (".jsonl", ".json"):
        return lines
    texts: list[str] = []
    for number, line in enumerate(lines, start=1):
        try:
            texts.append(_text(json.loads(line)[column]))
        except (ValueError, KeyError, TypeError) as error:
            raise InvalidInputError(f"{file}:{number} has no {column!r} that is a text ({error!r})") from error
    return texts


def _text(value: Any) -> str:
    """A text, or the first message of a conversation."""
    if isinstance(value, list):
        value = value[0]["content"]
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__}")
    return value
