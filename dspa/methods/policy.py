"""A steering policy: the map, both SAEs and the options, as one thing that selects edits for a prompt."""

from __future__ import annotations

import html
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

import torch
from torch import Tensor

from dspa.errors import CorruptFileError, DspaError, InvalidInputError, MismatchError, UnsupportedSaeError
from dspa.kernels import EditKind, EditList, SaeWeights, lookup
from dspa.kernels.lookup import check_lookup_options
from dspa.methods.conditional_map import ConditionalDifferenceMap
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.sae.metadata import SaeMetadata
from dspa.transformers_model import ModelFingerprint
from dspa.util.files import CONFIG, read_tensor_folder, write_atomically, write_tensor_folder

if TYPE_CHECKING:
    from dspa.online.summary import SteeringSummary

EditPositions = Literal["from_last_prompt", "generated", "all"]

KIND = "policy"
FORMAT_VERSION = 1


class Policy(Protocol):
    """What `steer` asks of a policy. Write a class with these fields to steer by another rule."""

    @property
    def model(self) -> ModelFingerprint: ...
    @property
    def input_layer(self) -> int: ...
    @property
    def output_layer(self) -> int: ...
    @property
    def input_sae(self) -> SaeWeights | None:
        """The SAE whose prompt densities `select` reads; None for a rule that does not look at the prompt."""
        ...

    @property
    def output_sae(self) -> SaeWeights: ...
    @property
    def alpha(self) -> float: ...
    @property
    def edit_positions(self) -> EditPositions: ...
    @property
    def uncounted_token_ids(self) -> tuple[int, ...]: ...

    def select(self, density: Tensor) -> EditList:
        """Edit lists for prompts of densities `[B, d_sae_in]` (`[B, 0]` without an input SAE)."""
        ...


