"""Personal policies: a small overlay of one user on a policy that many share (DSPA, appendix F).

The paper's appendix F personalises by choosing among a policy's latents by what they do to a user's utility. Here a
user's liked and disliked responses choose directly, by the rule of docs/method.md, section 2, for a single prompt-blind
row: how much more often a latent is active in what the user likes. The overlay is a list of latents with directions.
Each row of a batch carries its own list in any case, so that rows of many users are edited in one launch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspa.errors import CorruptFileError, InvalidInputError, MismatchError
from dspa.kernels import EditList, encode_density
from dspa.methods.latent_lists import LatentLists
from dspa.methods.policy import EditPositions, PromptObservation
from dspa.methods.split_model import SplitModel
from dspa.methods.steering_policy import SteeringPolicy
from dspa.offline.triples import PreferenceTriple, PreferenceTriples
from dspa.transformers_model import ModelFingerprint, device_of, is_steered
from dspa.util.files import TensorFolder
from dspa.util.scalars import LARGEST_FLOAT32, check_integer, check_number

EXAMPLES_AT_ONCE = 16


@dataclass(frozen=True, eq=False, repr=False)
class Overlay:
    """What one user has of their own: tens of numbers, a folder of a few kB.

    Attributes:
        latents: `[n]` int32, output latents, each once.
        signs: `[n]` int8: 1 augment, -1 ablate, 0 leave alone whatever the shared policy selects.
        scores: `[n]` float32, for the record: by how much each was more frequent in what the user likes.
        alpha: the user's edit strength; None for that of the shared policy.
        output_layer: the decoder layer of the latents.
        output_sae: the fingerprint of their encoder.
        examples: from how many pairs of responses it was made.

    Raises:
        InvalidInputError: for tensors that do not fit together, or a value out of range.
    """

    latents: Tensor
    signs: Tensor
    scores: Tensor
    alpha: float | None
    output_layer: int
    output_sae: str
    examples: int

    def __post_init__(self) -> None:
        shapes = [tuple(tensor.shape) for tensor in (self.latents, self.signs, self.scores)]
        dtypes = (self.latents.dtype, self.signs.dtype, self.scores.dtype)
        if dtypes != (torch.int32, torch.int8, torch.float32) or len(set(shapes)) != 1 or len(shapes[0]) != 1:
            raise InvalidInputError(
                f"an overlay's latents, signs and scores are {shapes} {dtypes}; expected [n] int32, int8, float32"
            )
        if len(self.latents.unique()) != len(self.latents) or bool((self.latents < 0).any()):
            raise InvalidInputError("an overlay names a latent twice, or a negative one")
        if bool((self.signs.abs() > 1).any()) or not bool(self.scores.isfinite().all()):
            raise InvalidInputError("an overlay's signs are not all -1, 0 or 1, or its scores not all finite")
        if self.alpha is not None:
            check_number("alpha", self.alpha, 0, LARGEST_FLOAT32)
        check_integer("output_layer", self.output_layer, 0)
        check_integer("examples", self.examples, 0)

    def __repr__(self) -> str:
        up, down = int((self.signs > 0).sum()), int((self.signs < 0).sum())
        return f"Overlay({up} augmented, {down} ablated, {self.examples} examples, alpha={self.alpha})"

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the overlay to a folder: three short tensors and `config.json`.

        Raises:
            DspaError: if it cannot be written.
        """
        config = {
            "alpha": None if self.alpha is None else float(self.alpha),
            "output_layer": self.output_layer,
            "output_sae": self.output_sae,
            "examples": self.examples,
        }
        tensors = {"latents": self.latents, "signs": self.signs, "scores": self.scores}
        return FOLDER.write(folder, config, tensors)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Overlay:
        """Reads what `save_pretrained` wrote.

        Raises:
            InvalidInputError: if there is no overlay.
            CorruptFileError: if a file is truncated, altered, or holds values out of bounds.
        """
        config, tensors = FOLDER.read(folder)
        try:
            if tensors.keys() != {"latents", "signs", "scores"}:
                raise ValueError(f"its tensors are {', '.join(sorted(tensors)) or 'none'}")
            return cls(**tensors, **vars(config))
        except (ValueError, InvalidInputError) as error:
            raise CorruptFileError(f"{folder} does not hold a whole overlay ({error}); make it again") from error


