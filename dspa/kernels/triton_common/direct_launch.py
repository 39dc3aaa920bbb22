"""Launching a compiled Triton kernel again without Triton's binder, which takes longer than most of our kernels.

Triton binds, specialises and looks up at every launch, 20 to 30 us in Python for as many arguments as ours. What it
ends in is one call of the compiled kernel with all arguments in the order of its parameters; this module makes that
call, with addresses in the place of tensors. All that is not Triton's documented interface is in `DirectLaunch`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from triton import knobs

from dspa.kernels.triton_common.launch import Launch


def addresses(argument: Any) -> Any:
    """An argument of a kernel with an address in the place of each tensor; tuples of them likewise."""
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if isinstance(argument, tuple):
        return tuple(map(addresses, argument))
    return argument


class DirectLaunch:
    """A launch whose kernel is compiled, to be made again with other values of some arguments.

    The others are those of the launch. Values must be ones for which Triton would use the same compiled kernel: of the
    same types, and multiples of 16, or 1, where those of the launch are. Nothing of that is checked.

    Args:
        launch: made at least once.
        compiled: what running it returned.
        varying: the names of the arguments that are passed to each call.

    Raises:
        AttributeError: if this Triton is put together in another way than those that are known.
    """

    def __init__(self, launch: Launch, compiled: Any, varying: tuple[str, ...]) -> None:
        names: list[str] = launch.kernel.arg_names
        self.launch = launch  # its tensors live as long as this does
        self._arguments = [addresses(launch.arguments[name]) for name in names]
        self._varying = [names.index(name) for name in varying]
        self._call = compiled.run
        self._fixed = (compiled.function, compiled.packed_metadata, None, None, None)  # no hook, no data for hooks

    def __call__(self, stream: int, values: tuple[object, ...]) -> None:
        """Puts it on a stream of the current device, which is the device of the launch."""
        arguments = self._arguments.copy()
        for at, value in zip(self._varying, values, strict=True):
            arguments[at] = value
        self._call(self.launch.programs, 1, 1, stream, *self._fixed, *arguments)


def is_watched() -> bool:
    """Whether a profiler hooks into Triton's launches; it sees none that is made directly."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))
