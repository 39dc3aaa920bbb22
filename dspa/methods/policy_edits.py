"""What the edits of a policy are changed by: latents switched off, latents whose edits are scaled.

Both are folded into what a policy is made of, so that a token costs what it cost before: a latent that is switched off
is missing from the lists; a factor is part of the latent's decoder row. Each function also words the line that the
change leaves in `SteeringPolicy.changes`. Lines are whole; `shortened` is how they are shown.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.util.scalars import LARGEST_FLOAT32, check_integer, check_number

NAMED = 20  # latents of a line of `changes` that are shown
MERGED = "merged "  # how the line of a mixture begins
ITEM = r"\d+(?: by [\d.e+-]+)?"
LONG_LIST = re.compile(rf"({ITEM}(?:, {ITEM}){{{NAMED - 1}}})((?:, {ITEM})+)")


def without_latents(editable: Tensor | None, d_sae: int, latents: Iterable[int]) -> tuple[Tensor, str]:
    """Which latents may still be edited, `[d_sae]` bool; see `SteeringPolicy.without`."""
    chosen = _checked(latents, d_sae)
    left = _all_editable(editable, d_sae)
    left[chosen] = False
    return left, f"without {_named(chosen)}"


def only_latents(editable: Tensor | None, d_sae: int, latents: Iterable[int]) -> tuple[Tensor, str]:
    """Which latents may still be edited, `[d_sae]` bool; see `SteeringPolicy.only`."""
    chosen = _checked(latents, d_sae)
    kept = torch.zeros(d_sae, dtype=torch.bool)
    kept[chosen] = True
    return _all_editable(editable, d_sae) & kept, f"only {_named(chosen)}"


def scaled_decoder(
    sae: SparseAutoencoder, before: Tensor | None, factors: Mapping[int, float]
) -> tuple[SparseAutoencoder, Tensor, str]:
    """The SAE with multiples of some decoder rows, and of each row `[d_sae]` float32 its factor, those `before`
    included; see `SteeringPolicy.scaled`."""
    if not isinstance(factors, Mapping):
        raise InvalidInputError(f"factors are a {type(factors).__name__}; expected a dictionary of latents and factors")
    chosen = _checked(factors, sae.d_sae)
    for latent, factor in factors.items():
        check_number(f"the factor of latent {latent}", factor, 0, LARGEST_FLOAT32)
    assert sae.W_dec is not None  # a policy checks it
    rows = torch.tensor(chosen, dtype=torch.int64, device=sae.device)
    rows = rows if sae.decoder_rows is None else sae.decoder_rows[rows].long()
    known = rows >= 0  # the others cannot be selected, and need no factor
    small = torch.promote_types(sae.dtype, torch.float32)
    multiples = torch.tensor([float(factors[latent]) for latent in chosen], dtype=small, device=sae.device)
    W_dec = sae.W_dec.clone()
    W_dec[rows[known]] = (W_dec[rows[known]].to(small) * multiples[known, None]).to(W_dec.dtype)
    after = torch.ones(sae.d_sae) if before is None else before.clone()
    for latent in chosen:
        after[latent] *= float(factors[latent])
    listed = [f"{latent} by {written(factors[latent])}" for latent in chosen]
    return replace(sae, W_dec=W_dec), after, f"scaled the edits of {_named(listed)}"


def shortened(changes: Iterable[str]) -> str:
    """The lines of `SteeringPolicy.changes` in one, of each list of latents the first `NAMED`."""

    def rest(found: re.Match[str]) -> str:
        return f"{found[1]} and {found[2].count(',')} more"

    return "; ".join(LONG_LIST.sub(rest, change) for change in changes)


def written(number: float) -> str:
    """A number as short as it can be read back exactly."""
    short = f"{float(number):g}"
    return short if float(short) == number else repr(float(number))


def _all_editable(editable: Tensor | None, d_sae: int) -> Tensor:
    """`[d_sae]` bool, a copy."""
    return torch.ones(d_sae, dtype=torch.bool) if editable is None else editable.clone()


def _checked(latents: Iterable[int], d_sae: int) -> list[int]:
    """The latents in ascending order, each once."""
    if isinstance(latents, str) or not isinstance(latents, Iterable):
        raise InvalidInputError(f"latents are {latents!r}; expected a list of integers")
    chosen = list(latents)
    for latent in chosen:
        check_integer("a latent", latent, 0, d_sae - 1, "d_sae - 1 = ")
    if not chosen:
        raise InvalidInputError("no latent was named; expected at least one")
    return sorted(set(chosen))


def _named(latents: list[Any]) -> str:
    return f"{'latent' if len(latents) == 1 else 'latents'} {', '.join(map(str, latents))}"
