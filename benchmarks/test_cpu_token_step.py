"""`token_step` on the CPU beside sae-lens and the bare reading of the encoder."""

from __future__ import annotations

import itertools

import pytest
import torch
from cpu_token_step import BASELINE, cpu_ways
from interleaved import timed
from record import Record
from token_step_case import Case, Shape

from dspa.kernels import available

SIZES = ((2304, 16384), (2304, 65536), (3584, 16384), (4096, 65536))
SHAPES = [
    Shape(*size, dtype, batch)
    for size, dtype, batch in itertools.product(SIZES, (torch.bfloat16, torch.float32), (1, 4, 16))
]

pytestmark = pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}")


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_token_step(shape: Shape, record: Record) -> None:
    torch.compiler.reset()
    case = Case(shape, "cpu")

    def check() -> None:
        case.check(("dense", "lazy", "screened"))

    record(str(shape), "token_step, CPU", lambda: timed(cpu_ways(case), BASELINE), check=check, reference=BASELINE)
