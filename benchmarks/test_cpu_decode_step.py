"""A decode step of a model of Gemma-2-2B's shape, steered and not, in one `generate` after the other."""

from __future__ import annotations

import os

import pytest
import torch
from interleaved import time_column
from random_model import model_dtype, random_model
from record import Record

import dspa
from dspa.bench.generation import step_milliseconds, worst_case_policy
from dspa.bench.measurements import Column, Interval
from dspa.bench.operations import name_of
from dspa.kernels import available
from dspa.kernels.token_step import work_of

D_SAE = 16384
OUTPUT_LAYER = 24
PROMPT_TOKENS = 32
NEW_TOKENS = 9
ROUNDS = int(os.environ.get("DSPA_BENCH_DECODE_ROUNDS", "2"))  # half as many in float32, which takes twice as long

pytestmark = pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}")


def test_decode_step(record: Record) -> None:
    model = random_model("gemma-2-2b", model_dtype())
    policy = worst_case_policy(model, OUTPUT_LAYER, D_SAE)
    prompt = torch.arange(2, 2 + PROMPT_TOKENS)[None]

    def generate() -> list[float]:
        return step_milliseconds(model, prompt, NEW_TOKENS)

    def steered() -> list[float]:
        with dspa.steer(model, policy):
            return generate()

    def measure() -> tuple[Column, ...]:
        samples: dict[str, list[float]] = {"unsteered": [], "steered, default mode": []}
        before = work_of(policy.output_sae)
        for _ in range(ROUNDS if model.dtype == torch.bfloat16 else max(1, ROUNDS // 2)):
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
        """The last prompt token and every generated one that went through the model was edited. Also fills what is
        filled once."""
        with dspa.steer(model, policy) as steering:
            generate()
        assert steering.summary().tokens_edited == steering.summary().tokens_seen == NEW_TOKENS

    name = f"Gemma-2-2B's shape, {name_of(model_dtype())}, 16k SAE, batch 1"
    record(name, "decode step, CPU", measure, check=check, reference="unsteered")
