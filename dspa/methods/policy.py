"""What steering requires of a method. `online/` sees every method through the protocols of this module alone.

A policy states what it observes of a prompt (`observation`), which parameters it derives from that (`select`), and what
it changes (`intervention`). Interventions that can share a kernel launch are edited together, row by row, by one
`PositionEditor`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dspa.kernels import EditList, SaeWeights, StepMode, TokenStats
from dspa.transformers_model import ModelFingerprint, check_layer_fits, check_sae_fits

EditPositions = Literal["from_last_prompt", "generated", "all"]


@dataclass(frozen=True, eq=False)
class PromptObservation:
    """What a method observes of a prompt: the share of its counted tokens on which each latent is active
    (docs/method.md, section 2).

    Attributes:
        layer: the decoder layer after which the residual stream is encoded, from 0.
        sae: the SAE that encodes it.
    """

    layer: int
    sae: SaeWeights

    def check(self, model: ModelFingerprint) -> None:
        """Raises MismatchError if the layer or the SAE does not fit the model."""
        check_sae_fits(self.sae, "input", self.layer, model)


@dataclass(frozen=True)
class LatentChange:
    """One latent of one token, before and after its edit: f~_j and f~'_j of docs/method.md, section 4.

    Attributes:
        latent: its number in the SAE.
        before, after: its activation.
        link: its page on neuronpedia.org, if the SAE's metadata name one.
    """

    latent: int
    before: float
    after: float
    link: str | None = None


@dataclass(frozen=True)
class TokenEdit:
    """What an edit does to one token.

    Attributes:
        maximum: M_t, the largest activation before edits; NaN where it has no part in the edit, or is not finite.
        changes: the latents that change.
    """

    maximum: float
    changes: tuple[LatentChange, ...]


class PositionEditor(Protocol):
    """Edits positions after one layer, for the rows of all policies that share it.

    What it reads and writes per batch size is allocated once and updated in place, so that captured graphs and compiled
    models see fixed addresses. After `begin_prompt`, all calls are about batches of that many rows.

    Attributes:
        layer: the decoder layer, from 0.
        device: where it edits.
        latents: how many latents its counters tell apart; 0 for an edit without latents.
    """

    layer: int
    device: torch.device
    latents: int

    def begin_prompt(self, row_policies: Sequence[str | None]) -> None:
        """Another prompt begins: the policy of each row. Nothing is selected yet."""

    def set_selection(self, selection: EditList, rows: Tensor) -> None:
        """Stores what a policy selected for its rows, `rows [n]` int64.

        Raises:
            InvalidInputError: if a list is longer than the intervention declared.
        """

    def edit(self, hidden: Tensor, enabled: Tensor | None, counters: Sequence[TokenStats | None]) -> None:
        """Edits positions in place; a row does not depend on the others.

        Args:
            hidden: `[B, T, d_model]`.
            enabled: `[B, T]` bool, what to edit; None for everything.
            counters: for each of the T positions, what its tokens are added to.
        """

    def differentiable_edit(self, hidden: Tensor, enabled: Tensor | None) -> Tensor:
        """What `edit` computes, as a function that autograd follows, into `hidden` and into the method's parameters."""
        ...

    def describe(self, hidden: Tensor, enabled: Tensor | None) -> list[TokenEdit | None]:
        """What `edit` does at one position, `hidden [B, d_model]`, `enabled [B]`; None for rows left alone."""
        ...

    def selection(self) -> EditList | None:
        """The lists of the last prompt; None for an edit that is the same for every prompt."""


class Intervention(Protocol):
    """What a policy changes, for all prompts.

    Attributes:
        layer: the decoder layer after which it edits, from 0.
        strength: factor of the edit; at 0 nothing changes.
        longest_list: how many latents one row's list can name; 0 for an edit without lists.
    """

    @property
    def layer(self) -> int: ...
    @property
    def strength(self) -> float: ...
    @property
    def longest_list(self) -> int: ...

    def check(self, model: ModelFingerprint) -> None:
        """Raises MismatchError if the layer or a width does not fit the model."""

    def shares_launch_with(self, other: Intervention) -> bool:
        """Whether one editor can serve rows of both."""
        ...

    def editor(
        self, sharing: Mapping[str, Intervention], device: torch.device, backend: str, mode: StepMode | None
    ) -> PositionEditor:
        """The editor of the rows of some policies by name, all of which share a launch with this one.

        Raises:
            MismatchError: if two of them contradict each other.
        """
        ...


class Policy(Protocol):
    """A steering method with its parameters, as `dspa.steer` takes it.

    Attributes:
        model: the model it was made for; None for any model that fits.
        observation: what of a prompt `select` depends on; None for a method that is the same for every prompt.
        intervention: what it changes.
        edit_positions: which positions it edits.
        uncounted_token_ids: prompt tokens that are neither counted nor, under "all", edited.
    """

    @property
    def model(self) -> ModelFingerprint | None: ...
    @property
    def observation(self) -> PromptObservation | None: ...
    @property
    def intervention(self) -> Intervention: ...
    @property
    def edit_positions(self) -> EditPositions: ...
    @property
    def uncounted_token_ids(self) -> tuple[int, ...]: ...

    def select(self, density: Tensor) -> EditList | None:
        """What to edit for prompts of densities `[B, d_sae_in]`, `[B, 0]` without an observation; None for an
        intervention without lists."""


def check_edit_positions(positions: str) -> None:
    """Raises InvalidInputError for a name that is none of `EditPositions`."""
    from typing import get_args

    from dspa.errors import InvalidInputError

    if positions not in get_args(EditPositions):
        known = ", ".join(get_args(EditPositions))
        raise InvalidInputError(f"edit_positions is {positions!r}; expected one of {known}")


__all__ = [
    "EditPositions",
    "Intervention",
    "LatentChange",
    "Policy",
    "PositionEditor",
    "PromptObservation",
    "TokenEdit",
    "check_edit_positions",
    "check_layer_fits",
]
