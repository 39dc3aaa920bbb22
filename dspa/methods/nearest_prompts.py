"""Which of the triples' prompts are nearest to a prompt, by their densities (docs/method.md, section 2.1).

The estimator `nearest_prompts` of the conditional map keeps a row for each triple. A prompt chooses the rows of the
triples whose prompts are nearest to it, in place of the rows of its densest latents.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dspa.errors import CorruptFileError, InvalidInputError
from dspa.kernels import CsrMap
from dspa.kernels.lookup.reference import row_sum, top

NEIGHBOURS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # how many may be averaged
QUERIES = 1024  # at most so many triples are left out, to choose among them


@dataclass(frozen=True, eq=False)
class TriplePrompts:
    """The prompts of triples, as points in the space of prompt densities.

    Attributes:
        densities: `[triples, d_sae_in]` by compressed rows, float32.
        centre: `[d_sae_in]` float32, the mean of them. Directions are seen from there.
        neighbours: how many of them a prompt is compared with.
    """

    densities: CsrMap
    centre: Tensor
    neighbours: int = 1

    @classmethod
    def from_densities(cls, densities: CsrMap) -> TriplePrompts:
        """With the mean of the densities as the centre."""
        total = torch.zeros(densities.d_sae_out, dtype=torch.float64)
        total.index_add_(0, densities.columns.long(), densities.values.double())
        return cls(densities, (total / densities.d_sae_in).float())

    @property
    def count(self) -> int:
        """The number of triples."""
        return self.densities.d_sae_in

    def to(self, device: torch.device | str) -> TriplePrompts:
        if self.centre.device == torch.device(device):
            return self
        return TriplePrompts(self.densities.to(device), self.centre.to(device), self.neighbours)

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], neighbours: int | None) -> TriplePrompts:
        """From `tensors()`, not checked yet.

        Raises:
            KeyError: if one is missing.
        """
        offsets, columns, values = (tensors[f"prompts.{name}"] for name in ("row_offsets", "columns", "values"))
        centre = tensors["prompts.centre"]
        return cls(CsrMap(offsets, columns, values, centre.numel()), centre, 0 if neighbours is None else neighbours)

    def check(self, source: str) -> None:
        """Raises CorruptFileError if an index, a density or the number of neighbours is out of bounds."""
        self.densities.check()
        for name, values in (("values", self.densities.values), ("centre", self.centre)):
            if values.dtype != torch.float32 or not bool(((values >= 0) & (values <= 1)).all()):
                raise CorruptFileError(f"{source}: prompts.{name} are not all float32 from 0 to 1; fit it again")
        if not 1 <= self.neighbours <= self.count:
            raise CorruptFileError(f"{source} names {self.neighbours} neighbours; expected 1 to {self.count}")

    def tensors(self) -> dict[str, Tensor]:
        """What is saved as tensors."""
        densities = self.densities
        return {
            "prompts.row_offsets": densities.row_offsets,
            "prompts.columns": densities.columns,
            "prompts.values": densities.values,
            "prompts.centre": self.centre,
        }

    @cached_property
    def distances(self) -> Tensor:
        """`[triples]` float64, of each prompt from the centre."""
        centre, values = self.centre.double(), self.densities.values.double()
        at = centre[self.densities.columns.long()]
        # |p - c|^2 = |c|^2 + sum over the active latents of (p - c)^2 - c^2
        change = _sums_of_rows((values - at).square() - at.square(), self.densities)
        return (centre.square().sum() + change).clamp(min=0).sqrt()

    def nearness(self, density: Tensor) -> Tensor:
        """`(1 + cosine) / 2` of prompts and the triples' prompts, both seen from the centre: 1 in the same direction, 0
        in the opposite one, 1/2 where one of them is the centre.

        The numbers of a row depend on no other row.

        Args:
            density: `[B, d_sae_in]` floating point.

        Returns:
            `[B, triples]` float32.

        Raises:
            InvalidInputError: if the width does not fit.
        """
        if density.ndim != 2 or density.shape[1] != len(self.centre):
            raise InvalidInputError(f"density is {tuple(density.shape)}; expected [B, d_sae_in = {len(self.centre)}]")
        centre, columns = self.centre.double(), self.densities.columns.long()
        values = self.densities.values.double()
        nearness = []
        for row in density.double():  # one by one: no sum then depends on the size of the batch
            seen = row - centre
            products = _sums_of_rows(seen[columns] * values, self.densities) - (seen * centre).sum()
            lengths = self.distances * seen.square().sum().sqrt()
            cosine = torch.where(lengths > 0, products / lengths, torch.zeros_like(products))
            nearness.append(((1 + cosine) / 2).clamp(0, 1).float())
        return torch.stack(nearness) if nearness else self.centre.new_zeros(0, self.count)


def choose_neighbours(prompts: TriplePrompts, rows: CsrMap, differences: Tensor, edits_per_side: int) -> int:
    """How many neighbours predict the triples best, each left out in turn: the number with which the latents that would
    be edited differ most, in the triple left out, in the direction of the edit. Of equal numbers, the smaller.

    Args:
        prompts: of the triples.
        rows: `[triples, d_sae_out]`, what a neighbour contributes.
        differences: `[n, d_sae_out]`, D of the first n triples, which are left out.
        edits_per_side: how many latents are augmented, and ablated.

    Returns:
        One of `NEIGHBOURS`, less than the number of triples; 1 for a single triple.
    """
    choices = [number for number in NEIGHBOURS if number < prompts.count]
    if not choices:
        return 1
    captured = torch.zeros(len(choices), dtype=torch.float64)
    for query, difference in enumerate(differences):
        nearness = prompts.nearness(_dense_row(prompts.densities, query)[None])[0]
        nearness[query] = -1
        nearest = top(nearness, choices[-1], largest=True)
        score, done = torch.zeros(rows.d_sae_out, dtype=torch.float64), 0
        for index, number in enumerate(choices):
            score += row_sum(rows, nearest[done:number])
            done = number
            up, down = (top(score, edits_per_side, largest=largest) for largest in (True, False))
            captured[index] += (difference[up].sum() - difference[down].sum()).double()
    return choices[int(captured.argmax())]


def _dense_row(rows: CsrMap, index: int) -> Tensor:
    """`[columns]`."""
    return row_sum(rows, torch.tensor([index]))


def _sums_of_rows(values: Tensor, rows: CsrMap) -> Tensor:
    """Sums of `[nonzeros]` over the entries of each row, `[rows]`, in the order of the entries."""
    return torch.segment_reduce(values, "sum", offsets=rows.row_offsets, initial=0.0)
