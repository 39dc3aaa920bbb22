"""What a prompt is recognised by: the latents denser than usual (docs/method.md, section 2.1).

The estimator `ridge` of the conditional map is a regression on them, and its map is looked up by them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dspa.errors import CorruptFileError, InvalidInputError
from dspa.kernels import CsrMap
from dspa.kernels.lookup.reference import top

LEAST_DEVIATION = 2.0**-40  # far above rounding, far below a token of a response
LEAST_PENALTY = 1e-6  # what it is added to stays far from singular in float64


@dataclass(frozen=True, eq=False)
class PromptFeatures:
    """The at most `count` latents whose density deviates most from the mean, upwards: of those that do not, none.

    Attributes:
        centre: `[d_sae_in]` float32, the mean density over the prompts of the triples.
        count: how many latents describe a prompt at most.
    """

    centre: Tensor
    count: int

    def to(self, device: torch.device | str) -> PromptFeatures:
        return PromptFeatures(self.centre.to(device), self.count)

    def check(self, source: str) -> PromptFeatures:
        """Itself, or CorruptFileError if a mean density is out of bounds."""
        if self.centre.dtype != torch.float32 or not bool(((self.centre >= 0) & (self.centre <= 1)).all()):
            raise CorruptFileError(f"{source}: prompt_centre is not all float32 from 0 to 1; fit it again")
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
        deviation = self.deviation(density)
        chosen = torch.zeros(density.shape, dtype=torch.bool)
        for row, values in zip(chosen, deviation, strict=True):
            row[top(values, self.count, largest=True)] = True
        return chosen & (deviation > 0)

    def ranking(self, density: Tensor) -> Tensor:
        """`[B, d_sae_in + count]` float32, by which the lookup chooses rows of a `padded` map: deviations above 0, then
        the `count` rows that are empty; what is not above 0 comes last and is never reached."""
        deviation = self.deviation(density)
        nothing = deviation.new_zeros(len(deviation), self.count)
        return torch.cat([torch.where(deviation > 0, deviation, -1), nothing], dim=1)

    def padded(self, matrix: CsrMap) -> CsrMap:
        """A map with `count` empty rows more, for prompts with fewer than `count` features."""
        nothing = matrix.row_offsets[-1:].expand(self.count)
        return CsrMap(torch.cat([matrix.row_offsets, nothing]), matrix.columns, matrix.values, matrix.d_sae_out)


def ridge_weights(features: Tensor, differences: Tensor, penalty: float = 1.0) -> Tensor:
    """How differences of triples are combined, `[N, N]` float64: `(K + k I)^-1 L (L + l I)^-1`, with k and l the mean
    eigenvalues of K and L, times the penalty.

    Neither may be 0, see `check_that_triples_differ`.

    Args:
        features: `[N, N]` float64, K, the products of the triples' centred features.
        differences: `[N, N]` float64, L, those of their centred differences.
        penalty: by what both are multiplied, above 0.
    """
    return _resolvent(features, penalty) @ differences @ _resolvent(differences, penalty)


def check_that_triples_differ(prompts: Tensor, deviations: Tensor) -> None:
    """Raises InvalidInputError if all triples have the same features, or the same differences: nothing that differs can
    be laid to a feature.

    Args:
        prompts: `[N, d_sae_in]` bool, whether a latent describes a triple's prompt.
        deviations: `[N, d_sae_out]` float64, the differences minus their mean, up to rounding.
    """
    equal_prompts = bool((prompts == prompts[:1]).all())
    if equal_prompts or float(deviations.abs().max()) < LEAST_DEVIATION:
        which = "prompts" if equal_prompts else "differences between responses"
        raise InvalidInputError(
            f"ridge finds the {which} of all {len(prompts)} triples alike, and has nothing to learn; expected at least "
            "two that differ, use mean_difference"
        )


def _resolvent(products: Tensor, penalty: float) -> Tensor:
    level = penalty * products.diagonal().mean()
    return torch.linalg.inv(products + level * torch.eye(len(products), dtype=products.dtype))