@dataclass(frozen=True, eq=False, repr=False)
class PersonalPolicy:
    """A shared policy under a user's overlay: a latent of the overlay is edited as the overlay says, every other one as
    the policy does.

    Policies of many users hold one and the same shared policy; their rows are edited in one launch. Within a list, the
    overlay's latents come first.

    Attributes:
        policy: the shared policy.
        overlay: what the user has of their own.

    Raises:
        InvalidInputError: if one of them is something else.
        MismatchError: if the overlay belongs to another SAE or layer, or names latents that this policy may not edit,
            or whose decoder rows it does not hold.
    """

    policy: SteeringPolicy
    overlay: Overlay

    def __post_init__(self) -> None:
        policy, overlay = self.policy, self.overlay
        _check_shared(policy)
        if not isinstance(overlay, Overlay):
            raise InvalidInputError(
                f"the overlay is a {type(overlay).__name__}; expected what dspa.personalise returned"
            )
        encoder = policy.conditional_map.run.output_sae
        if (overlay.output_layer, overlay.output_sae) != (policy.output_layer, encoder):
            raise MismatchError("the overlay belongs to another output SAE or layer than the policy; make it again")
        if len(overlay.latents) and int(overlay.latents.max()) >= policy.output_sae.d_sae:
            raise MismatchError(f"the overlay names latent {int(overlay.latents.max())} of {policy.output_sae.d_sae}")
        latents = overlay.latents[overlay.signs != 0].long()
        rows = policy.output_sae.decoder_rows
        if rows is not None and bool((rows.cpu()[latents] < 0).any()):
            raise MismatchError("the overlay edits latents whose decoder rows this policy does not hold; make it again")
        if policy.editable is not None and not bool(policy.editable[latents].all()):
            raise MismatchError("the overlay edits latents that are switched off in this policy; make it again")

    def __repr__(self) -> str:
        return f"PersonalPolicy({self.policy!r}, {self.overlay!r})"

    @property
    def model(self) -> ModelFingerprint:
        return self.policy.model

    @property
    def observation(self) -> PromptObservation:
        return self.policy.observation

    @property
    def edit_positions(self) -> EditPositions:
        return self.policy.edit_positions

    @property
    def uncounted_token_ids(self) -> tuple[int, ...]:
        return self.policy.uncounted_token_ids

    @property
    def alpha(self) -> float:
        """The edit strength."""
        return self.policy.alpha if self.overlay.alpha is None else self.overlay.alpha

    @property
    def intervention(self) -> LatentLists:
        shared = self.policy.intervention
        longest = min(shared.longest_list + int((self.overlay.signs != 0).sum()), self.policy.output_sae.d_sae)
        return LatentLists(shared.layer, shared.sae, self.alpha, longest)

    def select(self, density: Tensor) -> EditList:
        """The shared policy's lists for prompts of densities `[B, d_sae_in]`, under the overlay."""
        shared, device = self.policy.select(density), density.device
        latents, signs = self.overlay.latents.to(device), self.overlay.signs.to(device)
        named = torch.zeros(self.policy.output_sae.d_sae, dtype=torch.bool, device=device)
        named[latents.long()] = True
        rows, width = shared.batch, len(latents) + shared.k
        joined = EditList(
            torch.cat([latents.expand(rows, -1), shared.latents], dim=1),
            torch.cat([signs.expand(rows, -1), shared.signs], dim=1),
            torch.full((rows,), width, dtype=torch.int32, device=device),
        )
        own = (signs != 0).expand(rows, -1)
        return joined.where(
            torch.cat([own, shared.valid() & ~named[shared.latents.long()]], dim=1), self.intervention.longest_list
        )


def _check_shared(policy: object) -> None:
    if not isinstance(policy, SteeringPolicy):
        raise InvalidInputError(f"the shared policy is a {type(policy).__name__}; expected a SteeringPolicy")


