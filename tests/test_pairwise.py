"""The reduced products: every pair of values is there, in few rows, the same ones in every process."""

from __future__ import annotations

from itertools import product

import pairwise
import pytest

pytest_plugins = ["pytester"]

SIZES = [(1,), (5,), (2, 3), (2, 2, 2), (3, 4, 5), (12, 3, 3, 3), (4, 4, 4, 2, 2), (1, 1, 1)]


def rows_of(sizes: tuple[int, ...]) -> list[dict[str, int]]:
    names = [f"p{number}" for number in range(len(sizes))]
    return [dict(zip(names, values, strict=True)) for values in product(*map(range, sizes))]


def pairs_by_hand(rows: list[dict[str, int]]) -> set[tuple[str, int, str, int]]:
    return {(a, row[a], b, row[b]) for row in rows for a in row for b in row if a < b}


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_every_pair_is_covered(sizes: tuple[int, ...]) -> None:
    rows = rows_of(sizes)
    kept = [rows[index] for index in pairwise.covering(rows)]
    assert pairs_by_hand(kept) == pairs_by_hand(rows)
    assert {choice for row in kept for choice in row.items()} == {choice for row in rows for choice in row.items()}


@pytest.mark.parametrize(
    ("sizes", "least", "most"),
    [((5,), 5, 5), ((2, 3), 6, 6), ((2, 2, 2), 4, 4), ((3, 4, 5), 20, 24), ((12, 3, 3, 3), 36, 42)],
)
def test_few_rows_are_left(sizes: tuple[int, ...], least: int, most: int) -> None:
    """`least` is the product of the two largest sizes, below which no covering array goes."""
    assert least <= len(pairwise.covering(rows_of(sizes))) <= most


@pytest.mark.parametrize(("sizes", "rows"), [((5,), 5), ((2, 3), 3), ((12, 3, 3, 3), 12), ((1, 1), 1)])
def test_every_single_value_is_covered_by_as_few_rows_as_can_be(sizes: tuple[int, ...], rows: int) -> None:
    kept = [rows_of(sizes)[index] for index in pairwise.covering(rows_of(sizes), strength=1)]
    assert len(kept) == rows
    assert {choice for row in kept for choice in row.items()} == {
        choice for row in rows_of(sizes) for choice in row.items()
    }


def test_pairs_that_no_row_holds_are_not_required() -> None:
    rows = [row for row in rows_of((3, 3, 3)) if row["p0"] != row["p1"]]
    kept = [rows[index] for index in pairwise.covering(rows)]
    assert pairs_by_hand(kept) == pairs_by_hand(rows)


def test_the_order_of_the_rows_decides_ties() -> None:
    rows = rows_of((3, 4, 5))
    assert pairwise.covering(rows) == pairwise.covering([dict(reversed(row.items())) for row in rows])
    assert 0 in pairwise.covering(rows)


TESTS = """
import pytest

@pytest.fixture(params=["x", "y", pytest.param("absent", marks=pytest.mark.skip(reason="it is not here"))])
def backend(request):
    return request.param

@pytest.mark.product
@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize(("b", "c"), [(b, c) for b in range(2) for c in range(3)])
def test_product(a, b, c, backend):
    pass

@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(5))
@pytest.mark.parametrize("c", range(2))
def test_plain(a, b, c):
    pass

@pytest.mark.long
def test_long():
    pass

@pytest.mark.emulated
@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(5))
def test_emulated(a, b):
    pass

@pytest.mark.emulated
@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(3))
@pytest.mark.parametrize("c", range(2))
def test_emulated_product(a, b, c):
    pass
"""


@pytest.mark.parametrize(
    ("arguments", "passed", "skipped"),
    [([], (61, 62), 24), (["--all-cases"], (133, 133), 24), (["--remaining-cases"], (59, 66), 0)],
    ids=["pairs", "whole", "rest"],
)
def test_tests_marked_product_are_reduced_unless_the_whole_is_selected(
    pytester: pytest.Pytester, arguments: list[str], passed: tuple[int, int], skipped: int
) -> None:
    pytester.makeconftest("from pairwise import pytest_addoption, pytest_collection_modifyitems")
    pytester.makeini("[pytest]\nmarkers =\n product: of parameters\n emulated: of a GPU\n long: takes long")
    pytester.makepyfile(test_reduced=TESTS)
    outcomes = pytester.runpytest_inprocess("-q", *arguments).parseoutcomes()
    assert passed[0] <= outcomes["passed"] <= passed[1]
    assert outcomes.get("skipped", 0) == skipped
