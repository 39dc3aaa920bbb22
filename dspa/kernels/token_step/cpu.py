"""`token_step` in C++ (`csrc/cpu/token_step.cpp`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dspa.kernels.backends.registry import StepMode
from dspa.kernels.native import encoder_arguments
from dspa.kernels.types import EditList, TokenStats
from dspa.sae.weights import SaeWeights

LEADERS = 16  # reading this many rows costs a thousandth of a pass over a 16k encoder
DEFAULT_MODE: StepMode = "screened"  # the measured winner at every shape, see benchmarks/
WIDEST_CODED_MODEL = 16384


@dataclass(frozen=True, eq=False)
class Codes:
    """`W_enc` in 8 bits per weight, with which `screened` rules rows out (`csrc/cpu/codes.h`).

    Attributes:
        values: `[d_sae, d_model rounded up]` int8.
        factors: `[3, d_sae]` float32: each row's scale, the norm of its error, the norm of its codes times scale.
    """

    values: Tensor
    factors: Tensor

    @classmethod
    def quantized(cls, W_enc: Tensor) -> Codes:
        d_sae, d_model = W_enc.shape
        codes = cls(torch.empty(d_sae, -(-d_model // 32) * 32, dtype=torch.int8), torch.empty(3, d_sae))
        torch.ops.dspa.encode_rows(W_enc, codes.values, codes.factors)
        return codes


@dataclass(frozen=True, eq=False)
class StepScratch:
    """What `token_step` keeps from one token to the next for one SAE. It changes how fast a result is found, never the
    result.

    Attributes:
        leaders: int32, latents that were the maximum before, the latest first; -1 where there is none yet.
        counters: int64, see `StepWork`.
    """

    leaders: Tensor = field(default_factory=lambda: torch.full((LEADERS,), -1, dtype=torch.int32))
    counters: Tensor = field(default_factory=lambda: torch.zeros(7, dtype=torch.int64))


@dataclass(frozen=True)
class StepWork:
    """What the steps of one SAE cost so far.

    Attributes:
        tokens: tokens that came by, enabled and finite.
        active: of those, with an active latent in their list.
        passes: of those, for which a pass over the encoder was begun.
        maximum_needed: of those, whose edit depends on the value of M_t.
        encoder_bytes: bytes of `W_enc`, or of its low-precision copy, that were read.
        screened_rows: pairs of token and latent that were screened.
        rescored_rows: of those, computed exactly after all.
    """

    tokens: int
    active: int
    passes: int
    maximum_needed: int
    encoder_bytes: int
    screened_rows: int
    rescored_rows: int


_scratch: WeakKeyDictionary[SaeWeights, StepScratch] = WeakKeyDictionary()
_codes: WeakKeyDictionary[SaeWeights, Codes | None] = WeakKeyDictionary()


def scratch_of(sae: SaeWeights) -> StepScratch:
    """The scratch that lives as long as this SAE."""
    scratch = _scratch.get(sae)
    if scratch is None:
        scratch = _scratch[sae] = StepScratch()
    return scratch


def codes_of(sae: SaeWeights) -> Codes | None:
    """The codes of this SAE, made when first asked for outside a compiled graph; None where there are none yet, or
    where they would prove nothing. `W_enc` must not be written afterwards."""
    if sae not in _codes and not torch.compiler.is_compiling():
        _codes[sae] = Codes.quantized(sae.W_enc) if _can_be_screened(sae) else None
    return _codes.get(sae)


def _can_be_screened(sae: SaeWeights) -> bool:
    """Bounds of a product bound the score only if scores rise with products; wider rows would overflow 32 bits."""
    factors = [factor for factor in (sae.decoder_norm, sae.magnitude_scale) if factor is not None]
    return sae.d_model <= WIDEST_CODED_MODEL and all(bool((factor >= 0).all()) for factor in factors)


def work_of(sae: SaeWeights) -> StepWork:
    """What the CPU steps through this SAE cost since it was made."""
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
    codes = codes_of(sae) if mode == "screened" else None
    torch.ops.dspa.token_step(
        hidden,
        *encoder_arguments(sae),
        sae.W_dec,
        sae.decoder_rows,
        edits.latents.contiguous(),
        edits.signs.contiguous(),
        edits.counts.contiguous(),
        0.0 if isinstance(alpha, Tensor) else alpha,
        alpha.float().contiguous() if isinstance(alpha, Tensor) else None,
        None if enabled is None else enabled.bool().contiguous(),
        *((None,) * 7 if stats is None else counters_of(stats)),
        scratch.leaders,
        None if codes is None else codes.values,
        None if codes is None else codes.factors,
        scratch.counters,
        mode,
    )


def counters_of(stats: TokenStats) -> tuple[Tensor, ...]:
    """The counters in the order of the operation's schema."""
    return (
        stats.seen,
        stats.edited,
        stats.nonfinite,
        stats.maximum,
        stats.maximum_sum,
        stats.maximum_known,
        stats.latent_edits,
    )
