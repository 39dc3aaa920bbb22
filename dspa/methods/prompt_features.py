"""What a prompt is recognised by: the latents denser than usual (docs/method.md, section 2.1).

The estimator `ridge` of the conditional map is a regression on them, and its map is looked up by them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspa.errors import CorruptFileError, InvalidInputError
from dspa.kernels.lookup.reference import top


@dataclass(frozen=True, eq=False)
class PromptFeatures:
    """The `count` latents whose density deviates most from the mean, upwards.

    Attributes:
        centre: `[d_sae_in]` float32, the mean density over the prompts of the triples.
        count: how many latents describe a prompt.
    """

    centre: Tensor
    count: int

    def to(self, device: torch.device | str) -> PromptFeatures:
        return PromptFeatures(self.centre.to(device), self.count)

    def check(self, source: str) -> PromptFeatures:
        """Itself, or CorruptFileError if a mean density or the count is out of bounds."""
        if self.centre.dtype != torch.float32 or not bool(((self.centre >= 0) & (self.centre <= 1)).all()):
            raise CorruptFileError(f"{source}: prompt_centre is not all float32 from 0 to 1; fit it again")
        if not 1 <= self.count <= len(self.centre):
            raise CorruptFileError(f"{source} names {self.count} features; expected 1 to {len(self.centre)}")
        return self

    def deviation(self, density: Tensor) -> Tensor:
        """`(rho - c) / sqrt(c (1 - c))`: in units of the deviation of one token. 0 where c is 0 or 1, since nothing was
        learnt there.

        The numbers of a row depend on no other row.

        Args:
            density: `[B, d_sae_in]` floating point.

        Returns:
            `[B, d_sae_in]` float32.

        Raises:
            InvalidInputError: if the width does not fit.
        """
        if density.ndim != 2 or density.shape[1] != len(self.centre):
            raise InvalidInputError(f"density is {tuple(density.shape)}; expected [B, d_sae_in = {len(self.centre)}]")
        centre = self.centre.double()
        unit = (centre * (1 - centre)).sqrt()
        known = unit > 0
        deviation = (density.double() - centre) / torch.where(known, unit, torch.ones_like(unit))
        return torch.where(known, deviation, torch.zeros_like(deviation)).float()

    def indicators(self, density: Tensor) -> Tensor:
        """`[B, d_sae_in]` bool, the latents that describe each prompt; ties go to the lower one, as in the lookup."""
        chosen = torch.zeros(density.shape, dtype=torch.bool)
        for row, values in zip(chosen, self.deviation(density), strict=True):
            row[top(values, self.count, largest=True)] = True
        return chosen


def ridge_weights(features: Tensor, differences: Tensor) -> Tensor:
    """How differences of triples are combined, `[N, N]` float64: `(K + k I)^-1 L (L + l I)^-1`, with k and l the mean
    eigenvalues of K and L.

    Args:
        features: `[N, N]` float64, K, the products of the triples' centred features.
        differences: `[N, N]` float64, L, those of their centred differences.
    """
    return _resolvent(features) @ differences @ _resolvent(differences)


def _resolvent(products: Tensor) -> Tensor:
    """0 of what is 0: there is nothing to learn from equal triples."""
    level = products.diagonal().mean()
    if float(level) <= 0:
        return torch.zeros_like(products)
    return torch.linalg.inv(products + level * torch.eye(len(products), dtype=products.dtype))
