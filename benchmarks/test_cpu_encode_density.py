"""`encode_density` on the CPU beside the bare matrix product."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interleaved import SECONDS_A_CALL, Way, timed
from peak_memory import STATUS, peak_column
from record import Record

from dspa.bench.density_check import check_counts
from dspa.bench.measurements import Column, Interval
from dspa.bench.operations import eager_dtypes, name_of
from dspa.kernels import SaeWeights, available, encode_density

GROUP = "encode_density, CPU"
BASELINE = "matrix product alone"
TOKENS = 1024
SEGMENTS = (0, 200, 777, 1024)

pytestmark = pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("d_model", "d_sae"), [(2304, 16384)])
def test_encode_density(d_model: int, d_sae: int, dtype: torch.dtype, record: Record) -> None:
    rng = torch.Generator().manual_seed(0)
    W_enc = (torch.randn(d_sae, d_model, generator=rng) / d_model**0.5).to(dtype)
    hidden, offsets = torch.randn(TOKENS, d_model, generator=rng).to(dtype), torch.tensor(SEGMENTS)
    sae = SaeWeights(W_enc=W_enc, b_enc=torch.zeros(d_sae), threshold=torch.ones(d_sae), activation="jumprelu")
    # Few rows are tried, which take far more time each than many.
    dtypes, left_out = eager_dtypes(sae, TOKENS, 20 * SECONDS_A_CALL)
    plain_hidden, plain_W_enc = hidden.to(dtypes[0]), W_enc.to(dtypes[0])
    baseline = BASELINE if dtypes[0] == dtype else f"{BASELINE}, {name_of(dtypes[0])}"
    ways = [
        Way(baseline, lambda: plain_hidden @ plain_W_enc.T),
        Way("encode_density", lambda: encode_density(hidden, offsets, sae, backend="cpu")),
    ]
    record(
        f"{d_model}x{d_sae}-{str(dtype).removeprefix('torch.')}-{TOKENS} tokens",
        GROUP,
        lambda: timed(ways, baseline, at_least=3),
        check=lambda: check_counts(encode_density(hidden, offsets, sae, backend="cpu"), hidden, offsets, sae),
        reference=baseline,
        left_out=left_out,
    )


@pytest.mark.skipif(not STATUS.exists(), reason="peak memory is read from /proc")
def test_peak_memory(record: Record) -> None:
    """What comes on top of the operands; the activations would be `[N, d_sae]` float32."""
    d_model, d_sae, dtype = 2304, 16384, torch.bfloat16

    def run() -> tuple[Column, ...]:
        size = Column("the activations, for comparison", "MiB", Interval.exactly(4096 * d_sae * 4 / 2**20))
        return (peak_column("encode_density", prepare_density, d_model, d_sae, 4096, dtype), size)

    record(f"memory, {d_model}x{d_sae}-{str(dtype).removeprefix('torch.')}-4096 tokens", GROUP, run)


def prepare_density(d_model: int, d_sae: int, tokens: int, dtype: torch.dtype) -> Callable[[], object]:
    W_enc, hidden = torch.rand(d_sae, d_model).to(dtype), torch.rand(tokens, d_model).to(dtype)
    sae = SaeWeights(W_enc=W_enc, b_enc=torch.zeros(d_sae), threshold=torch.ones(d_sae), activation="jumprelu")
    encode_density(hidden[:2], torch.tensor([0, 2]), sae, backend="cpu")
    return lambda: encode_density(hidden, torch.tensor([0, tokens]), sae, backend="cpu")
