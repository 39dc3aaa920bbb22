"""The place of steering in a decoder layer: a custom operation, opaque to `torch.compile`.

A compiled model calls it between two pieces of generated code, or as one call in them. What it does depends on the
step, which the worker states before it runs the model; outside of a step it does nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from dspa.errors import InvalidInputError

OPERATION = "dspa::after_layer"


class LayerObserver(Protocol):
    """What is told that a layer was computed."""

    def layer_computed(self, layer: int, hidden: Tensor, residual: Tensor | None) -> None:
        """The residual stream after a layer is `hidden + residual`, `[N, d_model]` both, or `hidden` alone."""


class _Observers(threading.local):
    """Of each thread: engines in one process may run their steps in threads of their own."""

    def __init__(self) -> None:
        self.stack: list[LayerObserver] = []  # the last one is of the step that runs


_observers = _Observers()


@contextmanager
def observed_by(observer: LayerObserver) -> Iterator[None]:
    """While it lasts, the layers that this thread computes tell an observer."""
    _observers.stack.append(observer)
    try:
        yield
    finally:
        _observers.stack.pop()


def _after_layer(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    if _observers.stack:
        _observers.stack[-1].layer_computed(layer, hidden, residual)


def _nothing(hidden: Tensor, residual: Tensor | None, layer: int) -> None:
    """On meta tensors, when a model is traced."""


_library = torch.library.Library("dspa", "FRAGMENT")
_library.define(
    "after_layer(Tensor(a!) hidden, Tensor(b!)? residual, int layer) -> ()", tags=(torch.Tag.cudagraph_unsafe,)
)
_library.impl("after_layer", _after_layer, "CompositeExplicitAutograd")
_library.impl("after_layer", _nothing, "Meta")


def observe_layer(layer: nn.Module, index: int) -> None:
    """Makes a decoder layer, of a model that was not traced yet, tell the observer what it computed.

    Raises:
        InvalidInputError: if something else runs in the place of the layer's forward, as where weights are offloaded.
    """
    kind: Any = type(layer)
    if "forward" in vars(layer):
        raise InvalidInputError(
            f"the forward of layer {index} was replaced before steering was attached, as offloading of weights does; "
            "start vLLM without it"
        )

    class Observed(kind):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = kind.forward(self, *args, **kwargs)
            if isinstance(output, tuple):
                torch.ops.dspa.after_layer(output[0], output[1], index)
            else:
                torch.ops.dspa.after_layer(output, None, index)
            return output

    Observed.__name__ = kind.__name__
    Observed.__qualname__ = kind.__qualname__
    layer.__class__ = Observed
