"""A steering policy: the map, both SAEs and the options, as one thing that selects edits for a prompt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from dspa.errors import CorruptFileError, InvalidInputError, MismatchError, UnsupportedSaeError
from dspa.kernels import EditKind, EditList
from dspa.methods import policy_edits
from dspa.methods.conditional_map import ConditionalDifferenceMap, FitOptions, MapConfig
from dspa.methods.hub import local_folder, upload_folder
from dspa.methods.latent_lists import LatentLists
from dspa.methods.model_card import (
    EditCounts,
    audit_of_counts,
    audit_of_map,
    counted_tokens,
    describe_sae,
    model_card,
    write_card,
)
from dspa.methods.policy import EditPositions, PromptObservation, check_edit_positions
from dspa.methods.saved_sae import SaeConfig, sae_config, sae_from_config
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.transformers_model import ModelFingerprint
from dspa.util.files import TensorFolder
from dspa.util.html_table import html_table
from dspa.util.scalars import LARGEST_FLOAT32, check_number, check_switch

if TYPE_CHECKING:
    from dspa.methods.explanation import PolicyExplanation

EDITABLE, FACTORS = "editable", "factors"  # the tensors of that name in the folder
OPTIONS = ("k_prompt", "k_diff", "alpha", "edit", "sign_guard", "edit_positions")


@dataclass(frozen=True, eq=False, repr=False)
class SteeringPolicy:
    """DSPA's policy (method, sections 3 and 4).

    Attributes:
        conditional_map: the map A, with the collection it comes from (model, layers, counting rules).
        input_sae, output_sae: the SAEs it was collected with.
        k_prompt: how many of a prompt's densest latents choose rows of the map. A map fitted by `ridge` has a
            number of its own.
        k_diff: how many latents are edited in each direction.
        alpha: edit strength, in units of the token's largest activation M_t.
        edit: "ablate", "augment" or "both".
        sign_guard: drop selected latents whose score has the other sign; the literal rule keeps them.
        edit_positions: "from_last_prompt" edits the last prompt token and every generated one, "generated" only these,
            "all" every prompt token that is counted as well.
        editable: `[d_sae_out]` bool on the CPU, the output latents that may be edited; None for all. A selected latent
            that may not is left out of the list, and no other takes its place.
        factors: `[d_sae_out]` float32 on the CPU, for the record: what the decoder rows of `output_sae` were multiplied
            by; see `scaled`. None where all are 1.
        changes: what was done to the policy since it was fitted, a line each; see `without`, `only`, `scaled`,
            `with_options` and `dspa.merge`.

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
    editable: Tensor | None = None
    factors: Tensor | None = None
    changes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, which in (("input_sae", "input"), ("output_sae", "output")):
            object.__setattr__(self, name, SparseAutoencoder.from_any(getattr(self, name), which))
        run = self.conditional_map.run
        self.conditional_map.check_lookup(self.k_prompt, self.k_diff, self.edit)
        check_number("alpha", self.alpha, 0, LARGEST_FLOAT32, " (edit says in which direction)")
        check_switch("sign_guard", self.sign_guard)
        check_edit_positions(self.edit_positions)
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
        if self.editable is not None and (
            self.editable.dtype != torch.bool or tuple(self.editable.shape) != (self.output_sae.d_sae,)
        ):
            raise InvalidInputError(
                f"editable is {tuple(self.editable.shape)} {self.editable.dtype}; expected [{self.output_sae.d_sae}] "
                "bool, one for each output latent"
            )
        if self.factors is not None and not _are_factors(self.factors, self.output_sae.d_sae):
            raise InvalidInputError(
                f"factors are {tuple(self.factors.shape)} {self.factors.dtype}; expected [{self.output_sae.d_sae}] "
                "float32, one for each output latent, finite and at least 0"
            )
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
    def observation(self) -> PromptObservation:
        return PromptObservation(self.input_layer, self.input_sae)

    @property
    def intervention(self) -> LatentLists:
        return LatentLists(self.output_layer, self.output_sae, self.alpha, self._longest_list)

    @property
    def _longest_list(self) -> int:
        longest = (2 if self.edit == "both" else 1) * self.k_diff
        return longest if self.editable is None else min(longest, int(self.editable.sum()))

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
        edits = self.conditional_map.select(density, self.k_prompt, self.k_diff, self.edit, sign_guard=self.sign_guard)
        if self.editable is None:
            return edits
        return edits.where(self.editable.to(density.device)[edits.latents.long()], self._longest_list)

    def without(self, latents: Iterable[int]) -> SteeringPolicy:
        """The policy that edits everything it edits now but these output latents: their places in the lists stay empty,
        so that nothing else is edited instead.

        Raises:
            InvalidInputError: for a latent out of range, or none.
        """
        editable, change = policy_edits.without_latents(self.editable, self.output_sae.d_sae, latents)
        return replace(self, editable=editable, changes=(*self.changes, change))

    def only(self, latents: Iterable[int]) -> SteeringPolicy:
        """The policy that, of everything it edits now, edits these output latents alone.

        Raises:
            InvalidInputError: for a latent out of range, or none.
        """
        editable, change = policy_edits.only_latents(self.editable, self.output_sae.d_sae, latents)
        return replace(self, editable=editable, changes=(*self.changes, change))

    def scaled(self, factors: Mapping[int, float]) -> SteeringPolicy:
        """The policy in which what an edit of these output latents adds to the residual stream is multiplied.

        For an augmented latent that is the edit with `factor * alpha`. Of an ablated one, `factor` times what the
        ablation removes is removed. The factor is folded into the latent's decoder row, in the dtype of the SAE.

        Args:
            factors: by output latent, at least 0.

        Raises:
            InvalidInputError: for a latent or a factor out of range, or none.
        """
        output_sae, multiplied, change = policy_edits.scaled_decoder(self.output_sae, self.factors, factors)
        return replace(self, output_sae=output_sae, factors=multiplied, changes=(*self.changes, change))

    def with_options(self, **options: Any) -> SteeringPolicy:
        """The policy with other options, such as `alpha=0.1` or `k_diff=8`.

        Raises:
            InvalidInputError: for an option that is unknown or out of range.
            MismatchError: if an option needs decoder rows that were not saved.
        """
        _check_options(options)
        differing = {name: value for name, value in options.items() if getattr(self, name) != value}
        lines = tuple(f"{name} {getattr(self, name)} -> {value}" for name, value in differing.items())
        return replace(self, **options, changes=(*self.changes, *lines))

    def explain(
        self,
        prompt: str | Sequence[int] | Tensor,
        model: nn.Module,
        tokenizer: Any = None,
        *,
        chat: bool = True,
    ) -> PolicyExplanation:
        """Which prompt latents fire on a prompt and how densely, which rows of the map they pick, and which latents
        will be edited and why: a table for terminals and notebooks.

        Args:
            prompt: a text, or the token ids of one prompt as they are.
            model: the model the policy was made for, not steered at the moment.
            tokenizer: its tokenizer, for a text.
            chat: whether a text is a user's turn of a conversation, if the tokenizer has a chat template, as in
                `dspa generate`.

        Raises:
            InvalidInputError: if the model is steered, or a text comes without a tokenizer.
            MismatchError: if the policy was made for another model.
        """
        from dspa.methods.explanation import explain_prompt

        return explain_prompt(self, model, prompt, tokenizer, chat)

    @property
    def merged(self) -> bool:
        """Whether `dspa.merge` made it, so that its map comes from several fits."""
        return any(change.startswith(policy_edits.MERGED) for change in self.changes)

    def selectable_latents(self) -> Tensor:
        """Output latents that some prompt can select, int64, ascending: those in the map, and, since latents with a
        score of 0 are selected in index order when a prompt leaves room, the first k_diff of the others."""
        touched = torch.zeros(self.output_sae.d_sae, dtype=torch.bool)
        touched[self.conditional_map.matrix.columns.long().cpu()] = True
        untouched = (~touched).nonzero().flatten()[: self.k_diff]
        found = torch.cat([touched.nonzero().flatten(), untouched]).sort().values
        return found if self.editable is None else found[self.editable[found]]

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the policy to a folder that needs nothing else: its tensors and `config.json`.

        Of the input SAE its encoder is kept, of the output SAE the encoder and the decoder rows some prompt can select.
        `README.md` is the card for people; one that this package has not written stays as it is.

        Raises:
            DspaError: if it cannot be written.
        """
        config = {
            **{name: getattr(self, name) for name in OPTIONS},
            "alpha": float(self.alpha),
            "conditional_map": self.conditional_map.config(),
            "input_sae": sae_config(self.input_sae),
            "output_sae": sae_config(self.output_sae),
            **({"changes": list(self.changes)} if self.changes else {}),
        }
        parts = {
            "conditional_map": self.conditional_map.tensors(),
            "input_sae": self.input_sae.encoder_only().tensors(),
            "output_sae": self.output_sae.with_decoder_rows(self.selectable_latents()).tensors(),
        }
        tensors = {f"{part}.{name}": tensor for part, named in parts.items() for name, tensor in named.items()}
        if self.editable is not None:
            tensors[EDITABLE] = self.editable.to(torch.uint8)
        if self.factors is not None:
            tensors[FACTORS] = self.factors
        saved = FOLDER.write(folder, config, tensors)
        write_card(saved, self.model_card("path/of/this/policy"))
        return saved

    def push_to_hub(
        self,
        repo_id: str,
        *,
        summary: EditCounts | None = None,
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
            counts: what it edited on prompts of one's own (`Steering.summary`); without, the card says how often the
                map names a latent.
        """
        run, fit, model = self.conditional_map.run, self.conditional_map.options, self.model
        page = self.output_sae.metadata.neuronpedia_page
        matrix = self.conditional_map.matrix
        of_parts = "of each part" if self.merged else None
        return model_card(
            repo_id,
            {
                "model": f"{model.model_type}, {model.num_hidden_layers} layers, width {model.hidden_size}",
                "input SAE": f"after layer {self.input_layer}: {describe_sae(self.input_sae)}",
                "output SAE": f"after layer {self.output_layer}: {describe_sae(self.output_sae)}",
                "k_prompt, k_diff": f"{self.k_prompt}, {self.k_diff}",
                "alpha": self.alpha,
                "edit": self.edit,
                "sign_guard": self.sign_guard,
                "edit_positions": self.edit_positions,
                "gate_percentile, gate_rule": of_parts or f"{fit.gate_percentile}, {fit.gate_rule}",
                "sparsify": of_parts or fit.sparsify,
                "estimator": _estimator_of(fit),
                "map entries": matrix.nonzeros,
                "preference triples": run.triple_count,
                "counted tokens": counted_tokens(run.count_bos, run.count_template, run.count_eos),
                **({"changed since it was fitted": policy_edits.shortened(self.changes)} if self.changes else {}),
            },
            audit_of_map(matrix, page, self.editable, self.factors)
            if counts is None
            else audit_of_counts(counts, page),
        )

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> SteeringPolicy:
        """Reads a policy from a folder, or from the hub if there is no such folder.

        Args:
            source: a folder that `save_pretrained` wrote, or a hub repository's id.
            options: fields to change, such as `alpha=0.1`, as `with_options` does.

        Raises:
            InvalidInputError: if there is no policy, or an option is unknown or out of range.
            CorruptFileError: if a file is truncated, altered, or holds values out of bounds.
            MismatchError: if an option needs decoder rows that were not saved.
        """
        config, tensors = FOLDER.read(local_folder(source, FOLDER.patterns))
        _check_options(options)
        editable = _editable_from(tensors.pop(EDITABLE, None), str(source))
        factors = tensors.pop(FACTORS, None)
        parts: dict[str, dict[str, Tensor]] = {"conditional_map": {}, "input_sae": {}, "output_sae": {}}
        for key, tensor in tensors.items():
            part, _, name = key.partition(".")
            if part not in parts:
                raise CorruptFileError(f"{source} holds a tensor {key!r} that is no part of a policy; make it again")
            parts[part][name] = tensor
        try:
            saved = {name: getattr(config, name) for name in OPTIONS}
            conditional_map = ConditionalDifferenceMap.from_tensors(
                config.conditional_map, parts["conditional_map"], str(source)
            )
            input_sae = sae_from_config(config.input_sae, parts["input_sae"])
            output_sae = sae_from_config(config.output_sae, parts["output_sae"])
            if output_sae.W_dec is None:
                raise ValueError("output_sae.W_dec is missing")
            if editable is not None and len(editable) != output_sae.d_sae:
                raise ValueError(f"{EDITABLE} is for {len(editable)} latents; expected {output_sae.d_sae}")
        except (TypeError, ValueError, UnsupportedSaeError) as error:
            raise CorruptFileError(f"{source} does not hold a whole policy ({error}); make it again") from error
        if factors is not None and not _are_factors(factors, output_sae.d_sae):
            raise CorruptFileError(f"{source}: {FACTORS} are not {output_sae.d_sae} finite factors; make it again")
        more: dict[str, Any] = {"editable": editable, "factors": factors, "changes": config.changes}
        return cls(conditional_map, input_sae, output_sae, **saved, **more).with_options(**options)


