"""A plain residual vector: `h <- h + scale * vector`, the form that CAA, RepE and most steering libraries use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from dspa.errors import CorruptFileError, InvalidInputError, MismatchError
from dspa.kernels import EditList, StepMode, TokenStats
from dspa.methods.hub import local_folder
from dspa.methods.policy import EditPositions, Intervention, TokenEdit, check_edit_positions
from dspa.transformers_model import ModelFingerprint, check_layer_fits
from dspa.util.files import TensorFolder
from dspa.util.scalars import LARGEST_FLOAT32, check_integer, check_number


@dataclass(frozen=True, eq=False)
class ResidualVector:
    """`strength * vector` is added to the residual stream after a layer.

    Attributes:
        layer: the decoder layer, from 0.
        vector: `[d_model]` floating point.
        strength: its factor.
        longest_list: 0, for it names no latents.
    """

    layer: int
    vector: Tensor
    strength: float
    longest_list: int = 0

    def check(self, model: ModelFingerprint) -> None:
        """Raises MismatchError if the layer or the vector's width does not fit the model."""
        check_layer_fits("vector", self.layer, model)
        if len(self.vector) != model.hidden_size:
            raise MismatchError(
                f"the vector has {len(self.vector)} elements; expected the model's hidden size {model.hidden_size}"
            )

    def shares_launch_with(self, other: Intervention) -> bool:
        return type(other) is type(self) and self.layer == other.layer

    def editor(
        self, sharing: Mapping[str, Intervention], device: torch.device, backend: str, mode: StepMode | None
    ) -> ResidualVectorEditor:
        vectors = {name: each for name, each in sharing.items() if isinstance(each, ResidualVector)}
        return ResidualVectorEditor(vectors, device)


class ResidualVectorEditor:
    """Adds to each row the vector of its policy, in float32 (float64 beside float64); see `PositionEditor`.

    A row that holds NaN or Inf, or would after the edit, is left alone and counted as not finite.
    """

    latents = 0

    def __init__(self, vectors: Mapping[str, ResidualVector], device: torch.device) -> None:
        self.layer = next(iter(vectors.values())).layer
        self.device = device
        self._vectors = vectors
        self._dtype = torch.float32
        for each in vectors.values():
            self._dtype = torch.promote_types(self._dtype, each.vector.dtype)
        self._by_batch: dict[int, Tensor] = {}  # [B, d_model], the vector of each row
        self._current: Tensor | None = None
        self._row_policies: tuple[str | None, ...] = ()

    def begin_prompt(self, row_policies: Sequence[str | None]) -> None:
        batch = len(row_policies)
        if batch not in self._by_batch:
            d_model = len(next(iter(self._vectors.values())).vector)
            with torch.inference_mode(False):  # it is written in later calls, which may not be in inference mode
                self._by_batch[batch] = torch.zeros(batch, d_model, dtype=self._dtype, device=self.device)
        rows = self._current = self._by_batch[batch]
        self._row_policies = tuple(row_policies)
        with torch.no_grad():
            rows.copy_(self._of_rows())

    def set_selection(self, selection: EditList, rows: Tensor) -> None:
        raise InvalidInputError("a vector policy selected latents; its select must return None")

    def edit(self, hidden: Tensor, enabled: Tensor | None, counters: Sequence[TokenStats | None]) -> None:
        assert self._current is not None  # a prompt has begun
        edited, finite = self._added(hidden, self._current)
        on = finite.new_ones(hidden.shape[:2]) if enabled is None else enabled
        changed = (on & finite)[..., None] & (edited != hidden)
        hidden.copy_(torch.where(changed, edited, hidden))
        for position, stats in enumerate(counters):
            if stats is not None:
                stats.seen.add_(on[:, position])
                stats.edited.add_(changed[:, position].any(dim=-1))
                stats.nonfinite.add_((on & ~finite)[:, position])

    def differentiable_edit(self, hidden: Tensor, enabled: Tensor | None) -> Tensor:
        edited, finite = self._added(hidden, self._of_rows())
        on = finite if enabled is None else finite & enabled
        return torch.where(on[..., None], edited, hidden)

    def describe(self, hidden: Tensor, enabled: Tensor | None) -> list[TokenEdit | None]:
        on = [True] * len(hidden) if enabled is None else enabled.tolist()
        return [TokenEdit(torch.nan, ()) if each else None for each in on]

    def selection(self) -> EditList | None:
        return None

    def _of_rows(self) -> Tensor:
        """`[B, d_model]`, the scaled vector of each row; zero for rows of other policies. Computed from the policies'
        own tensors each time, so that training reaches them."""
        scaled = {
            name: each.strength * each.vector.to(self.device, self._dtype) for name, each in self._vectors.items()
        }
        zero = torch.zeros_like(next(iter(scaled.values())))
        return torch.stack([scaled.get(name or "", zero) for name in self._row_policies])

    def _added(self, hidden: Tensor, vectors: Tensor) -> tuple[Tensor, Tensor]:
        """The sums `[B, T, d_model]`, rounded once to the dtype of `hidden`, and where they are finite, `[B, T]`."""
        edited = (hidden.to(torch.promote_types(hidden.dtype, vectors.dtype)) + vectors[:, None]).to(hidden.dtype)
        return edited, edited.isfinite().all(dim=-1)


