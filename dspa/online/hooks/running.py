"""Calls that have something to themselves while they run, and lose it however they end.

An interrupt (Ctrl-C) can come between any two lines, also before a `finally` has begun. So a call that holds something
is not believed to run because it once said so: it runs as long as the frame that holds it is on its thread's stack.
"""

from __future__ import annotations

import sys
import threading

_LOCAL = "running"  # the name under which a frame holds its call
_FUNCTIONS = ("__call__", "_draft")  # the only ones that do


class RunningCall:
    """A call that is running in a thread. Whoever runs it holds it in a local variable named `running`.

    Attributes:
        thread: the thread that runs it.
    """

    def __init__(self) -> None:
        self.thread = threading.get_ident()

    @property
    def is_alive(self) -> bool:
        """Whether a frame of its thread still holds it."""
        own = self.thread == threading.get_ident()
        frame = sys._getframe() if own else sys._current_frames().get(self.thread)
        while frame is not None:
            if frame.f_code.co_name in _FUNCTIONS and frame.f_locals.get(_LOCAL) is self:
                return True
            frame = frame.f_back
        return False


class Ownership:
    """Which running call has something to itself."""

    def __init__(self) -> None:
        self._holder: dict[None, RunningCall] = {}  # one at most; setdefault is one step for all threads

    @property
    def holder(self) -> RunningCall | None:
        """The call that holds it; None if none does, or none that still runs."""
        found = self._holder.get(None)
        return found if found is not None and found.is_alive else None

    def take(self, running: RunningCall, *, shared_within_thread: bool = False) -> bool:
        """Whether the call holds it from now on; with `shared_within_thread`, or one further up in its thread does."""
        found = self._holder.setdefault(None, running)
        while found is not running:
            if found.is_alive:
                return shared_within_thread and found.thread == running.thread
            self.release(found)
            found = self._holder.setdefault(None, running)
        return True

    def release(self, running: RunningCall) -> None:
        """Frees it, if that call holds it."""
        if self._holder.get(None) is running:
            self._holder.pop(None, None)
