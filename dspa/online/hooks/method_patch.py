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

    A copy of the module, by `copy.deepcopy` or by pickle, has the method it had before: the copy is not steered.
    The same object may be installed again, so that a compiled model recognises it.
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
        vars(self.module)[self.name] = self

    def remove(self) -> None:
        """Puts the method back, unless it was replaced since: then the replacement stays, and calls pass through."""
        if not self.installed:
            return
        if self._was_own_attribute:
            vars(self.module)[self.name] = self.original
        else:
            del vars(self.module)[self.name]

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


def _method_of(module: nn.Module, name: str, own: Callable[..., Any] | None) -> Callable[..., Any]:
    return own if own is not None else getattr(type(module), name).__get__(module)
