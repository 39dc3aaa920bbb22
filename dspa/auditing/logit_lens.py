"""The logit lens of directions in the residual stream: which tokens' logits they raise and lower."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dspa.auditing.records import LensTokens
from dspa.transformers_model import decoder_stack, device_of

SHOWN_TOKENS = 10  # in each direction
AT_ONCE = 64  # directions


class LogitLens:
    """Directions through a model's final norm and unembedding: `W_U (norm(d) - norm(0))`.

    The norm is scaled to each direction as if it were the whole stream, so that only the order of tokens and the ratio
    of their values mean something.

    Attributes:
        description: what it computes, in words.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        stack = decoder_stack(model)
        head: Any = model.get_output_embeddings()  # type: ignore[operator]
        self._unembedding: Tensor = head.weight
        self._norm = final_norm(stack.module, stack.layers, self._unembedding.shape[1])
        self._device = device_of(head)
        self._tokenizer = tokenizer
        through = "" if self._norm is None else "the final norm and "
        self.description = f"decoder rows through {through}the unembedding"

    @torch.no_grad()
    def tokens(self, directions: Tensor) -> list[LensTokens]:
        """The tokens that each of `directions [n, d_model]` promotes and suppresses most."""
        found: list[LensTokens] = []
        for part in directions.split(AT_ONCE):
            part = part.to(self._device, self._unembedding.dtype)
            if self._norm is not None:
                part = self._norm(part) - self._norm(torch.zeros_like(part[:1]))
            logits = (part @ self._unembedding.T).float()
            count = min(SHOWN_TOKENS, logits.shape[1])
            highest, lowest = logits.topk(count, dim=1), logits.topk(count, dim=1, largest=False)
            for row in range(len(part)):
                found.append(LensTokens(self._named(highest, row), self._named(lowest, row)))
        return found

    def _named(self, chosen: Any, row: int) -> tuple[tuple[str, float], ...]:
        ids: Sequence[int] = chosen.indices[row].tolist()
        return tuple(
            (token_text(self._tokenizer, token), value)
            for token, value in zip(ids, chosen.values[row].tolist(), strict=True)
        )


def token_text(tokenizer: Any, token: int) -> str:
    """A token by itself, with a space before it where its vocabulary marks one."""
    name = tokenizer.convert_ids_to_tokens(token)
    if not isinstance(name, str):
        return str(token)
    marked = name.startswith(("Ġ", "▁"))
    return (
        " " * marked + tokenizer.decode([token]).lstrip(" " if marked else "") if marked else tokenizer.decode([token])
    )


def final_norm(decoder: nn.Module, layers: nn.ModuleList, width: int) -> nn.Module | None:
    """The norm between the last layer and the unembedding: the last child of the decoder after its layers with a weight
    of the stream's width and no other; None if there is none."""
    children = list(decoder.children())
    after = children[next(index for index, child in enumerate(children) if child is layers) + 1 :]
    norms = [child for child in after if _is_norm(child, width)]
    return norms[-1] if norms else None


def _is_norm(module: nn.Module, width: int) -> bool:
    shapes = {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}
    return "weight" in shapes and set(shapes) <= {"weight", "bias"} and set(shapes.values()) == {(width,)}
