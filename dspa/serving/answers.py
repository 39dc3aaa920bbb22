"""Answers in the forms of the three endpoints, whole and in pieces, built from the openai package's own types."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage
from openai.types.chat.chat_completion import Choice, ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import ChoiceDelta
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob, TopLogprob
from openai.types.completion_choice import Logprobs

from dspa.serving.engine import PreparedRequest
from dspa.serving.generation import Event, Finished, Piece, TokenLogprob


@dataclass
class ChoiceState:
    """One choice, as far as it has come."""

    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: Any = None
    tokens: int = 0


class AnswerForm(Protocol):
    """How an endpoint answers."""

    def whole(self, choices: Sequence[ChoiceState]) -> dict[str, Any]:
        """The answer as one object."""
        ...

    def stream(self, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        ...


async def collected(events: AsyncIterator[Event], count: int) -> list[ChoiceState]:
    """All choices, once they are complete."""
    choices = [ChoiceState() for _ in range(count)]
    async for event in events:
        note(choices, event)
    return choices


def note(choices: Sequence[ChoiceState], event: Event) -> None:
    """Adds an event to the choice it belongs to."""
    choice = choices[event.choice]
    if isinstance(event, Piece):
        choice.text += event.text
        choice.logprobs += event.logprobs
    else:
        choice.reason, choice.tokens = event.reason, event.tokens


class _Form:
    def __init__(self, prepared: PreparedRequest, prefix: str) -> None:
        self.request = prepared.request
        self.prompt_tokens = len(prepared.prompt)
        self.id = f"{prefix}-{uuid.uuid4().hex}"
        self.created = int(time.time())

    def usage(self, choices: Sequence[ChoiceState]) -> CompletionUsage:
        generated = sum(choice.tokens for choice in choices)
        return CompletionUsage(
            prompt_tokens=self.prompt_tokens,
            completion_tokens=generated,
            total_tokens=self.prompt_tokens + generated,
        )


class ChatForm(_Form):
    """`POST /v1/chat/completions`."""

    def __init__(self, prepared: PreparedRequest) -> None:
        super().__init__(prepared, "chatcmpl")

    def whole(self, choices: Sequence[ChoiceState]) -> dict[str, Any]:
        reported = self.request.logprobs is not None
        return _plain(
            ChatCompletion(
                id=self.id,
                created=self.created,
                model=self.request.model,
                object="chat.completion",
                choices=[
                    Choice(
                        index=index,
                        finish_reason=choice.reason,
                        message=ChatCompletionMessage(role="assistant", content=choice.text),
                        logprobs=ChoiceLogprobs(content=_chat_logprobs(choice.logprobs)) if reported else None,
                    )
                    for index, choice in enumerate(choices)
                ],
                usage=self.usage(choices),
            )
        )

    async def stream(self, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        choices = [ChoiceState() for _ in range(self.request.choices)]
        for index in range(len(choices)):
            yield self._chunk(index, ChoiceDelta(role="assistant", content=""))
        async for event in events:
            note(choices, event)
            if isinstance(event, Piece):
                yield self._chunk(event.choice, ChoiceDelta(content=event.text), logprobs=event.logprobs)
            else:
                yield self._chunk(event.choice, ChoiceDelta(), reason=event.reason)
        if self.request.include_usage:
            yield _sse({**self._chunk_object([]), "usage": _plain(self.usage(choices))})
        yield "data: [DONE]\n\n"

    def _chunk(
        self, index: int, delta: ChoiceDelta, *, logprobs: Sequence[TokenLogprob] = (), reason: Any = None
    ) -> str:
        reported = ChunkLogprobs(content=_chat_logprobs(logprobs)) if logprobs else None
        return _sse(
            self._chunk_object([ChunkChoice(index=index, delta=delta, finish_reason=reason, logprobs=reported)])
        )

    def _chunk_object(self, choices: list[ChunkChoice]) -> dict[str, Any]:
        chunk = ChatCompletionChunk(
            id=self.id,
            created=self.created,
            model=self.request.model,
            object="chat.completion.chunk",
            choices=choices,
        )
        return _plain(chunk)


class CompletionForm(_Form):
    """`POST /v1/completions`."""

    def __init__(self, prepared: PreparedRequest) -> None:
        super().__init__(prepared, "cmpl")

    def whole(self, choices: Sequence[ChoiceState]) -> dict[str, Any]:
        return _plain(
            self._object(
                [
                    CompletionChoice(
                        index=index,
                        text=choice.text,
                        finish_reason=choice.reason,
                        logprobs=self._logprobs(choice.logprobs, 0),
                    )
                    for index, choice in enumerate(choices)
                ],
                self.usage(choices),
            )
        )

    async def stream(self, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        choices = [ChoiceState() for _ in range(self.request.choices)]
        async for event in events:
            sent = sum(len(entry.text) for entry in choices[event.choice].logprobs)
            note(choices, event)
            piece = CompletionChoice.model_construct(
                index=event.choice,
                text=event.text if isinstance(event, Piece) else "",
                finish_reason=event.reason if isinstance(event, Finished) else None,
                logprobs=self._logprobs(event.logprobs, sent) if isinstance(event, Piece) else None,
            )
            yield _sse(_plain(self._object([piece], None)))
        if self.request.include_usage:
            yield _sse(_plain(self._object([], self.usage(choices))))
        yield "data: [DONE]\n\n"

    def _object(self, choices: list[CompletionChoice], usage: CompletionUsage | None) -> Completion:
        return Completion.model_construct(
            id=self.id,
            created=self.created,
            model=self.request.model,
            object="text_completion",
            choices=choices,
            usage=usage,
        )

    def _logprobs(self, entries: Sequence[TokenLogprob], offset: int) -> Logprobs | None:
        if self.request.logprobs is None:
            return None
        offsets = []
        for entry in entries:
            offsets.append(offset)
            offset += len(entry.text)
        return Logprobs(
            tokens=[entry.text for entry in entries],
            token_logprobs=[entry.logprob for entry in entries],
            top_logprobs=[dict(entry.alternatives) for entry in entries],
            text_offset=offsets,
        )


class ResponseForm(_Form):
    """`POST /v1/responses`."""

    def __init__(self, prepared: PreparedRequest) -> None:
        super().__init__(prepared, "resp")
        self.item_id = f"msg-{uuid.uuid4().hex}"

    def whole(self, choices: Sequence[ChoiceState]) -> dict[str, Any]:
        (choice,) = choices
        cut = choice.reason == "length"
        usage = self.usage(choices)
        return {
            **self._response("incomplete" if cut else "completed"),
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "output": [self._item("incomplete" if cut else "completed", choice.text)],
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": usage.total_tokens,
            },
        }

    async def stream(self, events: AsyncIterator[Event]) -> AsyncIterator[str]:
        choice, number = ChoiceState(), 0
        place = {"item_id": self.item_id, "output_index": 0, "content_index": 0}

        def event_of(name: str, **fields: Any) -> str:
            nonlocal number
            number += 1
            return f"event: {name}\n" + _sse({"type": name, "sequence_number": number - 1, **fields})

        yield event_of("response.created", response=self._response("in_progress"))
        yield event_of("response.in_progress", response=self._response("in_progress"))
        yield event_of("response.output_item.added", output_index=0, item=self._item("in_progress", None))
        yield event_of("response.content_part.added", **place, part=_text_part(""))
        async for event in events:
            note([choice], event)
            if isinstance(event, Piece) and event.text:
                yield event_of("response.output_text.delta", **place, delta=event.text, logprobs=[])
        whole = self.whole([choice])
        yield event_of("response.output_text.done", **place, text=choice.text, logprobs=[])
        yield event_of("response.content_part.done", **place, part=_text_part(choice.text))
        yield event_of("response.output_item.done", output_index=0, item=whole["output"][0])
        yield event_of(f"response.{whole['status']}", response=whole)

    def _response(self, status: Literal["in_progress", "completed", "incomplete"]) -> dict[str, Any]:
        return {
            "id": self.id,
            "created_at": self.created,
            "model": self.request.model,
            "object": "response",
            "status": status,
            "error": None,
            "output": [],
            "parallel_tool_calls": False,
            "tool_choice": "none",
            "tools": [],
            "temperature": self.request.sampling.temperature,
            "top_p": self.request.sampling.top_p,
            "max_output_tokens": self.request.max_tokens[0],
        }

    def _item(self, status: str, text: str | None) -> dict[str, Any]:
        return {
            "id": self.item_id,
            "type": "message",
            "role": "assistant",
            "status": status,
            "content": [] if text is None else [_text_part(text)],
        }


def _text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _chat_logprobs(entries: Sequence[TokenLogprob]) -> list[ChatCompletionTokenLogprob]:
    return [
        ChatCompletionTokenLogprob(
            token=entry.text,
            bytes=list(entry.text.encode()),
            logprob=entry.logprob,
            top_logprobs=[
                TopLogprob(token=text, bytes=list(text.encode()), logprob=value) for text, value in entry.alternatives
            ],
        )
        for entry in entries
    ]


def _plain(value: Any) -> dict[str, Any]:
    return value.model_dump(mode="json", exclude_none=True, warnings=False)


def _sse(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"
