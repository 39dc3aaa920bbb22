"""Activation densities of preference triples: the offline part that runs the model (method, section 2)."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from dspa.density_store import CollectionRun, DensityShard, DensityStore, SparseCounts
from dspa.errors import InvalidInputError, MismatchError
from dspa.kernels import encode_density
from dspa.model_structure import (
    DecoderStack,
    ModelFingerprint,
    check_sae_fits,
    decoder_stack,
    device_of,
    hidden_of,
    text_config,
)
from dspa.preferences import PreferenceTriple, PreferenceTriples
from dspa.progress import track
from dspa.sae import SparseAutoencoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def collect(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase | None,
    triples: PreferenceTriples,
    *,
    input_sae: SparseAutoencoder,
    output_sae: SparseAutoencoder,
    input_layer: int | None = None,
    output_layer: int | None = None,
    out: str | Path,
    triples_per_batch: int = 8,
    triples_per_shard: int = 64,
    progress: bool = False,
) -> DensityStore:
    """Runs the model over prompt + chosen and prompt + rejected and keeps how often each latent was active.

    The densities go to shards in `out`. A run that was killed is resumed by the same call and gives the same bytes.
    Layers past `output_layer` are not run. Tokens on which the hidden state is not finite activate nothing; they are
    counted in the store and warned about once.

    Args:
        model: a transformers language model; its weights and mode are left as they were.
        tokenizer: the model's tokenizer; only its padding id is read, and None will do.
        triples: what `load_preferences` gave.
        input_sae, output_sae: SAEs on the residual stream after `input_layer` and `output_layer`.
        input_layer, output_layer: decoder layers from 0; by default the layers the SAEs were trained on.
        out: folder of the shards, made if it is not there.
        triples_per_batch: triples run at once, two sequences each.
        triples_per_shard: triples per file.
        progress: whether to draw a progress bar.

    Raises:
        InvalidInputError: if there are no triples, or one is longer than the model's context.
        MismatchError: if an SAE does not fit its layer, or `out` holds another run's densities.
        DspaError: if a shard cannot be written; finished shards stay usable.
    """
    fingerprint = ModelFingerprint.of(model)
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
    )
    store = DensityStore.create_or_resume(out, run).without_damaged()
    reader = _DensityReader(
        decoder_stack(model),
        input_sae.to(device_of(decoder_stack(model).layers[input_layer])),
        output_sae.to(device_of(decoder_stack(model).layers[output_layer])),
        input_layer,
        output_layer,
        torch.tensor(sorted(triples.uncounted_token_ids), dtype=torch.int64),
        getattr(tokenizer, "pad_token_id", None) or 0,
    )
    starts = range(len(store.shards) * triples_per_shard, len(triples), triples_per_shard)
    with _evaluating(model), torch.no_grad():
        for start in track(starts, "Collecting densities", enabled=progress, unit="shards"):
            part = triples.triples[start : start + triples_per_shard]
            batches = [part[i : i + triples_per_batch] for i in range(0, len(part), triples_per_batch)]
            shards, nonfinite = zip(*[reader.read(batch) for batch in batches], strict=True)
            store = store.append(
                DensityShard(
                    SparseCounts.concatenate([shard.prompt for shard in shards]),
                    SparseCounts.concatenate([shard.chosen for shard in shards]),
                    SparseCounts.concatenate([shard.rejected for shard in shards]),
                ),
                sum(nonfinite),
            )
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
    """The decoder layer an SAE reads: the one asked for, or the one its metadata names.

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
    """Runs batches of triples through the decoder layers and counts active latents."""

    stack: DecoderStack
    input_sae: SparseAutoencoder
    output_sae: SparseAutoencoder
    input_layer: int
    output_layer: int
    uncounted_token_ids: Tensor
    pad_token_id: int

    def read(self, triples: Sequence[PreferenceTriple]) -> tuple[DensityShard, int]:
        """The counts of some triples, and how many counted tokens held NaN or Inf."""
        sequences = [t.prompt + t.chosen for t in triples] + [t.prompt + t.rejected for t in triples]
        length = max(map(len, sequences))
        ids = torch.full((len(sequences), length), self.pad_token_id)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        hidden_in, hidden_out = self._hidden_states(ids)

        column = torch.arange(length)
        prompt_end = torch.tensor([len(t.prompt) for t in triples])[:, None]
        chosen_end = prompt_end + torch.tensor([t.chosen_counted for t in triples])[:, None]
        rejected_end = prompt_end + torch.tensor([t.rejected_counted for t in triples])[:, None]
        first, second = slice(len(triples)), slice(len(triples), None)
        # The prompt is a causal prefix of both sequences: its states are read from the first.
        counted = ~torch.isin(ids[first], self.uncounted_token_ids) & (column < prompt_end)
        responses = [(column >= prompt_end) & (column < end) for end in (chosen_end, rejected_end)]
        parts = [
            _count(hidden_in[first], counted, self.input_sae),
            _count(hidden_out[first], responses[0], self.output_sae),
            _count(hidden_out[second], responses[1], self.output_sae),
        ]
        return DensityShard(*[counts for counts, _ in parts]), sum(nonfinite for _, nonfinite in parts)

    def _hidden_states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """`[B, T, d_model]` after the input layer and after the output layer.

        No mask is needed: attention is causal, so that nothing counted sees the padding, which is on the right.
        """
        caught: dict[int, Tensor] = {}

        def catch(layer: int):
            def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
                caught[layer] = hidden_of(output)
                if len(caught) == len({self.input_layer, self.output_layer}):
                    raise _EnoughSeenError

            return hook

        layers = {self.input_layer, self.output_layer}
        handles = [self.stack.layers[layer].register_forward_hook(catch(layer)) for layer in layers]
        device = device_of(self.stack.module)
        try:
            self.stack.module(input_ids=ids.to(device), use_cache=False)
        except _EnoughSeenError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return caught[self.input_layer], caught[self.output_layer]


class _EnoughSeenError(Exception):
    """Leaves the forward pass: nothing past the later of the two layers is used."""


def _count(hidden: Tensor, counted: Tensor, sae: SparseAutoencoder) -> tuple[SparseCounts, int]:
    """Counts of the marked tokens of each row of `[B, T, d_model]`, and how many of these tokens are not finite."""
    tokens = counted.sum(dim=1)
    offsets = torch.zeros(len(tokens) + 1, dtype=torch.int64)
    offsets[1:] = tokens.cumsum(dim=0)
    rows = hidden[counted.to(hidden.device)]
    counts = encode_density(rows, offsets.to(hidden.device), sae)
    return SparseCounts.of(counts, tokens), int((~rows.isfinite().all(dim=-1)).sum())


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
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