def personalise(
    policy: SteeringPolicy,
    model: nn.Module,
    examples: PreferenceTriples | Sequence[PreferenceTriple],
    *,
    entries_per_side: int = 8,
    alpha: float | None = None,
) -> Overlay:
    """An overlay from a few responses that a user liked and disliked.

    A latent's score is the mean, over the examples, of the share of the liked response's tokens on which it is active
    minus the same share of the disliked one's. The latents with the highest positive scores are augmented, those with
    the lowest negative ones ablated. Candidates are what the policy itself can select, so that nothing has to be saved
    beside the overlay.

    Args:
        policy: the policy that users share.
        model: its model, not steered at the moment.
        examples: pairs with a `chosen` (liked) and a `rejected` (disliked) response, as `load_preferences` reads them.
        entries_per_side: how many latents are augmented, and how many ablated, at most.
        alpha: the user's edit strength; None for the policy's.

    Raises:
        InvalidInputError: if the policy is no `SteeringPolicy`, there are no examples, an option is out of range, or
            the model is steered.
        MismatchError: if the policy was made for another model.
    """
    _check_shared(policy)
    triples = PreferenceTriples.from_any(examples)
    check_integer("entries_per_side", entries_per_side, 1, policy.output_sae.d_sae, "d_sae = ")
    policy.model.check(model)
    if is_steered(model):
        raise InvalidInputError("the model is steered; an overlay is made from what the model does without steering")
    score = _differences(policy, model, triples).mean(dim=0)
    candidate = torch.zeros(len(score), dtype=torch.bool)
    candidate[policy.selectable_latents()] = True
    latents: list[Tensor] = []
    for sign in (1, -1):
        order = torch.where(candidate, sign * score, 0).sort(descending=True, stable=True).indices[:entries_per_side]
        latents.append(order[sign * score[order] > 0])
    chosen = torch.cat(latents)
    signs = torch.tensor([1] * len(latents[0]) + [-1] * len(latents[1]), dtype=torch.int8)
    run = policy.conditional_map.run
    return Overlay(chosen.int(), signs, score[chosen].float(), alpha, run.output_layer, run.output_sae, len(triples))


def _differences(policy: SteeringPolicy, model: nn.Module, triples: PreferenceTriples) -> Tensor:
    """`[examples, d_sae_out]` float64: densities of liked minus densities of disliked responses."""
    split, sae = SplitModel(model, policy.output_layer), policy.output_sae.encoder_only().to(device_of(model))
    config: Any = model.config
    pad = int(getattr(config, "pad_token_id", None) or 0)
    densities: dict[str, list[Tensor]] = {"chosen": [], "rejected": []}
    for first in range(0, len(triples), EXAMPLES_AT_ONCE):
        for side, found in densities.items():
            part = triples[first : first + EXAMPLES_AT_ONCE]
            rows = [(triple.prompt, getattr(triple, side), getattr(triple, f"{side}_counted")) for triple in part]
            width = max(len(prompt) + len(response) for prompt, response, _ in rows)
            ids = torch.full((len(rows), width), pad)
            mask = torch.zeros_like(ids)
            for row, (prompt, response, _) in enumerate(rows):
                ids[row, : len(prompt) + len(response)] = torch.tensor([*prompt, *response])
                mask[row, : len(prompt) + len(response)] = 1
            states = split.states(ids.to(sae.device), mask.to(sae.device))
            own = [states[row, len(prompt) : len(prompt) + counted] for row, (prompt, _, counted) in enumerate(rows)]
            offsets = torch.tensor([0, *(len(each) for each in own)]).cumsum(dim=0).to(sae.device)
            counts = encode_density(torch.cat(own), offsets, sae).cpu().double()
            found.append(counts / torch.tensor([len(each) for each in own], dtype=torch.float64)[:, None])
    return torch.cat(densities["chosen"]) - torch.cat(densities["rejected"])


@dataclass(frozen=True)
class _Config:
    """`config.json`."""

    alpha: float | None
    output_layer: int
    output_sae: str
    examples: int


FOLDER = TensorFolder("overlay", 1, _Config)
