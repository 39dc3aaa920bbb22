"""FSRL's adapter behind DSPA's gates: the prompt chooses the latents that may move, the adapter how far they do.

For latents that the lists of a prompt name with sign `s`, and 0 for all others:

    free     v = sign(y) * relu(|y| - theta)     the adapter chooses the direction
    signed   v = s * relu(y - theta)             the list chooses the direction

and `h <- h + W_dec^T max(v, -f)` as in docs/method.md, section 6. In plain torch: a form to be tried, not to be served.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from dspa.kernels import AdapterWeights, EditList, StepMode, TokenStats, token_step
from dspa.kernels.adapter_step.equation import clipped
from dspa.methods.fsrl.objective import response_log_probabilities, simpo_losses
from dspa.methods.fsrl.pairs import EditedTokens, PairSource
from dspa.methods.fsrl.training import TrainingOptions, adamw
from dspa.methods.policy import EditPositions, Intervention, PromptObservation, TokenEdit
from dspa.methods.split_model import SplitModel
from dspa.methods.steering_policy import SteeringPolicy
from dspa.offline.preferences import PreferenceTriple
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.sae.encode import encode, encoder_input
from dspa.transformers_model import ModelFingerprint, check_sae_fits, device_of

Direction = Literal["free", "signed"]
POSITIONS: EditPositions = "from_last_prompt"


def signs_of(lists: EditList, d_sae: int) -> Tensor:
    """`[B, d_sae]` float32: the sign of each listed latent, 0 for the others."""
    signs = torch.zeros(lists.batch, d_sae)
    row, entry = lists.valid().nonzero(as_tuple=True)
    signs[row, lists.latents[row, entry].long()] = lists.signs[row, entry].float()
    return signs


def gated_delta(
    hidden: Tensor, sae: SparseAutoencoder, adapter: AdapterWeights, signs: Tensor, direction: Direction
) -> tuple[Tensor, Tensor]:
    """What is added to states `[B, T, d_model]` of rows with `signs [B, d_sae]`, and `sum_j |v_j|` `[B, T]`; autograd
    follows, into the adapter."""
    assert sae.W_dec is not None
    x, _ = encoder_input(hidden.flatten(0, 1), sae)
    y = (x @ adapter.weight.T + adapter.bias).view(*hidden.shape[:2], -1)
    gate, least = signs[:, None], adapter.threshold.clamp(min=0)
    v = (gate != 0) * y.sign() * (y.abs() - least).relu() if direction == "free" else gate * (y - least).relu()
    with torch.no_grad():
        f = encode(hidden.flatten(0, 1), sae).view_as(v)
    return clipped(v, f) @ sae.W_dec, v.abs().sum(dim=-1)


@dataclass(frozen=True, eq=False)
class GatedEdit:
    """The intervention of `GatedPolicy`."""

    layer: int
    sae: SparseAutoencoder
    adapter: AdapterWeights
    direction: Direction
    longest_list: int
    strength: float = 1.0

    def check(self, model: ModelFingerprint) -> None:
        check_sae_fits(self.sae, "adapter's", self.layer, model)

    def shares_launch_with(self, other: Intervention) -> bool:
        return other is self

    def editor(
        self, sharing: Mapping[str, Intervention], device: torch.device, backend: str, mode: StepMode | None
    ) -> GatedEditor:
        return GatedEditor(self, device)


class GatedEditor:
    """See `PositionEditor`."""

    def __init__(self, edit: GatedEdit, device: torch.device) -> None:
        self._edit = edit
        self.layer, self.device, self.latents = edit.layer, device, edit.sae.d_sae
        self._signs = torch.zeros(0)
        self._lists: EditList | None = None

    def begin_prompt(self, row_policies: Sequence[str | None]) -> None:
        self._signs = torch.zeros(len(row_policies), self.latents)

    def set_selection(self, selection: EditList, rows: Tensor) -> None:
        self._lists = selection
        self._signs[rows] = signs_of(selection, self.latents)

    @torch.no_grad()
    def edit(self, hidden: Tensor, enabled: Tensor | None, counters: Sequence[TokenStats | None]) -> None:
        edited = self.differentiable_edit(hidden, enabled)
        for position, stats in enumerate(counters):
            if stats is not None:
                on = torch.ones(len(hidden), dtype=torch.bool) if enabled is None else enabled[:, position]
                stats.seen.add_(on)
                stats.edited.add_((edited[:, position] != hidden[:, position]).any(dim=-1))
        hidden.copy_(edited)

    def differentiable_edit(self, hidden: Tensor, enabled: Tensor | None) -> Tensor:
        edit = self._edit
        delta, _ = gated_delta(hidden, edit.sae, edit.adapter, self._signs, edit.direction)
        edited = hidden + edit.strength * delta
        return edited if enabled is None else torch.where(enabled[..., None], edited, hidden)

    def describe(self, hidden: Tensor, enabled: Tensor | None) -> list[TokenEdit | None]:
        on = [True] * len(hidden) if enabled is None else enabled.tolist()
        return [TokenEdit(torch.nan, ()) if each else None for each in on]

    def selection(self) -> EditList | None:
        return self._lists


@dataclass(frozen=True, eq=False)
class GatedPolicy:
    """An adapter behind the gates of a DSPA policy.

    Attributes:
        gates: whose lists say which latents of a prompt may move.
        adapter: says how far.
        direction: see the module.
        strength: factor of the edit.
        edit_positions: as in `SteeringPolicy`; "all" would need the lists before the prompt has been read.
    """

    gates: SteeringPolicy
    adapter: AdapterWeights
    direction: Direction
    strength: float = 1.0
    edit_positions: EditPositions = POSITIONS

    @property
    def model(self) -> ModelFingerprint:
        return self.gates.model

    @property
    def observation(self) -> PromptObservation:
        return self.gates.observation

    @property
    def intervention(self) -> GatedEdit:
        gates = self.gates
        longest = gates.intervention.longest_list
        return GatedEdit(gates.output_layer, gates.output_sae, self.adapter, self.direction, longest, self.strength)

    @property
    def uncounted_token_ids(self) -> tuple[int, ...]:
        return self.gates.uncounted_token_ids

    def select(self, density: Tensor) -> EditList:
        return self.gates.select(density)


def train_gated(
    model: Any,
    triples: Sequence[PreferenceTriple],
    policy: SteeringPolicy,
    lists: EditList,
    options: TrainingOptions,
    *,
    direction: Direction | None,
    on_top: bool = False,
) -> AdapterWeights:
    """Trains an adapter by SimPO behind the gates of the triples' prompts, as `dspa.methods.fsrl.training.train` does
    without gates.

    Args:
        model: the organism.
        triples: the pairs.
        policy: DSPA's.
        lists: its list for the prompt of each triple.
        options: of training; `edit_positions` is that of `policy`.
        direction: see the module; None for an adapter without gates.
        on_top: whether the states have DSPA's edit before the adapter reads them.
    """
    sae, generator = policy.output_sae, torch.Generator().manual_seed(options.seed)
    least = options.initial_threshold
    weight = (torch.rand(sae.d_sae, sae.d_model, generator=generator) * 2 - 1) * least
    parameters = [
        torch.nn.Parameter(each) for each in (weight, torch.zeros(sae.d_sae), torch.full((sae.d_sae,), least))
    ]
    adapter = AdapterWeights(weight=parameters[0], bias=parameters[1], threshold=parameters[2])
    signs = signs_of(lists, sae.d_sae) if direction is not None else torch.ones(len(triples), sae.d_sae)
    split = SplitModel(model, policy.output_layer)
    edited = EditedTokens(policy.edit_positions, policy.uncounted_token_ids)
    pad = int(model.config.pad_token_id)
    source = PairSource(
        split, triples, edited, device=device_of(model), pad_token_id=pad, cached=True, padding_too=False
    )
    optimizer = adamw(parameters, options.learning_rate)
    model.requires_grad_(False)
    for epoch in range(options.epochs):
        order = torch.randperm(
            len(triples), generator=torch.Generator().manual_seed(options.seed * 1_000_003 + epoch)
        ).tolist()
        for first in range(0, len(order), options.pairs_per_step):
            indices = order[first : first + options.pairs_per_step]
            optimizer.zero_grad(set_to_none=True)
            tokens = source.edited_tokens(indices)
            for start in range(0, len(indices), options.pairs_at_once):
                part = indices[start : start + options.pairs_at_once]
                batch, rows = source.batch(part), torch.tensor([*part, *part])
                hidden = batch.hidden.clone()
                if on_top:
                    _edit_by_lists(hidden, policy, lists.rows(rows), batch.edited)
                delta, l1 = gated_delta(hidden, sae, adapter, signs[rows], direction or "free")
                hidden = torch.where(batch.edited[..., None], hidden + delta, hidden)
                logits = split.logits(hidden, batch.ids, batch.mask)
                chosen, rejected = response_log_probabilities(logits, batch.ids, batch.response).chunk(2)
                loss = simpo_losses(chosen - rejected, options.beta, options.gamma).sum() / len(indices)
                loss = loss + options.l1 * l1[batch.edited].sum() / tokens
                loss.backward()
            optimizer.step()
            with torch.no_grad():
                parameters[2].clamp_(min=0)
    trained = {name: each.detach() for name, each in zip(("weight", "bias", "threshold"), parameters, strict=True)}
    return replace(adapter, **trained)


@torch.no_grad()
def _edit_by_lists(hidden: Tensor, policy: SteeringPolicy, lists: EditList, enabled: Tensor) -> None:
    for position in range(hidden.shape[1]):
        on = enabled[:, position].contiguous()
        token_step(hidden[:, position], policy.output_sae, lists, policy.alpha, on)
