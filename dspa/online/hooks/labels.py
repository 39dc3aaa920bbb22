"""Telling which labels a forward call came with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dspa.online.hooks.method_patch import MethodPatch


class LabelsHook(MethodPatch):
    """Tells the observers of a model's `generate` the labels `[B, T]` that its `forward` is called with, and that the
    call has ended. A compiled model tells nothing."""

    def __init__(self, model: nn.Module, observers: list[Any]) -> None:
        super().__init__(model, "forward")
        self._observers = observers

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        labels = None if torch.compiler.is_compiling() else kwargs.get("labels")
        if not isinstance(labels, Tensor):
            return self.original(*args, **kwargs)
        try:
            for observer in list(self._observers):
                observer.labels_passed(labels)
            return self.original(*args, **kwargs)
        finally:
            for observer in list(self._observers):
                observer.labels_passed(None)
