"""The C++ library as torch sees it: schemas, fake implementations, compilation, processors, and what it refuses."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pairwise
import pytest
import torch
from kernel_cases import Kind, edit_list, generator, make_sae, normal, random_lists, same_bits
from torch import Tensor

import dspa.kernels.native as native
from dspa.errors import BackendUnavailableError, InvalidInputError
from dspa.kernels import CsrMap, EditList, SaeWeights, TokenStats, available, encode_density, lookup, token_step
from dspa.kernels.native import encoder_arguments
from dspa.kernels.quantized_rows import quantize_rows
from dspa.kernels.token_step.arguments import counter_arguments
from dspa.kernels.token_step.cpu import StepScratch

pytestmark = pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}")

KINDS = (Kind(), Kind("gated", "layer_norm"), Kind("topk", subtract_b_dec=True, rescaled=True, compact=True))


def step_arguments(sae: SaeWeights, optional: bool) -> tuple[object, ...]:
    rows = normal(generator(1), 3, sae.d_model).bfloat16()
    edits = edit_list(*random_lists(sae, 3, 8, 2), 8)
    scratch, codes = StepScratch(), quantize_rows(sae.W_enc)
    return (
        rows,
        *encoder_arguments(sae),
        sae.W_dec,
        sae.decoder_rows,
        edits.latents,
        edits.signs,
        edits.counts,
        0.2,
        torch.full((3,), 0.2) if optional else None,
        torch.tensor([True, False, True]) if optional else None,
        *(counter_arguments(TokenStats.zeros(3, sae.d_sae)) if optional else (None,) * 7),
        scratch.recent_argmax if optional else None,
        codes.values if optional else None,
        codes.factors if optional else None,
        scratch.counters if optional else None,
        "screened",
    )


@pytest.mark.long
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_token_step_passes_opcheck(kind: Kind, optional: bool) -> None:
    arguments = step_arguments(make_sae(kind, 37, 64, torch.bfloat16, seed=0), optional)
    torch.library.opcheck(torch.ops.dspa.token_step.default, arguments)


def test_quantize_rows_passes_opcheck() -> None:
    W, codes, factors = torch.randn(9, 37), torch.zeros(9, 64, dtype=torch.int8), torch.zeros(3, 9)
    torch.library.opcheck(torch.ops.dspa.quantize_rows.default, (W, codes, factors))


def test_encode_density_passes_opcheck() -> None:
    sae = make_sae(Kind(), 37, 64, torch.float16, seed=0)
    rows, counts = normal(generator(1), 9, 37).float(), torch.zeros(2, 64, dtype=torch.int32)
    arguments = (rows, torch.tensor([0, 4, 9]), *encoder_arguments(sae), counts)
    torch.library.opcheck(torch.ops.dspa.encode_density.default, arguments)


def small_map() -> CsrMap:
    offsets, columns = torch.tensor([0, 2, 3, 5]), torch.tensor([0, 4, 2, 1, 3], dtype=torch.int32)
    return CsrMap(offsets, columns, torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0]), 6).check()


def test_lookup_passes_opcheck() -> None:
    A, edits = small_map(), EditList.empty(2, 4)
    arguments = (torch.rand(2, 3), A.row_offsets, A.columns, A.values, 6, 2, 2, "both", False)
    torch.library.opcheck(torch.ops.dspa.lookup.default, (*arguments, edits.latents, edits.signs, edits.counts))


@pytest.mark.parametrize("compiler", ["aot_eager", pytest.param("inductor", marks=pytest.mark.long)])
def test_compiles_as_one_graph(compiler: str) -> None:
    sae = make_sae(Kind(), 37, 64, torch.bfloat16, seed=0)
    edits, stats = edit_list(*random_lists(sae, 3, 8, 2), 8), TokenStats.zeros(3, 64)
    rows = normal(generator(1), 3, 37).bfloat16()

    def block(hidden: Tensor, alpha: Tensor) -> Tensor:
        hidden = hidden * 2
        token_step(hidden, sae, edits, alpha, None, stats, backend="cpu")
        return hidden + 1

    alpha = torch.full((3,), 0.2)
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    first = compiled(rows, alpha)  # the scratch of this SAE is made while compiling
    assert same_bits(first, block(rows, alpha))
    assert stats.seen.tolist() == [2, 2, 2]


def test_density_and_lookup_compile_as_one_graph() -> None:
    sae, A = make_sae(Kind(), 37, 64, torch.bfloat16, seed=0), small_map()
    rows, offsets = normal(generator(1), 9, 37).bfloat16(), torch.tensor([0, 4, 9])

    def select(hidden: Tensor) -> tuple[Tensor, Tensor]:
        counts = encode_density(hidden * 2, offsets, sae, backend="cpu")
        return counts, lookup(counts[:, :3].float(), A, 2, 2, backend="cpu").latents + 1

    for found, expected in zip(
        torch.compile(select, fullgraph=True, backend="aot_eager")(rows), select(rows), strict=True
    ):
        assert torch.equal(found, expected)


@pytest.mark.long
@pytest.mark.parametrize("capability", ["portable", "avx2"])
def test_lesser_instruction_sets(capability: str, request: pytest.FixtureRequest) -> None:
    """They pass the step tests too; where the processor lacks one it falls back to the next."""
    tests = Path(__file__).parent / "test_token_step.py"
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(tests),
        "-q",
        "-k",
        "cpu and not lazy and not screened",
        "-p",
        "no:cacheprovider",
        "-x",
        *([pairwise.OPTION] if request.config.getoption(pairwise.OPTION) else []),
    ]
    environment = {**os.environ, "DSPA_CPU_CAPABILITY": capability}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def bits_at(capability: str) -> str:
    program = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]);"
        "from kernel_cases import *; from dspa.kernels import available; available();"
        "sae = make_sae(Kind('jumprelu', 'layer_norm'), 199, 300, torch.bfloat16, seed=1);"
        "rows = (normal(generator(2), 5, 199) * 2).float();"
        "token_step(rows, sae, edit_list(*random_lists(sae, 5, 12, 3), 12), 0.2, backend='cpu');"
        "print(torch.ops.dspa.cpu_capability(), rows.view(torch.int32).flatten().tolist())"
    )
    command = [sys.executable, "-c", program, str(Path(__file__).parent)]
    environment = {**os.environ, "DSPA_CPU_CAPABILITY": capability}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def test_avx2_and_avx512_give_the_same_bits() -> None:
    if torch.ops.dspa.cpu_capability() != "avx512":
        pytest.skip(f"this processor runs {torch.ops.dspa.cpu_capability()}")
    narrow, wide = bits_at("avx2"), bits_at("avx512")
    assert narrow.split(maxsplit=1)[0] == "avx2"
    assert narrow.split(maxsplit=1)[1] == wide.split(maxsplit=1)[1]


def test_missing_library_is_explained(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(native, "_PACKAGE", tmp_path)
    with pytest.raises(BackendUnavailableError, match="not built"):
        native.load_library()
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    with pytest.raises(BackendUnavailableError, match="cannot be loaded"):
        native.load_library()


@pytest.mark.parametrize(
    ("latent", "count", "message"),
    [(64, 1, "name latents 64"), (-1, 1, "name latents -1"), (0, 9, r"have \[9\] entries"), (0, -1, "have")],
)
def test_lists_out_of_bounds_are_refused(latent: int, count: int, message: str) -> None:
    sae = make_sae(Kind(), 37, 64, torch.bfloat16, seed=0)
    edits = EditList.empty(1, 8)
    edits.latents[0, 0], edits.counts[0] = latent, count
    with pytest.raises(InvalidInputError, match=message):
        token_step(torch.zeros(1, 37), sae, edits, 0.2, backend="cpu")


def test_latents_without_a_decoder_are_refused() -> None:
    sae = make_sae(Kind(compact=True), 37, 64, torch.bfloat16, seed=0)
    assert sae.decoder_rows is not None
    missing = int((sae.decoder_rows < 0).nonzero()[0])
    with pytest.raises(InvalidInputError, match="without a decoder row"):
        token_step(torch.zeros(1, 37), sae, EditList.from_lists([[]], [[missing]]), 0.2, backend="cpu")


def test_float64_is_refused() -> None:
    sae = make_sae(Kind(), 37, 64, torch.float64, seed=0)
    with pytest.raises(BackendUnavailableError, match="float64"):
        token_step(torch.zeros(1, 37), sae, EditList.empty(1, 4), 0.2, backend="cpu")


@pytest.mark.parametrize("density", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("values", [torch.float32, torch.float64])
def test_lookup_has_the_bits_of_the_reference(density: torch.dtype, values: torch.dtype) -> None:
    rng = generator(0)
    A = normal(rng, 200, 150).to(values) * (torch.rand(200, 150, generator=rng) < 0.2)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), (A != 0).sum(1).cumsum(0)])
    conditional_map = CsrMap(offsets, A.nonzero()[:, 1].int(), A[A != 0], 150).check()
    x = torch.rand(6, 200, generator=rng).to(density)
    for edit in ("ablate", "augment", "both"):
        for guard in (False, True):
            found = [
                lookup(x, conditional_map, 32, 16, edit, sign_guard=guard, backend=backend)
                for backend in ("reference", "cpu")
            ]
            for name in ("latents", "signs", "counts"):
                assert torch.equal(getattr(found[0], name), getattr(found[1], name))
