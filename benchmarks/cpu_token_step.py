"""The ways to edit a token on the CPU, sae-lens' own among them."""

from __future__ import annotations

from dataclasses import replace

import torch
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from torch import nn

from dspa.bench.cases import NEEDS_MAXIMUM, Case
from dspa.bench.eager import as_delta, with_error_term
from dspa.bench.operations import in_dtype, name_of, our_ways, read_way
from dspa.bench.timing import Way

BASELINE = "sae-lens with error term"


def cpu_ways(case: Case, saes: list[JumpReLUSAE], *, compiled: bool) -> list[Way]:
    """sae-lens as it is used, as a delta and, if wanted, compiled, in the dtype of each of its SAEs; the bare reading
    of the encoder; and every mode of ours."""
    latents = case.lists[NEEDS_MAXIMUM].latents.long()
    ways = [read_way(case.sae.W_enc)]
    for sae in saes:
        ways += sae_lens_ways(sae, case, latents, compiled=compiled)
    return [*ways, *our_ways(case)]


def sae_lens_ways(sae: JumpReLUSAE, case: Case, latents: torch.Tensor, *, compiled: bool) -> list[Way]:
    hidden, suffix = case.hidden.to(sae.dtype), named_dtype(case, sae.dtype)
    ways = [
        Way(BASELINE + suffix, lambda: with_error_term(sae, hidden, latents)),
        Way(f"sae-lens as a delta{suffix}", lambda: as_delta(sae, hidden, latents)),
    ]
    if compiled:
        run = torch.compile(as_delta, dynamic=False)
        ways.append(Way(f"torch.compile of the delta{suffix}", lambda: run(sae, hidden, latents)))
    return ways


def named_dtype(case: Case, dtype: torch.dtype) -> str:
    """What tells a way in another dtype than the case's from one in its own."""
    return "" if dtype == case.shape.dtype else f", {name_of(dtype)}"


def in_other_dtype(case: Case, dtype: torch.dtype) -> Case:
    """The same case with weights of another dtype."""
    if dtype == case.shape.dtype:
        return case
    other = case.on(case.backend)
    other.shape, other.sae = replace(case.shape, dtype=dtype), in_dtype(case.sae, dtype)
    return other


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
