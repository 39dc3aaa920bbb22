"""The ways to edit a token on the CPU, sae-lens' own among them."""

from __future__ import annotations

import torch
from interleaved import Way
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from token_step_case import NEEDS_MAXIMUM, Case, as_delta, with_error_term
from torch import nn

from dspa.kernels import StepMode
from dspa.kernels.token_step.cpu import scratch_of, work_of

BASELINE = "sae-lens with error term"
OURS: tuple[tuple[str, StepMode, str], ...] = (
    ("dense", "dense", NEEDS_MAXIMUM),
    ("lazy, none active", "lazy", "none active"),
    ("lazy, all certainly zero", "lazy", "all certainly zero"),
    ("lazy, needs M_t", "lazy", NEEDS_MAXIMUM),
    ("screened", "screened", NEEDS_MAXIMUM),
)


def cpu_ways(case: Case) -> list[Way]:
    """sae-lens as it is used, as a delta and compiled, the bare reading of the encoder, and every mode of ours."""
    sae, hidden, latents = sae_lens_of(case), case.hidden, case.lists[NEEDS_MAXIMUM].latents.long()
    compiled = torch.compile(as_delta, dynamic=False)
    return [
        Way("read W_enc", lambda: torch.ops.dspa.stream_read(case.sae.W_enc), case.sae.W_enc.nbytes),
        Way(BASELINE, lambda: with_error_term(sae, hidden, latents)),
        Way("sae-lens as a delta", lambda: as_delta(sae, hidden, latents)),
        Way("torch.compile of the delta", lambda: compiled(sae, hidden, latents)),
        *(
            Way(name, lambda lists=lists, mode=mode: case.step(lists, mode), _bytes_read(case, lists, mode))
            for name, mode, lists in OURS
        ),
    ]


def sae_lens_of(case: Case) -> JumpReLUSAE:
    """sae-lens' SAE with the same weights, the encoder in its own layout."""
    config = JumpReLUSAEConfig(
        d_in=case.shape.d_model,
        d_sae=case.shape.d_sae,
        dtype=str(case.shape.dtype).removeprefix("torch."),
        device="meta",
        apply_b_dec_to_input=False,
    )
    sae = JumpReLUSAE(config)
    assert case.sae.W_dec is not None
    weights = {
        "W_enc": case.sae.W_enc.T.contiguous(),
        "W_dec": case.sae.W_dec,
        "b_enc": case.sae.b_enc.to(case.shape.dtype),
        "b_dec": torch.zeros(case.shape.d_model, dtype=case.shape.dtype),
        "threshold": case.sae.threshold.to(case.shape.dtype),
    }
    for name, value in weights.items():
        setattr(sae, name, nn.Parameter(value, requires_grad=False))
    return sae


def _bytes_read(case: Case, lists: str, mode: StepMode) -> int:
    """Counted in the kernel, in the steady state: what one step reads of the encoder or its codes."""
    case.step(lists, mode)
    scratch_of(case.sae).counters.zero_()
    case.step(lists, mode)
    return work_of(case.sae).encoder_bytes
