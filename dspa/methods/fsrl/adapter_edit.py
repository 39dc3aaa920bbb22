"""Adding an adapter's decoded steering vector: the intervention of FSRL (docs/method.md, section 6)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels import AdapterMode, AdapterWeights, EditList, SaeWeights, StepMode, TokenStats, adapter_step
from dspa.kernels.adapter_step.differentiable import differentiable_adapter_step
from dspa.kernels.adapter_step.equation import clipped, steering_activations
from dspa.methods.policy import Intervention, LatentChange, TokenEdit
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.sae.encode import encode, encoder_input
from dspa.sae.weights import encode_alike
from dspa.transformers_model import ModelFingerprint, check_sae_fits


@dataclass(frozen=True, eq=False)
class AdapterEdit:
    """An adapter's steering vector, times `strength`, is added to the latents of every edited token.

    Attributes:
        layer: the decoder layer after which the adapter reads and the edit is written, from 0.
        sae: the SAE, with decoder rows for every latent that is not masked.
        adapter: the adapter as it was trained.
        strength: factor of the steering vector.
        masked_latents: latents that stay as they are.
        steering_fraction: share of the latents that a token may change, the largest in size; None for all.
        longest_list: 0, for it has no lists.
    """

    layer: int
    sae: SaeWeights
    adapter: AdapterWeights
    strength: float = 1.0
    masked_latents: tuple[int, ...] = ()
    steering_fraction: float | None = None
    longest_list: int = 0

    def check(self, model: ModelFingerprint) -> None:
        """Raises MismatchError if the layer or the SAE does not fit the model."""
        check_sae_fits(self.sae, "adapter's", self.layer, model)

    def shares_launch_with(self, other: Intervention) -> bool:
        return (
            isinstance(other, AdapterEdit)
            and type(other) is type(self)
            and self.layer == other.layer
            and self.adapter is other.adapter
            and (self.strength, self.masked_latents, self.steering_fraction)
            == (other.strength, other.masked_latents, other.steering_fraction)
            and self.sae.W_dec is other.sae.W_dec
            and encode_alike(self.sae, other.sae)
        )

    def editor(
        self, sharing: Mapping[str, Intervention], device: torch.device, backend: str, mode: StepMode | None
    ) -> AdapterEditor:
        return AdapterEditor(self, device, backend, mode)

    def effective_adapter(self) -> AdapterWeights:
        """The adapter with strength and masked latents in its tensors: `s * v(y)` is `v(s * y)` with thresholds times
        `s >= 0`, and a latent whose threshold is Inf stays as it is. Autograd follows."""
        adapter, strength = self.adapter, self.strength
        threshold = adapter.threshold
        if strength not in (0, 1):
            adapter = replace(
                adapter,
                weight=adapter.weight * strength,
                bias=adapter.bias * strength,
                threshold=torch.where(threshold == math.inf, threshold, threshold * strength),
            )
        if not self.masked_latents and strength != 0:
            return adapter
        masked = torch.full_like(threshold, strength == 0, dtype=torch.bool)
        masked[list(self.masked_latents)] = True
        return replace(adapter, threshold=torch.where(masked, math.inf, adapter.threshold))


class AdapterEditor:
    """One `adapter_step` for all tokens of a pass that are counted together; see `PositionEditor`.

    Attributes:
        sae: the SAE, on the layer's device.
    """

    def __init__(self, edit: AdapterEdit, device: torch.device, backend: str, mode: StepMode | None) -> None:
        self._edit = replace(edit, sae=edit.sae.to(device), adapter=edit.adapter.to(device))
        self.sae = self._edit.sae
        with torch.no_grad():
            self._adapter = self._edit.effective_adapter()
        self.layer = edit.layer
        self.device = self.sae.device
        self.latents = self.sae.d_sae
        self._backend = backend
        self._mode: AdapterMode | None = None if mode == "lazy" else mode  # an adapter is never lazy
        self._allocated: set[int] = set()

    def begin_prompt(self, row_policies: Sequence[str | None]) -> None:
        batch = len(row_policies)
        if batch in self._allocated:
            return
        self._allocated.add(batch)
        # What a backend keeps between steps is allocated by a step that edits no row, not in a captured graph.
        with torch.inference_mode(False):
            hidden = torch.zeros(batch, self.sae.d_model, dtype=self.sae.dtype, device=self.device)
            self._step(hidden, torch.zeros(batch, dtype=torch.bool, device=self.device), None)

    def set_selection(self, selection: EditList, rows: Tensor) -> None:
        raise InvalidInputError("an FSRL policy selected latents; its select must return None")

    def edit(self, hidden: Tensor, enabled: Tensor | None, counters: Sequence[TokenStats | None]) -> None:
        for first, last in _counted_together(counters):
            on = None if enabled is None else enabled[:, first:last]
            self._edit_together(hidden[:, first:last], on, counters[first])

    def differentiable_edit(self, hidden: Tensor, enabled: Tensor | None) -> Tensor:
        step = differentiable_adapter_step(
            hidden.flatten(0, 1),
            self.sae,
            self._edit.effective_adapter(),
            None if enabled is None else enabled.flatten(),
            steering_fraction=self._edit.steering_fraction,
        )
        return step.hidden.view_as(hidden)

    def describe(self, hidden: Tensor, enabled: Tensor | None) -> list[TokenEdit | None]:
        """Computed again in plain torch; where a value lies within rounding of its threshold, the kernel may decide
        otherwise."""
        page = self.sae.metadata.neuronpedia_page if isinstance(self.sae, SparseAutoencoder) else lambda latent: None
        x, _ = encoder_input(hidden, self.sae)
        adapter = self._adapter
        y = x @ adapter.weight.to(x.dtype).T + adapter.bias
        v = steering_activations(y, adapter.threshold, adapter.activation)
        if self._edit.steering_fraction is not None:
            kept = max(1, int(self.latents * self._edit.steering_fraction))
            order = v.abs().sort(dim=1, descending=True, stable=True).indices[:, :kept]
            v = torch.zeros_like(v).scatter(1, order, v.gather(1, order))
        f = encode(hidden, self.sae)
        delta = clipped(v, f) if adapter.clip else v
        finite = hidden.isfinite().all(dim=1) & delta.isfinite().all(dim=1)
        on = torch.ones_like(finite) if enabled is None else enabled
        described: list[TokenEdit | None] = [None] * len(f)
        for row in on.nonzero().flatten().tolist():
            latents = delta[row].nonzero().flatten() if finite[row] else delta.new_zeros(0, dtype=torch.int64)
            before, after = f[row, latents], f[row, latents] + delta[row, latents]
            values = zip(latents.tolist(), before.tolist(), after.tolist(), strict=True)
            changes = tuple(LatentChange(latent, was, becomes, page(latent)) for latent, was, becomes in values)
            described[row] = TokenEdit(torch.nan, changes)
        return described

    def selection(self) -> EditList | None:
        return None

    def _edit_together(self, hidden: Tensor, enabled: Tensor | None, stats: TokenStats | None) -> None:
        """Edits `[B, T, d_model]`, all of it added to the same counters."""
        batch, positions = hidden.shape[:2]
        if positions == 1:
            self._step(hidden[:, 0], None if enabled is None else enabled[:, 0].contiguous(), stats)
            return
        rows = hidden.reshape(batch * positions, -1)  # a copy where it has to be one
        on = None if enabled is None else enabled.reshape(-1)
        counted = None if stats is None else TokenStats.zeros(len(rows), self.latents, self.device)
        self._step(rows, on, counted)
        if rows.data_ptr() != hidden.data_ptr():
            hidden.copy_(rows.view_as(hidden))
        if stats is not None and counted is not None:
            for name in ("seen", "edited", "nonfinite"):
                getattr(stats, name).add_(getattr(counted, name).view(batch, positions).sum(dim=1))
            stats.latent_edits.add_(counted.latent_edits)

    def _step(self, rows: Tensor, enabled: Tensor | None, stats: TokenStats | None) -> None:
        adapter_step(
            rows,
            self.sae,
            self._adapter,
            enabled,
            stats,
            steering_fraction=self._edit.steering_fraction,
            mode=self._mode,
            backend=self._backend,
        )


def _counted_together(counters: Sequence[TokenStats | None]) -> list[tuple[int, int]]:
    """Half-open ranges of positions whose tokens are added to the same counters."""
    runs: list[tuple[int, int]] = []
    for position, stats in enumerate(counters):
        if runs and counters[runs[-1][0]] is stats:
            runs[-1] = (runs[-1][0], position + 1)
        else:
            runs.append((position, position + 1))
    return runs
