"""What the conditional-difference map says by itself: its size, its rows, and how they name each output latent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from dspa.auditing.records import Lead, MapFacts, MapRow, MapUse
from dspa.auditing.statistics import quantiles
from dspa.methods.conditional_map import ConditionalDifferenceMap
from dspa.methods.steering_policy import SteeringPolicy

SHOWN_ROWS = 500  # of the map, heaviest first
SHOWN_LEADS = 5  # rows named for a latent

Page = Callable[[int], str | None]


@dataclass(frozen=True, eq=False)
class MapByLatent:
    """The entries of a map, also by column.

    Attributes:
        policy: whose map it is.
    """

    policy: SteeringPolicy

    @property
    def map(self) -> ConditionalDifferenceMap:
        return self.policy.conditional_map

    @cached_property
    def rows(self) -> Tensor:
        """`[entries]` int64, the row of each entry."""
        offsets = self.map.matrix.row_offsets.cpu()
        return torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())

    @cached_property
    def columns(self) -> Tensor:
        return self.map.matrix.columns.long().cpu()

    @cached_property
    def values(self) -> Tensor:
        return self.map.matrix.values.double().cpu()

    @cached_property
    def mass(self) -> float:
        """The sum of |A_ij|."""
        return float(self.values.abs().sum())

    @cached_property
    def latents(self) -> list[int]:
        """Output latents that some row names, ascending."""
        return self.columns.unique().tolist()

    @cached_property
    def _by_column(self) -> tuple[Tensor, Tensor]:
        """Entries ordered by column, and where each column begins and ends, `[d_sae_out + 1]`."""
        ends = torch.zeros(self.map.matrix.d_sae_out + 1, dtype=torch.int64)
        ends[1:] = torch.bincount(self.columns, minlength=self.map.matrix.d_sae_out).cumsum(dim=0)
        return self.columns.argsort(stable=True), ends

    @cached_property
    def _extreme(self) -> Tensor:
        """`[entries]` bool: among the k_diff of its row that the policy would edit if this row were picked alone."""
        extreme = torch.zeros(len(self.values), dtype=torch.bool)
        offsets = self.map.matrix.row_offsets.cpu()
        for edit, sign in (("augment", 1.0), ("ablate", -1.0)):
            if self.policy.edit in (edit, "both"):
                order = (-sign * self.values).argsort(stable=True)
                order = order[self.rows[order].argsort(stable=True)]  # by row, within it from the extreme on
                place = torch.arange(len(order)) - offsets[self.rows[order]]
                chosen = order[place < self.policy.k_diff]
                extreme[chosen[sign * self.values[chosen] > 0]] = True
        return extreme

    def entries_of(self, latent: int) -> tuple[Tensor, Tensor]:
        """Rows that name a latent, int64, and their entries, float64."""
        order, ends = self._by_column
        place = order[int(ends[latent]) : int(ends[latent + 1])]
        return self.rows[place], self.values[place]

    def use_of(self, latent: int, picks: Mapping[tuple[int, int], int] | None) -> MapUse | None:
        """How the rows name a latent; None if none does.

        Args:
            latent: of the output SAE.
            picks: on how many prompts a row was picked while the latent was listed, by row and latent; None without
                prompts.
        """
        order, ends = self._by_column
        place = order[int(ends[latent]) : int(ends[latent + 1])]
        if not len(place):
            return None
        rows, values = self.rows[place], self.values[place]
        return MapUse(
            raising=int((values > 0).sum()),
            lowering=int((values < 0).sum()),
            in_extremes=int(self._extreme[place].sum()),
            mean=float(values.mean()),
            strongest=float(values[values.abs().argmax()]),
            share=float(values.abs().sum()) / self.mass,
            leads=self._leads(latent, rows, values, picks),
        )

    def _leads(
        self, latent: int, rows: Tensor, values: Tensor, picks: Mapping[tuple[int, int], int] | None
    ) -> tuple[Lead, ...]:
        """Strongest in the direction of the edit; with prompts, by how much they added on all of them."""
        wanted = {"augment": values, "ablate": -values, "both": values.abs()}[self.policy.edit]
        if picks is not None:
            times = torch.tensor([picks.get((row, latent), 0) for row in rows.tolist()], dtype=torch.float64)
            wanted = wanted * times
        page = self.row_page()
        leads = []
        for index in wanted.argsort(descending=True, stable=True)[:SHOWN_LEADS].tolist():
            row = int(rows[index])
            if float(wanted[index]) > 0:
                prompts = None if picks is None else picks.get((row, latent), 0)
                leads.append(Lead(row, float(values[index]), prompts, page(row)))
        return tuple(leads)

    def row_page(self) -> Page:
        """The page of a row's prompt latent; triples have none."""
        if self.map.prompts is not None:
            return lambda row: None
        return self.policy.input_sae.metadata.neuronpedia_page

    def facts(self) -> MapFacts:
        """The map as a whole."""
        fitted, matrix = self.map, self.map.matrix
        latents = fitted.prompts is None
        masses = torch.zeros(matrix.d_sae_in, dtype=torch.float64).index_add_(0, self.rows, self.values.abs())
        order = masses.argsort(descending=True, stable=True)
        half = int((masses[order].cumsum(dim=0) < self.mass / 2).sum()) + 1 if self.mass else 0
        counts, page = matrix.row_offsets.cpu().diff(), self.row_page()
        always = fitted.always_on().cpu() if latents else torch.zeros(matrix.d_sae_in, dtype=torch.bool)
        heaviest = [
            MapRow(
                row=row,
                entries=int(counts[row]),
                mass=float(masses[row]),
                share=float(masses[row]) / self.mass,
                gate_count=int(fitted.gate_counts[row]) if latents else None,
                always_open=bool(always[row]),
                link=page(row),
            )
            for row in order[:SHOWN_ROWS].tolist()
            if counts[row]
        ]
        return MapFacts(
            rows_of="prompt latent" if latents else "triple",
            shape=(matrix.d_sae_in, matrix.d_sae_out),
            triples=fitted.run.triple_count,
            entries=matrix.nonzeros,
            sparsity=1 - matrix.nonzeros / (matrix.d_sae_in * matrix.d_sae_out),
            columns_used=len(self.latents),
            rows_used=int((counts > 0).sum()),
            always_open=int(always.sum()) if latents else None,
            always_open_mass=float(masses[always].sum()) / self.mass if latents and self.mass else None,
            entry_size=quantiles(self.values.abs()),
            rows_for_half_the_mass=half,
            heaviest=tuple(heaviest),
        )
