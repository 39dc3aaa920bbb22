"""A decode step of a model of Gemma-2-2B's shape, steered and not, in one `generate` after the other."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch
from conftest import Record
from interleaved import time_column
from random_model import random_model
from transformers import StoppingCriteria, StoppingCriteriaList

import dspa
from dspa.bench_records import Column, Interval
from dspa.kernels import EditList, available
from dspa.kernels.token_step.cpu import work_of
from dspa.policy import ModelFingerprint, StaticPolicy
from dspa.sae import SparseAutoencoder

D_SAE = 16384
OUTPUT_LAYER = 24
PROMPT_TOKENS = 32
NEW_TOKENS = 9
ROUNDS = int(os.environ.get("DSPA_BENCH_DECODE_ROUNDS", "8"))

pytestmark = pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}")


class Stopwatch(StoppingCriteria):
    """The time after each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool)


def test_decode_step(record: Record) -> None:
    model = random_model("gemma-2-2b", torch.bfloat16)
    policy = worst_case_policy(model)
    prompt = torch.arange(2, 2 + PROMPT_TOKENS)[None]

    def generate() -> list[float]:
        """Milliseconds of each step but the first, which reads the prompt."""
        watch = Stopwatch()
        model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            min_new_tokens=NEW_TOKENS,
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([watch]),
        )
        return [(later - earlier) * 1e3 for earlier, later in zip(watch.times, watch.times[1:], strict=False)]

    def steered() -> list[float]:
        with dspa.steer(model, policy):
            return generate()

    def measure() -> tuple[Column, ...]:
        generate()
        steered()
        samples: dict[str, list[float]] = {"unsteered": [], "steered, default mode": []}
        before = work_of(policy.output_sae)
        for _ in range(ROUNDS):
            samples["unsteered"] += generate()
            samples["steered, default mode"] += steered()
        after = work_of(policy.output_sae)
        times = [time_column(name, values, samples["unsteered"]) for name, values in samples.items()]
        slower = times[1].relative
        assert slower is not None
        ratio = Interval(1 / slower.value, 1 / slower.high, 1 / slower.low)
        needed = (after.maximum_needed - before.maximum_needed) / (after.tokens - before.tokens)
        return (
            *times,
            Column("tokens/s, steered / unsteered", "", ratio, better="higher", rounds=len(samples["unsteered"])),
            Column("tokens that needed M_t", "", Interval.exactly(needed)),
        )

    def check() -> None:
        """The last prompt token and every generated one that went through the model was edited."""
        with dspa.steer(model, policy) as steering:
            generate()
        assert steering.summary().tokens_edited == steering.summary().tokens_seen == NEW_TOKENS

    name = "Gemma-2-2B's shape, bfloat16, 16k SAE, batch 1"
    record(name, "decode step, CPU", measure, check=check, reference="unsteered")


def worst_case_policy(model: Any) -> StaticPolicy:
    """Sixteen latents to ablate of an SAE half of whose latents are active: nearly every token needs M_t."""
    d_model = model.config.hidden_size
    rng = torch.Generator().manual_seed(1)
    size, scale = (D_SAE, d_model), d_model**-0.5
    sae = SparseAutoencoder(
        W_enc=torch.empty(size, dtype=torch.bfloat16).normal_(generator=rng).mul_(scale),
        W_dec=torch.empty(size, dtype=torch.bfloat16).normal_(generator=rng).mul_(scale),
        b_enc=torch.zeros(D_SAE),
        threshold=torch.zeros(D_SAE),
        activation="jumprelu",
        b_dec=torch.zeros(d_model),
    )
    return StaticPolicy(
        EditList.of([[]], [list(range(16))]),
        model=ModelFingerprint.of(model),
        output_layer=OUTPUT_LAYER,
        output_sae=sae,
    )
