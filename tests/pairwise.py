"""Covering arrays: the few rows of a product of parameters that still hold every pair of values.

A test of three and more parameters that is marked `product` runs on these rows only, one that is marked `emulated`
(GPU kernels without a GPU, a hundred times slower) on rows that hold every single value, and one that is marked `long`
not at all, unless pytest is started with `--all-cases`. With `--remaining-cases` those run that are otherwise left out,
so that `make test-all` runs nothing twice; of the rows that are emulated, those that hold every pair, and where each
takes long, every single value. The hooks of this module do so where a conftest has them.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations

import pytest

OPTION, REMAINING = "--all-cases", "--remaining-cases"
PRODUCT, EMULATED, LONG = "product", "emulated", "long"  # markers

Row = Mapping[str, Hashable]
Choice = tuple[str, Hashable]  # of a value for a parameter


def combined(row: Row, strength: int) -> set[frozenset[Choice]]:
    """The pairs (strength 2) or the single values (strength 1) that a row holds; of fewer parameters, all together."""
    choices = list(row.items())
    return {frozenset(values) for values in combinations(choices, strength)} or {frozenset(choices)}


def covering(rows: Sequence[Row], strength: int = 2) -> list[int]:
    """Positions, ascending, of rows that together hold every pair of values, or every single value, that all rows hold.

    Greedy: the row with the most pairs that are not covered yet comes next, the first of those that are tied. The
    result depends on nothing but the rows and their order.
    """
    held = [combined(row, strength) for row in rows]
    missing = set[frozenset[Choice]]().union(*held)
    chosen: list[int] = []
    while missing:
        best = max(range(len(rows)), key=lambda index: len(held[index] & missing))
        chosen.append(best)
        missing -= held[best]
    return sorted(chosen)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        OPTION, action="store_true", help="run every row of the tests marked product, and the tests marked long"
    )
    parser.addoption(
        REMAINING,
        action="store_true",
        help="run only what is left out without --all-cases; emulated, every pair of values",
    )


@pytest.hookimpl(trylast=True)  # after -m and -k, so that what they deselect covers nothing
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption(OPTION):
        return
    outside = left_out(items)
    deselected = set(items) - outside | beyond_pairs(items) if config.getoption(REMAINING) else outside
    if deselected:
        config.hook.pytest_deselected(items=list(deselected))
        items[:] = [item for item in items if item not in deselected]


def row_of(item: pytest.Item) -> dict[str, str]:
    """What a test was parametrised with, by name; values are told apart by how they are written."""
    assert isinstance(item, pytest.Function)
    return {name: repr(value) for name, value in item.callspec.params.items()}


def left_out(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """The tests marked `long`, and those marked `product` or `emulated` outside the covering rows of their test.
    Skipped rows cover nothing, and stay."""
    outside = {item for item in items if item.get_closest_marker(LONG)}
    inside = [item for item in items if item not in outside]
    emulated = {item: 1 for item in inside if item.get_closest_marker(EMULATED)}
    products = {item: 2 for item in inside if item.get_closest_marker(PRODUCT) and item not in emulated}
    return outside | outside_of_covering(emulated | products)


def beyond_pairs(items: Sequence[pytest.Item]) -> set[pytest.Item]:
    """The tests marked `emulated` outside the rows of their test that hold every pair of values, or every single value
    where they are marked `long` as well."""
    emulated = [item for item in items if item.get_closest_marker(EMULATED)]
    return outside_of_covering({item: 1 if item.get_closest_marker(LONG) else 2 for item in emulated})


def outside_of_covering(strengths: Mapping[pytest.Item, int]) -> set[pytest.Item]:
    """The rows that the covering array of their test, of the strength of each, does not need."""
    tests: dict[tuple[str, int], list[pytest.Item]] = {}
    for item, strength in strengths.items():
        if item.get_closest_marker("skip") is None and hasattr(item, "callspec"):
            tests.setdefault((item.nodeid.partition("[")[0], strength), []).append(item)
    outside = set[pytest.Item]()
    for (_, strength), group in tests.items():
        kept = set(covering([row_of(item) for item in group], strength))
        outside.update(item for index, item in enumerate(group) if index not in kept)
    return outside
