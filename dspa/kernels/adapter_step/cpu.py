"""`adapter_step` in C++ (`csrc/cpu/adapter_step.cpp`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dspa.kernels.adapter_step.arguments import adapter_arguments, row_arguments
from dspa.kernels.adapter_weights import AdapterWeights
from dspa.kernels.backends.interface import AdapterMode
from dspa.kernels.native import encoder_arguments
from dspa.kernels.quantized_rows import WIDEST_QUANTIZED_MODEL, QuantizedRows, quantize_rows
from dspa.kernels.types import TokenStats
from dspa.sae.weights import SaeWeights

DEFAULT_MODE: AdapterMode = "screened"


@dataclass(eq=False)
class AdapterState:
    """What is kept of an adapter from one step to the next. It affects the speed of a step, not the result.

    Attributes:
        quantized: the codes of the adapter's weight, once a step has screened by them.
        version: of the weight when it was quantized, see `_version`.
        counters: int64, see `AdapterWork`.
    """

    quantized: QuantizedRows | None = None
    version: int | None = None
    counters: Tensor = field(default_factory=lambda: torch.zeros(6, dtype=torch.int64))


@dataclass(frozen=True)
class AdapterWork:
    """The cost of the steps of one adapter so far.

    Attributes:
        tokens: tokens processed, enabled and with finite input.
        fired: latents that fired, summed over those tokens.
        fell: of those, latents with `v < 0` whose activation the clip needed: as many rows of `W_enc` were read.
        weight_bytes: bytes of the adapter's weight, or of its low-precision copy, that were read.
        screened_pairs: pairs of token and latent that were screened.
        rescored_pairs: of those, computed exactly as well.
    """

    tokens: int
    fired: int
    fell: int
    weight_bytes: int
    screened_pairs: int
    rescored_pairs: int


_states: WeakKeyDictionary[AdapterWeights, AdapterState] = WeakKeyDictionary()


def state_of(adapter: AdapterWeights) -> AdapterState:
    """The state of this adapter, kept as long as the adapter."""
    state = _states.get(adapter)
    if state is None:
        state = _states[adapter] = AdapterState()
    return state


def quantized_weight_of(adapter: AdapterWeights) -> QuantizedRows | None:
    """The codes of the adapter's weight, made at its first step outside a compiled graph and again whenever torch has
    written the weight; None where there are none, or rows are too wide for them."""
    state = state_of(adapter)
    if torch.compiler.is_compiling() or adapter.d_model > WIDEST_QUANTIZED_MODEL:
        return state.quantized
    version = _version(adapter.weight)
    if state.quantized is None or state.version != version:
        state.quantized, state.version = quantize_rows(adapter.weight.detach()), version
    return state.quantized


def _version(weight: Tensor) -> int | None:
    """Rises with every write to a tensor in place; an inference tensor has no such count, and is not trained."""
    return None if weight.is_inference() else weight._version  # pyright: ignore[reportAttributeAccessIssue]


def work_of(adapter: AdapterWeights) -> AdapterWork:
    """The cost of all CPU steps of this adapter."""
    return AdapterWork(*state_of(adapter).counters.tolist())


def adapter_step(
    hidden: Tensor,
    sae: SaeWeights,
    adapter: AdapterWeights,
    enabled: Tensor | None,
    stats: TokenStats | None,
    steering_fraction: float | None,
    mode: AdapterMode | None,
) -> None:
    """See `dspa.kernels.adapter_step`."""
    assert steering_fraction is None  # the backend's entry in the table refuses it
    quantized = quantized_weight_of(adapter) if (mode or DEFAULT_MODE) == "screened" else None
    torch.ops.dspa.adapter_step(
        hidden,
        *encoder_arguments(sae),
        sae.W_dec,
        sae.decoder_rows,
        *adapter_arguments(adapter),
        *row_arguments(enabled, stats),
        None if quantized is None else quantized.values,
        None if quantized is None else quantized.factors,
        state_of(adapter).counters,
    )
