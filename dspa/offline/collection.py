"""Activation densities of preference triples: the offline part that runs the model (method, section 2)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import Tensor, nn

from dspa.errors import InvalidInputError, MismatchError
from dspa.kernels import encode_density
from dspa.offline.batching import BatchLimits, TripleLengths, plan_groups
from dspa.offline.density_store import CollectionRun, DensityShard, DensityStore, SparseCounts
from dspa.offline.distributed import fill_store
from dspa.offline.preferences import PreferenceTriple, PreferenceTriples
from dspa.offline.prefix_forward import HiddenSegments, Part, SharedPrefixForward
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.transformers_model import (
    ModelFingerprint,
    check_sae_fits,
    decoder_stack,
    device_of,
    is_steered,
    text_config,
)

if TYPE_CHECKING:
    import sae_lens
    from transformers import PreTrainedTokenizerBase


def collect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    triples: PreferenceTriples | Sequence[PreferenceTriple],
    *,
    input_sae: SparseAutoencoder | sae_lens.SAE[Any],
    output_sae: SparseAutoencoder | sae_lens.SAE[Any],
    input_layer: int | None = None,
    output_layer: int | None = None,
    out: str | Path,
    triples_per_batch: int = 64,
    tokens_per_batch: int = 16384,
    triples_per_shard: int = 64,
    progress: bool = False,
) -> DensityStore:
    """Runs the model over prompt + chosen and prompt + rejected and keeps how often each latent was active.

    The densities go to shards in `out`. A run that was killed is resumed by the same call, with the same bytes, and so
    does a run of several processes (`torchrun`, `accelerate launch`) on one shared folder, each with the same
    number of threads: they divide the shards among them. A prompt runs once for both responses, and layers past
    `output_layer` are not run. Tokens on which the hidden state is not finite activate nothing; they are counted in the
    store and warned about once.

    Args:
        model: a transformers language model; its weights and mode are left as they were.
        tokenizer: the model's tokenizer; only its padding id is read, and None will do.
        triples: what `load_preferences` returned, or a list of triples from it.
        input_sae: an SAE, also as a live object of sae-lens, on the residual stream after `input_layer`; it encodes
            prompts.
        output_sae: an SAE on the residual stream after `output_layer`; it encodes responses.
        input_layer: a decoder layer, from 0; by default the one the SAE was trained on.
        output_layer: likewise for the output SAE.
        out: folder of the shards, made if it is not there.
        triples_per_batch: most triples run at once, two sequences each.
        tokens_per_batch: most tokens in their keys and values, padding included; a longer triple runs alone.
        triples_per_shard: triples per file.
        progress: whether to draw a progress bar.

    Raises:
        InvalidInputError: if there are no triples, or one is longer than the model's context.
        MismatchError: if an SAE does not fit its layer, or `out` holds another run's densities.
        DspaError: if a shard cannot be written; finished shards stay usable.
    """
    triples = PreferenceTriples.from_any(triples)
    input_sae = SparseAutoencoder.from_any(input_sae, "input")
    output_sae = SparseAutoencoder.from_any(output_sae, "output")
    fingerprint = ModelFingerprint.from_model(model)
    if is_steered(model):
        raise InvalidInputError("the model is steered, and its densities would be those of the edits; remove() first")
    input_layer = layer_of(input_sae, "input", input_layer)
    output_layer = layer_of(output_sae, "output", output_layer)
    check_sae_fits(input_sae, "input", input_layer, fingerprint)
    check_sae_fits(output_sae, "output", output_layer, fingerprint)
    _check_lengths(model, triples)
    run = CollectionRun(
        model=fingerprint,
        input_layer=input_layer,
        output_layer=output_layer,
        input_sae=input_sae.encoder_only().fingerprint(),
        output_sae=output_sae.encoder_only().fingerprint(),
        d_sae_in=input_sae.d_sae,
        d_sae_out=output_sae.d_sae,
        triples=triples.fingerprint(),
        triple_count=len(triples),
        triples_per_shard=triples_per_shard,
        triples_per_batch=triples_per_batch,
        count_bos=triples.count_bos,
        count_template=triples.count_template,
        count_eos=triples.count_eos,
        uncounted_token_ids=triples.uncounted_token_ids,
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        model_weights=weights_fingerprint(decoder_stack(model).module),
        tokens_per_batch=tokens_per_batch,
    )
    stack = decoder_stack(model)
    reader = _DensityReader(
        SharedPrefixForward(
            stack,
            text_config(model),
            input_layer,
            output_layer,
            frozenset(triples.uncounted_token_ids),
            getattr(tokenizer, "pad_token_id", None) or 0,
        ),
        input_sae.to(device_of(stack.layers[input_layer])),
        output_sae.to(device_of(stack.layers[output_layer])),
        BatchLimits(triples_per_batch, tokens_per_batch),
    )

    def read(index: int) -> tuple[DensityShard, int]:
        start = index * triples_per_shard
        return reader.read(triples.triples[start : start + triples_per_shard])

    with _evaluating(model), torch.no_grad():
        store = fill_store(out, run, read, progress=progress)
    if store.nonfinite_tokens:
        warnings.warn(
            f"the hidden states of {store.nonfinite_tokens} tokens held NaN or Inf; they count as activating no latent",
            stacklevel=2,
        )
    return store


def weights_fingerprint(module: nn.Module) -> str:
    """SHA-256 over names, shapes and some thousand evenly spaced values of every parameter: tells a fine-tuned model
    from the one it was tuned from, without reading all of it."""
    digest = hashlib.sha256()
    for name, parameter in module.named_parameters():
        values = parameter.detach().flatten()
        sample = values[:: max(1, len(values) // 4096)].contiguous().cpu()
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        digest.update(sample.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def layer_of(sae: SparseAutoencoder, which: str, layer: int | None) -> int:
    """The decoder layer an SAE reads: the one passed, or the one its metadata names.

    Raises:
        InvalidInputError: if neither says.
        MismatchError: if the two disagree.
    """
    known = sae.metadata.layer
    if layer is None and known is None:
        raise InvalidInputError(f"the {which} SAE's metadata names no layer; pass {which}_layer")
    if layer is not None and known is not None and layer != known:
        raise MismatchError(f"{which}_layer is {layer}, but the {which} SAE was trained on layer {known}; use {known}")
    return known if layer is None else layer  # type: ignore[return-value]


@dataclass(frozen=True)
class _DensityReader:
    """Runs the triples of a shard and counts active latents as the hidden states pass."""

    forward: SharedPrefixForward
    input_sae: SparseAutoencoder
    output_sae: SparseAutoencoder
    limits: BatchLimits

    def read(self, triples: Sequence[PreferenceTriple]) -> tuple[DensityShard, int]:
        """The counts of a shard's triples, and how many counted tokens held NaN or Inf."""
        lengths = [TripleLengths(len(t.prompt), len(t.chosen), len(t.rejected)) for t in triples]
        rows: dict[Part, dict[int, SparseCounts]] = {part: {} for part in get_args(Part)}
        nonfinite = 0
        shares = self.forward.shares
        limits = self.limits if shares else replace(self.limits, chunk=max(n.total for n in lengths))
        for group in plan_groups(lengths, limits, shares):
            counters = {part: _Counter.zeros(group.triples, self._sae(part)) for part in get_args(Part)}
            for segments in self.forward.segments(triples, group, limits):
                counters[segments.part].add(segments)
            for part, counter in counters.items():
                rows[part].update(counter.by_triple())
                nonfinite += int(counter.nonfinite)
        parts = [SparseCounts.concatenate([rows[part][t] for t in range(len(triples))]) for part in get_args(Part)]
        return DensityShard(*parts), nonfinite

    def _sae(self, part: Part) -> SparseAutoencoder:
        return self.input_sae if part == "prompt" else self.output_sae


