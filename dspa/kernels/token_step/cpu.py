"""`token_step` in C++ (`csrc/cpu/token_step.cpp`)."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dspa.kernels.backends.interface import BoundStep, StepMode
from dspa.kernels.native import encoder_arguments
from dspa.kernels.operands import Versions, refusal_of_the_library, refusals_of_the_library, versions_of
from dspa.kernels.quantized_rows import WIDEST_QUANTIZED_MODEL, QuantizedRows, quantize_rows, scores_never_fall
from dspa.kernels.token_step.arguments import (
    NO_COUNTERS,
    are_passed_as_they_are,
    counter_arguments,
    strength_arguments,
)
from dspa.kernels.types import EditList, TokenStats
from dspa.sae.weights import SaeWeights

RECENT = 16  # reading this many rows costs a thousandth of a pass over a 16k encoder
DEFAULT_MODE: StepMode = "screened"  # the fastest at every measured shape, see benchmarks/


@dataclass(frozen=True, eq=False)
class StepScratch:
    """The state of `token_step` from one token to the next, for one SAE. It affects the speed of a step, not the
    result.

    Attributes:
        recent_argmax: int32, latents that were the argmax of earlier tokens, the most recent first; -1 where empty.
        counters: int64, see `StepWork`.
    """

    recent_argmax: Tensor = field(default_factory=lambda: torch.full((RECENT,), -1, dtype=torch.int32))
    counters: Tensor = field(default_factory=lambda: torch.zeros(7, dtype=torch.int64))


@dataclass(frozen=True)
class StepWork:
    """The cost of the steps of one SAE so far.

    Attributes:
        tokens: tokens processed, enabled and finite.
        active: of those, with an active latent in their list.
        passes: of those, for which a pass over the encoder was begun.
        maximum_needed: of those, whose edit depends on the value of M_t.
        encoder_bytes: bytes of `W_enc`, or of its low-precision copy, that were read.
        screened_pairs: pairs of token and latent that were screened.
        rescored_pairs: of those, computed exactly as well.
    """

    tokens: int
    active: int
    passes: int
    maximum_needed: int
    encoder_bytes: int
    screened_pairs: int
    rescored_pairs: int


_scratch: WeakKeyDictionary[SaeWeights, StepScratch] = WeakKeyDictionary()
_quantized: WeakKeyDictionary[SaeWeights, tuple[Versions, QuantizedRows | None]] = WeakKeyDictionary()


def scratch_of(sae: SaeWeights) -> StepScratch:
    """The scratch of this SAE, kept as long as the SAE."""
    scratch = _scratch.get(sae)
    if scratch is None:
        scratch = _scratch[sae] = StepScratch()
    return scratch


def quantized_encoder_of(sae: SaeWeights) -> QuantizedRows | None:
    """The quantized encoder of this SAE, made at its first step outside a compiled graph, and again when the weights
    were written in place since; None where there is none yet, where it would prove nothing, and for weights of
    inference mode, which do not tell that they were written."""
    if torch.compiler.is_compiling():
        return None if sae not in _quantized else _quantized[sae][1]
    versions = versions_of(*quantized_from(sae))
    if versions is None:
        return None
    known = _quantized.get(sae)
    if known is None or known[0] != versions:
        known = _quantized[sae] = (versions, quantize_rows(sae.W_enc) if _can_be_screened(sae) else None)
    return known[1]


def quantized_from(sae: SaeWeights) -> tuple[Tensor, ...]:
    """The tensors that a quantized encoder, and whether there is one, depends on."""
    return (sae.W_enc, *(factor for factor in (sae.decoder_norm, sae.magnitude_scale) if factor is not None))


def _can_be_screened(sae: SaeWeights) -> bool:
    """Wider rows would overflow 32 bits."""
    return sae.d_model <= WIDEST_QUANTIZED_MODEL and scores_never_fall(sae)


def work_of(sae: SaeWeights) -> StepWork:
    """The cost of all CPU steps of this SAE."""
    return StepWork(*scratch_of(sae).counters.tolist())


def token_step(
    hidden: Tensor,
    sae: SaeWeights,
    edits: EditList,
    alpha: float | Tensor,
    enabled: Tensor | None,
    stats: TokenStats | None,
    mode: StepMode | None,
) -> None:
    """See `dspa.kernels.token_step`."""
    scratch, mode = scratch_of(sae), mode or DEFAULT_MODE
    quantized = quantized_encoder_of(sae) if mode == "screened" else None
    with refusals_of_the_library():
        torch.ops.dspa.token_step(
            hidden,
            *encoder_arguments(sae),
            sae.W_dec,
            sae.decoder_rows,
            edits.latents.contiguous(),
            edits.signs.contiguous(),
            edits.counts.contiguous(),
            *strength_arguments(alpha, enabled, stats),
            scratch.recent_argmax,
            None if quantized is None else quantized.values,
            None if quantized is None else quantized.factors,
            scratch.counters,
            mode,
        )


def bind_step(
    hidden: Tensor, sae: SaeWeights, edits: EditList, alpha: float | Tensor, mode: StepMode | None
) -> BoundStep | None:
    """See `dspa.kernels.backends.interface.BindStep`. The library looks at all tensors at every call; only the
    quantized encoder can be out of date."""
    sources, mode = quantized_from(sae), mode or DEFAULT_MODE
    if not are_passed_as_they_are(edits, alpha) or any(tensor.is_inference() for tensor in sources):
        return None
    written, address = operator.attrgetter("_version"), Tensor.data_ptr
    versions = [*map(written, sources), *map(address, sources)]
    scratch = scratch_of(sae)
    quantized = quantized_encoder_of(sae) if mode == "screened" else None
    lists = (edits.latents, edits.signs, edits.counts)
    before = (*encoder_arguments(sae), sae.W_dec, sae.decoder_rows, *lists, *strength_arguments(alpha, None, None)[:2])
    codes = (None, None) if quantized is None else (quantized.values, quantized.factors)
    after = (scratch.recent_argmax, *codes, scratch.counters, mode)
    operation = torch.ops.dspa.token_step.default

    def bound(hidden: Tensor, enabled: Tensor | None, stats: TokenStats | None) -> bool:
        if [*map(written, sources), *map(address, sources)] != versions:
            return False
        on = None if enabled is None else enabled.contiguous()
        counters = NO_COUNTERS if stats is None else counter_arguments(stats)
        try:
            operation(hidden, *before, on, *counters, *after)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError) as error:
            raise refusal_of_the_library(error) from error
        return True

    return bound
