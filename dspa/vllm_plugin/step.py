"""What one step of the engine computes, and what is known of a request from one step to the next."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from dspa.kernels import EditList
from dspa.methods.policy import Policy


@dataclass(frozen=True)
class Segment:
    """The tokens of one request in one step, consecutive positions of its sequence.

    Attributes:
        request: its id.
        policy: its policy's name.
        first_row: the row of its first token among the tokens of the step.
        start: the position of that token.
        tokens: how many there are.
        prompt: the request's prompt, token ids.
        blocks: the blocks of the KV cache that hold its sequence; empty if nothing is kept by block.
    """

    request: str
    policy: str
    first_row: int
    start: int
    tokens: int
    prompt: Sequence[int]
    blocks: Sequence[int] = ()

    @property
    def end(self) -> int:
        return self.start + self.tokens


@dataclass(eq=False)
class RequestState:
    """What is known of a request.

    Attributes:
        policy: its policy's name.
        prompt_tokens: P, how many tokens its prompt has.
        counted: `[P]` bool, prompt tokens that make up its densities.
        counts: `[d_sae]` int32, of the positions before `read_until`; None before the first and after the last of them.
        read_until: how far the prompt has been read.
        selected: whether the policy selected its edits.
        selection: these, a list of one row; None for an edit without lists.
        seen_until: positions before this one were computed before; those of a preempted request are computed again,
            and not counted again.
    """

    policy: str
    prompt_tokens: int
    counted: np.ndarray
    counts: Tensor | None = None
    read_until: int = 0
    selected: bool = False
    selection: EditList | None = None
    seen_until: int = field(default=0)

    @classmethod
    def of(cls, segment: Segment, policy: Policy) -> RequestState:
        """The state of a request before its first step. What a policy that reads nothing selects is known by then."""
        prompt = np.asarray(segment.prompt)
        counted = ~np.isin(prompt, np.asarray(policy.uncounted_token_ids, dtype=prompt.dtype))
        state = cls(segment.policy, len(prompt), counted)
        if policy.observation is None:
            state.select(policy.select(torch.zeros(1, 0)))
        return state

    def select(self, selection: EditList | None) -> None:
        """Stores what the policy selected."""
        self.selected, self.selection, self.counts = True, selection, None

    def edited_positions(self, policy: Policy, segment: Segment) -> np.ndarray:
        """The positions of a segment that are edited, ascending (docs/method.md, section 4)."""
        generated_from = self.prompt_tokens - (policy.edit_positions != "generated")
        if policy.edit_positions != "all":
            return np.arange(max(segment.start, generated_from), segment.end)
        positions = np.arange(segment.start, segment.end)
        in_prompt = self.counted[np.minimum(positions, self.prompt_tokens - 1)]
        return positions[(positions >= generated_from) | in_prompt]


def stream_at(rows: Tensor, hidden: Tensor, residual: Tensor | None) -> Tensor:
    """The residual stream of some rows of a step, `rows [n]` int64, as a new tensor `[n, d_model]`."""
    stream = hidden.index_select(0, rows)
    return stream if residual is None else stream.add_(residual.index_select(0, rows))
