"""`encode_density` on the CPU beside the bare matrix product."""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
import torch
from conftest import RESULTS
from interleaved import Rounds
from token_step_case import Column

from dspa.kernels import SaeWeights, available, encode_density

SECONDS = float(os.environ.get("DSPA_BENCH_SECONDS", "6"))
TOKENS = 1024
SEGMENTS = (0, 200, 777, 1024)

pytestmark = pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("d_model", "d_sae"), [(2304, 16384)])
def test_encode_density(d_model: int, d_sae: int, dtype: torch.dtype, benchmark: Any) -> None:
    rng = torch.Generator().manual_seed(0)
    W_enc = (torch.randn(d_sae, d_model, generator=rng) / d_model**0.5).to(dtype)
    hidden, offsets = torch.randn(TOKENS, d_model, generator=rng).to(dtype), torch.tensor(SEGMENTS)
    sae = SaeWeights(W_enc=W_enc, b_enc=torch.zeros(d_sae), threshold=torch.ones(d_sae), activation="jumprelu")
    check(hidden, offsets, sae)
    rounds = Rounds(
        [
            Column("matrix product alone", lambda: hidden @ W_enc.T),
            Column("encode_density", lambda: encode_density(hidden, offsets, sae, backend="cpu")),
            Column("encode_density, reference", lambda: encode_density(hidden, offsets, sae, backend="reference")),
        ]
    )
    rounds.run_for(SECONDS)
    row = f"{d_model}x{d_sae}-{str(dtype).removeprefix('torch.')}-{TOKENS} tokens"
    columns = [timing.as_json() for timing in rounds.timings()]
    RESULTS[row] = columns
    benchmark.extra_info.update(row=row, columns=columns)
    benchmark.pedantic(rounds.run_one, rounds=1)


def check(hidden: torch.Tensor, offsets: torch.Tensor, sae: SaeWeights) -> None:
    """A count may differ from the exact one only by gates that rounding can flip."""
    found = encode_density(hidden, offsets, sae, backend="cpu").long()
    distance = (hidden.double() @ sae.W_enc.double().T - 1).abs()
    undecided = distance < 1e-4  # far above what float32 accumulation of unit variance gets wrong
    active = hidden.double() @ sae.W_enc.double().T > 1
    for segment, (start, end) in enumerate(itertools.pairwise(SEGMENTS)):
        difference = (found[segment] - active[start:end].sum(0)).abs()
        assert (difference <= undecided[start:end].sum(0)).all()
    assert undecided.double().mean() < 1e-3
