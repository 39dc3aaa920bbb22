"""`adapter_step` on the CPU beside FSRL on top of sae-lens and the bare reading of the adapter's weight."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cpu_token_step import sae_lens_of
from interleaved import timed
from record import Record

from dspa.bench.adapter import EAGER_ADAPTER, AdapterCase, adapter_ways, eager_way
from dspa.bench.cases import Case, Shape
from dspa.bench.operations import READ_ADAPTER, in_dtype, read_way
from dspa.bench.timing import Way
from dspa.kernels import available

SHAPES = [
    Shape(2304, 16384, torch.bfloat16, 1),
    Shape(2304, 16384, torch.bfloat16, 16),
    Shape(2304, 16384, torch.float32, 1),
    Shape(2304, 65536, torch.bfloat16, 1),
]

pytestmark = pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}")


def sae_lens_ways(adapters: AdapterCase) -> list[Way]:
    """With sae-lens' encode and decode, in float32 as well where the weights have 16 bits: without AVX-512 that is
    faster. The widest SAE has no room for its copies in float32."""
    case = adapters.case
    ways = [eager_way(sae_lens_of(case), adapters, case.shape.dtype)]
    if case.shape.dtype != torch.float32 and case.shape.d_sae <= 16384:
        wide = case.on(case.backend)
        wide.shape, wide.sae = replace(case.shape, dtype=torch.float32), in_dtype(case.sae, torch.float32)
        ways.append(eager_way(sae_lens_of(wide), adapters, torch.float32))
    return ways


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adapter_step(shape: Shape, record: Record) -> None:
    adapters = AdapterCase(Case(shape, "cpu"))

    def ways() -> list[Way]:
        return [
            read_way(adapters.adapter.weight, READ_ADAPTER),
            *sae_lens_ways(adapters),
            *adapter_ways(adapters),
        ]

    record(
        str(shape),
        "adapter_step, CPU",
        lambda: timed(ways(), EAGER_ADAPTER),
        check=adapters.check,
        reference=EAGER_ADAPTER,
    )
