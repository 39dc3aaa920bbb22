"""What the edits of a policy are changed by: latents switched off, latents whose edits are scaled.

Both are folded into what a policy is made of, so that a token costs what it cost before: a latent that is switched off
is missing from the lists; a factor is part of the latent's decoder row. Each function also words the line that the
change leaves in `SteeringPolicy.changes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.util.scalars import LARGEST_FLOAT32, check_integer, check_number

NAMED = 20  # latents that a line of `changes` names


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


def scaled_decoder(sae: SparseAutoencoder, factors: Mapping[int, float]) -> tuple[SparseAutoencoder, str]:
    """The SAE with multiples of some decoder rows; see `SteeringPolicy.scaled`."""
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
    listed = [f"{latent} by {float(factors[latent]):g}" for latent in chosen]
    return replace(sae, W_dec=W_dec), f"scaled the edits of {_named(listed)}"


def _all_editable(editable: Tensor | None, d_sae: int) -> Tensor:
    """`[d_sae]` bool, a copy."""
    return torch.ones(d_sae, dtype=torch.bool) if editable is None else editable.clone()


def _checked(latents: Iterable[int], d_sae: int) -> list[int]:
    """The latents in ascending order, each once."""
    chosen = list(latents)
    for latent in chosen:
        check_integer("a latent", latent, 0, d_sae - 1, "d_sae - 1 = ")
    if not chosen:
        raise InvalidInputError("no latent was named; expected at least one")
    return sorted(set(chosen))


def _named(latents: list[Any]) -> str:
    shown = ", ".join(map(str, latents[:NAMED]))
    more = len(latents) - NAMED
    return f"{'latent' if len(latents) == 1 else 'latents'} {shown}" + (f" and {more} more" if more > 0 else "")
