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
from dspa.methods.personal import Overlay, PersonalPolicy
from dspa.methods.policy import Policy
from dspa.methods.steering_policy import SteeringPolicy

SHOWN_ROWS = 500  # of the map, heaviest first
SHOWN_LEADS = 5  # rows named for a latent

Page = Callable[[int], str | None]


@dataclass(frozen=True, eq=False)
class MapByLatent:
    """The entries of a map that can lead to an edit, also by column. Those of latents that the policy may not edit, or
    that an overlay decides, are left out.

    Attributes:
        policy: whose map it is.
        overlay: of a personal policy that shares it; None for the policy by itself.
    """

    policy: SteeringPolicy
    overlay: Overlay | None = None

    @classmethod
    def of(cls, policy: Policy) -> MapByLatent | None:
        """Of a policy that selects by a map; None for any other."""
        if isinstance(policy, PersonalPolicy):
            return cls(policy.policy, policy.overlay)
        return cls(policy) if isinstance(policy, SteeringPolicy) else None

    @property
    def map(self) -> ConditionalDifferenceMap:
        return self.policy.conditional_map

    @cached_property
    def free(self) -> Tensor:
        """`[d_sae_out]` bool, the latents whose edits the map decides."""
        editable = self.policy.editable
        free = torch.ones(self.map.matrix.d_sae_out, dtype=torch.bool) if editable is None else editable.clone()
        if self.overlay is not None:
            free[self.overlay.latents.long()] = False
        return free

    @cached_property
    def left_out(self) -> int:
        """How many output latents some row names whose edits the map does not decide."""
        named = torch.zeros_like(self.free)
        named[self._all_columns] = True
        return int((named & ~self.free).sum())

    @cached_property
    def rows(self) -> Tensor:
        """`[entries]` int64, the row of each entry."""
        return self._all_rows[self._kept]

    @cached_property
    def columns(self) -> Tensor:
        return self._all_columns[self._kept]

    @cached_property
    def values(self) -> Tensor:
        return self.map.matrix.values.double().cpu()[self._kept]

    @cached_property
    def _all_rows(self) -> Tensor:
        offsets = self.map.matrix.row_offsets.cpu()
        return torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())

    @cached_property
    def _all_columns(self) -> Tensor:
        return self.map.matrix.columns.long().cpu()

    @cached_property
    def _kept(self) -> Tensor:
        """Of all entries, which can lead to an edit, bool."""
        return self.free[self._all_columns]

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
        """`[entries]` bool: among the k_diff of its row that the policy would edit if this row were picked alone. A
        latent that is left out keeps its place among them."""
        all_rows, values = self._all_rows, self.map.matrix.values.double().cpu()
        extreme = torch.zeros(len(values), dtype=torch.bool)
        offsets = self.map.matrix.row_offsets.cpu()
        for edit, sign in (("augment", 1.0), ("ablate", -1.0)):
            if self.policy.edit in (edit, "both"):
                order = (-sign * values).argsort(stable=True)
                order = order[all_rows[order].argsort(stable=True)]  # by row, within it from the extreme on
                place = torch.arange(len(order)) - offsets[all_rows[order]]
                chosen = order[place < self.policy.k_diff]
                extreme[chosen[sign * values[chosen] > 0]] = True
        return extreme[self._kept]

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
        """The page of a row's prompt latent."""
        return self.policy.input_sae.metadata.neuronpedia_page

    def facts(self) -> MapFacts:
        """The map as a whole."""
        fitted, matrix = self.map, self.map.matrix
        masses = torch.zeros(matrix.d_sae_in, dtype=torch.float64).index_add_(0, self.rows, self.values.abs())
        order = masses.argsort(descending=True, stable=True)
        half = int((masses[order].cumsum(dim=0) < self.mass / 2).sum()) + 1 if self.mass else 0
        counts, page = torch.bincount(self.rows, minlength=matrix.d_sae_in), self.row_page()
        always = fitted.always_on().cpu()
        heaviest = [
            MapRow(
                row=row,
                entries=int(counts[row]),
                mass=float(masses[row]),
                share=float(masses[row]) / self.mass,
                gate_count=int(fitted.gate_counts[row]),
                always_open=bool(always[row]),
                link=page(row),
            )
            for row in order[:SHOWN_ROWS].tolist()
            if counts[row]
        ]
        return MapFacts(
            shape=(matrix.d_sae_in, matrix.d_sae_out),
            triples=fitted.run.triple_count,
            entries=len(self.values),
            sparsity=1 - len(self.values) / (matrix.d_sae_in * matrix.d_sae_out),
            columns_used=len(self.latents),
            columns_left_out=self.left_out,
            rows_used=int((counts > 0).sum()),
            always_open=int(always.sum()),
            always_open_mass=float(masses[always].sum()) / self.mass if self.mass else None,
            entry_size=quantiles(self.values.abs()),
            rows_for_half_the_mass=half,
            heaviest=tuple(heaviest),
        )
