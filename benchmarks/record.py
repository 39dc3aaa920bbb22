"""Keeps the rows of a run: in pytest-benchmark's JSON file, and for the table at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from dspa.bench.measurements import Column, Row

ROWS: list[Row] = []


class Record:
    """Checks the results of a row, then measures it, and keeps what came of it."""

    def __init__(self, benchmark: Any) -> None:
        self._benchmark = benchmark

    def __call__(
        self,
        name: str,
        group: str,
        measure: Callable[[], tuple[Column, ...]],
        *,
        check: Callable[[], None] | None = None,
        reference: str | None = None,
        left_out: str = "",
    ) -> None:
        """A row whose check fails is kept as failed, without a number, and fails the run.

        Args:
            name, group, reference, left_out: see `Row`.
            measure: returns the columns.
            check: raises AssertionError if a result is wrong; None where `measure` counts and does not time.
        """
        try:
            if check is not None:
                check()
            row = Row(name, group, measure(), reference, left_out=left_out)
        except AssertionError as failure:
            row = Row(name, group, (), reference, failed=(str(failure).strip() or "check failed").splitlines()[0])
        ROWS.append(row)
        self._benchmark.extra_info.update(row.as_json())
        self._benchmark.pedantic(
            lambda: None, rounds=1
        )  # pytest-benchmark keeps the record; the columns are what counts
        if row.failed is not None:
            pytest.fail(f"{name}: {row.failed}")
