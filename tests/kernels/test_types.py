"""Maps, edit lists and counters."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import dense_map, edit_list, generator, integers
from torch import Tensor

from dspa.errors import CorruptFileError, InvalidInputError
from dspa.kernels import CsrMap, EditList, TokenStats


def csr(offsets: list[int], columns: list[int], values: list[float], d_sae_out: int = 5) -> CsrMap:
    return CsrMap(torch.tensor(offsets), torch.tensor(columns, dtype=torch.int32), torch.tensor(values), d_sae_out)


GOOD = csr([0, 2, 2, 4], [0, 3, 1, 4], [1.0, -2.0, 3.0, 0.5])


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 8), columns=st.integers(1, 8), filled=st.sampled_from([0.0, 0.3, 1.0]), seed=st.integers(0))
def test_dense_and_back(rows: int, columns: int, filled: float, seed: int) -> None:
    rng = generator(seed % 2**32)
    A = torch.where(torch.rand(rows, columns, generator=rng) < filled, integers(rng, -4, 4, rows, columns), 0.0)
    found = dense_map(A)
    assert (found.d_sae_in, found.d_sae_out, found.nonzeros) == (rows, columns, int((A != 0).sum()))
    assert torch.equal(found.to_dense(), A)


def test_a_map_by_hand() -> None:
    assert GOOD.check() is GOOD
    assert GOOD.to("cpu") is GOOD
    assert (GOOD.d_sae_in, GOOD.nonzeros) == (3, 4)
    expected = torch.tensor([[1.0, 0, 0, -2, 0], [0, 0, 0, 0, 0], [0, 3, 0, 0, 0.5]])
    assert torch.equal(GOOD.to_dense(), expected)


CORRUPT: dict[str, tuple[CsrMap, str]] = {
    "offsets in int32": (CsrMap(GOOD.row_offsets.int(), GOOD.columns, GOOD.values, 5), "expected int64, int32, float"),
    "columns in int64": (CsrMap(GOOD.row_offsets, GOOD.columns.long(), GOOD.values, 5), "expected int64, int32, float"),
    "values of integers": (CsrMap(GOOD.row_offsets, GOOD.columns, GOOD.columns, 5), "expected int64, int32, float"),
    "no offsets": (csr([], [], []), "tensors"),
    "no rows": (csr([0], [], []), "shapes"),
    "offsets as a matrix": (CsrMap(GOOD.row_offsets[None], GOOD.columns, GOOD.values, 5), "shapes"),
    "fewer values than columns": (CsrMap(GOOD.row_offsets, GOOD.columns, GOOD.values[:3], 5), "shapes"),
    "offsets do not start at 0": (csr([1, 2, 4], [0, 3, 1, 4], [1.0] * 4), "do not rise from 0 to the 4 entries"),
    "offsets end early": (csr([0, 2, 3], [0, 3, 1, 4], [1.0] * 4), "do not rise"),
    "offsets end late": (csr([0, 2, 5], [0, 3, 1, 4], [1.0] * 4), "do not rise"),
    "offsets fall": (csr([0, 3, 2, 4], [0, 3, 1, 4], [1.0] * 4), "do not rise"),
    "offsets below 0": (csr([0, -1, 4], [0, 1, 2, 4], [1.0] * 4), "do not rise"),
    "column below 0": (csr([0, 2], [-1, 3], [1.0] * 2), "columns run from -1 to 3; expected 0 to 4"),
    "column too large": (csr([0, 2], [1, 5], [1.0] * 2), "columns run from 1 to 5; expected 0 to 4"),
    "columns not ascending": (csr([0, 2], [3, 1], [1.0] * 2), "not strictly ascending"),
    "column twice in a row": (csr([0, 1, 3], [3, 1, 1], [1.0] * 3), "not strictly ascending"),
    "NaN": (csr([0, 2], [1, 3], [1.0, float("nan")]), "NaN or Inf"),
    "Inf": (csr([0, 2], [1, 3], [float("-inf"), 1.0]), "NaN or Inf"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_a_corrupt_map_is_named(case: str) -> None:
    conditional_map, message = CORRUPT[case]
    with pytest.raises(CorruptFileError, match=message) as raised:
        conditional_map.check()
    assert "\n" not in str(raised.value)


WRAPPING = """
import torch
from dspa.errors import CorruptFileError
from dspa.kernels import CsrMap
offsets, columns = torch.tensor([0, 2**63 - 1, -2, 3]), torch.tensor([0, 1, 2], dtype=torch.int32)
try:
    CsrMap(offsets, columns, torch.ones(3), 5).check()
