"""`token_step` on the CPU beside sae-lens and the bare reading of the encoder."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from conftest import RESULTS
from interleaved import Rounds
from token_step_case import Case, Shape

from dspa.kernels import available

SECONDS = float(os.environ.get("DSPA_BENCH_SECONDS", "6"))  # per row
SIZES = ((2304, 16384), (2304, 65536), (3584, 16384), (4096, 65536))
SHAPES = [
    Shape(*size, dtype, batch)
    for size, dtype, batch in itertools.product(SIZES, (torch.bfloat16, torch.float32), (1, 4, 16))
]

pytestmark = pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_token_step(shape: Shape, benchmark: Any) -> None:
    torch.compiler.reset()
    case = Case(shape)
    case.check()
    rounds = Rounds(case.columns())
    rounds.run_for(SECONDS)
    columns = [timing.as_json() for timing in rounds.timings()]
    RESULTS[str(shape)] = columns
    benchmark.extra_info.update(row=str(shape), columns=columns)
    benchmark.pedantic(rounds.run_one, rounds=1)  # pytest-benchmark keeps the record; the columns are what counts
