"""Controls: lists of prompts of another kind."""

from __future__ import annotations

import pytest

from dspa.errors import InvalidInputError
from dspa.kernels import EditList
from dspa.methods.controls import lists_of_other_prompts


@pytest.mark.parametrize("seed", range(3))
def test_lists_come_from_prompts_of_other_kinds(seed: int) -> None:
    kinds = [("how-to", "fact", "opinion")[place % 3] for place in range(60)]
    lists = EditList.from_lists([[number] for number in range(60)], [[]] * 60)
    found = lists_of_other_prompts(lists, kinds, seed)
    givers = [found.augmented(place)[0] for place in range(60)]
    assert all(kind != kinds[giver] for kind, giver in zip(kinds, givers, strict=True))
    assert len(set(givers)) > 20
    with pytest.raises(InvalidInputError, match="all prompts are of one kind"):
        lists_of_other_prompts(lists, ["fact"] * 60, seed)
