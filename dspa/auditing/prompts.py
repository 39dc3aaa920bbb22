"""Prompts to audit a policy on: from a file or as they are, as token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from dspa.errors import InvalidInputError
from dspa.offline.chat_template import chat_prompt, plain_prompt
from dspa.util.records import parse_json

PromptSource = str | Sequence[Mapping[str, Any]]  # a text, or the messages of a conversation


@dataclass(frozen=True)
class ReadPrompt:
    """A prompt: what is shown of it, and what the model reads."""

    text: str
    ids: tuple[int, ...]


def read_prompts(file: str | Path, limit: int | None = None) -> list[PromptSource]:
    """The prompts in a file: JSON Lines whose objects have a `prompt`, a text or a conversation, or plain text with one
    prompt a line.

    Raises:
        InvalidInputError: if the file cannot be read, a line has no prompt, or there is none.
    """
    path = Path(file)
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InvalidInputError(f"prompts {path} cannot be read: {error.strerror or error}") from error
    found: list[PromptSource] = []
    for number, line in enumerate(lines, start=1):
        if limit is not None and len(found) == limit:
            break
        if line.strip():
            found.append(_prompt_of(line, f"{path}:{number}", path.suffix in (".jsonl", ".json")))
    if not found:
        raise InvalidInputError(f"{path} holds no prompt; expected one a line")
    return found


def _prompt_of(line: bytes, place: str, is_json: bool) -> PromptSource:
    if not is_json:
        try:
            return line.decode()
        except UnicodeDecodeError as error:
            raise InvalidInputError(f"{place} is not UTF-8 text ({error.reason})") from error
    try:
        record = parse_json(line)
    except ValueError as error:
        raise InvalidInputError(f"{place} is not JSON ({error}); expected an object with a prompt") from error
    prompt = record.get("prompt") if isinstance(record, dict) else record
    if (isinstance(prompt, str) and prompt) or is_conversation(prompt):
        return prompt
    raise InvalidInputError(f"{place} has no prompt; expected a text or a list of messages under 'prompt'")


def is_conversation(prompt: object) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    """Whether it is a list of messages."""
    return isinstance(prompt, (list, tuple)) and bool(prompt) and all(isinstance(each, Mapping) for each in prompt)


def tokenise(prompts: Sequence[PromptSource], tokenizer: Any, chat: bool) -> list[ReadPrompt]:
    """What the model reads of each prompt. With `chat`, a text is a user's turn if the tokenizer has a chat template.

    Raises:
        InvalidInputError: if there is no prompt, one is empty or something else, or a conversation meets no chat
            template.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Sequence) or not prompts:
        raise InvalidInputError("there is no prompt to audit the policy on; pass a list of at least one")
    read = []
    for prompt in prompts:
        if isinstance(prompt, str):
            templated = chat and tokenizer.chat_template
            messages = [{"role": "user", "content": prompt}]
            text, ids = prompt, chat_prompt(tokenizer, messages) if templated else plain_prompt(tokenizer, prompt)
        elif not is_conversation(prompt):
            raise InvalidInputError(f"a prompt is {prompt!r}; expected a text or a list of messages")
        else:
            text = "\n".join(str(message.get("content", "")) for message in prompt)
            ids = chat_prompt(tokenizer, prompt)
        if not ids:
            raise InvalidInputError("a prompt has no tokens; leave it out")
        read.append(ReadPrompt(text, ids))
    return read
