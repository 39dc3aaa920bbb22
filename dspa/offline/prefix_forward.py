"""The forward pass of the offline part: each prompt once for both of its responses, no layer and no token beyond what
the densities need, hidden states handed out as they pass.

The prompt's keys and values are kept in a transformers cache and both responses go on from it. Of the output layer
the prompt only needs keys and values, which the responses attend to; its attention and its MLP are not run there.
The rows of a call are aligned on the left and padded on the right (see `batching`), so causal attention, with sliding
windows or without, keeps all padding out of sight of every token that counts.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from dspa.offline.batching import BatchLimits, Group, Row, chunks
from dspa.offline.preferences import PreferenceTriple
from dspa.transformers_model import DecoderStack, device_of, hidden_of

Part = Literal["prompt", "chosen", "rejected"]


@dataclass(frozen=True, eq=False)
class HiddenSegments:
    """Residual-stream vectors of counted tokens that just passed their layer.

    Attributes:
        part: what they belong to: "prompt" is read after the input layer, the others after the output layer.
        triples: `[S]` indices in the shard; segment s belongs to `triples[s]`.
        offsets: `[S + 1]` int64; segment s is rows `offsets[s]` to `offsets[s + 1]`.
        hidden: `[offsets[S], d_model]`.
    """

    part: Part
    triples: tuple[int, ...]
    offsets: Tensor
    hidden: Tensor


@dataclass(frozen=True)
class SharedPrefixForward:
    """Runs groups of triples through the decoder layers.

    Attributes:
        stack: the decoder.
        config: the language model's configuration, which decides what its cache keeps.
        input_layer, output_layer: decoder layers from 0 after which prompts and responses are read.
        uncounted_token_ids: prompt tokens that are not handed out.
        pad_token_id: any id below the vocabulary's size.
    """

    stack: DecoderStack
    config: Any
    input_layer: int
    output_layer: int
    uncounted_token_ids: frozenset[int]
    pad_token_id: int = 0

    @property
    def shares(self) -> bool:
        """Whether a prompt's cache can be continued twice: keys and values can, a recurrent state that is updated in
        place cannot."""
        return all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in self._cache().layers)

    def _cache(self) -> _StoppingCache:
        return _StoppingCache(self.config)

    def segments(
        self, triples: Sequence[PreferenceTriple], group: Group, limits: BatchLimits
    ) -> Iterator[HiddenSegments]:
        """The hidden states of a group's counted tokens, chunk by chunk.

        Args:
            triples: the shard's.
            group: indices of those to run, and how.
            limits: how many tokens of a row run at once.
        """
        cache = self._cache()
        if group.shared:
            yield from self._shared_part(triples, group, cache, limits)
        position = {triple: row for row, triple in enumerate(group.triples)}
        for rows in group.continuations:
            branch = cache.branch([position[row.triple] for row in rows]) if group.shared else self._cache()
            yield from self._continuation(triples, group, rows, branch, limits)

    def _shared_part(
        self, triples: Sequence[PreferenceTriple], group: Group, cache: _StoppingCache, limits: BatchLimits
    ) -> Iterator[HiddenSegments]:
        ids = torch.tensor([triples[t].prompt[: group.shared] for t in group.triples])
        counted = self._countable(ids)
        if self.input_layer < self.output_layer:
            cache.stop_layer = self.output_layer
        through = max(self.input_layer, self.output_layer)
        for span in chunks(group.shared, limits.chunk):
            columns = slice(span.start, span.stop)
            hidden = self._run(ids[:, columns], cache, through)[self.input_layer]
            yield from _segments("prompt", group.triples, hidden, counted[:, columns])
        cache.stop_layer = None

    def _continuation(
        self,
        triples: Sequence[PreferenceTriple],
        group: Group,
        rows: Sequence[Row],
        cache: _StoppingCache,
        limits: BatchLimits,
    ) -> Iterator[HiddenSegments]:
        width = max(row.length for row in rows)
        ids = torch.full((len(rows), width), self.pad_token_id)
        marked: dict[Part, Tensor] = {part: torch.zeros(ids.shape, dtype=torch.bool) for part in get_args(Part)}
        for r, row in enumerate(rows):
            triple = triples[row.triple]
            rest = triple.prompt[group.shared :]
            response, counted = (
                (triple.chosen, triple.chosen_counted)
                if row.response == "chosen"
                else (triple.rejected, triple.rejected_counted)
            )
            ids[r, : row.length] = torch.tensor(rest + response)
            marked[row.response][r, len(rest) : len(rest) + counted] = True
            if row.response == "chosen":  # the prompt's states are the same in both rows; they count once
                marked["prompt"][r, : len(rest)] = self._countable(ids[r, : len(rest)])
        owners = tuple(row.triple for row in rows)
        through = max(self.input_layer, self.output_layer) if bool(marked["prompt"].any()) else self.output_layer
        for span in chunks(width, limits.chunk):
            columns = slice(span.start, span.stop)
            caught = self._run(ids[:, columns], cache, through)
            for part, mask in marked.items():
                if bool(mask[:, columns].any()):
                    layer = self.input_layer if part == "prompt" else self.output_layer
                    yield from _segments(part, owners, caught[layer], mask[:, columns])

    def _countable(self, ids: Tensor) -> Tensor:
        return ~torch.isin(ids, torch.tensor(sorted(self.uncounted_token_ids), dtype=torch.int64))

    def _run(self, ids: Tensor, cache: _StoppingCache, through: int) -> dict[int, Tensor]:
        """Runs `[B, T]` token ids after what the cache holds, up to the layer `through` or to the cache's stop.

        Returns:
            `[B, T, d_model]` after the input layer and after the output layer, as far as they were run.
        """
        caught: dict[int, Tensor] = {}

        def catch(layer: int):
            def hook(module: nn.Module, args: object, output: Tensor | tuple[Tensor, ...]) -> None:
                caught[layer] = hidden_of(output)
                if layer == through:
                    raise _EnoughSeenError

            return hook

        watched = sorted({self.input_layer, self.output_layer, through})
        handles = [self.stack.layers[layer].register_forward_hook(catch(layer)) for layer in watched]
        device = device_of(self.stack.module)
        try:
            self.stack.module(input_ids=ids.to(device), past_key_values=cache, use_cache=True)
        except _EnoughSeenError:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return caught


class _EnoughSeenError(Exception):
    """Leaves the forward pass: nothing that comes after is used."""


class _StoppingCache(DynamicCache):
    """A cache that leaves the forward pass once the layer `stop_layer` has stored its keys and values."""

    def __init__(self, config: Any) -> None:
        super().__init__(config=config)
        self.stop_layer: int | None = None

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        result = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if layer_idx == self.stop_layer:
            raise _EnoughSeenError
        return result

    def branch(self, rows: Sequence[int]) -> _StoppingCache:
        """A cache that begins with some rows of this one, which stays as it is."""
        branch = copy.copy(self)
        branch.layers = [copy.copy(layer) for layer in self.layers]  # updates put new tensors in place of theirs
        branch.batch_select_indices(torch.tensor(rows))
        return branch


def _segments(part: Part, owners: Sequence[int], hidden: Tensor, counted: Tensor) -> Iterator[HiddenSegments]:
    """The marked tokens `[B, T]` of `[B, T, d_model]`, one segment per row that has some."""
    lengths = counted.sum(dim=1)
    kept = [row for row, length in enumerate(lengths.tolist()) if length]
    if not kept:
        return
    offsets = torch.zeros(len(kept) + 1, dtype=torch.int64)
    offsets[1:] = lengths[kept].cumsum(dim=0)
    index = counted.flatten().nonzero().flatten()
    rows = hidden.flatten(0, 1).index_select(0, index.to(hidden.device))
    yield HiddenSegments(part, tuple(owners[row] for row in kept), offsets, rows)
