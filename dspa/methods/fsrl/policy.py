"""An FSRL policy: an adapter, the SAE it was trained beside, and where both act."""

from __future__ import annotations

from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dspa.errors import CorruptFileError, InvalidInputError, MismatchError, UnsupportedSaeError
from dspa.kernels import AdapterActivation, AdapterWeights
from dspa.methods.fsrl.adapter_edit import AdapterEdit
from dspa.methods.hub import local_folder, upload_folder
from dspa.methods.model_card import EditCounts, audit_of_counts, describe_sae, model_card, write_card
from dspa.methods.policy import EditPositions, check_edit_positions
from dspa.methods.saved_sae import SaeConfig, sae_config, sae_from_config
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.transformers_model import ModelFingerprint
from dspa.util.files import TensorFolder

OPTIONS = ("scale", "edit_positions", "uncounted_token_ids", "masked_latents", "steering_fraction")
TENSORS = ("weight", "bias", "threshold")

INTRODUCTION = (
    "A steering policy of FSRL (arXiv 2509.12934): a small adapter, trained by preference optimisation, adds a sparse "
    "vector of a sparse autoencoder's latents to the residual stream of a frozen model at every token."
)


@dataclass(frozen=True, eq=False, repr=False)
class FsrlPolicy:
    """FSRL's policy (docs/method.md, section 6).

    Attributes:
        adapter: the trained adapter, on the same latents as the SAE. `clip=True` is version 3 of the method,
            `clip=False` versions 1 and 2.
        sae: the SAE, with its decoder.
        layer: the decoder layer after which it acts, from 0.
        scale: factor of the steering vector, not negative; 1 is what was trained.
        model: the model it was made for; None for any that fits.
        edit_positions: "all" as in training: prompt, template and response.
        uncounted_token_ids: prompt tokens that "all" leaves out, such as that of the beginning of the sequence, which
            the original code edits.
        masked_latents: latents that stay as they are.
        steering_fraction: share of the latents a token may change, those with the largest steering; None for all.

    Raises:
        InvalidInputError: for an option out of range.
        MismatchError: if the adapter and the SAE have other shapes.
    """

    adapter: AdapterWeights
    sae: SparseAutoencoder
    layer: int
    _: KW_ONLY
    scale: float = 1.0
    model: ModelFingerprint | None = None
    edit_positions: EditPositions = "all"
    uncounted_token_ids: tuple[int, ...] = ()
    masked_latents: tuple[int, ...] = ()
    steering_fraction: float | None = None
    observation: None = None

    def __post_init__(self) -> None:
        if self.adapter.weight.shape != self.sae.W_enc.shape:
            raise MismatchError(
                f"the adapter is {tuple(self.adapter.weight.shape)}; expected [d_sae, d_model] of its SAE, "
                f"{tuple(self.sae.W_enc.shape)}"
            )
        if self.sae.W_dec is None or self.sae.decoder_rows is not None:
            raise InvalidInputError("an FSRL policy needs every decoder row of its SAE; pass the whole SAE")
        if not 0 <= self.scale < float("inf"):
            raise InvalidInputError(f"scale is {self.scale}; expected a finite number >= 0")
        if self.steering_fraction is not None and not 0 < self.steering_fraction <= 1:
            raise InvalidInputError(f"steering_fraction is {self.steering_fraction}; expected a number in (0, 1]")
        outside = [latent for latent in self.masked_latents if not 0 <= latent < self.sae.d_sae]
        if outside:
            raise InvalidInputError(f"masked latent {outside[0]} is not one of 0 to {self.sae.d_sae - 1}")
        check_edit_positions(self.edit_positions)

    @property
    def intervention(self) -> AdapterEdit:
        return AdapterEdit(
            self.layer, self.sae, self.adapter, self.scale, tuple(self.masked_latents), self.steering_fraction
        )

    def select(self, density: Tensor) -> None:
        """Nothing: the adapter reads each token by itself."""

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in ("scale", "edit_positions"))
        masked = f", {len(self.masked_latents)} latents masked" if self.masked_latents else ""
        return (
            f"FsrlPolicy({self.sae.d_sae} latents, layer {self.layer}, {self.adapter.activation}, "
            f"clip={self.adapter.clip}, {options}{masked})"
        )

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the policy to a folder that needs nothing else: its tensors and `config.json`.

        Raises:
            DspaError: if it cannot be written.
        """
        config = {
            "scale": float(self.scale),
            "edit_positions": self.edit_positions,
            "uncounted_token_ids": list(self.uncounted_token_ids),
            "masked_latents": list(self.masked_latents),
            "steering_fraction": self.steering_fraction,
            "layer": self.layer,
            "activation": self.adapter.activation,
            "clip": self.adapter.clip,
            "model": None if self.model is None else asdict(self.model),
            "sae": sae_config(self.sae),
        }
        tensors = {f"adapter.{name}": getattr(self.adapter, name) for name in TENSORS}
        tensors |= {f"sae.{name}": tensor for name, tensor in self.sae.tensors().items()}
        saved = FOLDER.write(folder, config, tensors)
        write_card(saved, self.model_card("path/of/this/policy"))
        return saved

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> FsrlPolicy:
        """Reads a policy from a folder, or from the hub if there is no such folder.

        Args:
            source: a folder that `save_pretrained` wrote, or a hub repository's id.
            options: fields to change, such as `scale=0.5`.

        Raises:
            InvalidInputError: if there is no policy, or an option is unknown or out of range.
            CorruptFileError: if a file is truncated, altered, or holds values out of bounds.
        """
        config, tensors = FOLDER.read(local_folder(source, FOLDER.patterns))
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise InvalidInputError(f"option {unknown[0]!r} is not known; expected one of {', '.join(OPTIONS)}")
        try:
            saved = _policy_from(config, tensors)
            return cls(**{**saved, **options})
        except (KeyError, TypeError, ValueError, UnsupportedSaeError, MismatchError) as error:
            raise CorruptFileError(f"{source} does not hold a whole FSRL policy ({error}); make it again") from error
        except InvalidInputError as error:
            if options:
                raise
            raise CorruptFileError(f"{source} does not hold a whole FSRL policy ({error}); make it again") from error

    def push_to_hub(
        self,
        repo_id: str,
        *,
        summary: EditCounts | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload FSRL policy",
    ) -> str:
        """Uploads the policy's folder with a model card; arguments, result and errors as `SteeringPolicy.push_to_hub`.

        Args:
            repo_id: `user/name`.
            summary: what the policy edited on prompts of one's own (`Steering.summary`), for the card's audit.
            private: whether a new repository is private; None leaves it to the account.
            token: a hub token; None takes the one of `hf auth login`.
            commit_message: of the upload.

        Returns:
            The address of the commit.
        """
        return upload_folder(
            FOLDER,
            self.save_pretrained,
            self.model_card(repo_id, summary),
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
        )

    def model_card(self, repo_id: str, counts: EditCounts | None = None) -> str:
        """Markdown with the header the hub reads.

        Args:
            repo_id: where the policy will be found, for the example.
            counts: what it edited on prompts of one's own (`Steering.summary`).
        """
        model = self.model
        made_for = "not recorded"
        if model is not None:
            made_for = f"{model.model_type}, {model.num_hidden_layers} layers, width {model.hidden_size}"
        page = self.sae.metadata.neuronpedia_page
        return model_card(
            repo_id,
            {
                "model": made_for,
                "SAE": f"after layer {self.layer}: {describe_sae(self.sae)}",
                "activation, clip": f"{self.adapter.activation}, {self.adapter.clip}",
                "scale": self.scale,
                "edit_positions": self.edit_positions,
                "masked latents": len(self.masked_latents),
                "steering_fraction": self.steering_fraction,
            },
            "Not measured on prompts." if counts is None else audit_of_counts(counts, page),
            policy_class="FsrlPolicy",
            introduction=INTRODUCTION,
        )


@dataclass(frozen=True)
class _Config:
    """`config.json`."""

    scale: float
    edit_positions: EditPositions
    uncounted_token_ids: tuple[int, ...]
    masked_latents: tuple[int, ...]
    steering_fraction: float | None
    layer: int
    activation: AdapterActivation
    clip: bool
    model: ModelFingerprint | None
    sae: SaeConfig


FOLDER = TensorFolder("fsrl_policy", 1, _Config)


def _policy_from(config: _Config, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The fields of a saved policy, its tensors checked."""
    parts: dict[str, dict[str, Tensor]] = {"adapter": {}, "sae": {}}
    for key, tensor in tensors.items():
        part, _, name = key.partition(".")
        parts[part][name] = tensor
    adapter = AdapterWeights(**parts["adapter"], activation=config.activation, clip=config.clip)
    for name in TENSORS:
        value = getattr(adapter, name)
        if bool(value.isnan().any()) or (name != "threshold" and not bool(value.isfinite().all())):
            raise ValueError(f"adapter tensor {name} holds NaN or Inf")
    fields = {name: getattr(config, name) for name in (*OPTIONS, "layer", "model")}
    return {**fields, "adapter": adapter, "sae": sae_from_config(config.sae, parts["sae"])}
