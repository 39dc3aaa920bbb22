"""What a request asks for: the bodies of the three endpoints, checked field by field.

A field either has its effect or is refused by name; none is ignored. Fields that are absent, null, or have the value
that changes nothing (`response_format={"type": "text"}`) are accepted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

MAX_CHOICES = 16
MAX_STOPS = 4
_SEEDS = 2**63


class RequestError(Exception):
    """A request that is refused.

    Attributes:
        status: the HTTP status.
        message: one line that says why.
        param: the field it is about, if it is about one.
        code: what a program can tell it by.
    """

    def __init__(self, message: str, *, status: int = 400, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, " ".join(message.split()), param, code

    def body(self) -> dict[str, Any]:
        """As the OpenAI API has it."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen. What is None is as the model's generation config says.

    Attributes:
        temperature: 0 for the likeliest token.
        top_p: sample from the likeliest tokens with this much probability together.
        seed: of the sampling; the same request with the same seed has the same answer. None for one of its own.
        frequency_penalty: subtracted from a token's logit for each time it was generated.
        presence_penalty: subtracted once for a token that was generated.
        logit_bias: added to logits, by token id.
    """

    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)


@dataclass(frozen=True)
class GenerationRequest:
    """One request, whatever its endpoint.

    Attributes:
        model: the name that is asked for.
        messages: the conversation, as chat templates have it; None for a plain prompt.
        prompt: the plain prompt, empty for a conversation.
        template_options: passed to the chat template.
        sampling: how tokens are chosen.
        max_tokens: most tokens of a choice, and the name of the field that says so.
        choices: how many answers.
        stop: strings that end an answer and are not part of it.
        logprobs: how many alternatives are reported for each token; None for no log-probabilities.
        stream: whether the answer comes in pieces.
        include_usage: whether a stream ends with its token counts.
    """

    model: str
    messages: list[dict[str, str]] | None
    prompt: str
    sampling: Sampling
    max_tokens: tuple[int | None, str]
    template_options: Mapping[str, Any] = field(default_factory=dict)
    choices: int = 1
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    stream: bool = False
    include_usage: bool = False


class _Fields(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class _Part(_Fields):
    type: Literal["text", "input_text", "output_text"]
    text: str
    annotations: list[Any] | None = Field(default=None, max_length=0)
    logprobs: list[Any] | None = None


class _Message(_Fields):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    @model_validator(mode="before")
    @classmethod
    def _drop_what_is_empty(cls, value: Any) -> Any:
        """The fields with which clients send an answer back."""
        if not isinstance(value, dict):
            return value
        returned = {"id", "status"} if value.get("type") == "message" else set()
        return {
            name: entry
            for name, entry in value.items()
            if name not in returned and (name in ("role", "content") or entry not in (None, [], "message"))
        }

    def plain(self) -> dict[str, str]:
        content = self.content
        if not isinstance(content, str):
            content = "".join(part.text for part in content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _StreamOptions(_Fields):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


_Penalty = Annotated[float, Field(ge=-2, le=2)]
_Count = Annotated[int, Field(ge=1)]


class _Shared(_Fields):
    """The fields of all endpoints."""

    model: str
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=-_SEEDS, lt=_SEEDS)] | None = None
    stream: bool = False
    user: str | None = None  # who asks; changes no answer

    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_p, self.seed)


class _Choices(_Shared):
    """The fields of chat and text completions."""

    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] = 1
    max_tokens: _Count | None = None
    stop: str | list[str] | None = None
    frequency_penalty: _Penalty = 0.0
    presence_penalty: _Penalty = 0.0
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] = Field(default_factory=dict)
    stream_options: _StreamOptions | None = None

    @field_validator("stop")
    @classmethod
    def _stops(cls, value: str | list[str] | None) -> list[str]:
        stops = [value] if isinstance(value, str) else list(value or ())
        if len(stops) > MAX_STOPS or not all(stops):
            raise ValueError(f"expected at most {MAX_STOPS} strings, none of them empty")
        return stops

    @field_validator("logit_bias")
    @classmethod
    def _token_ids(cls, value: dict[str, float]) -> dict[str, float]:
        wrong = [name for name in value if not (name.isascii() and name.isdigit() and len(name) < 10)]
        if wrong:
            raise ValueError(f"expected token ids as keys, found {wrong[0][:40]!r}")
        return value

    def sampling(self) -> Sampling:
        bias = {int(token): value for token, value in self.logit_bias.items()}
        return Sampling(self.temperature, self.top_p, self.seed, self.frequency_penalty, self.presence_penalty, bias)

    def include_usage(self) -> bool:
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options is for stream=true only", param="stream_options")
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatBody(_Choices):
    """Of `POST /v1/chat/completions`."""

    messages: Annotated[list[_Message], Field(min_length=1)]
    max_completion_tokens: _Count | None = None
    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    chat_template_kwargs: dict[str, bool | str] = Field(default_factory=dict)

    def request(self) -> GenerationRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise RequestError("top_logprobs needs logprobs=true", param="top_logprobs")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise RequestError("max_tokens and max_completion_tokens are both given; pass one", param="max_tokens")
        name = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return GenerationRequest(
            model=self.model,
            messages=[message.plain() for message in self.messages],
            prompt="",
            template_options=self.chat_template_kwargs,
            sampling=self.sampling(),
            max_tokens=(getattr(self, name), name),
            choices=self.n,
            stop=tuple(self.stop or ()),
            logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            stream=self.stream,
            include_usage=self.include_usage(),
        )


class CompletionBody(_Choices):
    """Of `POST /v1/completions`."""

    prompt: str
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None

    def request(self) -> GenerationRequest:
        return GenerationRequest(
            model=self.model,
            messages=None,
            prompt=self.prompt,
            sampling=self.sampling(),
            max_tokens=(self.max_tokens, "max_tokens"),
            choices=self.n,
            stop=tuple(self.stop or ()),
            logprobs=self.logprobs,
            stream=self.stream,
            include_usage=self.include_usage(),
        )


class ResponseBody(_Shared):
    """Of `POST /v1/responses`."""

    input: str | Annotated[list[_Message], Field(min_length=1)]
    instructions: str | None = None
    max_output_tokens: _Count | None = None

    def request(self) -> GenerationRequest:
        asked = self.input
        messages = [{"role": "user", "content": asked}] if isinstance(asked, str) else [m.plain() for m in asked]
        if self.instructions is not None:
            messages.insert(0, {"role": "system", "content": self.instructions})
        return GenerationRequest(
            model=self.model,
            messages=messages,
            prompt="",
            sampling=self.sampling(),
            max_tokens=(self.max_output_tokens, "max_output_tokens"),
            stream=self.stream,
        )


# Fields that are not served, with the values that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "background": (False,),
    "functions": ([],),
    "function_call": ("none",),
    "include": ([],),
    "metadata": ({},),
    "modalities": (["text"],),
    "parallel_tool_calls": (True, False),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "suffix": ("",),
    "text": ({"format": {"type": "text"}}, {}),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncation": ("disabled",),
}


def read_request(body: bytes, kind: type[ChatBody] | type[CompletionBody] | type[ResponseBody]) -> GenerationRequest:
    """A request from its body.

    Raises:
        RequestError: if the body is no JSON object, or a field is unknown, not served, or has a value it cannot have.
    """
    try:
        fields = json.loads(body, parse_constant=_refuse_constant)
        if not isinstance(fields, dict):
            raise RequestError(f"the body is a JSON {type(fields).__name__}; expected an object")
        body.decode("utf-8")
        json.dumps(fields, ensure_ascii=False).encode("utf-8")  # no half characters
    except (ValueError, RecursionError) as error:
        raise RequestError(f"the body is no JSON in UTF-8: {_first_line(error)}") from error
    kept = {name: value for name, value in fields.items() if value is not None and not _is_neutral(name, value)}
    for name in kept:
        if name not in kind.model_fields:
            reason = "is not served" if name in _NEUTRAL else "is unknown or not served"
            raise RequestError(f"{name[:60]!r} {reason} by this endpoint; leave it out", param=name[:60])
    try:
        return kind.model_validate(kept).request()
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part)[:60] for part in first["loc"]) or "body"
        param = str(first["loc"][0]) if first["loc"] else None
        raise RequestError(f"{place}: {first['msg']}", param=param) from error


def _is_neutral(name: str, value: Any) -> bool:
    return any(type(value) is type(known) and value == known for known in _NEUTRAL.get(name, ()))


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
