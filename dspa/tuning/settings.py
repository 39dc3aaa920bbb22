"""What is tuned: settings, grids of them, and the policy of each."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from dspa.errors import InvalidInputError, MismatchError
from dspa.kernels import EditKind
from dspa.methods.conditional_map import ConditionalDifferenceMap, FitOptions, GateRule
from dspa.methods.steering_policy import SteeringPolicy, check_policy_names
from dspa.offline.density_store import DensityStore
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.util.scalars import LARGEST_FLOAT32, check_number

OPTIONS = ("alpha", "edit", "k_prompt", "k_diff")  # of a policy; the other fields are those of a fit


@dataclass(frozen=True)
class TunedSetting:
    """One point of a grid. Fields as in `SteeringPolicy` and `FitOptions`."""

    alpha: float
    edit: EditKind
    k_prompt: int
    k_diff: int
    gate_percentile: float
    gate_rule: GateRule

    @classmethod
    def of_policy(cls, policy: SteeringPolicy) -> TunedSetting:
        """Where a policy stands."""
        fit = policy.conditional_map.options
        options = {name: getattr(policy, name) for name in OPTIONS}
        return cls(**options, gate_percentile=float(fit.gate_percentile), gate_rule=fit.gate_rule)

    def __str__(self) -> str:
        return (
            f"{self.edit}, alpha {_exact(self.alpha)}, k_prompt {self.k_prompt}, k_diff {self.k_diff}, "
            f"percentile {_exact(self.gate_percentile)}, {self.gate_rule}"
        )


def _exact(number: float) -> str:
    """The shortest decimal that is this number and no other, since evaluations are found again by it."""
    return repr(float(number)).removesuffix(".0")


@dataclass(frozen=True)
class TuningGrid:
    """The values that are tried of each field, in every combination; None for the policy's own value.

    Raises:
        InvalidInputError: for a field that is no sequence, without a value, or with one twice.
    """

    alpha: tuple[float, ...] | None = (0.1, 0.2, 0.3, 0.5)
    edit: tuple[EditKind, ...] | None = ("ablate", "both")
    k_prompt: tuple[int, ...] | None = None
    k_diff: tuple[int, ...] | None = (8, 16)
    gate_percentile: tuple[float, ...] | None = None
    gate_rule: tuple[GateRule, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            if values is None:
                continue
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise InvalidInputError(
                    f"the grid has {values!r} for {field.name}; expected a tuple of values, or None"
                )
            if field.name in ("alpha", "gate_percentile"):
                for value in values:
                    check_number(field.name, value, -LARGEST_FLOAT32, LARGEST_FLOAT32)
            if not values or len(set(values)) != len(values):
                raise InvalidInputError(f"the grid has {list(values)} for {field.name}; expected values, each once")

    def settings(self, policy: SteeringPolicy) -> list[TunedSetting]:
        """All combinations, the last field fastest."""
        own = TunedSetting.of_policy(policy)
        values = [
            (getattr(own, field.name),) if getattr(self, field.name) is None else getattr(self, field.name)
            for field in fields(self)
        ]
        return [TunedSetting(*combination) for combination in itertools.product(*values)]


class PolicyMaker:
    """The policy of each setting. A map is fitted once for each gate, from stored densities, without the model.

    Raises:
        MismatchError: if the densities are not those that the policy's map was fitted from, or the SAE is another.
    """

    def __init__(
        self,
        policy: SteeringPolicy,
        store: DensityStore | None = None,
        output_sae: SparseAutoencoder | None = None,
    ) -> None:
        """See `dspa.tune`."""
        if store is not None and store.run != policy.conditional_map.run:
            raise MismatchError(
                f"the densities in {store.folder} are not those the policy's map was fitted from; pass that folder"
            )
        self.policy = policy if output_sae is None else _with_decoder_of(policy, output_sae)
        self._store = store
        fit = policy.conditional_map.options
        self._maps = {(float(fit.gate_percentile), fit.gate_rule): policy.conditional_map}

    def policy_of(self, setting: TunedSetting) -> SteeringPolicy:
        """The policy of a setting.

        Raises:
            InvalidInputError: if it needs another map and there are no densities, or a value is out of range.
            MismatchError: if it may select latents whose decoder rows are not there.
        """
        check_policy_names(setting.edit, self.policy.edit_positions)
        gate = setting.gate_percentile, setting.gate_rule
        if gate not in self._maps:
            if self.policy.merged:
                raise InvalidInputError(
                    f"percentile {gate[0]:g} with rule {gate[1]} needs another map, but this one is a merge of several "
                    "fits; tune the gates of the parts before merging them"
                )
            if self._store is None:
                raise InvalidInputError(
                    f"percentile {gate[0]:g} with rule {gate[1]} needs another map; pass the folder of densities that "
                    "the policy was fitted from"
                )
            fit: FitOptions = self.policy.conditional_map.options
            self._maps[gate] = ConditionalDifferenceMap.fit(
                self._store,
                gate_percentile=gate[0],
                gate_rule=gate[1],
                sparsify=fit.sparsify,
                entries_per_side=fit.entries_per_side,
                estimator=fit.estimator,
            )
        own = TunedSetting.of_policy(self.policy)
        made = self.policy
        if gate != (own.gate_percentile, own.gate_rule):
            line = f"fitted again: percentile {own.gate_percentile:g} -> {gate[0]:g}, rule {own.gate_rule} -> {gate[1]}"
            made = replace(made, conditional_map=self._maps[gate], changes=(*made.changes, line))
        return made.with_options(**{name: getattr(setting, name) for name in OPTIONS})


def _with_decoder_of(policy: SteeringPolicy, whole: SparseAutoencoder) -> SteeringPolicy:
    """The policy with all decoder rows, for latents that its own lists cannot name.

    Raises:
        MismatchError: if its own rows are others, or hold factors, which the SAE's rows do not.
    """
    made = replace(policy, output_sae=whole)
    own, theirs = policy.output_sae, made.output_sae
    latents = policy.selectable_latents()
    rows = [
        sae.with_decoder_rows(latents).W_dec.cpu().to(own.dtype)  # pyright: ignore[reportOptionalMemberAccess]
        for sae in (own, theirs)
    ]
    if not torch.equal(*rows) or any("scaled the edits of" in change for change in policy.changes):
        raise MismatchError(
            "the decoder rows of the policy are not those of the output SAE that was passed, as after scaled(); tune "
            "without it, or tune the policy before its edits are scaled"
        )
    return made
