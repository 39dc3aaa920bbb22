"""`token_step` on the CPU beside sae-lens and the bare reading of the encoder."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from cpu_token_step import BASELINE, cpu_ways, sae_lens_of
from interleaved import timed
from record import Record
from sae_lens.saes.jumprelu_sae import JumpReLUSAE

from dspa.bench.cases import Case, Shape
from dspa.kernels import available

SIZES = ((2304, 16384), (2304, 65536), (3584, 16384), (4096, 65536))
BATCHES = (1, 4, 16)
SHAPES = [
    Shape(*size, dtype, batch)
    for size, dtype, batch in itertools.product(SIZES, (torch.bfloat16, torch.float32), BATCHES)
]
COMPILED = {shape for shape in SHAPES if shape.batch == 1} | {replace(SHAPES[0], batch=16)}
"""The rows that time torch.compile as well: a compilation takes seconds, and its ratio to the delta that it compiles
hardly depends on the batch."""

pytestmark = pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}")


class Weights:
    """The weights of one shape at a time: its batches come one after the other."""

    def __init__(self) -> None:
        self._case: Case | None = None
        self._plain: JumpReLUSAE | None = None

    def of(self, shape: Shape) -> tuple[Case, JumpReLUSAE]:
        """A case of this shape, and the SAE of sae-lens with the same weights."""
        case, plain = self._case, self._plain
        if case is None or plain is None or replace(shape, batch=case.shape.batch) != case.shape:
            case = plain = self._case = self._plain = None  # freed before the next is drawn
            case = self._case = Case(shape, "cpu")
            plain = self._plain = sae_lens_of(case)
        return case.with_batch(shape.batch), plain


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_token_step(shape: Shape, weights: Weights, record: Record) -> None:
    torch.compiler.reset()
    case, plain = weights.of(shape)

    def check() -> None:
        case.check(("dense", "lazy", "screened"))

    record(
        str(shape),
        "token_step, CPU",
        lambda: timed(cpu_ways(case, plain, compiled=shape in COMPILED), BASELINE),
        check=check,
        reference=BASELINE,
    )
