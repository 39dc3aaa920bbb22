"""Triton's interpreter under the control of tests: faster, in another order, and watched.

It reaches into `triton.runtime.interpreter`, whose parts have no public handle.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from queue import Empty, SimpleQueue
from typing import Any

import pytest
import triton.runtime.interpreter as interpreter
from torch import Tensor

from dspa.kernels.triton_common.launch import Launch


class PatchOncePerLaunch:
    """The interpreter replaces the functions of triton.language each time a device function is called, which takes
    longer than most device functions. Once per launch and module does the same."""

    def __init__(self) -> None:
        self._original: Any = interpreter._patch_lang  # pyright: ignore[reportPrivateUsage]
        self._scopes: dict[int, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, function: Any) -> Any:
        module = id(function.__globals__)
        if module in self._scopes:
            return None
        with self._lock:
            if module in self._scopes:
                return None
            outermost = not self._scopes
            self._scopes[module] = self._original(function)
            return self if outermost else None

    def restore(self) -> None:
        """Called by the interpreter when the launch is over."""
        for scope in reversed(self._scopes.values()):
            scope.restore()
        self._scopes.clear()


class NumpyTypes(dict[str, Any]):
    """The interpreter builds a table of types whenever it wants to know one; this remembers what it found."""

    def __init__(self) -> None:
        super().__init__()
        self._original: Any = interpreter._get_np_dtype  # pyright: ignore[reportPrivateUsage]

    def __call__(self, triton_type: Any) -> Any:
        name = triton_type.name
        if name not in self:
            self[name] = self._original(triton_type)
        return self[name]


class ShuffledGrid:
    """Which program comes when: each launch runs its programs in a shuffled order, the same for as many programs."""

    def __init__(self) -> None:
        builder = interpreter.interpreter_builder
        self._set_dim, self._set_idx = builder.set_grid_dim, builder.set_grid_idx
        self._order: list[int] = []
        self.shuffles = True

    def set_dim(self, nx: int, ny: int, nz: int) -> None:
        """Called by the interpreter when a launch begins."""
        self._order = random.Random(nx).sample(range(nx), nx) if self.shuffles else list(range(nx))
        self._set_dim(nx, ny, nz)

    def set_idx(self, x: int, y: int, z: int) -> None:
        """Called by the interpreter before each program."""
        self._set_idx(self._order[x], y, z)


def shuffle_programs() -> None:
    """From now on, launches run their programs in a shuffled order, except within `in_sequence`."""
    builder = interpreter.interpreter_builder
    if not isinstance(getattr(builder.set_grid_dim, "__self__", None), ShuffledGrid):
        grid = ShuffledGrid()
        builder.set_grid_dim, builder.set_grid_idx = grid.set_dim, grid.set_idx


@contextmanager
def in_sequence() -> Iterator[None]:
    """Within it, programs run in the order of their numbers."""
    grid = interpreter.interpreter_builder.set_grid_dim.__self__
    assert isinstance(grid, ShuffledGrid)
    grid.shuffles = False
    try:
        yield
    finally:
        grid.shuffles = True


def speed_up() -> None:
    """Interprets faster from now on, without checks of integers for overflow: the shapes of tests are small."""
    if not isinstance(interpreter._patch_lang, PatchOncePerLaunch):  # pyright: ignore[reportPrivateUsage]
        interpreter._patch_lang = PatchOncePerLaunch()  # pyright: ignore[reportPrivateUsage]
        interpreter._get_np_dtype = NumpyTypes()  # pyright: ignore[reportPrivateUsage]
        options = replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
        interpreter.interpreter_builder.options = options


class Interleaved:
    """Runs the programs of a launch in a shuffled order, some of them at the same time.

    A program that asks a counter for the second time, while nothing has happened since the first, waits. It is woken
    when another program changes something by an atomic operation, which is all that programs wait for.

    Attributes:
        slots: how many programs run at a time, each in a thread. The others start when a slot is free, so that whoever
            waits for a program that has not started waits forever. None: all.
        held: the ticket, which is what its first atomic operation returns, of a program that goes no further from
            there until all others have ended or wait.
        holds: how often a program was held up.
        launches: the launches so far.
    """

    def __init__(self, slots: int | None, seed: int, held: int | None) -> None:
        self.slots = slots
        self.held = held
        self.holds = 0
        self.launches: list[Launch] = []
        self._order = random.Random(seed)
        self._original: Any = interpreter.interpreter_builder.create_atomic_rmw
        self._changed = threading.Condition()
        self._program = threading.local()
        self._running = 0  # threads that still have programs to run
        self._waiting = 0  # those of them that wait
        self._events = 0  # changes so far
        self._is_holding = False
        self._is_stuck = False

    def __call__(self, launch: Launch) -> None:
        self.launches.append(launch)
        function = launch.kernel.rewrite()
        executor = interpreter.GridExecutor(function, launch.kernel.arg_names, (launch.programs,))
        arguments = {
            name: value if name in executor.constexprs else interpreter._implicit_cvt(value)  # pyright: ignore[reportPrivateUsage]
            for name, value in launch.arguments.items()
        }
        waiting: SimpleQueue[int] = SimpleQueue()
        for program in self._order.sample(range(launch.programs), launch.programs):
            waiting.put(program)
        failures: list[BaseException] = []

        def work() -> None:
            try:
                while True:
                    # The interpreter knows one program's number at a time: kernels that ask for it need one slot.
                    interpreter.interpreter_builder.set_grid_idx(waiting.get_nowait(), 0, 0)
                    self._program.has_ticket, self._program.asked = False, None
                    function(**arguments)
            except Empty:
                pass
            except BaseException as failure:
                failures.append(failure)
            finally:
                with self._changed:
                    self._running -= 1
                    self._look_around()

        scope = interpreter._patch_lang(function)  # pyright: ignore[reportPrivateUsage]
        interpreter.interpreter_builder.set_grid_dim(launch.programs, 1, 1)
        self._running, self._waiting, self._is_stuck = self.slots or launch.programs, 0, False
        try:
            threads = [threading.Thread(target=work, daemon=True) for _ in range(self._running)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        finally:
            scope.restore()
        if failures:
            raise failures[0]

    def atomic(self, operation: Any, pointer: Any, value: Any, *rest: Any) -> Any:
        """The interpreter's atomic operation."""
        time.sleep(0.0002)  # lets another program go on
        with self._changed:
            before = self._original(operation, pointer, value, *rest)
            if value.data.size == 1 and not value.data.any():
                self._ask(int(pointer.data.item()))
            else:
                self._happen()
            if not self._program.has_ticket:
                self._program.has_ticket = True
                if self.held is not None and before.data.item() == self.held:
                    self._hold()
        return before

    def _happen(self) -> None:
        self._events += 1
        self._waiting = 0
        self._changed.notify_all()

    def _ask(self, address: int) -> None:
        """Notes that this program looks at a counter; returns when it may have changed."""
        question = address, self._events
        if question != self._program.asked:
            self._program.asked = question
            return
        self._waiting += 1
        self._look_around()
        self._changed.wait_for(lambda: self._events != question[1] or self._is_stuck)
        if self._is_stuck:
            raise RuntimeError("programs wait for each other")

    def _hold(self) -> None:
        self.holds += 1
        self._is_holding = True
        self._look_around()
        self._changed.wait_for(lambda: not self._is_holding)

    def _look_around(self) -> None:
        """Lets the program that is held up go on, if no other one does; gives up if there is none."""
        if self._waiting == self._running - self._is_holding:
            self._is_stuck = self._waiting > 0 and not self._is_holding
            self._is_holding = False
            self._changed.notify_all()


