"""Checks of what is passed to the operations: a public kernel refuses a bad operand in one line, and never reads or
writes beyond a tensor. What takes long is looked at once, and again when it was written to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dspa.errors import InvalidInputError

Versions = tuple[tuple[int, int], ...]


def versions_of(*tensors: Tensor) -> Versions | None:
    """What tells whether one of some tensors was written in place or moved; None for tensors of inference mode, which
    do not count that. Writing through `.data` or by way of numpy is not counted either."""
    if any(tensor.is_inference() for tensor in tensors):
        return None
    return tuple((tensor._version, tensor.data_ptr()) for tensor in tensors)


def can_be_read(tensor: Tensor) -> bool:
    """Whether looking at a tensor's values is possible and waits for nothing: not in a compiled graph, which has none
    yet, and not on a GPU."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def is_being_captured(device: torch.device) -> bool:
    """Whether the work of the current stream is being captured in a graph, instead of being done."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def check_same_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Raises InvalidInputError if a tensor is on another device than the first operand of a call."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise InvalidInputError(f"{name} is on {tensor.device}; expected {device}, where the call began")


def check_is_tensor(name: str, value: object) -> None:
    """Raises InvalidInputError if an operand is no dense tensor."""
    if not isinstance(value, Tensor):
        raise InvalidInputError(f"{name} is a {type(value).__name__}; expected a tensor")
    if value.layout != torch.strided:
        raise InvalidInputError(f"{name} is a tensor of layout {value.layout}; expected a dense one")


@contextmanager
def refusals_of_the_library() -> Iterator[None]:
    """What the C++ library refuses, as an error of this package."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        raise refusal_of_the_library(error) from error


def refusal_of_the_library(error: Exception) -> InvalidInputError:
    """An error of the C++ library in one line."""
    return InvalidInputError((str(error).strip().splitlines() or ["the kernel failed"])[0])
