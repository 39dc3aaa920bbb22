"""Direct launches without a GPU: a compiled kernel that is none, and has Triton's interpreter run what it is given."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dspa.kernels.token_step import triton_bound
from dspa.kernels.triton_common.launch import Launch


def tensor_at(address: int, like: Tensor) -> Tensor:
    """A tensor of one element; the interpreter takes no more than its address and dtype."""
    memory = (ctypes.c_char * like.element_size()).from_address(address)
    return torch.frombuffer(memory, dtype=like.dtype)


def with_tensors(given: Any, like: Any) -> Any:
    """An argument with a tensor in the place of each address, and tuples named, as in an ordinary launch."""
    if isinstance(like, Tensor):
        return tensor_at(given, like)
    if isinstance(like, tuple):
        return type(like)(*(with_tensors(one, other) for one, other in zip(given, like, strict=True)))
    return given


class FakeKernel:
    """What a launch returns where kernels are compiled, as far as `DirectLaunch` knows it.

    Attributes:
        calls: how often it was called directly.
        stream: where the last call was put.
        shift: added to the number of an argument, as in a Triton with another order of them.
    """

    function, packed_metadata = 7, (4, 1, 0)

    def __init__(self, launch: Launch, run: Any) -> None:
        self._launch, self._run = launch, run
        self.calls = 0
        self.stream: int | None = None
        self.spoil: Any = None

    def run(self, x: int, y: int, z: int, stream: int, *rest: Any) -> None:
        names = self._launch.kernel.arg_names
        fixed, arguments = rest[:5], rest[5:]
        assert (y, z, fixed) == (1, 1, (self.function, self.packed_metadata, None, None, None))
        assert len(arguments) == len(names)
        self.calls += 1
        self.stream = stream
        named = {
            name: with_tensors(given, self._launch.arguments[name])
            for name, given in zip(names, arguments, strict=True)
        }
        if self.spoil is not None:
            self.spoil(named)
        self._run(replace(self._launch, programs=x, arguments=named))


class FakeDriver:
    """The driver of a device without a number, as the CPU is.

    Attributes:
        stream, device: what is current.
    """

    def __init__(self) -> None:
        self.stream = 1
        self.device: int | None = None
        self.active = SimpleNamespace(
            get_current_stream=lambda device: self.stream, get_current_device=lambda: self.device
        )


@contextmanager
def direct_launches(spoil: Any = None) -> Iterator[tuple[list[FakeKernel], FakeDriver]]:
    """Within it, Triton's steps are bound as on a GPU. The compiled kernels are listed, one for each kind of list.

    Args:
        spoil: changes the arguments of direct launches, for kernels that do not compute what they should.
    """
    driver, original = FakeDriver(), Launch.run
    kernels: dict[object, FakeKernel] = {}
    listed: list[FakeKernel] = []

    def run(launch: Launch) -> FakeKernel:
        original(launch)
        edits, strength, stats = (launch.arguments[name] for name in ("edits", "strength", "stats"))
        kind = edits.capacity, strength.alpha_of_row is None, strength.enabled is None, stats is None  # type: ignore[attr-defined]
        if kind not in kernels:
            kernels[kind] = FakeKernel(launch, original)
            kernels[kind].spoil = spoil
            listed.append(kernels[kind])
        return kernels[kind]

    with (
        mock.patch.object(Launch, "run", run),
        mock.patch.object(triton_bound, "is_interpreted", return_value=False),
        mock.patch.object(triton_bound, "driver", driver),
    ):
        yield listed, driver
