"""The conditional-difference map: which response latents go with preference, given prompt latents.

Method, section 2.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from dspa.errors import CorruptFileError, InvalidInputError
from dspa.kernels import CsrMap, EditKind, EditList, lookup
from dspa.kernels.lookup import check_lookup_options, top
from dspa.methods.prompt_features import LEAST_PENALTY, PromptFeatures, check_that_triples_differ, ridge_weights
from dspa.offline.density_store import CollectionRun, DensityStore, SparseCounts
from dspa.offline.density_subset import DensitySubset
from dspa.util.files import TensorFolder
from dspa.util.html_table import html_table
from dspa.util.progress import track
from dspa.util.scalars import check_integer, check_number

GateRule = Literal["ge", "positive_ge"]
Sparsification = Literal["per_row", "global_tau", "none"]
Estimator = Literal["mean_difference", "ridge"]

ENTRIES_PER_SIDE: dict[Estimator, int] = {"mean_difference": 16, "ridge": 32}  # unless told otherwise
BLOCK_BYTES = 256 * 2**20  # what one dense block may take in memory while fitting
GRID = 2.0**48  # A is rounded to multiples of 1 / GRID, far below what densities resolve and above what sums lose


@dataclass(frozen=True)
class FitOptions:
    """How a map is fitted; see the table of open points in method.md, section 2.

    Attributes:
        gate_percentile: p, in percent: a latent's gate opens at this percentile of its densities over the prompts.
        gate_rule: "ge" is the literal gate `rho >= tau`, always on where tau is 0; "positive_ge" requires `rho > 0` as
            well.
        sparsify: "per_row" keeps each row's own extremes; "global_tau" is appendix B's one threshold for all rows.
        entries_per_side: how many of a row's largest, and of its smallest, entries are its extremes.
        estimator: "mean_difference" is the paper's map; "ridge" has no gates, but is a regression on the latents that
            are denser than usual, and is looked up by them.
        features: with "ridge", how many latents describe a prompt at most.
        penalty: with "ridge", by what both penalties are multiplied.
    """

    gate_percentile: float = 90.0
    gate_rule: GateRule = "ge"
    sparsify: Sparsification = "per_row"
    entries_per_side: int = 16
    estimator: Estimator = "mean_difference"
    features: int = 64
    penalty: float = 1.0

    def __post_init__(self) -> None:
        check_number("gate_percentile", self.gate_percentile, 0, 100)
        for name, value, known in (
            ("gate_rule", self.gate_rule, get_args(GateRule)),
            ("sparsify", self.sparsify, get_args(Sparsification)),
            ("estimator", self.estimator, get_args(Estimator)),
        ):
            if value not in known:
                raise InvalidInputError(f"{name} is {value!r}; expected one of {', '.join(known)}")
        check_integer("entries_per_side", self.entries_per_side, 1)
        check_integer("features", self.features, 1)
        check_number("penalty", self.penalty, LEAST_PENALTY, 1 / LEAST_PENALTY)
        if self.estimator == "ridge" and self.sparsify == "global_tau":
            raise InvalidInputError("global_tau is a rule of the paper's map; use per_row or none with ridge")


@dataclass(frozen=True)
class MapConfig:
    """What is saved of a map beside its tensors."""

    run: CollectionRun
    fit: FitOptions


FOLDER = TensorFolder("conditional_map", 2, MapConfig, version_without_checksum=1)


@dataclass(frozen=True, eq=False, repr=False)
class ConditionalDifferenceMap:
    """The map `A` of method.md, section 2, and what is known of its rows.

    Attributes:
        matrix: A by compressed rows, float32.
        gate_counts: `[d_sae_in]` int64, N_i: for how many triples gate i was on; with `ridge`, how many it described.
        gate_thresholds: `[d_sae_in]` float64, tau_i; 0 with `ridge`, which has no gates.
        mean_difference: `[d_sae_out]` float32, the mean of D over all triples: what a prompt-blind edit goes by.
        run: the collection it was fitted from.
        options: how it was fitted.
        features: what a prompt is looked up by; None where it is the density itself.
    """

    matrix: CsrMap
    gate_counts: Tensor
    gate_thresholds: Tensor
    mean_difference: Tensor
    run: CollectionRun
    options: FitOptions
    features: PromptFeatures | None = None

    def __repr__(self) -> str:
        run = self.run
        return (
            f"ConditionalDifferenceMap({run.d_sae_in} x {run.d_sae_out}, {self.matrix.nonzeros} entries, "
            f"{run.triple_count} triples, layers {run.input_layer} -> {run.output_layer})"
        )

    def _repr_html_(self) -> str:
        """For notebooks: its size, how it was fitted, and its gates."""
        run, options = self.run, self.options
        columns = int(self.matrix.columns.unique().numel())
        return html_table(
            {
                "model": run.model.model_type,
                "layers": f"{run.input_layer} → {run.output_layer}",
                "latents": f"{run.d_sae_in} → {run.d_sae_out}",
                "triples": run.triple_count,
                "entries": f"{self.matrix.nonzeros} in {columns} columns",
                "estimator": options.estimator,
                **(
                    {
                        "gates": f"{options.gate_rule} percentile {options.gate_percentile:g}",
                        "gates always on": f"{float(self.always_on().double().mean()):.1%}",
                    }
                    if self.features is None
                    else {"features of a prompt": f"at most {self.features.count}"}
                ),
                "sparsify": options.sparsify,
            }
        )

    @classmethod
    def fit(
        cls,
        store: DensityStore | DensitySubset | str | Path,
        *,
        gate_percentile: float = 90.0,
        gate_rule: GateRule = "ge",
        sparsify: Sparsification = "per_row",
        entries_per_side: int | None = None,
        estimator: Estimator = "mean_difference",
        features: int = 64,
        penalty: float = 1.0,
        progress: bool = False,
    ) -> ConditionalDifferenceMap:
        """Fits a map from collected densities, without the model, in float64, a block of rows at a time.

        A dense block takes at most a quarter of a GiB; the whole map is never dense. `ridge` keeps a number for each
        pair of triples, and for each triple and latent on either side, and the densities of a shard, dense: it is meant
        for at most some thousands of triples.

        Args:
            store: what `collect` returned, or its folder, or some of its triples.
            gate_percentile: see FitOptions.
            gate_rule: see FitOptions.
            sparsify: see FitOptions.
            entries_per_side: see FitOptions; None for 16, or 32 with `ridge`.
            estimator: see FitOptions.
            features: see FitOptions; at most `d_sae_in` are used.
            penalty: see FitOptions.
            progress: whether to draw a progress bar.

        Raises:
            InvalidInputError: for an option out of range, or a collection that is not complete; with `ridge`, for
                triples whose prompts, or whose differences, are all alike, such as a single one.
            CorruptFileError: for a damaged shard.
        """
        if entries_per_side is None:
            entries_per_side = ENTRIES_PER_SIDE.get(estimator, 16)
        options = FitOptions(gate_percentile, gate_rule, sparsify, entries_per_side, estimator, features, penalty)
        store = store if isinstance(store, (DensityStore, DensitySubset)) else DensityStore.open(store)
        ridge = RidgeFit.from_store(store, features, penalty) if estimator == "ridge" else None
        starts = range(0, store.run.d_sae_in, _rows_per_block(store.run))
        threshold = 0.0
        if sparsify == "global_tau":
            # Appendix B's threshold is a minimum over all rows, so the rows are computed once more to find it.
            passes = track(starts, "Finding the threshold", enabled=progress, unit="row blocks")
            threshold = min(_smallest_extreme(_row_block(store, options, at).rows, entries_per_side) for at in passes)
        counts, thresholds, lengths, columns, values = [], [], [], [], []
        for at in track(starts, "Fitting the map", enabled=progress, unit="row blocks"):
            block = _row_block(store, options, at) if ridge is None else ridge.row_block(at, _rows_per_block(store.run))
            kept = _kept(block.rows, options, threshold)
            counts.append(block.gate_counts)
            thresholds.append(block.gate_thresholds)
            lengths.append(kept.sum(dim=1))
            columns.append(kept.nonzero()[:, 1].int())
            values.append(block.rows[kept].float())
        offsets = torch.zeros(store.run.d_sae_in + 1, dtype=torch.int64)
        offsets[1:] = torch.cat(lengths).cumsum(dim=0)
        return cls(
            matrix=CsrMap(offsets, torch.cat(columns), torch.cat(values), store.run.d_sae_out),
            gate_counts=torch.cat(counts),
            gate_thresholds=torch.cat(thresholds),
            mean_difference=_mean_difference(store).float(),
            run=store.run,
            options=options,
            features=None if ridge is None else ridge.features,
        )

    def to_dense(self) -> Tensor:
        """`[d_sae_in, d_sae_out]` float32."""
        return self.matrix.to_dense()

    def check_lookup(self, k_prompt: int, k_diff: int, edit: str) -> None:
        """Raises InvalidInputError if the options cannot be used with this map."""
        check_lookup_options(self.matrix, self.rows_per_prompt(k_prompt), k_diff, edit)

    def rows_per_prompt(self, k_prompt: int) -> int:
        """How many rows a prompt chooses: k_prompt, or at most as many as the features it was fitted with."""
        return k_prompt if self.features is None else self.features.count

    def picked(self, density: Tensor, k_prompt: int) -> list[int]:
        """The rows that a prompt of density `[d_sae_in]` chooses, the first choice first."""
        if self.features is None:
            return top(density, k_prompt, largest=True).tolist()
        deviation = self.features.to(density.device).deviation(density[None])[0]
        return [row for row in top(deviation, self.features.count, largest=True).tolist() if deviation[row] > 0]

    def select(
        self, density: Tensor, k_prompt: int, k_diff: int, edit: EditKind, *, sign_guard: bool = False
    ) -> EditList:
        """Which latents to edit for prompts of the given densities; see `dspa.kernels.lookup`.

        Args:
            density: `[B, d_sae_in]` floating point.
            k_prompt: how many of a prompt's densest latents choose rows; not used with `ridge`, which was fitted for a
                number of its own. With it, a prompt none of whose latents is denser than usual has an empty list.

        Raises:
            InvalidInputError: if the shape does not fit.
        """
        matrix, rows = self._looked_up.to(density.device), self.rows_per_prompt(k_prompt)
        if self.features is None:
            return lookup(density, matrix, rows, k_diff, edit, sign_guard=sign_guard)
        ranking = self.features.to(density.device).ranking(density)
        edits = lookup(ranking, matrix, rows, k_diff, edit, sign_guard=sign_guard)
        known = (ranking > 0).any(dim=1, keepdim=True)  # without a feature all scores are 0, and tie
        return edits.where(known.expand(-1, edits.k))

    @cached_property
    def _looked_up(self) -> CsrMap:
        return self.matrix if self.features is None else self.features.padded(self.matrix)

    def always_on(self) -> Tensor:
        """`[d_sae_in]` bool: gates that were on for every triple; their rows are the prompt-blind mean difference.

        Raises:
            InvalidInputError: for a map by `ridge`, which has no gates.
        """
        self._check_gates()
        return self.gate_counts == self.run.triple_count

    def deviation_probability(self, epsilon: float) -> Tensor:
        """`[d_sae_in]` float64: a bound on the probability that an entry of row i is off its expectation by epsilon
        or more, `2 exp(-N_i epsilon^2 / 2)`, at most 1 (appendix A).

        Raises:
            InvalidInputError: for a map by `ridge`, whose entries are no means over gated triples.
        """
        self._check_gates()
        return (2 * torch.exp(-self.gate_counts.double() * epsilon**2 / 2)).clamp(max=1)

    def _check_gates(self) -> None:
        if self.features is not None:
            raise InvalidInputError("this map was fitted by ridge and has no gates; ask a map by mean_difference")

    def save(self, folder: str | Path) -> Path:
        """Writes the map to a folder: the tensors and `config.json`.

        Raises:
            DspaError: if it cannot be written.
        """
        return FOLDER.write(folder, self.config(), self.tensors())

    @classmethod
    def load(cls, folder: str | Path) -> ConditionalDifferenceMap:
        """Reads what `save` wrote, checking every index and shape.

        Raises:
            InvalidInputError: if the folder holds no map.
            CorruptFileError: if it is truncated, altered or out of bounds.
        """
        return cls.from_tensors(*FOLDER.read(folder), str(folder))

    def config(self) -> dict[str, object]:
        """What is saved as JSON."""
        numbers = {name: float(getattr(self.options, name)) for name in ("gate_percentile", "penalty")}
        fit = {**asdict(self.options), **numbers}
        return {"run": asdict(self.run), "fit": fit}

    def tensors(self) -> dict[str, Tensor]:
        """What is saved as tensors."""
        return {
            "row_offsets": self.matrix.row_offsets,
            "columns": self.matrix.columns,
            "values": self.matrix.values,
            "gate_counts": self.gate_counts,
            "gate_thresholds": self.gate_thresholds,
            "mean_difference": self.mean_difference,
            **({} if self.features is None else {"prompt_centre": self.features.centre}),
        }

    @classmethod
    def from_tensors(cls, config: MapConfig, tensors: dict[str, Tensor], source: str) -> ConditionalDifferenceMap:
        """From `config()` and `tensors()`; `source` is named in errors.

        Raises:
            CorruptFileError: if a field is missing or out of bounds.
        """
        try:
            run, options = config.run, config.fit
            matrix = CsrMap(tensors["row_offsets"], tensors["columns"], tensors["values"], run.d_sae_out)
            names = ["gate_counts", "gate_thresholds", "mean_difference"]
            rows = {name: tensors[name] for name in names + ["prompt_centre"] * (options.estimator == "ridge")}
        except KeyError as error:
            raise CorruptFileError(f"{source} does not hold a whole map (no tensor {error}); fit it again") from error
        known = rows.keys() | {"row_offsets", "columns", "values"}
        if surplus := sorted(tensors.keys() - known):
            raise CorruptFileError(f"{source} holds a tensor {surplus[0]!r} that is no part of a map; fit it again")
        sizes = dict.fromkeys(rows, run.d_sae_in) | {"mean_difference": run.d_sae_out, "row_offsets": run.d_sae_in + 1}
        for name, size in sizes.items():
            if tuple(tensors[name].shape) != (size,):
                raise CorruptFileError(f"{source}: {name} is {tuple(tensors[name].shape)}; expected [{size}]")
        for name, dtype, low, high in (
            ("gate_counts", torch.int64, 0, run.triple_count),
            ("gate_thresholds", torch.float64, 0, 1),
            ("mean_difference", torch.float32, -1, 1),
        ):
            if rows[name].dtype != dtype or not bool(((rows[name] >= low) & (rows[name] <= high)).all()):
                raise CorruptFileError(f"{source}: {name} is not all {dtype} from {low} to {high}; fit it again")
        centre, features = rows.get("prompt_centre"), None
        if centre is not None:
            features = PromptFeatures(centre, min(options.features, run.d_sae_in)).check(source)
        counts, thresholds, mean = rows["gate_counts"], rows["gate_thresholds"], rows["mean_difference"]
        return cls(matrix.check(), counts, thresholds, mean, run, options, features)


@dataclass(frozen=True, eq=False)
class _RowBlock:
    """Some consecutive rows of A, dense: `rows` is `[n, d_sae_out]` float64."""

    rows: Tensor
    gate_counts: Tensor
    gate_thresholds: Tensor


@dataclass(frozen=True, eq=False)
class RidgeFit:
    """A regression of differences on the features of prompts (docs/method.md, section 2.1).

    Attributes:
        features: what describes a prompt.
        prompts: `[triples, d_sae_in]` bool, whether a latent describes a triple's prompt.
        weights: `[triples, triples]` float64, what `ridge_weights` computes.
        deviations: `[triples, d_sae_out]` float64, the differences minus their mean.
    """

    features: PromptFeatures
    prompts: Tensor
    weights: Tensor
    deviations: Tensor

    @classmethod
    def from_store(cls, store: DensityStore | DensitySubset, count: int, penalty: float) -> RidgeFit:
        run = store.run
        total = torch.zeros(run.d_sae_in, dtype=torch.float64)
        for shard in store.read():
            total.index_add_(0, shard.prompt.latents.long(), shard.prompt.densities())
        features = PromptFeatures((total / run.triple_count).float(), min(count, run.d_sae_in))
        prompts = torch.cat([features.indicators(_dense(shard.prompt, 0, run.d_sae_in)) for shard in store.read()])
        deviations = torch.cat([difference for _, difference in differences(store)]) - _mean_difference(store)
        check_that_triples_differ(prompts, deviations)
        found = cls(features, prompts, torch.empty(0), deviations)
        products = torch.zeros(run.triple_count, run.triple_count, dtype=torch.float64)
        for start in range(0, run.d_sae_in, _rows_per_block(run)):
            block = found.centred(start, start + _rows_per_block(run))
            products += block @ block.T
        return replace(found, weights=ridge_weights(products, deviations @ deviations.T, penalty))

    def centred(self, start: int, end: int) -> Tensor:
        """`[triples, end - start]` float64, the features of these latents minus their means."""
        block = self.prompts[:, start:end].double()
        return block - block.mean(dim=0)

    @cached_property
    def predictions(self) -> Tensor:
        """`[triples, d_sae_out]` float64, what a triple adds to the row of a latent that describes it."""
        return self.weights @ self.deviations

    def row_block(self, start: int, count: int) -> _RowBlock:
        """Rows `start` and following of A, before sparsification."""
        counts = self.prompts[:, start : start + count].sum(dim=0)
        rows = self.centred(start, start + count).T @ self.predictions
        return _RowBlock(rows.mul_(GRID).round_().div_(GRID), counts, torch.zeros(len(counts), dtype=torch.float64))


def _rows_per_block(run: CollectionRun) -> int:
    widest = max(run.triple_count, run.d_sae_out)
    return min(run.d_sae_in, max(1, BLOCK_BYTES // (8 * widest)))


def _row_block(store: DensityStore | DensitySubset, options: FitOptions, start: int) -> _RowBlock:
    """Rows `start` and following of A, before sparsification."""
    run = store.run
    end = min(start + _rows_per_block(run), run.d_sae_in)
    density = torch.cat([_dense(shard.prompt, start, end) for shard in store.read()]).numpy()
    thresholds = np.percentile(density, options.gate_percentile, axis=0)
    gates = density >= thresholds
    if options.gate_rule == "positive_ge":
        gates &= density > 0
    gate = torch.from_numpy(gates)
    rows = torch.zeros(end - start, run.d_sae_out, dtype=torch.float64)
    for first, difference in differences(store):
        rows += gate[first : first + len(difference)].double().T @ difference
    return _RowBlock(_mean(rows, run), gate.sum(dim=0), torch.from_numpy(thresholds))


def _mean_difference(store: DensityStore | DensitySubset) -> Tensor:
    total = torch.zeros(store.run.d_sae_out, dtype=torch.float64)
    for _, difference in differences(store):
        total += difference.sum(dim=0)
    return _mean(total, store.run)


def _mean(total: Tensor, run: CollectionRun) -> Tensor:
    """The total over all triples divided by their number, in place.

    Rounded to a grid, so that what cancels is 0 and what ties is equal whatever the order in which it was added.
    """
    return total.div_(run.triple_count).mul_(GRID).round_().div_(GRID)


def differences(store: DensityStore | DensitySubset) -> Iterator[tuple[int, Tensor]]:
    """For each shard, the number of its first triple and D, `[triples, d_sae_out]` float64."""
    first = 0
    for shard in store.read():
        difference = _dense(shard.chosen, 0, store.run.d_sae_out) - _dense(shard.rejected, 0, store.run.d_sae_out)
        yield first, difference
        first += len(difference)


def dense_densities(counts: SparseCounts, d_sae: int) -> Tensor:
    """`[triples, d_sae]` float64."""
    return _dense(counts, 0, d_sae)


def _dense(counts: SparseCounts, start: int, end: int) -> Tensor:
    """Densities of the latents from `start` to `end`, `[triples, end - start]` float64."""
    inside = (counts.latents >= start) & (counts.latents < end)
    dense = torch.zeros(len(counts.tokens), end - start, dtype=torch.float64)
    dense[counts.triple_of_entry[inside], counts.latents[inside].long() - start] = counts.densities()[inside]
    return dense


def _extremes(rows: Tensor, entries_per_side: int) -> tuple[Tensor, Tensor]:
    """Each row's n largest entries, falling, and its n smallest, rising, `[rows, n]`."""
    n = min(entries_per_side, rows.shape[1])
    return rows.topk(n, dim=1).values, rows.topk(n, dim=1, largest=False).values


