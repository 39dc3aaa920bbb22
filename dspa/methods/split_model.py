"""A model cut in two after one layer: hidden states there, and what follows from them.

Nothing below the adapter is trained, so the lower part runs once per example, and every training step begins at the
layer. The upper part is the model's own forward method with the lower layers passing on what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dspa.transformers_model import DecoderStack, decoder_stack, hidden_of, with_hidden


class SplitModel:
    """A transformers model, cut after a decoder layer.

    Attributes:
        model: the model; its parameters are left as they are.
        layer: the layer, from 0.
    """

    def __init__(self, model: nn.Module, layer: int) -> None:
        self.model = model
        self.layer = layer
        self._stack: DecoderStack = decoder_stack(model)
        self._output: Any = None  # what the layer returned last: its form

    @torch.no_grad()
    def states(self, ids: Tensor, mask: Tensor) -> Tensor:
        """The hidden states after the layer, `[B, T, d_model]`; nothing above it is run.

        Args:
            ids: `[B, T]` token ids, padded on the right.
            mask: `[B, T]`, nonzero on tokens.
        """

        def stop(module: nn.Module, args: object, output: Any) -> None:
            self._output = output if isinstance(output, Tensor) else (None, *output[1:])
            raise _StopError(hidden_of(output))

        handle = self._stack.layers[self.layer].register_forward_hook(stop)
        try:
            self._stack.module(input_ids=ids, attention_mask=mask, use_cache=False)
        except _StopError as reached:
            return reached.hidden
        finally:
            handle.remove()
        raise AssertionError("the layer did not run")

    def logits(self, hidden: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
        """`[B, T, vocabulary]` from the hidden states after the layer; autograd follows.

        Args:
            hidden: `[B, T, d_model]`, as `states` returned them, edited or not.
            ids, mask: as for `states`.
        """
        assert self._output is not None, "states comes first: it shows the form of the layer's output"
        with self._starting_with(hidden):
            return self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits

    @contextmanager
    def _starting_with(self, hidden: Tensor) -> Iterator[None]:
        def passes_on(form: Any) -> Callable[..., Any]:
            return lambda states, *args, **kwargs: with_hidden(form, states)

        layers = list(self._stack.layers)[: self.layer + 1]
        form = self._output if isinstance(self._output, Tensor) else (hidden, *self._output[1:])
        replaced = [passes_on(form) for _ in layers[:-1]] + [lambda *args, **kwargs: with_hidden(form, hidden)]
        originals = [layer.__dict__.get("forward") for layer in layers]
        for layer, forward in zip(layers, replaced, strict=True):
            layer.forward = forward
        try:
            yield
        finally:
            for layer, original in zip(layers, originals, strict=True):
                if original is None:
                    del layer.forward
                else:
                    layer.forward = original


class _StopError(Exception):
    """Leaves the forward pass with the layer's hidden states."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__()
        self.hidden = hidden
