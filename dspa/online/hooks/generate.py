"""Telling when a model's `generate` starts, with which prompt, and when it ends."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dspa.errors import InvalidInputError
from dspa.online.hooks.labels import LabelsHook
from dspa.online.hooks.method_patch import MethodPatch
from dspa.online.hooks.running import RunningCall


class GenerateObserver(Protocol):
    def generate_begins(self, running: RunningCall, token_ids: Tensor | None, attention_mask: Tensor) -> None:
        """A generate call starts: ids `[B, n]`, or None for embeddings, and `[B, P]` nonzero where there is a token."""

    def generate_ends(self, running: RunningCall, new_tokens: int | None) -> None:
        """The generate call returned, with so many columns after the prompt, or raised: then None. Also called when its
        beginning was interrupted."""

    def draft_begins(self, running: RunningCall) -> None:
        """A generate call starts inside the running one, to draft what that may accept."""

    def draft_ends(self, running: RunningCall) -> None:
        """It returned or raised."""

    def labels_passed(self, labels: Tensor | None) -> None:
        """A forward call with labels `[B, T]` starts, or has ended: then None."""


class ObservedGenerate(MethodPatch):
    """Replaces `model.generate` while it is observed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, "generate")
        self.observers: list[GenerateObserver] = []

    def __call__(self, inputs: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        observers = list(self.observers)
        if not observers:  # a wrapper of this method is called after the last observer was removed
            return self.original(inputs, *args, **kwargs)
        config = args[0] if args else kwargs.get("generation_config")
        if getattr(config, "is_assistant", False):
            return self._draft(observers, inputs, *args, **kwargs)
        self._refuse_what_cannot_be_followed(config, kwargs)
        token_ids, attention_mask = self._prompt(inputs, config, kwargs)
        begun: list[GenerateObserver] = []
        new_tokens = None
        running = RunningCall()
        try:
            for observer in observers:
                begun.append(observer)
                self._begin(observer, begun, running, token_ids, attention_mask)
            result = self.original(inputs, *args, **kwargs)
            sequences = result if isinstance(result, Tensor) else getattr(result, "sequences", None)
            if sequences is not None:
                new_tokens = sequences.shape[1] - (0 if token_ids is None else token_ids.shape[1])
            return result
        finally:
            errors = []
            for observer in begun:  # every one of them, also when another raises
                try:
                    observer.generate_ends(running, new_tokens)
                except BaseException as error:
                    errors.append(error)
            if errors:
                raise errors[0]

    @staticmethod
    def _begin(
        observer: GenerateObserver,
        begun: list[GenerateObserver],
        running: RunningCall,
        token_ids: Tensor | None,
        attention_mask: Tensor,
    ) -> None:
        """The call begins for an observer; for one that refuses it, it did not."""
        try:
            observer.generate_begins(running, token_ids, attention_mask)
        except Exception:
            begun.remove(observer)
            raise

    def _draft(self, observers: list[GenerateObserver], *args: Any, **kwargs: Any) -> Any:
        running = RunningCall()
        try:
            for observer in observers:
                observer.draft_begins(running)
            return self.original(*args, **kwargs)
        finally:
            for observer in observers:
                observer.draft_ends(running)

    def _refuse_what_cannot_be_followed(self, config: Any, kwargs: dict[str, Any]) -> None:
        # An adapter in front of this model passes it the inputs by a method of its own.
        refuse_virtual_tokens(getattr(vars(self.module).get("prepare_inputs_for_generation"), "__self__", None))
        guidance = self._option("guidance_scale", config, kwargs)
        if guidance is not None and guidance != 1:
            raise InvalidInputError(
                f"guidance_scale is {guidance}: its unconditional passes have another prompt and would be taken for "
                "steps of this one; leave it out while the model is steered"
            )
        if self._option("token_healing", config, kwargs):
            raise InvalidInputError(
                "token_healing is on: it replaces the prompt inside generate, after the policy was chosen for it; heal "
                "the prompt first (model.heal_tokens), or leave it out while the model is steered"
            )
        if self._option("cache_implementation", config, kwargs) == "paged":
            raise InvalidInputError(PACKED)

    def _prompt(self, inputs: Tensor | None, config: Any, kwargs: dict[str, Any]) -> tuple[Tensor | None, Tensor]:
        token_ids = inputs if inputs is not None else kwargs.get("input_ids")
        embeddings = kwargs.get("inputs_embeds")
        attention_mask = kwargs.get("attention_mask")
        if token_ids is None and embeddings is None:  # generate begins with a token of its own
            first = self._option("bos_token_id", config, kwargs)
            return None if first is None else torch.tensor([[first]]), torch.ones(1, 1)
        if embeddings is not None:
            if attention_mask is None:
                attention_mask = torch.ones(embeddings.shape[:2], device=embeddings.device)
            return None, attention_mask
        assert token_ids is not None
        return token_ids, self._presence(token_ids, config, kwargs) if attention_mask is None else attention_mask

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
        return getattr(getattr(self.module, "generation_config", None), name, None)


class RefusedMethod(MethodPatch):
    """A method that cannot be steered, and says so while `generate` is observed."""

    def __init__(self, model: nn.Module, name: str, reason: str, observed: ObservedGenerate) -> None:
        super().__init__(model, name)
        self._reason = reason
        self._observed = observed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._observed.observers:
            raise InvalidInputError(self._reason)
        return self.original(*args, **kwargs)


def refuse_virtual_tokens(model: object) -> None:
    """Refuses adapters that put trained columns before the prompt, such as those of prompt tuning and prefix tuning.

    Raises:
        InvalidInputError: if the model is wrapped into one.
    """
    configs = getattr(model, "peft_config", None)
    for name, config in configs.items() if isinstance(configs, dict) else ():
        if getattr(config, "is_prompt_learning", False):
            raise InvalidInputError(
                f"adapter {name!r} puts virtual tokens before the prompt ({type(config).__name__}), which shifts the "
                "positions to be edited; steer the model without it, or with an adapter of weights such as LoRA"
            )


# Also, it skips prompt tokens that another request has in the cache, and replays captured graphs of whole steps.
PACKED = (
    "continuous batching packs the tokens of many requests into one row and does not tell the model whose they are, so "
    "that prompts cannot be told apart; call generate with a padded batch instead of generate_batch while steered"
)


class GenerateObservation:
    """An observer of every `generate` call on a model, or on the transformers model inside a wrapper. Continuous
    batching is refused meanwhile.

    `install` and `remove` may be interrupted at any line; `remove` then undoes what was done so far.

    Raises:
        InvalidInputError: if nothing in the model can generate, or an adapter puts virtual tokens before prompts.
    """

    def __init__(self, model: nn.Module, observer: GenerateObserver) -> None:
        refuse_virtual_tokens(model)
        self._generating = generating_module(model)
        self._observer = observer
        self._observed: ObservedGenerate | None = None

    def install(self) -> None:
        """Begins to observe; nothing happens if it was begun."""
        found = vars(self._generating).get("generate")
        self._observed = found if isinstance(found, ObservedGenerate) else ObservedGenerate(self._generating)
        if self._observer not in self._observed.observers:
            self._observed.observers.append(self._observer)
        self._observed.install()
        if not isinstance(vars(self._generating).get("forward"), LabelsHook):
            LabelsHook(self._generating, self._observed.observers).install()
        name = "init_continuous_batching"
        refused = vars(self._generating).get(name)
        if callable(getattr(self._generating, name, None)) and not isinstance(refused, RefusedMethod):
            RefusedMethod(self._generating, name, PACKED, self._observed).install()

    def remove(self) -> None:
        """Stops observing; after the last observer, `model.generate` is the original method again."""
        if self._observed is None:
            return
        if self._observer in self._observed.observers:
            self._observed.observers.remove(self._observer)
        if self._observed.observers:
            return
        self._observed.remove()
        for name, kind in (("forward", LabelsHook), ("init_continuous_batching", RefusedMethod)):
            patch = vars(self._generating).get(name)
            if isinstance(patch, kind):
                patch.remove()


def observe_generate(model: nn.Module, observer: GenerateObserver) -> GenerateObservation:
    """Begins to observe; arguments and errors as for `GenerateObservation`."""
    observation = GenerateObservation(model, observer)
    observation.install()
    return observation


def generating_module(model: nn.Module) -> nn.Module:
    """The transformers model whose `generate` is called, by the user or by the wrapper around it.

    Raises:
        InvalidInputError: if there is none.
    """
    from transformers import GenerationMixin

    for module in model.modules():
        if isinstance(module, GenerationMixin):
            return module
    raise InvalidInputError(f"{type(model).__name__} has no generate method; pass a causal language model")
