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
    def from_model(cls, model: nn.Module) -> PaddingTokens:
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
                or a beginning of sequence.
        """
        present = torch.ones_like(token_ids)
        if self.padding is None or token_ids.shape[1] < 2:
            return present
        is_padding = token_ids == self.padding
        trailing = is_padding.flip(1).cumprod(dim=1).flip(1)  # 1 from where only padding follows
        leading = is_padding.cumprod(dim=1) * (1 - trailing)
        if bool((leading.sum(dim=1) > (self.padding == self.begins)).any()):
            raise InvalidInputError(
                f"a forward call has padding (token {self.padding}) on the left and no attention mask, so that the "
                "model takes it for text; pass attention_mask"
            )
        if self.padding in self.ends:
            if bool((trailing.sum(dim=1) > 1).any()):
                raise InvalidInputError(
                    f"a forward call has several tokens {self.padding} at the end of a row and no attention mask: they "
                    "may be padding or ends of sequence; pass attention_mask"
                )
            return present
        return 1 - trailing


def presence_of_mask(mask: Tensor, batch: int, width: int) -> Tensor:
    """Where the `[B, T]` tokens of a forward call are, by its attention mask.

    Args:
        mask: `[B, T]`, nonzero on tokens; or `[B or 1, heads or 1, T, T]`, what each position attends to: bool, or
            numbers that are added to the scores.
        batch, width: B and T.

    Raises:
        InvalidInputError: for a mask of another shape, or one of the second form that hides something that comes
            before: whether that is padding cannot be told.
    """
    if mask.shape == (batch, width):
        return mask
    if mask.ndim == 4 and mask.shape[2:] == (width, width):
        seen = mask if mask.dtype == torch.bool else mask >= 0
        if bool((seen | ~torch.ones(width, width, dtype=torch.bool, device=mask.device).tril()).all()):
            return torch.ones(batch, width, device=mask.device)
    raise InvalidInputError(
        f"a forward call has an attention mask of shape {tuple(mask.shape)} that does not say which tokens are "
        f"padding; pass one of shape [{batch}, {width}]"
    )


def check_lengths(lengths: Tensor, present: Tensor) -> Tensor:
    """The prompt lengths `[B]` of rows whose tokens `present [B, T]` marks.

    Raises:
        InvalidInputError: unless they are whole numbers, as many as rows or one for all, from 1 to a row's tokens.
    """
    batch = len(present)
    if lengths.dtype == torch.bool or lengths.is_floating_point() or lengths.ndim > 1:
        raise InvalidInputError(f"scoring got prompt_tokens {lengths.tolist()}; expected a whole number for each row")
    if lengths.ndim and len(lengths) != batch:
        raise InvalidInputError(f"scoring got {len(lengths)} prompt lengths for {batch} rows; expected as many")
    lengths = lengths.to(torch.int64).expand(batch)
    tokens = present.bool().sum(dim=1).to(lengths.device)
    wrong = ((lengths < 1) | (lengths > tokens)).nonzero().flatten().tolist()
    if wrong:
        row = wrong[0]
        raise InvalidInputError(
            f"scoring got {int(lengths[row])} prompt tokens for row {row}, which has {int(tokens[row])} tokens; "
            "expected at least 1 and at most all of them"
        )
    return lengths


def prompt_lengths_of(response: Tensor, present: Tensor) -> Tensor | None:
    """How many tokens of each row come before its response.

    Args:
        response: `[B, T]` bool, tokens of the response.
        present: `[B, T]`, nonzero on tokens.

    Returns:
        `[B]` int64; all tokens of a row without a response. None if some row begins with its response, as the labels of
        plain language modelling do: then these say nothing about prompts.

    Raises:
        InvalidInputError: if a row has several responses, as packed sequences and conversations of several turns have:
            each would have a prompt of its own.
    """
    if response.shape != present.shape:
        return None
    tokens = present.bool().to(response.device)
    answered = response & tokens
    before = (tokens & (answered.cumsum(dim=1) == 0)).sum(dim=1)
    if bool((before == 0).any()):
        return None
    end = (answered * torch.arange(1, tokens.shape[1] + 1, device=tokens.device)).amax(dim=1)
    inside = tokens.cumsum(dim=1).gather(1, (end - 1).clamp(min=0)[:, None]).squeeze(1) - before
    several = ((end > 0) & (inside != answered.sum(dim=1))).nonzero().flatten().tolist()
    if several:
        raise InvalidInputError(
            f"row {several[0]} of a forward call has more than one response; a steered call has one prompt a row: pass "
            "each turn as a row of its own, or say with scoring(prompt_tokens=...) where the response begins"
        )
    return before.to(torch.int64)