@contextmanager
def interleaved(slots: int | None, seed: int, held: int | None = None) -> Iterator[Interleaved]:
    """Within it, launches are run by `Interleaved`."""
    runner = Interleaved(slots, seed, held)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Launch, "run", lambda launch: runner(launch))
        patch.setattr(interpreter.interpreter_builder, "create_atomic_rmw", runner.atomic)
        yield runner


class Counted:
    """Bytes loaded from and stored to some tensors, by name."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.bytes = dict.fromkeys(tensors, 0)
        self._ranges = {
            name: (tensor.data_ptr(), tensor.data_ptr() + tensor.untyped_storage().nbytes(), tensor.element_size())
            for name, tensor in tensors.items()
        }

    def add(self, pointers: Any, mask: Any) -> None:
        """Counts one load or store."""
        at = pointers.data[mask.data.astype(bool)]
        for name, (begin, end, size) in self._ranges.items():
            self.bytes[name] += int(((at >= begin) & (at < end)).sum()) * size


@contextmanager
def counting_bytes(tensors: dict[str, Tensor]) -> Iterator[Counted]:
    """Within it, the interpreter's loads and stores are counted."""
    counted, builder = Counted(tensors), interpreter.interpreter_builder
    load, store = builder.create_masked_load, builder.create_masked_store

    def counting_load(pointers: Any, mask: Any, *rest: Any) -> Any:
        counted.add(pointers, mask)
        return load(pointers, mask, *rest)

    def counting_store(pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        counted.add(pointers, mask)
        return store(pointers, value, mask, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(builder, "create_masked_load", counting_load)
        patch.setattr(builder, "create_masked_store", counting_store)
        yield counted
