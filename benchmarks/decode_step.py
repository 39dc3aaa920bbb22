"""Times of the steps of a `generate` call, and a policy that costs as much as one can."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from dspa.kernels import EditList
from dspa.methods.static_policy import StaticPolicy
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.transformers_model import ModelFingerprint

LISTED = 16


class Stopwatch(StoppingCriteria):
    """The time after each token, everything waited for."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def step_milliseconds(model: Any, prompt: torch.Tensor, new_tokens: int, **options: Any) -> list[float]:
    """Greedy generation of so many tokens; the first, which reads the prompt, is left out."""
    watch = Stopwatch()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([watch]),
        **options,
    )
    return [(later - earlier) * 1e3 for earlier, later in zip(watch.times, watch.times[1:], strict=False)]


def worst_case_policy(model: Any, layer: int, d_sae: int, device: str = "cpu") -> StaticPolicy:
    """Latents to ablate of a random SAE half of whose latents are active: nearly every token needs M_t."""
    d_model = model.config.hidden_size
    rng = torch.Generator(device).manual_seed(1)
    W_enc, W_dec = (
        torch.empty(d_sae, d_model, dtype=torch.bfloat16, device=device).normal_(generator=rng).mul_(d_model**-0.5)
        for _ in range(2)
    )
    zeros = torch.zeros(d_sae, device=device)
    sae = SparseAutoencoder(W_enc=W_enc, W_dec=W_dec, b_enc=zeros, threshold=zeros, activation="jumprelu")
    return StaticPolicy(
        EditList.from_lists([[]], [list(range(LISTED))], device),
        model=ModelFingerprint.from_model(model),
        output_layer=layer,
        output_sae=sae,
    )
