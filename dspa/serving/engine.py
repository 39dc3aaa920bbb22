"""The model that is served: one in memory, under several names, one request at a time in a thread of its own."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

from dspa.errors import DspaError, InvalidInputError
from dspa.methods.policy import Policy
from dspa.online.steering import steer
from dspa.serving.generation import AsCriteria, AsProcessor, Event, Generation, generation_config, seed_of
from dspa.serving.requests import GenerationRequest, RequestError
from dspa.transformers_model import text_config


@dataclass(frozen=True)
class ServerLimits:
    """What a request may ask for at most.

    Attributes:
        context_tokens: tokens of prompt and answer together; 0 for the model's own context.
        default_tokens: tokens of an answer whose request does not say.
        request_bytes: bytes of a body.
        waiting: requests that wait for their turn.
        render_seconds: time for the chat template and the tokenizer.
    """

    context_tokens: int = 0
    default_tokens: int = 1024
    request_bytes: int = 0
    waiting: int = 256
    render_seconds: float = 20.0

    def for_model(self, model: Any) -> ServerLimits:
        """With the model's context where nothing else was said, and bodies of at most 32 bytes a token of it.

        Raises:
            InvalidInputError: if the model's configuration has no context, so that one has to be said.
        """
        context = self.context_tokens or getattr(text_config(model), "max_position_embeddings", None)
        if not context:
            raise InvalidInputError("the model's configuration has no max_position_embeddings; pass --max-context")
        return replace(self, context_tokens=context, request_bytes=self.request_bytes or max(65536, 32 * context))


@dataclass(frozen=True)
class PreparedRequest:
    """A request with its prompt in tokens, checked against the limits."""

    request: GenerationRequest
    prompt: list[int]
    max_tokens: int


class Engine:
    """Generates for requests, in the order in which they come.

    Attributes:
        steering: the policies on the model; its summary says what was edited so far.
        names: the names that are served, in the order of the policies, and the policy of each.
        limits: what a request may ask for.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        policies: Mapping[str, Policy],
        limits: ServerLimits | None = None,
    ) -> None:
        self.limits = (limits or ServerLimits()).for_model(model)
        self.names: dict[str, str | None] = {name: None} | {f"{name}@{policy}": policy for policy in policies}
        self.steering = steer(model.eval(), policies, select=None)
        self._model = model
        self._tokenizer = tokenizer
        self._generating = ThreadPoolExecutor(1, thread_name_prefix="dspa-generate")
        self._rendering = ThreadPoolExecutor(4, thread_name_prefix="dspa-render")
        self._pending = 0

    async def prepare(self, request: GenerationRequest) -> PreparedRequest:
        """Renders and tokenizes outside of the event loop, and checks the limits.

        Raises:
            RequestError: if the model's name is not served, the prompt cannot be rendered or does not fit, or too many
                requests wait.
        """
        if request.model not in self.names:
            known = ", ".join(self.names)
            raise RequestError(
                f"model {request.model[:200]!r} is not served here; expected one of {known}",
                status=404,
                param="model",
                code="model_not_found",
            )
        if self._pending >= self.limits.waiting:
            raise RequestError(f"{self._pending} requests are waiting already; try again later", status=503)
        loop = asyncio.get_running_loop()
        rendering = loop.run_in_executor(self._rendering, self._render, request)
        try:
            prompt = await asyncio.wait_for(rendering, self.limits.render_seconds)
        except asyncio.TimeoutError as error:
            raise RequestError(f"rendering the prompt took more than {self.limits.render_seconds:g} s") from error
        return self._checked(request, prompt)

    async def generate(self, prepared: PreparedRequest) -> AsyncIterator[Event]:
        """The events of the answer as they come. Closing the iterator cancels the generation, also while it waits.

        Raises:
            RequestError: if generating failed, with the reason.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event | BaseException | None] = asyncio.Queue()

        def send(event: Event | BaseException | None) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(events.put_nowait, event)

        generation = Generation(prepared.request, self._tokenizer, prepared.max_tokens, _end_tokens(self._model), send)

        def run() -> None:
            try:
                if not generation.cancelled.is_set():
                    self._run(prepared, generation)
                send(None)
            except BaseException as error:  # whatever it is, the waiting client is told
                send(error)

        self._pending += 1
        job = self._generating.submit(run)
        try:
            while (event := await events.get()) is not None:
                if isinstance(event, BaseException):
                    raise _as_request_error(event)
                yield event
        finally:
            generation.cancelled.set()
            job.cancel()
            self._pending -= 1

    def close(self) -> None:
        """Ends the threads and detaches the policies."""
        self._generating.shutdown(wait=True, cancel_futures=True)
        self._rendering.shutdown(wait=False, cancel_futures=True)
        self.steering.remove()

    def _render(self, request: GenerationRequest) -> list[int]:
        tokenizer = self._tokenizer
        if request.messages is None:
            return list(tokenizer(request.prompt)["input_ids"])
        if not tokenizer.chat_template:
            raise RequestError("the model's tokenizer has no chat template; use /v1/completions")
        reserved = set(inspect.signature(tokenizer.apply_chat_template).parameters) & set(request.template_options)
        if reserved:
            name = f"chat_template_kwargs.{sorted(reserved)[0]}"
            raise RequestError(f"{name} is the server's to set; leave it out", param="chat_template_kwargs")
        try:
            rendered = tokenizer.apply_chat_template(
                request.messages, add_generation_prompt=True, return_dict=True, **request.template_options
            )
        except Exception as error:  # templates raise what they like to refuse a conversation
            raise RequestError(f"the chat template refused the messages: {_reason(error)}", param="messages") from error
        return list(rendered["input_ids"])

    def _checked(self, request: GenerationRequest, prompt: list[int]) -> PreparedRequest:
        context = self.limits.context_tokens
        field = "prompt" if request.messages is None else "messages"
        if not prompt:
            raise RequestError("the prompt has no token", param=field)
        room = context - len(prompt)
        if room < 1:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, and the context {context}; shorten it",
                param=field,
                code="context_length_exceeded",
            )
        asked, name = request.max_tokens
        if asked is not None and asked > room:
            raise RequestError(
                f"{name} is {asked}; after the prompt's {len(prompt)} tokens the context of {context} has room for "
                f"{room}",
                param=name,
                code="context_length_exceeded",
            )
        vocabulary = text_config(self._model).vocab_size
        beyond = [token for token in request.sampling.logit_bias if token >= vocabulary]
        if beyond:
            raise RequestError(
                f"logit_bias names token {beyond[0]}; this model's are 0 to {vocabulary - 1}", param="logit_bias"
            )
        return PreparedRequest(request, prompt, asked or min(room, self.limits.default_tokens))

    def _run(self, prepared: PreparedRequest, generation: Generation) -> None:
        request = prepared.request
        sampling = request.sampling
        tokens = torch.tensor([prepared.prompt] * request.choices, device=self._model.device)
        devices = [self._model.device] if self._model.device.type == "cuda" else []
        self.steering.select(self.names[request.model])
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed_of(sampling))
            self._model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                generation_config=generation_config(self._model, sampling, prepared.max_tokens),
                logits_processor=LogitsProcessorList([AsProcessor(generation)]),
                stopping_criteria=StoppingCriteriaList([AsCriteria(generation)]),
            )


def _end_tokens(model: Any) -> list[int]:
    ends = model.generation_config.eos_token_id
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


def _as_request_error(error: BaseException) -> RequestError:
    if isinstance(error, RequestError):
        return error
    if isinstance(error, DspaError):
        return RequestError(str(error))
    return RequestError(f"generating failed: {type(error).__name__}: {_reason(error)}", status=500)


def _reason(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
