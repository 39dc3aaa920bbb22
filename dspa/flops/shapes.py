"""The sizes of a decoder and of its SAEs, from which FLOPs and bytes follow. Pure arithmetic: no tensor, no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dspa.errors import InvalidInputError

AttentionPairs = Literal["square", "causal"]


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that its FLOPs follow from.

    Attributes:
        name: what to call it.
        parameters: P, all of them; tied ones once.
        d_model: width of the residual stream.
        block_weights: per block, the elements of its weight matrices.
        qkv_weights: of these, the query, key and value projections.
        head_weights: elements of the matrix that computes the logits.
        query_width: heads times head_dim.
        key_width: key-value heads times head_dim.
        windows: per block, how many keys a query sees; None for all.
    """

    name: str
    parameters: int
    d_model: int
    block_weights: tuple[int, ...]
    qkv_weights: int
    head_weights: int
    query_width: int
    key_width: int
    windows: tuple[int | None, ...]

    @property
    def layers(self) -> int:
        return len(self.block_weights)

    @property
    def matrix_weights(self) -> int:
        """Elements of all matrices a token is multiplied with; an embedding that is only looked up is none."""
        return sum(self.block_weights) + self.head_weights

    def weights_through(self, layer: int) -> int:
        """P': the matrix elements of blocks 0 to `layer`."""
        return sum(self.block_weights[: layer + 1])

    def attention(self, queries: int, past: int, layers: range, pairs: AttentionPairs) -> float:
        """Attention FLOPs of one row in some layers.

        Args:
            queries: tokens of the call.
            past: tokens before them whose keys are in a cache.
            layers: which blocks.
            pairs: "square": every query with every key of the call, as an implementation with a mask computes and
                as `torch.utils.flop_counter` counts; "causal": only pairs that the mask leaves.
        """
        return float(sum(4 * self.query_width * _pairs(queries, past, self.windows[layer], pairs) for layer in layers))


def _pairs(queries: int, past: int, window: int | None, pairs: AttentionPairs) -> int:
    if pairs == "square":
        kept = past if window is None else min(past, window - 1)
        return queries * (kept + queries)
    if window is None:
        return queries * past + queries * (queries + 1) // 2
    return sum(min(past + query + 1, window) for query in range(queries))


@dataclass(frozen=True)
class SteeringShape:
    """Where the SAEs read and how wide they are.

    Raises:
        InvalidInputError: if a layer is not the model's.
    """

    input_layer: int
    output_layer: int
    d_sae_in: int = 16384
    d_sae_out: int = 16384

    def check(self, shape: ModelShape) -> SteeringShape:
        for which, layer in (("input", self.input_layer), ("output", self.output_layer)):
            if not 0 <= layer < shape.layers:
                raise InvalidInputError(f"{which} layer is {layer}; {shape.name} has layers 0 to {shape.layers - 1}")
        if self.input_layer > self.output_layer:
            raise InvalidInputError(f"input layer {self.input_layer} comes after output layer {self.output_layer}")
        return self
