"""`adapter_step` on the CPU beside FSRL on top of sae-lens and the bare reading of the adapter's weight."""

from __future__ import annotations

import pytest
import torch
from cpu_token_step import in_other_dtype, named_dtype, sae_lens_of
from interleaved import SECONDS_A_CALL, timed
from record import Record

from dspa.bench.adapter import EAGER_ADAPTER, AdapterCase, adapter_ways, eager_way
from dspa.bench.cases import Case, Shape
from dspa.bench.operations import EAGER_ADAPTER_PRODUCTS, READ_ADAPTER, eager_dtypes, read_way
from dspa.bench.timing import Way
from dspa.kernels import available

SHAPES = [
    Shape(2304, 16384, torch.bfloat16, 1),
    Shape(2304, 16384, torch.bfloat16, 16),
    Shape(2304, 16384, torch.float32, 1),
    Shape(2304, 65536, torch.bfloat16, 1),
]

pytestmark = pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}")


def baseline_dtypes(adapters: AdapterCase) -> tuple[list[torch.dtype], str]:
    """In float32 as well where the weights have 16 bits. The widest SAE has no room for both, and is timed in float32
    only where 16 bits take too long."""
    case = adapters.case
    dtypes, left_out = eager_dtypes(case.sae, EAGER_ADAPTER_PRODUCTS * len(case.hidden), SECONDS_A_CALL)
    return (dtypes if case.shape.d_sae <= 16384 else dtypes[:1]), left_out


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_adapter_step(shape: Shape, record: Record) -> None:
    adapters = AdapterCase(Case(shape, "cpu"))

    dtypes, left_out = baseline_dtypes(adapters)

    def ways() -> list[Way]:
        plain = [sae_lens_of(in_other_dtype(adapters.case, dtype)) for dtype in dtypes]
        return [
            read_way(adapters.adapter.weight, READ_ADAPTER),
            *(eager_way(sae, adapters, dtype) for sae, dtype in zip(plain, dtypes, strict=True)),
            *adapter_ways(adapters),
        ]

    baseline = EAGER_ADAPTER + named_dtype(adapters.case, dtypes[0])
    record(
        str(shape),
        "adapter_step, CPU",
        lambda: timed(ways(), baseline),
        check=adapters.check,
        reference=baseline,
        left_out=left_out,
    )
