"""The Triton encode_density and lookup beyond the shared matrix: launches, order of programs, compiled graphs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import Kind, dense_map, generator, integers, make_sae, normal
from torch import Tensor

from dspa.kernels import CsrMap, EditKind, EditList, SaeWeights, available, encode_density, lookup

if available()["triton"] != "available":
    pytest.skip(f"backend triton: {available()['triton']}", allow_module_level=True)

from dspa.kernels.encode_density import triton as triton_density
from dspa.kernels.lookup import triton as triton_lookup
from dspa.kernels.native import encoder_arguments
from dspa.kernels.triton_common.launch import Launch
from dspa.kernels.triton_common.tiles import INTERPRETED

if not INTERPRETED.value:
    pytest.skip("these tests watch the interpreter; set TRITON_INTERPRET=1", allow_module_level=True)

from triton_interpreter import in_sequence

OFFSETS = torch.tensor([0, 5, 5, 70, 83, 90])


def density_case(kind: Kind) -> tuple[Tensor, SaeWeights]:
    """More tokens and latents than a tile."""
    return (normal(generator(1), 90, 37) * 2).bfloat16(), make_sae(kind, 37, 150, torch.bfloat16, seed=2)


def lookup_case() -> tuple[Tensor, CsrMap]:
    """More columns than are scanned at a time."""
    rng = generator(3)
    A = integers(rng, -3, 3, 40, 1500) * (torch.rand(40, 1500, generator=rng) < 0.1)
    return integers(rng, 0, 6, 5, 40).float(), dense_map(A.float())


def same_lists(a: EditList, b: EditList) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("latents", "signs", "counts"))


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """New tensors that are not initialised are full of NaN, or of the largest integer."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.long
@pytest.mark.parametrize("kind", [Kind(), Kind("gated", "layer_norm"), Kind("topk")], ids=str)
def test_segments_share_launches_in_any_order_of_programs(kind: Kind, launches: list[Launch]) -> None:
    hidden, sae = density_case(kind)
    shuffled = encode_density(hidden, OFFSETS, sae, backend="triton")
    assert len(launches) == (2 if kind.activation == "topk" else 1)
    assert max(launch.programs for launch in launches) > 3
    with in_sequence():
        assert torch.equal(encode_density(hidden, OFFSETS, sae, backend="triton"), shuffled)


@pytest.mark.long
def test_scores_of_topk_are_held_for_some_tokens_at_a_time(
    monkeypatch: pytest.MonkeyPatch, launches: list[Launch]
) -> None:
    hidden, sae = density_case(Kind("topk"))
    expected = encode_density(hidden, OFFSETS, sae, backend="reference")
    monkeypatch.setattr(triton_density, "MOST_SCORES", 64 * 150)
    assert torch.equal(encode_density(hidden, OFFSETS, sae, backend="triton"), expected)
    assert len(launches) == 4  # two for each 64 tokens
    z = launches[0].arguments["z"]
    assert isinstance(z, Tensor)
    assert z.shape == (64, 150)


@pytest.mark.parametrize("edit", ["ablate", "both"])
def test_lookup_is_one_launch_in_any_order_of_programs(edit: EditKind, launches: list[Launch]) -> None:
    density, conditional_map = lookup_case()
    expected = lookup(density, conditional_map, 8, 20, edit, backend="reference")
    assert same_lists(lookup(density, conditional_map, 8, 20, edit, backend="triton"), expected)
    assert len(launches) == 1
    with in_sequence():
        assert same_lists(lookup(density, conditional_map, 8, 20, edit, backend="triton"), expected)


@pytest.mark.long
def test_operations_pass_opcheck() -> None:
    hidden, sae = density_case(Kind())
    torch.library.opcheck(torch.ops.dspa_triton.encode_density.default, (hidden, OFFSETS, *encoder_arguments(sae)))
    density, conditional_map = lookup_case()
    arguments = (density, *triton_lookup.map_arguments(conditional_map), 8, 3, "both", True)
    torch.library.opcheck(torch.ops.dspa_triton.lookup.default, arguments)


@pytest.mark.long
@pytest.mark.parametrize("kind", [Kind(), Kind("topk")], ids=str)
def test_encode_density_compiles_as_one_graph(kind: Kind) -> None:
    hidden, sae = density_case(kind)

    def active(hidden: Tensor) -> Tensor:
        return encode_density(hidden * 2, OFFSETS, sae, backend="triton") + 1

    compiled = torch.compile(active, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden), active(hidden))


def test_lookup_compiles_as_one_graph() -> None:
    density, conditional_map = lookup_case()

    def select(density: Tensor) -> Tensor:
        return lookup(density * 2, conditional_map, 8, 3, backend="triton").latents + 1

    compiled = torch.compile(select, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(density), select(density))
