"""Which of several policies are served together: those that read by one SAE, and those that edit in one launch."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.methods.policy import Intervention, Policy
from dspa.sae.weights import SaeWeights, encode_alike


@dataclass(frozen=True, eq=False)
class ReadingGroup:
    """Policies that observe prompts after one layer by one SAE.

    Attributes:
        layer: the decoder layer, from 0.
        sae: the SAE; None for policies that are the same for every prompt.
        names: the policies, by name.
    """

    layer: int
    sae: SaeWeights | None
    names: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class EditingGroup:
    """Policies whose rows one editor edits.

    Attributes:
        layer: the decoder layer, from 0.
        interventions: what each of the policies changes, by name.
    """

    layer: int
    interventions: Mapping[str, Intervention]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.interventions)


def reading_groups(policies: Mapping[str, Policy]) -> list[ReadingGroup]:
    """By layer and encoder, in the order of layers. A policy without an observation reads where it edits: its prompt
    has been computed there, and nothing of it is encoded."""
    groups: list[tuple[int, SaeWeights | None, list[str]]] = []
    for name, policy in policies.items():
        observed = policy.observation
        layer, sae = (policy.intervention.layer, None) if observed is None else (observed.layer, observed.sae)
        for known_layer, known_sae, names in groups:
            if known_layer == layer and _read_alike(known_sae, sae):
                names.append(name)
                break
        else:
            groups.append((layer, sae, [name]))
    return [ReadingGroup(layer, sae, tuple(names)) for layer, sae, names in sorted(groups, key=lambda group: group[0])]


def editing_groups(policies: Mapping[str, Policy]) -> list[EditingGroup]:
    """By shared launches, in the order of layers."""
    groups: list[dict[str, Intervention]] = []
    for name, policy in policies.items():
        intervention = policy.intervention
        for group in groups:
            if all(member.shares_launch_with(intervention) for member in group.values()):
                group[name] = intervention
                break
        else:
            groups.append({name: intervention})
    groups.sort(key=lambda group: next(iter(group.values())).layer)
    return [EditingGroup(next(iter(group.values())).layer, group) for group in groups]


def check_not_steered(policies: Mapping[str, Policy], attached: Sequence[Mapping[str, Policy]]) -> None:
    """Refuses policies that a model follows already, as when a cell of a notebook is run again, and warns where it
    follows others.

    Raises:
        InvalidInputError: if one of the policies is attached already, as the same object or with the same content.
    """
    if not attached:
        return
    for name, policy in policies.items():
        if any(alike(policy, other) for known in attached for other in known.values()):
            raise InvalidInputError(
                f"policy {name!r} is attached to this model already, and would edit twice; call remove() on its "
                "steering first, use steer in a with statement, or pass compose=True"
            )
    warnings.warn(
        f"this model is steered already, by {', '.join(name for known in attached for name in known)}: the edits "
        "follow one another; call remove() on the earlier steering, or pass compose=True if that is meant",
        stacklevel=4,
    )


def alike(one: Any, other: Any) -> bool:
    """Whether two values are the same object, or have the same content: dataclasses by their fields, tensors by their
    elements."""
    if one is other:
        return True
    if type(one) is not type(other):
        return False
    if isinstance(one, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and torch.equal(one.cpu(), other.cpu())
    if is_dataclass(one):
        return all(
            alike(getattr(one, field.name), getattr(other, field.name)) for field in fields(one) if field.compare
        )
    return bool(one == other)


def _read_alike(one: SaeWeights | None, other: SaeWeights | None) -> bool:
    return one is other or (one is not None and other is not None and encode_alike(one, other))