def _smallest_extreme(rows: Tensor, entries_per_side: int) -> float:
    """Appendix B's threshold over these rows: the least magnitude among the entries at or beyond their extremes."""
    largest, smallest = _extremes(rows, entries_per_side)
    extreme = (rows >= largest[:, -1:]) | (rows <= smallest[:, -1:])
    return float(torch.where(extreme, rows.abs(), math.inf).min())


def _kept(rows: Tensor, options: FitOptions, threshold: float) -> Tensor:
    """Which entries of some rows stay in the map; zeros never do."""
    if options.sparsify == "none":
        return rows != 0
    if options.sparsify == "global_tau":
        return (rows != 0) & (rows.abs() >= threshold)
    largest, smallest = _extremes(rows, options.entries_per_side)
    kept = ((rows > largest[:, -1:]) | (rows < smallest[:, -1:])) & (rows != 0)
    for extremes in (largest, smallest):
        # Of the entries equal to the n-th, the lower columns fill the places that are left.
        level = extremes[:, -1:]
        places = (extremes == level).sum(dim=1)
        row, column = ((rows == level) & (rows != 0)).nonzero(as_tuple=True)
        place = torch.arange(len(row)) - torch.searchsorted(row, row)
        fits = place < places[row]
        kept[row[fits], column[fits]] = True
    return kept
