"""Standing in for a method of one module: an attribute of the instance hides the method of its class.

Unlike a hook, an attribute is something that code compiled by torch checks before it runs: a model that was compiled
before it was steered is compiled again, and taking the attribute away brings the first version back.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from torch import nn


class MethodPatch:
    """Replaces `module.name` between `install` and `remove`; subclasses say by what, in `__call__`.

    A copy of the module, by `copy.copy`, `copy.deepcopy` or pickle, has the method it had before: the copy is not
    steered, and nothing of this stands in it. The same object may be installed again, so that a compiled model
    recognises it.

    `install` and `remove` may be interrupted at any line; `remove` then undoes what was done so far.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.module = module
        self.name = name
        self.original: Callable[..., Any] = getattr(module, name)
        self._was_own_attribute = name in vars(module)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.original(*args, **kwargs)

    @property
    def installed(self) -> bool:
        return vars(self.module).get(self.name) is self

    def install(self) -> None:
        """Takes the method's place; nothing happens if it has it already."""
        if self.installed:
            return
        self._was_own_attribute = self.name in vars(self.module)
        self.original = getattr(self.module, self.name)
        functools.update_wrapper(self, self.original, updated=())  # what looks at the signature sees the method's
        vars(self.module).setdefault(CopyWithoutPatches.NAME, CopyWithoutPatches(self.module))
        vars(self.module)[self.name] = self

    def remove(self) -> None:
        """Puts the method back, unless it was replaced since: then the replacement stays, and calls pass through."""
        if self.installed:
            if self._was_own_attribute:
                vars(self.module)[self.name] = self.original
            else:
                del vars(self.module)[self.name]
        copier = vars(self.module).get(CopyWithoutPatches.NAME)
        if isinstance(copier, CopyWithoutPatches) and not copier.patches():
            del vars(self.module)[CopyWithoutPatches.NAME]

    def unpatched(self, state: dict[str, Any]) -> None:
        """Puts into the state of a copy what the module had before."""
        if self._was_own_attribute:
            state[self.name] = self.original
        else:
            del state[self.name]

    def __deepcopy__(self, memo: dict[int, Any]) -> Callable[..., Any]:
        return _method_of(memo[id(self.module)], self.name, self._own_original(memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return _method_of, (self.module, self.name, self._own_original(None))

    def _own_original(self, memo: dict[int, Any] | None) -> Callable[..., Any] | None:
        """What the instance itself had in the place of its class' method, or None."""
        if not self._was_own_attribute:
            return None
        if memo is None:
            return self.original
        return copy.deepcopy(self.original, memo)


class CopyWithoutPatches:
    """Stands in for a module's `__reduce_ex__`, by which `copy` and `pickle` take it apart: without its patches."""

    NAME = "__reduce_ex__"

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def patches(self) -> list[MethodPatch]:
        """Those that are installed."""
        values = vars(self._module).values()
        return [value for value in values if isinstance(value, MethodPatch) and value.installed]

    def __call__(self, protocol: Any) -> Any:
        reduced = type(self._module).__reduce_ex__(self._module, protocol)
        if not isinstance(reduced, tuple) or len(reduced) < 3 or not isinstance(reduced[2], dict):
            return reduced  # a class that has its own way
        state = dict(reduced[2])
        state.pop(self.NAME, None)
        for patch in self.patches():
            if state.get(patch.name) is patch:
                patch.unpatched(state)
        return (*reduced[:2], state, *reduced[3:])

    def __deepcopy__(self, memo: dict[int, Any]) -> CopyWithoutPatches:
        """Reached only for classes that copy all of their attributes in a way of their own."""
        return CopyWithoutPatches(memo[id(self._module)])


def _method_of(module: nn.Module, name: str, own: Callable[..., Any] | None) -> Callable[..., Any]:
    return own if own is not None else getattr(type(module), name).__get__(module)
