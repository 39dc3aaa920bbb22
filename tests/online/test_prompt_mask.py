"""Which columns are counted and which are edited, by rows, one token at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dspa.errors import InvalidInputError
from dspa.methods.policy import EditPositions
from dspa.online.prompt_mask import PromptMask

PAD, BOS = 0, 1
UNCOUNTED = torch.tensor([BOS])
POSITIONS: tuple[EditPositions, ...] = ("from_last_prompt", "generated", "all")


def mask_of(
    ids: list[list[int]] | None,
    mask: list[list[int]],
    positions: EditPositions = "all",
    uncounted: torch.Tensor = UNCOUNTED,
) -> PromptMask:
    return PromptMask.from_prompt(None if ids is None else torch.tensor(ids), torch.tensor(mask), uncounted, positions)


@pytest.mark.parametrize(
    ("ids", "mask", "counted", "all_edited", "last_edited"),
    [
        # ids, mask -> counted, edited with "all", edited with "from_last_prompt"
        ([[1, 7, 8]], [[1, 1, 1]], "011", "011", "001"),
        ([[0, 1, 7, 8]], [[0, 1, 1, 1]], "0011", "0011", "0001"),  # left padding
        ([[1, 7, 8, 0]], [[1, 1, 1, 0]], "0110", "0110", "0010"),  # right padding
        ([[1, 7, 0, 8]], [[1, 1, 0, 1]], "0101", "0101", "0001"),  # a hole
        ([[1]], [[1]], "0", "1", "1"),  # BOS alone: nothing counted, but it is the last prompt token
        ([[7, 1]], [[1, 1]], "10", "11", "01"),  # an uncounted token at the end
        ([[1, 1, 7]], [[1, 1, 1]], "001", "001", "001"),  # BOS twice, as a template and a tokenizer may add it
        ([[0, 0]], [[0, 0]], "00", "00", "00"),  # nothing but padding
        ([[0, 7]], [[1, 1]], "11", "11", "01"),  # the padding id, where the mask says that it is a token
        (None, [[0, 1, 1]], "011", "011", "001"),  # embeddings: no id is known
        ([[8, 9]], [[1, 1, 1, 1]], "0011", "0011", "0001"),  # two columns are in a cache already
        ([[1, 9]], [[0, 1, 1, 1]], "0001", "0001", "0001"),
    ],
)
def test_counted_and_edited(
    ids: list[list[int]] | None, mask: list[list[int]], counted: str, all_edited: str, last_edited: str
) -> None:
    def marks(tensor: torch.Tensor) -> str:
        assert tensor.dtype == torch.bool
        return "".join(str(int(value)) for value in tensor[0])

    assert marks(mask_of(ids, mask).counted) == counted
    assert marks(mask_of(ids, mask, "all").edited) == all_edited
    assert marks(mask_of(ids, mask, "from_last_prompt").edited) == last_edited
    assert marks(mask_of(ids, mask, "generated").edited) == "0" * len(counted)


@given(st.data())
def test_every_row_by_the_rule(data: st.DataObject) -> None:
    batch, width = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 6))
    table = st.lists(st.lists(st.integers(0, 4), min_size=width, max_size=width), min_size=batch, max_size=batch)
    ids, mask = data.draw(table), [[min(value, 1) for value in row] for row in data.draw(table)]
    uncounted = data.draw(st.sets(st.integers(0, 4), max_size=2))
    positions = data.draw(st.sampled_from(POSITIONS))
    columns = mask_of(ids, mask, positions, torch.tensor(sorted(uncounted), dtype=torch.int64))
    edited_positions = set()
    for row in range(batch):
        present = [t for t in range(width) if mask[row][t]]
        counted = [t for t in present if ids[row][t] not in uncounted]
        edited = set(counted if positions == "all" else []) | set(present[-1:] if positions != "generated" else [])
        assert columns.counted[row].nonzero().flatten().tolist() == counted
        assert set(columns.edited[row].nonzero().flatten().tolist()) == edited
        edited_positions |= edited
    assert columns.edited_positions == tuple(sorted(edited_positions))
    assert (columns.batch, columns.width) == (batch, width)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.uint8])
def test_masks_of_any_dtype(dtype: torch.dtype) -> None:
    mask = torch.tensor([[0, 1, 1]], dtype=dtype)
    columns = PromptMask.from_prompt(torch.tensor([[0, 1, 5]]), mask, UNCOUNTED, "all")
    assert columns.counted.tolist() == [[False, False, True]]
    assert mask.tolist() == torch.tensor([[0, 1, 1]], dtype=dtype).tolist()  # not written to


@pytest.mark.parametrize("shape", [(1, 0), (3, 0), (3,), (1, 1, 3, 3)], ids=str)
def test_a_mask_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match=r"expected \[B, P\] with at least one token"):
        PromptMask.from_prompt(None, torch.ones(shape), UNCOUNTED, "all")


def test_expanded_rows_stand_next_to_each_other() -> None:
    columns = mask_of([[1, 7], [0, 8]], [[1, 1], [0, 1]])
    expanded = columns.expanded_to(6)
    assert expanded.counted.tolist() == [[False, True]] * 6
    assert mask_of([[7, 7], [0, 8]], [[1, 1], [0, 1]]).expanded_to(4).counted.tolist() == [
        [True, True],
        [True, True],
        [False, True],
        [False, True],
    ]
    assert expanded.edited_positions == columns.edited_positions
    assert columns.expanded_to(2) is columns


@pytest.mark.parametrize("batch", [1, 3, 5])
def test_a_batch_that_is_no_multiple_is_refused(batch: int) -> None:
    with pytest.raises(InvalidInputError, match=f"{batch} rows for 2 prompts"):
        mask_of([[1, 7], [0, 8]], [[1, 1], [0, 1]]).expanded_to(batch)


@pytest.mark.parametrize(
    ("mask", "lengths", "positions", "counted", "edited"),
    [
        ([[1, 1, 1, 1]], [2], "from_last_prompt", "0100", "0111"),
        ([[1, 1, 1, 1]], [2], "generated", "0100", "0011"),
        ([[1, 1, 1, 1]], [2], "all", "0100", "0111"),
        ([[0, 1, 1, 1]], [1], "from_last_prompt", "0100", "0111"),  # left padding is no token
        ([[1, 1, 1, 0]], [2], "from_last_prompt", "0100", "0110"),  # right padding is no response
        ([[1, 1, 1, 1]], [4], "from_last_prompt", "0111", "0001"),  # all prompt
        ([[1, 1, 1, 1]], [9], "from_last_prompt", "0111", "0001"),
        ([[1, 1, 1, 1]], [0], "from_last_prompt", "0000", "1111"),  # all response
    ],
)
def test_prompts_with_responses(
    mask: list[list[int]], lengths: list[int], positions: EditPositions, counted: str, edited: str
) -> None:
    ids = torch.tensor([[BOS, 7, 8, 9]])
    ids[0, : mask[0].index(1)] = PAD
    columns = PromptMask.from_prompt(ids, torch.tensor(mask), UNCOUNTED, positions, torch.tensor(lengths))
    assert "".join(str(int(value)) for value in columns.counted[0]) == counted
    assert "".join(str(int(value)) for value in columns.edited[0]) == edited


@pytest.mark.parametrize(
    ("mask", "positions", "edited_positions", "known_after"),
    [
        ([[1, 1, 1]], "from_last_prompt", (2,), (3,)),
        ([[1, 1, 0], [1, 1, 1]], "from_last_prompt", (1, 2), (2, 3)),  # a shorter row is known earlier
        ([[0, 0, 1], [1, 1, 1]], "from_last_prompt", (2,), (3,)),
        ([[1, 1, 1]], "all", (1, 2), (3, 3)),  # column 0 is BOS; column 1 has to wait for column 2
        ([[1, 1, 1]], "generated", (), ()),
    ],
)
def test_when_a_column_can_be_edited(
    mask: list[list[int]], positions: EditPositions, edited_positions: tuple[int, ...], known_after: tuple[int, ...]
) -> None:
    columns = mask_of([[BOS, 7, 8] for _ in mask], mask, positions)
    assert (columns.edited_positions, columns.known_after) == (edited_positions, known_after)


def test_rows_by_different_rules() -> None:
    ids = [[1, 7, 8]] * 3
    choices = [mask_of(ids, [[1, 1, 1]] * 3, positions) for positions in ("all", "from_last_prompt")]
    columns = PromptMask.from_rows(choices, torch.tensor([1, -1, 0]))
    assert columns.counted.int().tolist() == [[0, 1, 1], [0, 0, 0], [0, 1, 1]]
    assert columns.edited.int().tolist() == [[0, 0, 1], [0, 0, 0], [0, 1, 1]]
    assert (columns.edited_positions, columns.known_after) == ((1, 2), (3, 3))