@dataclass(frozen=True, eq=False, repr=False)
class VectorPolicy:
    """Adds one vector to the residual stream, whatever the prompt (docs/method.md, section 7).

    Attributes:
        vector: `[d_model]` floating point. Training through `steer(..., differentiable=True)` reaches it.
        layer: the decoder layer after which it is added, from 0.
        scale: its factor, of either sign.
        model: the model it was made for; None for any with that layer and width.
        edit_positions: "from_last_prompt" edits the last prompt token and every generated one, "generated" only these,
            "all" every prompt token but those of `uncounted_token_ids` as well.
        uncounted_token_ids: prompt tokens that "all" leaves out, such as that of the beginning of the sequence.

    Raises:
        InvalidInputError: for a vector of another shape or with NaN or Inf, or an option out of range.
    """

    vector: Tensor
    layer: int
    scale: float = 1.0
    _: KW_ONLY
    model: ModelFingerprint | None = None
    edit_positions: EditPositions = "from_last_prompt"
    uncounted_token_ids: tuple[int, ...] = ()
    observation: None = None

    def __post_init__(self) -> None:
        if self.vector.ndim != 1 or not self.vector.is_floating_point():
            raise InvalidInputError(
                f"the vector is {tuple(self.vector.shape)} {self.vector.dtype}; expected [d_model] floating point"
            )
        if not bool(self.vector.isfinite().all()):
            raise InvalidInputError("the vector holds NaN or Inf; expected finite numbers")
        check_integer("layer", self.layer, 0)
        check_number("scale", self.scale, -LARGEST_FLOAT32, LARGEST_FLOAT32)
        check_edit_positions(self.edit_positions)

    @property
    def intervention(self) -> ResidualVector:
        return ResidualVector(self.layer, self.vector, self.scale)

    def select(self, density: Tensor) -> None:
        """Nothing: the vector is the same for every prompt."""

    def __repr__(self) -> str:
        return (
            f"VectorPolicy([{len(self.vector)}], layer={self.layer}, scale={self.scale}, "
            f"edit_positions={self.edit_positions!r})"
        )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the policy to a folder: the vector and `config.json`.

        Raises:
            DspaError: if it cannot be written.
        """
        config = {
            "layer": self.layer,
            "scale": float(self.scale),
            "edit_positions": self.edit_positions,
            "uncounted_token_ids": list(self.uncounted_token_ids),
            "model": None if self.model is None else asdict(self.model),
        }
        return FOLDER.write(folder, config, {"vector": self.vector.detach()})

    @classmethod
    def from_pretrained(cls, source: str | Path) -> VectorPolicy:
        """Reads a policy from a folder that `save_pretrained` wrote, or from the hub if there is no such folder.

        Raises:
            InvalidInputError: if there is no policy.
            CorruptFileError: if a file is truncated, altered, or holds values out of bounds.
        """
        config, tensors = FOLDER.read(local_folder(source, FOLDER.patterns))
        try:
            if tensors.keys() != {"vector"}:
                raise ValueError(f"its tensors are {', '.join(sorted(tensors)) or 'none'}; expected vector")
            return cls(tensors["vector"], **vars(config))
        except (ValueError, InvalidInputError) as error:
            raise CorruptFileError(f"{source} does not hold a whole vector policy ({error}); make it again") from error


@dataclass(frozen=True)
class _Config:
    """`config.json`."""

    layer: int
    scale: float
    edit_positions: EditPositions
    uncounted_token_ids: tuple[int, ...]
    model: ModelFingerprint | None


FOLDER = TensorFolder("vector_policy", 2, _Config, version_without_checksum=1)
