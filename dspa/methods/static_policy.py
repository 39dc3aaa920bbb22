"""Edit lists that do not depend on the prompt: the Static-SAE comparator, and controls."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from dspa.errors import InvalidInputError, MismatchError
from dspa.kernels import EditList
from dspa.methods.latent_lists import LatentLists
from dspa.methods.policy import EditPositions, check_edit_positions
from dspa.methods.steering_policy import SteeringPolicy
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.transformers_model import ModelFingerprint


@dataclass(frozen=True, eq=False, repr=False)
class StaticPolicy:
    """Edit lists that do not depend on the prompt, applied by the same token rule.

    With one list for all it is the Static-SAE comparator (method, section 7); with a list per row, a control.

    Attributes:
        edits: one list, or one for each row of the batches to come.
        model, output_layer, output_sae, alpha, edit_positions, uncounted_token_ids: as in SteeringPolicy.

    Raises:
        InvalidInputError: if a listed latent is out of range.
        MismatchError: if a listed latent has no decoder row.
    """

    edits: EditList
    _: KW_ONLY
    model: ModelFingerprint
    output_layer: int
    output_sae: SparseAutoencoder
    alpha: float = 0.2
    edit_positions: EditPositions = "from_last_prompt"
    uncounted_token_ids: tuple[int, ...] = ()
    observation: None = None

    def __post_init__(self) -> None:
        listed = self.edits.latents[self.edits.valid()].long()
        if listed.numel() and not 0 <= int(listed.min()) <= int(listed.max()) < self.output_sae.d_sae:
            raise InvalidInputError(
                f"edit lists name latents {int(listed.min())} to {int(listed.max())}; "
                f"expected 0 to {self.output_sae.d_sae - 1}"
            )
        check_edit_positions(self.edit_positions)
        rows = self.output_sae.decoder_rows
        if rows is not None and bool((rows[listed.to(rows.device)] < 0).any()):
            raise MismatchError("edit lists name latents without a decoder row in this SAE; pass the whole SAE")

    @classmethod
    def with_edits(cls, policy: SteeringPolicy, edits: EditList) -> StaticPolicy:
        """A policy's layer, SAE, strength and positions with other lists."""
        return cls(
            edits,
            model=policy.model,
            output_layer=policy.output_layer,
            output_sae=policy.output_sae,
            alpha=policy.alpha,
            edit_positions=policy.edit_positions,
            uncounted_token_ids=policy.uncounted_token_ids,
        )

    @classmethod
    def from_mean_difference(cls, policy: SteeringPolicy) -> StaticPolicy:
        """The prompt-blind counterpart of a policy: the extremes of the mean of D, as many as the policy edits, without
        those that it may not edit."""
        mean = policy.conditional_map.mean_difference
        highest = mean.sort(descending=True, stable=True).indices[: policy.k_diff].tolist()
        lowest = mean.sort(stable=True).indices[: policy.k_diff].tolist()
        augment = highest if policy.edit != "ablate" else []
        ablate = lowest if policy.edit != "augment" else []
        in_both = set(augment) & set(ablate)  # their edits would cancel, as in `lookup`
        lists = [[latent for latent in side if latent not in in_both] for side in (augment, ablate)]
        edits = EditList.from_lists([lists[0]], [lists[1]])
        if policy.editable is not None:
            edits = edits.where(policy.editable[edits.latents.long()])
        return cls.with_edits(policy, edits)

    def __repr__(self) -> str:
        return (
            f"StaticPolicy({self.edits.batch} lists of up to {self.edits.k} latents, {self.model.model_type}, "
            f"layer {self.output_layer}, alpha={self.alpha}, edit_positions={self.edit_positions!r})"
        )

    @property
    def intervention(self) -> LatentLists:
        return LatentLists(self.output_layer, self.output_sae, self.alpha, self.edits.k)

    def select(self, density: Tensor) -> EditList:
        """The lists, for as many rows as `density` has; its values are not read.

        Raises:
            InvalidInputError: if there are neither as many lists nor one.
        """
        batch = density.shape[0]
        if self.edits.batch not in (1, batch):
            raise InvalidInputError(f"there are {self.edits.batch} edit lists for {batch} rows; expected 1 or {batch}")
        return self.edits.rows(torch.arange(batch) % self.edits.batch).to(density.device)