def _check_options(options: Mapping[str, object]) -> None:
    unknown = sorted(set(options) - set(OPTIONS))
    if unknown:
        raise InvalidInputError(f"option {unknown[0]!r} is not known; expected one of {', '.join(OPTIONS)}")


def _editable_from(stored: Tensor | None, source: str) -> Tensor | None:
    if stored is not None and (stored.dtype != torch.uint8 or stored.ndim != 1 or bool((stored > 1).any())):
        raise CorruptFileError(f"{source}: {EDITABLE} is not a row of zeros and ones; make the policy again")
    return None if stored is None else stored.bool()


def _estimator_of(fit: FitOptions) -> str:
    if fit.estimator != "ridge":
        return fit.estimator
    penalty = "" if fit.penalty == 1 else f", penalty {policy_edits.written(fit.penalty)}"
    return f"ridge, {fit.features} features{penalty}"


def _are_factors(factors: Tensor, d_sae: int) -> bool:
    if factors.dtype != torch.float32 or tuple(factors.shape) != (d_sae,):
        return False
    return bool((factors.isfinite() & (factors >= 0)).all())


def check_policy_names(edit: str, edit_positions: str) -> None:
    """Raises InvalidInputError for an edit or for positions that no policy knows."""
    if edit not in get_args(EditKind):
        raise InvalidInputError(f"edit is {edit!r}; expected one of {', '.join(get_args(EditKind))}")
    check_edit_positions(edit_positions)


@dataclass(frozen=True)
class _Config:
    """`config.json`."""

    k_prompt: int
    k_diff: int
    alpha: float
    edit: EditKind
    sign_guard: bool
    edit_positions: EditPositions
    conditional_map: MapConfig
    input_sae: SaeConfig
    output_sae: SaeConfig
    changes: tuple[str, ...] = ()


FOLDER = TensorFolder("policy", 2, _Config, version_without_checksum=1)
