"""The state of a running `generate` call."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from dspa.online.hooks.running import RunningCall
from dspa.online.prompt_mask import PromptMask


@dataclass
class GenerateCall:
    """What is known when a call begins.

    Attributes:
        mask: the mask of its prompts, before rows are repeated for beams or several sequences.
        prompt_policies: the policy of each prompt.
        attention_mask: `[prompts, P]`, nonzero where a prompt has a token.
        totals_before: of each editor, its totals when the call began.
        running: tells its thread, and whether it still runs.
        last_hidden: `[B, d_model]`, what the decoder returned at the last position so far; None before its first pass,
            and in a compiled model.
    """

    mask: PromptMask
    prompt_policies: list[str | None]
    attention_mask: Tensor
    totals_before: list[Tensor]
    running: RunningCall
    last_hidden: Tensor | None = None
