"""The control of the organism's tables."""

from __future__ import annotations

import numpy as np
import pytest

from dspa.errors import InvalidInputError
from dspa.kernels import EditList
from dspa.organism.evaluation import lists_of_other_prompts
from dspa.organism.language import draw_prompts


@pytest.mark.parametrize("seed", range(3))
def test_lists_come_from_prompts_of_other_kinds(seed: int) -> None:
    prompts = draw_prompts(np.random.default_rng(seed), "heldout", 60)
    lists = EditList.from_lists([[number] for number in range(60)], [[]] * 60)
    found = lists_of_other_prompts(lists, prompts, seed)
    givers = [found.augmented(place)[0] for place in range(60)]
    assert all(prompt.kind != prompts[giver].kind for prompt, giver in zip(prompts, givers, strict=True))
    assert len(set(givers)) > 20
    kind = prompts[0].kind
    alike = [place for place, prompt in enumerate(prompts) if prompt.kind == kind]
    with pytest.raises(InvalidInputError, match="all prompts are of one kind"):
        lists_of_other_prompts(lists, [prompts[place] for place in alike], seed)
