"""The adapter step in C++: screening is the same function, its cost is counted, and torch sees a proper operation."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pairwise
import pytest
import torch
from adapter_cases import VERSIONS, Version, make_adapter, untrained_adapter
from kernel_cases import KINDS, LOW_PRECISION, Kind, generator, make_sae, normal, same_bits
from torch import Tensor

from dspa.errors import BackendUnavailableError
from dspa.kernels import AdapterMode, AdapterWeights, SaeWeights, TokenStats, adapter_step, available
from dspa.kernels.adapter_step.arguments import adapter_arguments, row_arguments
from dspa.kernels.adapter_step.cpu import AdapterState, work_of
from dspa.kernels.native import encoder_arguments
from dspa.kernels.quantized_rows import quantize_rows

pytestmark = pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}")

SHAPE = (37, 4001)  # several blocks of rows, neither a multiple of anything


def run(
    rows: Tensor, sae: SaeWeights, adapter: AdapterWeights, mode: AdapterMode | None
) -> tuple[Tensor, dict[str, Tensor]]:
    hidden, stats = rows.clone(), TokenStats.zeros(len(rows), sae.d_sae)
    adapter_step(hidden, sae, adapter, None, stats, mode=mode, backend="cpu")
    return hidden, {name: getattr(stats, name) for name in ("seen", "edited", "nonfinite", "latent_edits")}


def assert_modes_agree(rows: Tensor, sae: SaeWeights, adapter: AdapterWeights) -> int:
    """How many latents the dense mode changed."""
    dense, expected = run(rows, sae, adapter, "dense")
    for mode in (None, "screened"):
        written, counters = run(rows, sae, adapter, mode)
        assert same_bits(written, dense)
        for name, counter in counters.items():
            assert torch.equal(counter, expected[name]), name
    return int(expected["latent_edits"].sum())


@pytest.mark.product
@pytest.mark.parametrize("version", VERSIONS, ids=str)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.activation != "topk"], ids=str)
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_modes_agree_bit_for_bit(dtype: torch.dtype, kind: Kind, version: Version) -> None:
    sae = make_sae(kind, *SHAPE, dtype, seed=1)
    adapter = make_adapter(version, sae, dtype, seed=2)
    rows = (normal(generator(3), 3, SHAPE[0]) * 3).bfloat16()
    rows[1, 5] = torch.nan
    assert assert_modes_agree(rows, sae, adapter) > 100


def test_screening_that_rules_out_nothing_is_given_up() -> None:
    sae = make_sae(Kind(), *SHAPE, torch.bfloat16, seed=1)
    adapter = untrained_adapter(sae, torch.bfloat16, seed=2)
    rows = (normal(generator(3), 2, SHAPE[0]) * 20).bfloat16()
    assert assert_modes_agree(rows, sae, adapter) > 2000
    before = work_of(adapter)
    run(rows, sae, adapter, "screened")
    screened = work_of(adapter).screened_pairs - before.screened_pairs
    assert 0 < screened <= 2 * SHAPE[1]


def test_thresholds_at_the_bounds_are_decided_exactly() -> None:
    """y on its threshold, and the float32 next to it on either side: never screened out wrongly."""
    sae = make_sae(Kind(), *SHAPE, torch.float32, seed=1)
    adapter = make_adapter(Version(), sae, torch.float32, seed=2)
    rows = normal(generator(3), 3, SHAPE[0]).float()
    y = (rows[0] @ adapter.weight.T + adapter.bias).abs()
    for threshold in (y, y.nextafter(torch.zeros(1)), y.nextafter(torch.full((1,), 9.0)), -y):
        for version in VERSIONS:
            changed = replace(adapter, threshold=threshold, activation=version.activation, clip=version.clip)
            assert_modes_agree(rows, sae, changed)


@pytest.mark.parametrize("mode", ["dense", "screened"])
@pytest.mark.parametrize("trained", [True, False])
def test_the_number_of_threads_changes_no_bit(trained: bool, mode: AdapterMode) -> None:
    sae = make_sae(Kind(), 300, 2000, torch.bfloat16, seed=5)
    adapter = make_adapter(Version(), sae, torch.bfloat16, 6) if trained else untrained_adapter(sae, torch.bfloat16, 6)
    rows = (normal(generator(6), 3, 300) * 20).float()
    found = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(run(rows, sae, adapter, mode)[0])
    torch.set_num_threads(before)
    assert same_bits(found[0], found[1])
    assert same_bits(found[0], found[2])
    assert not same_bits(found[0], rows)


def test_codes_follow_a_weight_that_is_trained() -> None:
    sae = make_sae(Kind(), *SHAPE, torch.float32, seed=1)
    adapter = make_adapter(Version(), sae, torch.float32, seed=2)
    rows = normal(generator(3), 2, SHAPE[0]).float() * 2
    first = run(rows, sae, adapter, "screened")[0]
    adapter.weight.mul_(-1)
    assert same_bits(run(rows, sae, adapter, "screened")[0], run(rows, sae, adapter, "dense")[0])
    assert not same_bits(run(rows, sae, adapter, "screened")[0], first)


def test_inference_tensors_are_screened() -> None:
    with torch.inference_mode():
        sae = make_sae(Kind(), *SHAPE, torch.float32, seed=1)
        adapter = make_adapter(Version(), sae, torch.float32, seed=2)
        assert_modes_agree(normal(generator(3), 2, SHAPE[0]).float(), sae, adapter)


def test_work_is_counted() -> None:
    """By count: the weight once for all tokens in the dense mode, the codes and a few rows in the screened one."""
    d_model, d_sae = SHAPE
    sae = make_sae(Kind(), *SHAPE, torch.bfloat16, seed=1)
    adapter = make_adapter(Version(), sae, torch.bfloat16, seed=2)
    rows = normal(generator(3), 5, d_model).bfloat16()
    rows[4] = torch.nan
    run(rows, sae, adapter, "dense")
    dense = work_of(adapter)
    x = rows[:4].double()
    y = x @ adapter.weight.double().T + adapter.bias.double()
    v = y.sign() * (y.abs() - adapter.threshold.double().clamp(min=0)).relu()
    assert (dense.tokens, dense.fired, dense.fell) == (4, int((v != 0).sum()), int((v < 0).sum()))
    assert (dense.weight_bytes, dense.screened_pairs, dense.rescored_pairs) == (2 * d_model * d_sae, 0, 0)
    run(rows, sae, adapter, "screened")
    work = work_of(adapter)
    assert work.fired == 2 * dense.fired
    assert work.screened_pairs == 4 * d_sae
    assert dense.fired <= work.rescored_pairs < 4 * d_sae
    code_bytes = 64 * d_sae  # a row of codes is padded to a multiple of 32
    assert work.weight_bytes - dense.weight_bytes == code_bytes + work.rescored_pairs * 2 * d_model


@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("kind", [Kind(), Kind("gated", "layer_norm", compact=True)], ids=str)
def test_passes_opcheck(kind: Kind, optional: bool) -> None:
    sae = make_sae(kind, 37, 64, torch.bfloat16, seed=0)
    adapter = make_adapter(Version(), sae, torch.bfloat16, seed=1)
    codes = quantize_rows(adapter.weight)
    on, stats = torch.tensor([True, False, True]), TokenStats.zeros(3, 64)
    arguments = (
        normal(generator(1), 3, 37).bfloat16(),
        *encoder_arguments(sae),
        sae.W_dec,
        sae.decoder_rows,
        *adapter_arguments(adapter),
        *(row_arguments(on, stats) if optional else row_arguments(None, None)),
        codes.values if optional else None,
        codes.factors if optional else None,
        AdapterState().counters if optional else None,
    )
    torch.library.opcheck(torch.ops.dspa.adapter_step.default, arguments)


def test_compiles_as_one_graph() -> None:
    sae = make_sae(Kind(), 37, 64, torch.bfloat16, seed=0)
    adapter, stats = make_adapter(Version(), sae, torch.bfloat16, seed=1), TokenStats.zeros(3, 64)
    rows = normal(generator(1), 3, 37).bfloat16()

    def block(hidden: Tensor) -> Tensor:
        hidden = hidden * 2
        adapter_step(hidden, sae, adapter, None, stats, backend="cpu")
        return hidden + 1

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(rows), block(rows))
    assert stats.seen.tolist() == [2, 2, 2]


@pytest.mark.long
@pytest.mark.parametrize("capability", ["portable", "avx2"])
def test_lesser_instruction_sets(capability: str, request: pytest.FixtureRequest) -> None:
    """They pass the step tests too; where the processor lacks one it falls back to the next."""
    tests = Path(__file__).parent / "test_adapter_step.py"
    every = [pairwise.OPTION] if request.config.getoption(pairwise.OPTION) else []
    command = [sys.executable, "-m", "pytest", str(tests), "-q", "-k", "cpu", "-p", "no:cacheprovider", "-x", *every]
    environment = {**os.environ, "DSPA_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_float64_is_refused() -> None:
    sae = make_sae(Kind(), 8, 16, torch.float64, seed=0)
    adapter = make_adapter(Version(), sae, torch.float64, seed=1)
    with pytest.raises(BackendUnavailableError, match="float64"):
        adapter_step(torch.zeros(1, 8), sae, adapter, backend="cpu")