except CorruptFileError as error:
    print(error)
"""


@pytest.mark.long
def test_offsets_whose_differences_wrap_around_are_named() -> None:
    """Each difference is positive in 64 bits. In a process of its own: who believes them writes anywhere."""
    ran = subprocess.run([sys.executable, "-c", WRAPPING], capture_output=True, text=True, check=False)
    assert ran.returncode == 0
    assert "do not rise" in ran.stdout


def test_columns_may_fall_from_one_row_to_the_next() -> None:
    csr([0, 2, 2, 3, 4], [1, 4, 1, 0], [1.0] * 4).check()


def test_lists_by_hand() -> None:
    edits = EditList.from_lists([[5, 2], [], [1]], [[7], [], [0, 3, 4]])
    assert (edits.batch, edits.k) == (3, 4)
    assert edits.counts.tolist() == [3, 0, 4]
    assert edits.latents.tolist() == [[5, 2, 7, 0], [0, 0, 0, 0], [1, 0, 3, 4]]
    assert edits.signs.tolist() == [[1, 1, -1, 0], [0, 0, 0, 0], [1, -1, -1, -1]]
    assert (edits.latents.dtype, edits.signs.dtype, edits.counts.dtype) == (torch.int32, torch.int8, torch.int32)
    assert [edits.augmented(row) for row in range(3)] == [[5, 2], [], [1]]
    assert [edits.ablated(row) for row in range(3)] == [[7], [], [0, 3, 4]]
    assert edits.valid().tolist() == [[True, True, True, False], [False] * 4, [True] * 4]


def test_no_lists() -> None:
    assert (EditList.from_lists([], []).batch, EditList.from_lists([], []).k) == (0, 0)
    assert (EditList.from_lists([[]], [[]]).batch, EditList.from_lists([[]], [[]]).k) == (1, 0)
    with pytest.raises(InvalidInputError, match="1 augment rows and 2 ablate rows"):
        EditList.from_lists([[1]], [[1], [2]])


def test_what_lies_behind_the_count_is_not_read() -> None:
    edits = edit_list([[1], []], [[2], [3]], 5, garbage=4)
    assert edits.valid().sum(dim=1).tolist() == [2, 1]
    assert (edits.augmented(0), edits.ablated(0), edits.augmented(1), edits.ablated(1)) == ([1], [2], [], [3])


def test_rows_are_picked_in_order_and_copied() -> None:
    edits = EditList.from_lists([[1], [2], [3]], [[], [], [4]])
    picked = edits.rows(torch.tensor([2, 0, 2]))
    assert [picked.augmented(row) for row in range(3)] == [[3], [1], [3]]
    picked.latents.zero_()
    assert edits.augmented(2) == [3]


def test_copy_keeps_the_addresses() -> None:
    edits, other = EditList.empty(2, 3), EditList.from_lists([[1, 2, 3], [4]], [[], [5]])
    before = [edits.latents.data_ptr(), edits.signs.data_ptr(), edits.counts.data_ptr()]
    edits.copy_(other)
    assert before == [edits.latents.data_ptr(), edits.signs.data_ptr(), edits.counts.data_ptr()]
    assert (edits.augmented(0), edits.augmented(1), edits.ablated(1)) == ([1, 2, 3], [4], [5])


def test_counters_start_at_nothing() -> None:
    stats = TokenStats.zeros(3, 7)
    values: dict[str, Tensor] = {field.name: getattr(stats, field.name) for field in fields(TokenStats)}
    assert {name: (tuple(value.shape), value.dtype) for name, value in values.items()} == {
        "seen": ((3,), torch.int64),
        "edited": ((3,), torch.int64),
        "nonfinite": ((3,), torch.int64),
        "maximum": ((3,), torch.float64),
        "maximum_sum": ((3,), torch.float64),
        "maximum_known": ((3,), torch.int64),
        "latent_edits": ((7,), torch.int64),
    }
    assert values.pop("maximum").isnan().all()
    assert not any(value.any() for value in values.values())