@dataclass(frozen=True, eq=False, repr=False)
class SteeringPolicy:
    """DSPA's policy (method, sections 3 and 4).

    Attributes:
        conditional_map: the map A, with the collection it comes from (model, layers, counting rules).
        input_sae, output_sae: the SAEs it was collected with.
        k_prompt: how many of a prompt's densest latents choose rows of the map.
        k_diff: how many latents are edited in each direction.
        alpha: edit strength, in units of the token's largest activation M_t.
        edit: "ablate", "augment" or "both".
        sign_guard: drop selected latents whose score has the other sign; the literal rule keeps them.
        edit_positions: "from_last_prompt" edits the last prompt token and every generated one, "generated" only these,
            "all" every prompt token that is counted as well.

    Raises:
        InvalidInputError: for an option out of range.
        MismatchError: for an SAE other than those the map was collected with.
    """

    conditional_map: ConditionalDifferenceMap
    input_sae: SparseAutoencoder
    output_sae: SparseAutoencoder
    _: KW_ONLY
    k_prompt: int = 32
    k_diff: int = 16
    alpha: float = 0.2
    edit: EditKind = "ablate"
    sign_guard: bool = False
    edit_positions: EditPositions = "from_last_prompt"

    def __post_init__(self) -> None:
        run = self.conditional_map.run
        check_lookup_options(self.conditional_map.matrix, self.k_prompt, self.k_diff, self.edit)
        if not 0 <= self.alpha < float("inf"):
            raise InvalidInputError(f"alpha is {self.alpha}; expected a number >= 0 (edit says in which direction)")
        if self.edit_positions not in get_args(EditPositions):
            known = ", ".join(get_args(EditPositions))
            raise InvalidInputError(f"edit_positions is {self.edit_positions!r}; expected one of {known}")
        if self.input_layer > self.output_layer:
            raise InvalidInputError(
                f"input_layer {self.input_layer} comes after output_layer {self.output_layer}; the prompt must be read "
                "before it is edited"
            )
        for which, sae, width, fingerprint in (
            ("input", self.input_sae, run.d_sae_in, run.input_sae),
            ("output", self.output_sae, run.d_sae_out, run.output_sae),
        ):
            if sae.d_sae != width:
                raise MismatchError(f"the {which} SAE has {sae.d_sae} latents; expected {width} as in the map")
            if sae.encoder_only().fingerprint() != fingerprint:
                raise MismatchError(f"the {which} SAE is not the one the map was collected with; pass that one")
        if self.output_sae.W_dec is None:
            raise InvalidInputError("the output SAE has no decoder, so no edit can be decoded; pass the whole SAE")
        if self.output_sae.decoder_rows is not None:
            missing = int((self.output_sae.decoder_rows.cpu()[self.selectable_latents()] < 0).sum())
            if missing:
                raise MismatchError(
                    f"k_diff = {self.k_diff} may select {missing} latents whose decoder rows were not saved; "
                    "build the policy again from the whole SAE"
                )

    @property
    def model(self) -> ModelFingerprint:
        return self.conditional_map.run.model

    @property
    def input_layer(self) -> int:
        return self.conditional_map.run.input_layer

    @property
    def output_layer(self) -> int:
        return self.conditional_map.run.output_layer

    @property
    def uncounted_token_ids(self) -> tuple[int, ...]:
        return self.conditional_map.run.uncounted_token_ids

    def __repr__(self) -> str:
        options = ", ".join(f"{name}={getattr(self, name)!r}" for name in OPTIONS)
        return (
            f"SteeringPolicy({self.model.model_type}, layers {self.input_layer} -> {self.output_layer}, "
            f"SAEs {self.input_sae.d_sae} -> {self.output_sae.d_sae}, {options})"
        )

    def _repr_html_(self) -> str:
        """For notebooks: a table of the options."""
        return html_table(
            {
                "model": self.model.model_type,
                "layers": f"{self.input_layer} → {self.output_layer}",
                "latents": f"{self.input_sae.d_sae} → {self.output_sae.d_sae}",
                **{name: getattr(self, name) for name in OPTIONS},
            }
        )

    def select(self, density: Tensor) -> EditList:
        """Which latents to edit for prompts of the given densities (method, section 3).

        Args:
            density: `[B, d_sae_in]` floating point.

        Raises:
            InvalidInputError: if the shape does not fit.
        """
        matrix = self.conditional_map.matrix.to(density.device)
        return lookup(density, matrix, self.k_prompt, self.k_diff, self.edit, sign_guard=self.sign_guard)

    def selectable_latents(self) -> Tensor:
        """Output latents that some prompt can select, int64, ascending: those in the map, and, since latents with a
        score of 0 are selected in index order when a prompt leaves room, the first k_diff of the others."""
        touched = torch.zeros(self.output_sae.d_sae, dtype=torch.bool)
        touched[self.conditional_map.matrix.columns.long().cpu()] = True
        untouched = (~touched).nonzero().flatten()[: self.k_diff]
        return torch.cat([touched.nonzero().flatten(), untouched]).sort().values

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the policy to a folder that needs nothing else: `policy.safetensors` and `config.json`.

        Of the input SAE its encoder is kept, of the output SAE the encoder and the decoder rows some prompt can select.

        Raises:
            DspaError: if it cannot be written.
        """
        config = {
            **{name: getattr(self, name) for name in OPTIONS},
            "conditional_map": self.conditional_map.config(),
            "input_sae": _sae_config(self.input_sae),
            "output_sae": _sae_config(self.output_sae),
        }
        parts = {
            "conditional_map": self.conditional_map.tensors(),
            "input_sae": self.input_sae.encoder_only().tensors(),
            "output_sae": self.output_sae.with_decoder_rows(self.selectable_latents()).tensors(),
        }
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        return write_tensor_folder(folder, KIND, FORMAT_VERSION, config, tensors)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        summary: SteeringSummary | None = None,
        private: bool | None = None,
        token: str | None = None,
        commit_message: str = "Upload steering policy",
    ) -> str:
        """Uploads the policy's folder, with a model card written from its configuration, to a hub repository, which is
        made if it is not there.

        Args:
            repo_id: `user/name`.
            summary: what the policy edited on prompts of one's own (`Steering.summary`), for the card's audit.
            private: whether a new repository is private; None leaves it to the account.
            token: a hub token; None takes the one of `hf auth login`.
            commit_message: of the upload.

        Returns:
            The address of the commit.

        Raises:
            DspaError: if it cannot be written, or the hub refuses it.
        """
        from tempfile import TemporaryDirectory

        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        from dspa.methods.model_card import model_card

        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            write_atomically(Path(folder) / "README.md", model_card(self, repo_id, summary).encode())
            api = HfApi(token=token)
            try:
                api.create_repo(repo_id, private=private, exist_ok=True)
                commit = api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=commit_message)
            except (HfHubHTTPError, HFValidationError, OSError) as error:
                reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
                raise DspaError(f"the policy cannot be uploaded to {repo_id}: {reason}") from error
        return commit.commit_url

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> SteeringPolicy:
        """Reads a policy from a folder, or from the hub if there is no such folder.

        Args:
            source: a folder that `save_pretrained` wrote, or a hub repository's id.
            options: fields to change, such as `alpha=0.1`.

        Raises:
            InvalidInputError: if there is no policy, or an option is unknown or out of range.
            CorruptFileError: if a file is truncated, altered, or holds values out of bounds.
            MismatchError: if an option needs decoder rows that were not saved.
        """
        config, tensors = read_tensor_folder(_local_folder(source), KIND, FORMAT_VERSION)
        unknown = sorted(set(options) - set(OPTIONS))
        if unknown:
            raise InvalidInputError(f"option {unknown[0]!r} is not known; expected one of {', '.join(OPTIONS)}")
        parts: dict[str, dict[str, Tensor]] = {"conditional_map": {}, "input_sae": {}, "output_sae": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            parts.setdefault(part, {})[name] = tensor
        try:
            saved = _saved_options(config)
            conditional_map = ConditionalDifferenceMap.from_tensors(
                config["conditional_map"], parts["conditional_map"], str(source)
            )
            input_sae = _sae_of(config["input_sae"], parts["input_sae"])
            output_sae = _sae_of(config["output_sae"], parts["output_sae"])
            if output_sae.W_dec is None:
                raise ValueError("output_sae.W_dec is missing")
        except (KeyError, TypeError, ValueError, UnsupportedSaeError) as error:
            raise CorruptFileError(f"{source} does not hold a whole policy ({error}); make it again") from error
        return cls(conditional_map, input_sae, output_sae, **{**saved, **options})


SEMANTICS = ("activation", "k", "subtract_b_dec", "normalization")  # of an SAE, beside its tensors
OPTIONS = ("k_prompt", "k_diff", "alpha", "edit", "sign_guard", "edit_positions")


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
    input_sae: None = None

    def __post_init__(self) -> None:
        listed = self.edits.latents[self.edits.valid()].long()
        if listed.numel() and not 0 <= int(listed.min()) <= int(listed.max()) < self.output_sae.d_sae:
            raise InvalidInputError(
                f"edit lists name latents {int(listed.min())} to {int(listed.max())}; "
                f"expected 0 to {self.output_sae.d_sae - 1}"
            )
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
        """The prompt-blind counterpart of a policy: the extremes of the mean of D, as many as the policy edits."""
        mean = policy.conditional_map.mean_difference
        highest = mean.sort(descending=True, stable=True).indices[: policy.k_diff].tolist()
        lowest = mean.sort(stable=True).indices[: policy.k_diff].tolist()
        augment = highest if policy.edit != "ablate" else []
        ablate = lowest if policy.edit != "augment" else []
        in_both = set(augment) & set(ablate)  # their edits would cancel, as in `lookup`
        lists = [[latent for latent in side if latent not in in_both] for side in (augment, ablate)]
        return cls.with_edits(policy, EditList.from_lists([lists[0]], [lists[1]]))

    def __repr__(self) -> str:
        return (
            f"StaticPolicy({self.edits.batch} lists of up to {self.edits.k} latents, {self.model.model_type}, "
            f"layer {self.output_layer}, alpha={self.alpha}, edit_positions={self.edit_positions!r})"
        )

    @property
    def input_layer(self) -> int:
        return self.output_layer

    def select(self, density: Tensor) -> EditList:
        """The lists, for as many rows as `density` has; its values are not read.

        Raises:
            InvalidInputError: if there are neither as many lists nor one.
        """
        batch = density.shape[0]
        if self.edits.batch not in (1, batch):
            raise InvalidInputError(f"there are {self.edits.batch} edit lists for {batch} rows; expected 1 or {batch}")
        return self.edits.rows(torch.arange(batch) % self.edits.batch).to(density.device)


def html_table(fields: dict[str, Any]) -> str:
    """Names and values, side by side."""
    rows = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in fields.items()
    )
    return f"<table>{''.join(rows)}</table>"


def _saved_options(config: dict[str, Any]) -> dict[str, Any]:
    """The options in a saved configuration, each of the type of its default."""
    for name in OPTIONS:
        expected = (int, float) if name == "alpha" else (type(getattr(SteeringPolicy, name)),)
        if type(config[name]) not in expected:
            raise TypeError(f"{name} is {config[name]!r}; expected {expected[-1].__name__}")
    return {name: config[name] for name in OPTIONS}


def _sae_config(sae: SparseAutoencoder) -> dict[str, Any]:
    return {**{name: getattr(sae, name) for name in SEMANTICS}, "metadata": asdict(sae.metadata)}


def _sae_of(config: dict[str, Any], tensors: dict[str, Tensor]) -> SparseAutoencoder:
    semantics: dict[str, Any] = {name: config[name] for name in SEMANTICS}
    arguments: dict[str, Any] = {**semantics, "metadata": SaeMetadata(**config["metadata"]), **tensors}
    sae = SparseAutoencoder(**arguments)
    if not sae.d_sae:
        raise ValueError("an SAE has no latents")
    for name, tensor in sae.tensors().items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ValueError(f"SAE tensor {name} holds NaN or Inf")
    if sae.decoder_rows is not None and sae.W_dec is not None:
        lowest, highest = int(sae.decoder_rows.min()), int(sae.decoder_rows.max())
        if lowest < -1 or highest >= sae.W_dec.shape[0]:
            raise ValueError(f"decoder rows run from {lowest} to {highest}; there are {sae.W_dec.shape[0]}")
    return sae


def _local_folder(source: str | Path) -> Path:
    """The folder itself, or a snapshot of the hub repository of that name."""
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(str(source), allow_patterns=[CONFIG, f"{KIND}.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InvalidInputError(f"no policy at {source}: no such folder, and the hub says: {reason}") from error
