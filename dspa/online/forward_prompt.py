"""Which tokens of a plain forward call are there, and which of them are prompt: what is passed says so, or it is
recognised, or the call is refused."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dspa.errors import InvalidInputError

IGNORED_LABEL = -100


@dataclass(frozen=True)
class PaddingTokens:
    """What a model calls padding.

    Attributes:
        padding: the id; None where the model has none.
        ends: ids that end a sequence; padding that is one of these may be a token.
        begins: the id that begins one, or None.
    """

    padding: int | None
    ends: frozenset[int]
    begins: int | None

    @classmethod
    def of(cls, model: nn.Module) -> PaddingTokens:
        """Of a model, by its generation config and, where that is silent, its config."""

        def known(name: str) -> Any:
            for config in (getattr(model, "generation_config", None), getattr(model, "config", None)):
                value = getattr(config, name, None)
                if value is not None:
                    return value
            return None

        ends = known("eos_token_id")
        ends = ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends]
        padding, begins = known("pad_token_id"), known("bos_token_id")
        return cls(
            padding if isinstance(padding, int) else None,
            frozenset(ends),
            begins if isinstance(begins, int) else None,
        )

    def presence(self, token_ids: Tensor) -> Tensor:
        """Where `[B, T]` ids that came without an attention mask are tokens: everywhere but in padding on the right.

        Raises:
            InvalidInputError: if there is padding on the left, which attention would see, or padding that may be an end
                of sequence.
        """
        present = torch.ones_like(token_ids)
        if self.padding is None or token_ids.shape[1] < 2:
            return present
        is_padding = token_ids == self.padding
        trailing = is_padding.flip(1).cumprod(dim=1).flip(1)  # 1 from where only padding follows
        if self.padding in self.ends:
            if bool((trailing.sum(dim=1) > 1).any()):
                raise InvalidInputError(
                    f"a forward call has several tokens {self.padding} at the end of a row and no attention mask: they "
                    "may be padding or ends of sequence; pass attention_mask"
                )
            return present
        if self.padding != self.begins and bool((is_padding[:, 0] & (trailing[:, 0] == 0)).any()):
            raise InvalidInputError(
                f"a forward call has padding (token {self.padding}) on the left and no attention mask, so that the "
                "model takes it for text; pass attention_mask"
            )
        return 1 - trailing


def prompt_lengths_of(response: Tensor, present: Tensor) -> Tensor | None:
    """How many tokens of each row come before its response.

    Args:
        response: `[B, T]` bool, tokens of the response.
        present: `[B, T]`, nonzero on tokens.

    Returns:
        `[B]` int64; all tokens of a row without a response. None if some row begins with its response, as the labels of
        plain language modelling do: then these say nothing about prompts.
    """
    if response.shape != present.shape:
        return None
    tokens = present.bool().to(response.device)
    before = (tokens & ((response & tokens).cumsum(dim=1) == 0)).sum(dim=1)
    return None if bool((before == 0).any()) else before.to(torch.int64)
