"""Telling when a model's `generate` starts, with which prompt, and when it ends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dspa.errors import InvalidInputError


class GenerateObserver(Protocol):
    def generate_begins(self, token_ids: Tensor | None, present: Tensor) -> None:
        """A generate call starts: ids `[B, n]`, or None for embeddings, and `[B, P]` nonzero where there is a token."""

    def generate_ends(self) -> None:
        """The generate call returned or raised."""


class ObservedGenerate:
    """Stands in for `model.generate` while somebody observes it."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.original: Callable[..., Any] = model.generate  # type: ignore[assignment]
        self.was_own_attribute = "generate" in vars(model)
        self.observers: list[GenerateObserver] = []
        functools.update_wrapper(self, self.original)

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        token_ids, present = self._prompt(inputs, *args, **kwargs)
        begun: list[GenerateObserver] = []
        try:
            for observer in self.observers:
                observer.generate_begins(token_ids, present)
                begun.append(observer)
            return self.original(inputs, *args, **kwargs)
        finally:
            for observer in begun:
                observer.generate_ends()

    def _prompt(self, inputs: Tensor | None, *args: Any, **kwargs: Any) -> tuple[Tensor | None, Tensor]:
        token_ids = inputs if inputs is not None else kwargs.get("input_ids")
        embeddings = kwargs.get("inputs_embeds")
        present = kwargs.get("attention_mask")
        config = args[0] if args else kwargs.get("generation_config")
        if token_ids is None and embeddings is None:  # generate begins with a token of its own
            first = self._option("bos_token_id", config, kwargs)
            return None if first is None else torch.tensor([[first]]), torch.ones(1, 1)
        if embeddings is not None:
            return None, torch.ones(embeddings.shape[:2], device=embeddings.device) if present is None else present
        assert token_ids is not None
        return token_ids, self._presence(token_ids, config, kwargs) if present is None else present

    def _presence(self, token_ids: Tensor, config: Any, kwargs: dict[str, Any]) -> Tensor:
        """As generate infers it without a mask: the padding id is padding unless it also ends sequences."""
        padding, ends = (self._option(name, config, kwargs) for name in ("pad_token_id", "eos_token_id"))
        ends = ends if isinstance(ends, (list, tuple)) else [ends]
        if padding is None or padding in ends:
            return torch.ones_like(token_ids)
        return (token_ids != padding).long()

    def _option(self, name: str, config: Any, kwargs: dict[str, Any]) -> Any:
        """What an option of a generate call is, wherever it was set."""
        for value in (kwargs.get(name), getattr(config, name, None)):
            if value is not None:
                return value
        return getattr(self.model.generation_config, name, None)


class ObserverHandle:
    """Ends an observation."""

    def __init__(self, observed: ObservedGenerate, observer: GenerateObserver) -> None:
        self._observed = observed
        self._observer = observer

    def remove(self) -> None:
        """Stops observing; `model.generate` is its old self when nobody observes it any more."""
        self._observed.observers.remove(self._observer)
        model = self._observed.model
        if not self._observed.observers and vars(model).get("generate") is self._observed:
            if self._observed.was_own_attribute:
                model.generate = self._observed.original  # type: ignore[assignment]
            else:
                del model.generate


def observe_generate(model: nn.Module, observer: GenerateObserver) -> ObserverHandle:
    """Tells an observer of every `generate` call on a model, or on the transformers model inside a wrapper.

    Raises:
        InvalidInputError: if nothing in the model can generate.
    """
    generating = next(
        (module for module in model.modules() if hasattr(type(module), "prepare_inputs_for_generation")), None
    )
    if generating is None:
        raise InvalidInputError(f"{type(model).__name__} has no generate method; pass a causal language model")
    observed = vars(generating).get("generate")
    if not isinstance(observed, ObservedGenerate):
        observed = ObservedGenerate(generating)
        generating.generate = observed  # type: ignore[assignment]
    observed.observers.append(observer)
    return ObserverHandle(observed, observer)