@dataclass(frozen=True, eq=False)
class _Counter:
    """Running counts of one part of a group's triples.

    Attributes:
        rows: where each triple's counts are.
        counts: `[B, d_sae]` int32, on the SAE's device.
        tokens: `[B]` int64, tokens counted.
        nonfinite: int64, of these, tokens whose hidden state held NaN or Inf.
    """

    sae: SparseAutoencoder
    rows: dict[int, int]
    counts: Tensor
    tokens: Tensor
    nonfinite: Tensor

    @classmethod
    def zeros(cls, triples: Sequence[int], sae: SparseAutoencoder) -> _Counter:
        return cls(
            sae,
            {triple: row for row, triple in enumerate(triples)},
            torch.zeros(len(triples), sae.d_sae, dtype=torch.int32, device=sae.device),
            torch.zeros(len(triples), dtype=torch.int64),
            torch.zeros((), dtype=torch.int64, device=sae.device),
        )

    def add(self, segments: HiddenSegments) -> None:
        device = self.sae.device
        index = torch.tensor([self.rows[triple] for triple in segments.triples])
        hidden = segments.hidden.to(device)
        self.counts.index_add_(0, index.to(device), encode_density(hidden, segments.offsets.to(device), self.sae))
        self.tokens.index_add_(0, index, segments.offsets.diff())
        self.nonfinite.add_((~hidden.isfinite().all(dim=-1)).sum())

    def by_triple(self) -> dict[int, SparseCounts]:
        counts = self.counts.cpu()
        return {
            triple: SparseCounts.from_dense(counts[row : row + 1], self.tokens[row : row + 1])
            for triple, row in self.rows.items()
        }


def _check_lengths(model: nn.Module, triples: PreferenceTriples) -> None:
    context = getattr(text_config(model), "max_position_embeddings", None)
    for triple in triples:
        length = len(triple.prompt) + max(len(triple.chosen), len(triple.rejected))
        if context is not None and length > context:
            raise InvalidInputError(
                f"{triple.source} is {length} tokens long, the model's context is {context}; "
                "shorten it, or load the triples with max_length and skip_bad"
            )


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; every module's own mode is put back."""
    training = [module for module in model.modules() if module.training]
    try:
        model.eval()
        yield
    finally:
        for module in training:
            module.training = True
