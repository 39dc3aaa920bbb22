"""`token_step` on the CPU beside sae-lens and the bare reading of the encoder."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import pytest
import torch
from cpu_token_step import BASELINE, cpu_ways, in_other_dtype, named_dtype, sae_lens_of
from interleaved import SECONDS_A_CALL, timed
from record import Record
from sae_lens.saes.jumprelu_sae import JumpReLUSAE

from dspa.bench.cases import Case, Shape
from dspa.bench.operations import EAGER_PRODUCTS, eager_dtypes
from dspa.kernels import available

SIZES = ((2304, 16384), (2304, 65536), (3584, 16384), (4096, 65536))
BATCHES = (1, 4, 16, 64)
SHAPES = [
    Shape(*size, dtype, batch)
    for size, dtype, batch in itertools.product(SIZES, (torch.bfloat16, torch.float32), BATCHES)
    if batch == 1 or size == SIZES[0]
]
COMPILED = {shape for shape in SHAPES if shape.batch == 1 and (shape.d_model, shape.d_sae) == SIZES[0]} | {
    replace(SHAPES[0], batch=16),
    next(shape for shape in SHAPES if shape.batch == 1 and (shape.d_model, shape.d_sae) == SIZES[-1]),
}
"""The rows that time torch.compile as well: a compilation takes seconds, and its ratio to the delta that it compiles
hardly depends on size and batch."""

pytestmark = pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}")


@dataclass(frozen=True, eq=False)
class Subject:
    """The weights of a shape, sae-lens' SAEs with the same weights, and which of these were left out."""

    case: Case
    saes: list[JumpReLUSAE]
    left_out: str


class Weights:
    """The weights of one shape at a time: its batches come one after the other."""

    def __init__(self) -> None:
        self._kept: Subject | None = None

    def of(self, shape: Shape) -> Subject:
        """A case of this shape, and the SAE of sae-lens with the same weights: in the same dtype, or in float32 where
        that takes too long even for one row."""
        if self._kept is None or replace(shape, batch=self._kept.case.shape.batch) != self._kept.case.shape:
            self._kept = None  # freed before the next is drawn
            case = Case(shape, "cpu")
            dtypes, left_out = eager_dtypes(case.sae, EAGER_PRODUCTS, SECONDS_A_CALL)
            self._kept = Subject(case, [sae_lens_of(in_other_dtype(case, dtypes[0]))], left_out)
        return replace(self._kept, case=self._kept.case.with_batch(shape.batch))


@pytest.fixture(scope="module")
def weights() -> Weights:
    return Weights()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_token_step(shape: Shape, weights: Weights, record: Record) -> None:
    torch.compiler.reset()
    subject = weights.of(shape)
    case, saes = subject.case, subject.saes

    def check() -> None:
        case.check(("dense", "lazy", "screened"))

    baseline = BASELINE + named_dtype(case, saes[0].dtype)
    record(
        str(shape),
        "token_step, CPU",
        lambda: timed(cpu_ways(case, saes, compiled=shape in COMPILED), baseline),
        check=check,
        reference=baseline,
        left_out=subject.left_out,
    )
