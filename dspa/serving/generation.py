"""One request as it is generated: what `generate` asks at each step, and the events its answer is made of."""

from __future__ import annotations

import copy
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, StoppingCriteria

from dspa.serving.requests import GenerationRequest, Sampling

_HALF = "\ufffd"  # what an unfinished character is decoded to
_LOWEST = -9999.0  # for log-probabilities that JSON has no number for


@dataclass(frozen=True)
class TokenLogprob:
    """A generated token, its log-probability by the model's own logits (before temperature, bias and penalties), and
    the likeliest tokens in its place."""

    text: str
    logprob: float
    alternatives: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class Piece:
    """More text of one choice, which may be empty."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...]


@dataclass(frozen=True)
class Finished:
    """One choice is complete: "stop" or "length", after so many tokens."""

    choice: int
    reason: str
    tokens: int


Event = Piece | Finished


@dataclass
class _Choice:
    tokens: list[int]
    text: str = ""  # what was sent
    finished: bool = False


class Generation:
    """Is asked by `generate` at each step: changes logits, sends what was chosen, and says which rows are complete.

    Attributes:
        cancelled: set from any thread, it ends the generation at the next step.
    """

    def __init__(
        self,
        request: GenerationRequest,
        tokenizer: Any,
        max_tokens: int,
        end_tokens: Sequence[int],
        send: Callable[[Event], None],
    ) -> None:
        self.cancelled = threading.Event()
        self._request = request
        self._tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._end_tokens = frozenset(end_tokens)
        self._send = send
        self._choices = [_Choice([]) for _ in range(request.choices)]
        self._logprobs: Tensor | None = None  # [choices, vocabulary], of the step that is being chosen
        self._counts: Tensor | None = None  # [choices, vocabulary], how often each token was generated

    def process(self, logits: Tensor) -> Tensor:
        """The logits `[choices, vocabulary]` with penalties and biases."""
        sampling = self._request.sampling
        if self._request.logprobs is not None:
            self._logprobs = logits.float().log_softmax(dim=-1)
        if sampling.frequency_penalty or sampling.presence_penalty:
            if self._counts is None:
                self._counts = torch.zeros_like(logits)
            seen = self._counts
            logits = logits - sampling.frequency_penalty * seen - sampling.presence_penalty * (seen > 0)
        if sampling.logit_bias:
            logits = logits.clone()
            tokens = torch.tensor(list(sampling.logit_bias), device=logits.device)
            logits[:, tokens] += torch.tensor(list(sampling.logit_bias.values()), device=logits.device)
        return logits

    def step(self, chosen: Tensor) -> Tensor:
        """Sends what was chosen, `[choices]`; returns which choices are complete, `[choices]` bool."""
        if self._counts is not None:
            self._counts.scatter_add_(1, chosen[:, None], torch.ones_like(self._counts[:, :1]))
        if self.cancelled.is_set():
            return torch.ones_like(chosen, dtype=torch.bool)
        for index, (choice, token) in enumerate(zip(self._choices, chosen.tolist(), strict=True)):
            if not choice.finished:
                self._advance(index, choice, token)
        return torch.tensor([choice.finished for choice in self._choices], device=chosen.device)

    def _advance(self, index: int, choice: _Choice, token: int) -> None:
        choice.tokens.append(token)
        ended = token in self._end_tokens
        text = self._tokenizer.decode(choice.tokens[:-1] if ended else choice.tokens, skip_special_tokens=True)
        stops = [place for place in (text.find(stop) for stop in self._request.stop) if place >= 0]
        reason = None
        if ended or stops:
            reason = "stop"
        elif len(choice.tokens) >= self._max_tokens:
            reason = "length"
        if stops:
            text = text[: min(stops)]
        elif reason is None:
            text = self._settled(text)
        logprobs = () if ended else self._token_logprobs(index, token)
        if len(text) > len(choice.text) or logprobs:
            self._send(Piece(index, text[len(choice.text) :], logprobs))
            choice.text = max(choice.text, text, key=len)
        if reason is not None:
            choice.finished = True
            self._send(Finished(index, reason, len(choice.tokens)))

    def _settled(self, text: str) -> str:
        """The part of the text that no further token changes: without half a character, and without what may turn out
        to be the beginning of a stop string."""
        text = text.rstrip(_HALF)
        for stop in self._request.stop:
            for length in range(min(len(stop) - 1, len(text)), 0, -1):
                if text.endswith(stop[:length]):
                    text = text[:-length]
                    break
        return text

    def _token_logprobs(self, index: int, token: int) -> tuple[TokenLogprob, ...]:
        if self._logprobs is None or self._request.logprobs is None:
            return ()
        row = self._logprobs[index]
        values, tokens = row.topk(min(self._request.logprobs, len(row)))
        alternatives = tuple(
            (self._text(other), _finite(value)) for other, value in zip(tokens.tolist(), values.tolist(), strict=True)
        )
        return (TokenLogprob(self._text(token), _finite(row[token].item()), alternatives),)

    def _text(self, token: int) -> str:
        return str(self._tokenizer.decode([token]))


class AsProcessor(LogitsProcessor):
    """A generation as `generate` asks it for logits."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        return self._generation.process(scores)


class AsCriteria(StoppingCriteria):
    """A generation as `generate` asks it whether to stop."""

    def __init__(self, generation: Generation) -> None:
        self._generation = generation

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        return self._generation.step(input_ids[:, -1])


def generation_config(model: Any, sampling: Sampling, max_tokens: int) -> GenerationConfig:
    """How `generate` is to choose tokens: as requested and, where the request is silent, as the model's own generation
    config says. A temperature of 0 takes the likeliest token; any other, or a top_p, samples."""
    config: Any = copy.deepcopy(model.generation_config)
    config.max_new_tokens, config.max_length, config.min_new_tokens = max_tokens, None, None
    config.num_beams = config.num_return_sequences = 1
    config.stop_strings = config.max_time = None
    samples = bool(config.do_sample)
    if sampling.temperature is not None or sampling.top_p is not None:
        samples = sampling.temperature != 0
    config.do_sample = samples
    if not samples:
        config.temperature = config.top_p = config.top_k = config.min_p = None
        return config
    for name in ("temperature", "top_p"):
        requested = getattr(sampling, name)
        if requested is not None:
            setattr(config, name, requested)
        elif getattr(config, name) is None or (name == "temperature" and not config.temperature):
            setattr(config, name, 1.0)
    if config.top_k is None:
        config.top_k = 0  # transformers' default of 50 would cut what was not asked to be cut
    return config


def seed_of(sampling: Sampling) -> int:
    """The seed of a request, drawn where it has none."""
    return secrets.randbits(63) if sampling.seed is None else sampling.seed


def _finite(value: float) -> float:
    return max(value, _LOWEST) if value == value else _LOWEST
