"""Progress bars, drawn only on request."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

ItemT = TypeVar("ItemT")


def track(items: Iterable[ItemT], description: str, *, enabled: bool, unit: str = "") -> Iterator[ItemT]:
    """The items, with a bar on the error stream that shows how many have gone by and how long the rest will take."""
    if not enabled:
        yield from items
        return
    from rich.console import Console
    from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (SpinnerColumn(), *Progress.get_default_columns()[:-1], TimeRemainingColumn(), TimeElapsedColumn())
    label = f"{description} ({unit})" if unit else description
    with Progress(*columns, console=Console(stderr=True)) as bars:
        yield from bars.track(items, description=label)
