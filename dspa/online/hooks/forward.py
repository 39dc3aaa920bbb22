"""Where a model is hooked: before each forward pass of its decoder, and after chosen decoder layers.

In a compiled model a tap is one opaque operation per place, with nothing in it that changes from step to step: no graph
break, no guard on a number, and the observers are looked up when it runs. A compiled graph is therefore the same for
every prompt, every batch content and every steering of the same layers.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Mapping
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from dspa.errors import InvalidInputError
from dspa.methods.policy import Policy
from dspa.online.hooks.generate import PACKED
from dspa.online.hooks.method_patch import MethodPatch
from dspa.online.hooks.running import Ownership, RunningCall
from dspa.transformers_model import HOOKS_ATTRIBUTE, DecoderStack, device_of, hidden_of, with_hidden

PACKED_ROWS = (
    "a forward call has no attention mask and position_ids that do not count up, as packed rows have, whose sequences "
    "each have a prompt of their own; pass each sequence as a row of a padded batch, with an attention mask"
)

_NUMBERS = itertools.count()
_models: WeakValueDictionary[int, ModelHooks] = WeakValueDictionary()

_library = torch.library.Library("dspa_steering", "FRAGMENT")
# `order` is written by every operation, so that a compiler keeps them, and in this order.
_library.define(
    "begin_pass(Tensor(a!) order, Tensor tokens, Tensor? mask, SymInt cache_length, Tensor? lengths, int model) -> ()"
)
_library.define("layer_computed(Tensor(a!) hidden, Tensor(b!) order, int model, int layer) -> ()")
_library.define("layer_computed_copy(Tensor hidden, Tensor order, int model, int layer) -> Tensor")


class PassObserver(Protocol):
    """Is called during the passes of a model.

    Attributes:
        policies: what it steers by.
        differentiable: whether gradients have to flow through its edits, which a compiled model cannot do.
    """

    differentiable: bool
    policies: Mapping[str, Policy]

    @property
    def call(self) -> object | None:
        """The running generate call that it follows, if any."""

    def pass_begins(
        self, tokens: Tensor, mask: Tensor | None, cache_length: int | Tensor, has_cache: bool, cache: object | None
    ) -> None:
        """The decoder is about to run on `tokens`, ids `[B, T]` or embeddings `[B, T, d_model]`, after `cache_length`
        cached positions. `mask` is what was passed for the attention mask, if that was a tensor. `cache` is the cache
        itself; None where there is none, and in a compiled model, which cannot tell."""

    def pass_ends(self, cache: object | None, hidden: Tensor) -> None:
        """The decoder has returned `hidden [B, T, d_model]`, with this cache or without one. Not called by compiled
        models."""

    def layer_computed(self, layer: int, hidden: Tensor) -> Tensor | None:
        """A hooked layer has returned `hidden [B, T, d_model]`, which may be edited in place; returns what takes its
        place where that is not allowed, else None."""


class ModelHooks:
    """The hooks of one model. They stay with it after the last observer, uninstalled, so that a compiled model
    recognises them later."""

    def __init__(self, stack: DecoderStack) -> None:
        self.stack = stack
        self.number = next(_NUMBERS)
        self.observers: list[PassObserver] = []
        self.passes = Ownership()  # held during a pass, unless it is compiled
        self._layers_of: dict[PassObserver, frozenset[int]] = {}
        self._following: list[PassObserver] = []  # the observers of the pass
        with torch.inference_mode(False):  # it is used outside as well
            self.order = torch.zeros(1, device=device_of(stack.module))
        from torch._dynamo import mark_static_address  # takes long, but transformers has it when there is a model

        mark_static_address(self.order)  # else its being written to would rule out CUDA graphs
        self._decoder_hook = DecoderHook(self, stack.module)
        self._layer_hooks: dict[int, LayerHook] = {}
        _models[self.number] = self

    def add(self, observer: PassObserver, layers: set[int]) -> None:
        """Adds an observer of the passes and of some layers. It may be interrupted at any line; `remove` then undoes
        what was done so far."""
        self._layers_of[observer] = frozenset(layers)
        self._install_what_is_observed()

    def remove(self, observer: PassObserver) -> None:
        """Undoes `add`, also one that was interrupted; nothing happens if there was none."""
        self._layers_of.pop(observer, None)
        self._install_what_is_observed()

    def _install_what_is_observed(self) -> None:
        self.observers = list(self._layers_of)
        self._following = [observer for observer in self._following if observer in self._layers_of]
        observed = frozenset[int]().union(*self._layers_of.values())
        for layer in observed - self._layer_hooks.keys():
            self._layer_hooks[layer] = LayerHook(self, layer, self.stack.layers[layer])
        for layer, hook in self._layer_hooks.items():
            if layer not in observed:
                hook.remove()
        if not self.observers:
            self._decoder_hook.remove()
            return
        self._decoder_hook.install()
        for layer in sorted(observed):
            self._layer_hooks[layer].install()

    def begin_pass(
        self,
        tokens: Tensor,
        mask: Tensor | None,
        cache_length: int | Tensor,
        has_cache: bool,
        cache: object | None = None,
    ) -> None:
        """A pass begins. One of a generate call is shown to those that saw the call begin: who was attached in its
        middle does not know its prompt."""
        observers = list(self.observers)
        self._following = [observer for observer in observers if observer.call is not None] or observers
        for observer in self._following:
            observer.pass_begins(tokens, mask, cache_length, has_cache, cache)

    def end_pass(self, cache: object | None, hidden: Tensor) -> None:
        for observer in self._following:
            observer.pass_ends(cache, hidden)

    @property
    def differentiable(self) -> bool:
        """Whether an observer's edits are for autograd to follow."""
        return any(observer.differentiable for observer in self.observers)

    def layer_computed(self, layer: int, hidden: Tensor) -> Tensor | None:
        """What takes the place of `hidden`, or None if it was edited in place or not at all."""
        replacement = None
        for observer in self._following:
            found = observer.layer_computed(layer, hidden)
            if found is not None:
                hidden = replacement = found
        return replacement

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """A copy of the model has hooks of its own, once it is steered."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def hooks_of(stack: DecoderStack) -> ModelHooks:
    """The hooks of the model with these decoder layers, created on first use."""
    hooks = vars(stack.module).get(HOOKS_ATTRIBUTE)
    if hooks is None or hooks.stack.layers is not stack.layers:
        hooks = vars(stack.module)[HOOKS_ATTRIBUTE] = ModelHooks(stack)
    return hooks


class DecoderHook(MethodPatch):
    """Tells of each pass of the decoder before it runs."""

    def __init__(self, hooks: ModelHooks, module: nn.Module) -> None:
        super().__init__(module, "forward")
        self._hooks = hooks
        self._order = hooks.order
        self._number = hooks.number
        self._names = list(inspect.signature(type(module).forward).parameters)[1:]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = {**dict(zip(self._names, args, strict=False)), **kwargs} if args else kwargs
        tokens, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        if tokens is None:
            tokens = arguments.get("inputs_embeds")
        if tokens is None:
            return self.original(*args, **kwargs)  # which says what is missing
        if "cu_seq_lens_q" in arguments:
            raise InvalidInputError(PACKED)
        cache = arguments.get("past_key_values")
        cache_length = 0 if cache is None else cache.get_seq_length()  # of a static cache, a tensor
        if mask is None and _restarts(arguments.get("position_ids")):
            raise InvalidInputError(PACKED_ROWS)
        if not isinstance(mask, Tensor):
            mask = None  # one already made into the form of some kind of attention
        if torch.compiler.is_compiling():
            number, lengths = (0, cache_length) if isinstance(cache_length, Tensor) else (cache_length, None)
            number = number if cache is not None else -1
            torch.ops.dspa_steering.begin_pass(self._order, tokens, mask, number, lengths, self._number)
            return self.original(*args, **kwargs)
        running = RunningCall()
        try:
            if not self._hooks.passes.take(running, shared_within_thread=True):
                raise InvalidInputError("two threads run this steered model at once; run one at a time")
            self._hooks.begin_pass(tokens, mask, cache_length, cache is not None, cache)
            output = self.original(*args, **kwargs)
            self._hooks.end_pass(_cache_in(output) if cache is None else cache, hidden_of(output))
            return output
        finally:
            self._hooks.passes.release(running)


def _restarts(position_ids: object) -> bool:
    """Whether `[B, T]` positions are those of several sequences in a row, as transformers tells it where there is no
    attention mask. Where the decoder is compiled, nothing is known of them."""
    if torch.compiler.is_compiling() or not isinstance(position_ids, Tensor) or position_ids.ndim != 2:
        return False
    if position_ids.shape[1] < 2:  # a decoding step, which must not wait for a GPU
        return False
    return bool((position_ids.diff(dim=1) != 1).any())


class LayerHook(MethodPatch):
    """Passes what a decoder layer returns to the observers, which may edit it."""

    def __init__(self, hooks: ModelHooks, layer: int, module: nn.Module) -> None:
        super().__init__(module, "forward")
        self._hooks = hooks
        self._order = hooks.order
        self._number = hooks.number
        self._layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.original(*args, **kwargs)
        hidden = hidden_of(output)
        if not torch.compiler.is_compiling():
            replacement = self._hooks.layer_computed(self._layer, hidden)
            return output if replacement is None else with_hidden(output, replacement)
        if torch.is_grad_enabled() and (hidden.requires_grad or self._hooks.differentiable):
            edited = torch.ops.dspa_steering.layer_computed_copy(hidden, self._order, self._number, self._layer)
            return with_hidden(output, edited)
        torch.ops.dspa_steering.layer_computed(hidden, self._order, self._number, self._layer)
        return output


def _cache_in(output: Any) -> object | None:
    """The cache that a decoder made itself, among what it returns."""
    values = output.values() if isinstance(output, dict) else output
    return next((value for value in values if hasattr(value, "get_seq_length")), None)


def _begin_pass(
    order: Tensor, tokens: Tensor, mask: Tensor | None, cache_length: int, lengths: Tensor | None, model: int
) -> None:
    hooks = _models.get(model)
    if hooks is not None:
        hooks.begin_pass(tokens, mask, max(cache_length, 0) if lengths is None else lengths, cache_length >= 0)


def _layer_computed(hidden: Tensor, order: Tensor, model: int, layer: int) -> None:
    hooks = _models.get(model)
    if hooks is not None:
        hooks.layer_computed(layer, hidden)


def _layer_computed_copy(hidden: Tensor, order: Tensor, model: int, layer: int) -> Tensor:
    hooks = _models.get(model)
    if hooks is not None and hooks.differentiable:
        raise InvalidInputError(
            "differentiable edits do not work in a compiled model; train without torch.compile, or steer without "
            "differentiable=True"
        )
    edited = hidden.detach().clone()
    _layer_computed(edited, order, model, layer)
    return edited


for _name, _function, _fake in (
    ("begin_pass", _begin_pass, lambda *args: None),
    ("layer_computed", _layer_computed, lambda *args: None),
    ("layer_computed_copy", _layer_computed_copy, lambda hidden, *args: torch.empty_like(hidden)),
):
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"dspa_steering::{_name}", _fake, lib=_library)
torch.library.register_autograd(
    "dspa_steering::layer_computed_copy", lambda context, gradient: (gradient, None, None, None), lib=_library
)
