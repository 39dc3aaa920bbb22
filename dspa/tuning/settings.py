"""What is tuned: settings, grids of them, and the policy of each."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace

import torch

from dspa.errors import InvalidInputError, MismatchError
from dspa.kernels import EditKind
from dspa.methods.conditional_map import (
    ENTRIES_PER_SIDE,
    ConditionalDifferenceMap,
    Estimator,
    FitOptions,
    GateRule,
)
from dspa.methods.steering_policy import SteeringPolicy, check_policy_names
from dspa.offline.density_store import DensityStore
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.util.scalars import LARGEST_FLOAT32, check_number

OPTIONS = ("alpha", "edit", "k_prompt", "k_diff")  # of a policy; the other fields are those of a fit
FIT = ("gate_percentile", "gate_rule", "estimator", "features", "penalty", "entries_per_side")
ONLY_RANKED = ("estimator", "features", "penalty", "entries_per_side")  # more values of them are no more tries
PUBLISHED = FitOptions()


@dataclass(frozen=True)
class ListSetting:
    """What decides which latents a setting edits: all of it but alpha. Fields as in `TunedSetting`."""

    edit: EditKind
    k_prompt: int
    k_diff: int
    gate_percentile: float
    gate_rule: GateRule
    estimator: Estimator
    features: int
    penalty: float
    entries_per_side: int

    def __str__(self) -> str:
        return f"{self.edit}, {self.words}"

    @property
    def words(self) -> str:
        """All but the edit; of the options of a fit, those that matter to its estimator."""
        entries = (
            "" if self.entries_per_side == ENTRIES_PER_SIDE[self.estimator] else f", {self.entries_per_side} entries"
        )
        if self.estimator == "ridge":
            penalty = "" if self.penalty == 1 else f", penalty {_exact(self.penalty)}"
            return f"k_diff {self.k_diff}, ridge, {self.features} features{penalty}{entries}"
        return (
            f"k_prompt {self.k_prompt}, k_diff {self.k_diff}, percentile {_exact(self.gate_percentile)}, "
            f"{self.gate_rule}{entries}"
        )


@dataclass(frozen=True)
class TunedSetting:
    """One point of a grid. Fields as in `SteeringPolicy` and `FitOptions`; those that mean nothing to the estimator
    have the value that `of_policy` gives them."""

    alpha: float
    edit: EditKind
    k_prompt: int
    k_diff: int
    gate_percentile: float
    gate_rule: GateRule
    estimator: Estimator = PUBLISHED.estimator
    features: int = PUBLISHED.features
    penalty: float = PUBLISHED.penalty
    entries_per_side: int = PUBLISHED.entries_per_side

    @classmethod
    def of_policy(cls, policy: SteeringPolicy) -> TunedSetting:
        """Where a policy stands."""
        fit = policy.conditional_map.options
        options = {name: getattr(policy, name) for name in OPTIONS}
        made = cls(**options, **{name: getattr(fit, name) for name in FIT})
        return replace(made, gate_percentile=float(fit.gate_percentile), penalty=float(fit.penalty))._plain(
            made.k_prompt
        )

    @property
    def lists(self) -> ListSetting:
        return ListSetting(**{field.name: getattr(self, field.name) for field in fields(ListSetting)})

    def fit_options(self, like: FitOptions) -> FitOptions:
        """How the setting's map is fitted, where that of the policy was fitted `like` this.

        Raises:
            InvalidInputError: for a value out of range.
        """
        # "global_tau" is a rule of the paper's map.
        sparsify = "per_row" if self.estimator == "ridge" and like.sparsify == "global_tau" else like.sparsify
        return FitOptions(sparsify=sparsify, **{name: getattr(self, name) for name in FIT})

    def _plain(self, k_prompt: int) -> TunedSetting:
        """With what means nothing to the estimator set to one value."""
        if self.estimator == "ridge":
            gates = {name: getattr(PUBLISHED, name) for name in ("gate_percentile", "gate_rule")}
            return replace(self, k_prompt=k_prompt, **gates)
        return replace(self, **{name: getattr(PUBLISHED, name) for name in ("features", "penalty")})

    def __str__(self) -> str:
        return f"{self.edit}, alpha {_exact(self.alpha)}, {self.lists.words}"


def _exact(number: float) -> str:
    """The shortest decimal that is this number and no other, since evaluations are found again by it."""
    return repr(float(number)).removesuffix(".0")


@dataclass(frozen=True)
class TuningGrid:
    """The values that are tried of each field, in every combination; None for the policy's own value.

    Values of `estimator`, `features`, `penalty` and `entries_per_side` are no more tries where agreement ranks the
    lists: as many lists are tried as the other fields have combinations. Then `estimator` None stands for both
    estimators, unless decoder rows are missing. Of the other three, None stands for the estimator's default where the
    estimator is not that of the policy. Gates and `k_prompt` mean nothing to `ridge`, `features` and `penalty` nothing
    to `mean_difference`; combinations that differ in nothing else are one.

    Raises:
        InvalidInputError: for a field that is no sequence, without a value, or with one twice.
    """

    alpha: tuple[float, ...] | None = (0.1, 0.2, 0.3, 0.5)
    edit: tuple[EditKind, ...] | None = ("ablate", "both")
    k_prompt: tuple[int, ...] | None = None
    k_diff: tuple[int, ...] | None = (8, 16)
    gate_percentile: tuple[float, ...] | None = None
    gate_rule: tuple[GateRule, ...] | None = None
    estimator: tuple[Estimator, ...] | None = None
    features: tuple[int, ...] | None = None
    penalty: tuple[float, ...] | None = None
    entries_per_side: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            if values is None:
                continue
            if isinstance(values, str) or not isinstance(values, Sequence):
                raise InvalidInputError(
                    f"the grid has {values!r} for {field.name}; expected a tuple of values, or None"
                )
            if field.name in ("alpha", "gate_percentile", "penalty"):
                for value in values:
                    check_number(field.name, value, -LARGEST_FLOAT32, LARGEST_FLOAT32)
            if not values or len(set(values)) != len(values):
                raise InvalidInputError(f"the grid has {list(values)} for {field.name}; expected values, each once")

    def settings(self, policy: SteeringPolicy) -> list[TunedSetting]:
        """All combinations, each once: estimator by estimator, the last field fastest."""
        own = TunedSetting.of_policy(policy)
        if unknown := sorted(set(self.estimator or ()) - ENTRIES_PER_SIDE.keys()):
            known = ", ".join(ENTRIES_PER_SIDE)
            raise InvalidInputError(f"the grid has {unknown[0]!r} for estimator; expected some of {known}")
        found: list[TunedSetting] = []
        for estimator in self.estimator or (own.estimator,):
            if estimator == own.estimator:
                base = own
            else:
                entries = ENTRIES_PER_SIDE[estimator]
                published = {name: getattr(PUBLISHED, name) for name in FIT}
                base = replace(own, **published | {"estimator": estimator, "entries_per_side": entries})
            of_estimator = replace(self, estimator=(estimator,))
            values = [getattr(of_estimator, field.name) or (getattr(base, field.name),) for field in fields(self)]
            found += [TunedSetting(*combination)._plain(own.k_prompt) for combination in itertools.product(*values)]
        return list(dict.fromkeys(found))

    @property
    def lists_per_edit(self) -> int:
        """How many lists are tried with each strength and edit."""
        named = (
            getattr(self, field.name) for field in fields(self) if field.name not in ("alpha", "edit", *ONLY_RANKED)
        )
        return math.prod(1 if values is None else len(values) for values in named)

    @property
    def strengths(self) -> int:
        """How many combinations of alpha and edit there are."""
        return math.prod(1 if values is None else len(values) for values in (self.alpha, self.edit))


class PolicyMaker:
    """The policy of each setting. A map is fitted once for all settings that share it, from stored densities, without
    the model.

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
        self.store = store
        own = TunedSetting.of_policy(policy)
        self._maps = {own.fit_options(policy.conditional_map.options): policy.conditional_map}

    def policy_of(self, setting: TunedSetting) -> SteeringPolicy:
        """The policy of a setting.

        Raises:
            InvalidInputError: if it needs another map and there are no densities, or a value is out of range.
            MismatchError: if it may select latents whose decoder rows are not there.
        """
        check_policy_names(setting.edit, self.policy.edit_positions)
        own, like = TunedSetting.of_policy(self.policy), self.policy.conditional_map.options
        fit = setting.fit_options(like)
        if fit not in self._maps:
            if self.policy.merged:
                raise InvalidInputError(
                    f"{_fit_words(setting, own)} needs another map, but this one is a merge of several fits; tune the "
                    "gates of the parts before merging them"
                )
            if self.store is None:
                raise InvalidInputError(
                    f"{_fit_words(setting, own)} needs another map; pass the folder of densities that the policy was "
                    "fitted from"
                )
            self._maps[fit] = ConditionalDifferenceMap.fit(self.store, **asdict(fit))
        made = self.policy
        if fit != own.fit_options(like):
            line = f"fitted again: {_refit_words(setting, own)}"
            made = replace(made, conditional_map=self._maps[fit], changes=(*made.changes, line))
        return made.with_options(**{name: getattr(setting, name) for name in OPTIONS})


def _fit_words(setting: TunedSetting, own: TunedSetting) -> str:
    """How a setting's map is fitted, in words."""
    gates = f"percentile {setting.gate_percentile:g} with rule {setting.gate_rule}"
    others = [
        f"{name} {getattr(setting, name)}" for name in ONLY_RANKED if getattr(setting, name) != getattr(own, name)
    ]
    return ", ".join(others) if others else gates


def _refit_words(setting: TunedSetting, own: TunedSetting) -> str:
    """What differs from the policy's own map."""
    words = {"gate_percentile": "percentile", "gate_rule": "rule"}
    meaningless = ("gate_percentile", "gate_rule") if setting.estimator == "ridge" else ("features", "penalty")
    differing = [name for name in FIT if name not in meaningless and getattr(setting, name) != getattr(own, name)]
    return ", ".join(f"{words.get(name, name)} {getattr(own, name)} -> {getattr(setting, name)}" for name in differing)


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
