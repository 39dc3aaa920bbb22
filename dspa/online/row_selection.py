"""Which policy each prompt of a batch follows, and what that makes of its positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.methods.policy import EditPositions, Policy
from dspa.online.prompt_mask import PromptMask

Selection = str | None | Sequence[str | None]


class RowSelection:
    """The selection for the calls to come: none made yet, one policy (or none) for all rows, or one for each prompt."""

    def __init__(self, policies: Mapping[str, Policy]) -> None:
        self._policies = policies
        self._made: tuple[str | tuple[str | None, ...] | None] | None = None  # set in one step

    def select(self, names: Selection) -> None:
        """Chooses; raises InvalidInputError if a policy is not there."""
        listed = [names] if names is None or isinstance(names, str) else list(names)
        unknown = sorted({name for name in listed if name is not None} - set(self._policies))
        if unknown:
            raise InvalidInputError(f"there is no policy {unknown[0]!r}; expected one of {', '.join(self._policies)}")
        self._made = (names if names is None or isinstance(names, str) else tuple(listed),)

    @property
    def is_none(self) -> bool:
        """Whether it was selected that nothing is steered."""
        return self._made == (None,)

    def of_prompts(self, batch: int) -> list[str | None]:
        """The policy of each of so many prompts.

        Raises:
            InvalidInputError: if there are several policies and none was selected, or for another number of prompts.
        """
        if self._made is None:
            if len(self._policies) > 1:
                raise InvalidInputError(
                    f"{len(self._policies)} policies are attached and none is selected; pass select= to steer, or call "
                    "select on the steering"
                )
            return [next(iter(self._policies))] * batch
        (selected,) = self._made
        if selected is None or isinstance(selected, str):
            return [selected] * batch
        if len(selected) != batch:
            raise InvalidInputError(
                f"policies are selected for {len(selected)} rows, the batch has {batch}; expected as many"
            )
        return list(selected)

    def mask(
        self,
        token_ids: Tensor | None,
        attention_mask: Tensor,
        prompt_policies: Sequence[str | None],
        prompt_lengths: Tensor | None,
    ) -> PromptMask:
        """The mask of a batch of prompts, each row by the rules of its policy; arguments as for
        `PromptMask.from_prompt`."""
        rules: dict[str | None, tuple[tuple[int, ...], EditPositions]] = {
            name: (policy.uncounted_token_ids, policy.edit_positions)
            for name, policy in self._policies.items()
            if name in prompt_policies
        }
        rules = rules or {None: ((), "from_last_prompt")}  # no row is steered
        distinct = list(dict.fromkeys(rules.values()))
        masks = [
            PromptMask.from_prompt(
                token_ids, attention_mask, torch.tensor(sorted(uncounted)).long(), positions, prompt_lengths
            )
            for uncounted, positions in distinct
        ]
        if len(masks) == 1 and None not in prompt_policies:
            return masks[0]
        row_choice = [-1 if name is None else distinct.index(rules[name]) for name in prompt_policies]
        return PromptMask.from_rows(masks, torch.tensor(row_choice))
