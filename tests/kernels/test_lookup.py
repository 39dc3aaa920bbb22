"""lookup against the equations: the indices are exact, ties included."""

from __future__ import annotations

from typing import get_args

import equations
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import Backend, dense_map, generator, integers, normal
from torch import Tensor

from dspa.errors import BackendUnavailableError, InvalidInputError
from dspa.kernels import CsrMap, EditKind, EditList, lookup

EDITS: tuple[EditKind, ...] = get_args(EditKind)


def check_lookup(
    density: Tensor, A: Tensor, k_prompt: int, k_diff: int, edit: EditKind, sign_guard: bool, backend: Backend
) -> EditList:
    """The lists of a lookup, after comparing every row and the padding behind it."""
    conditional_map = dense_map(A).to(backend.device)
    inputs = (density.to(backend.device), conditional_map.row_offsets, conditional_map.columns, conditional_map.values)
    before = [tensor.clone() for tensor in inputs]
    edits = lookup(inputs[0], conditional_map, k_prompt, k_diff, edit, sign_guard=sign_guard, backend=backend.name)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy), "an input was written"
    assert edits.latents.device.type == torch.device(backend.device).type
    edits = edits.to("cpu")
    room = 2 * k_diff if edit == "both" else k_diff
    assert edits.latents.shape == edits.signs.shape == (len(density), room)
    assert (edits.latents.dtype, edits.signs.dtype, edits.counts.dtype) == (torch.int32, torch.int8, torch.int32)
    for b in range(len(density)):
        augment, ablate = equations.lookup(density[b].double().numpy(), A.numpy(), k_prompt, k_diff, edit, sign_guard)
        entries = len(augment) + len(ablate)
        padding = room - entries
        assert int(edits.counts[b]) == entries
        assert edits.latents[b].tolist() == augment + ablate + [0] * padding
        assert edits.signs[b].tolist() == [1] * len(augment) + [-1] * len(ablate) + [0] * padding
        assert edits.augmented(b) == augment
        assert edits.ablated(b) == ablate
    return edits


@settings(max_examples=120, deadline=None)
@given(
    edit=st.sampled_from(EDITS),
    sign_guard=st.booleans(),
    batch=st.integers(1, 4),
    d_sae_in=st.integers(1, 20),
    d_sae_out=st.integers(1, 20),
    levels=st.sampled_from([1, 2, 4, 100]),
    filled=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    values_dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 2**32 - 1),
    data=st.data(),
)
def test_equals_the_equations_with_many_ties(
    float64_backend: Backend,
    edit: EditKind,
    sign_guard: bool,
    batch: int,
    d_sae_in: int,
    d_sae_out: int,
    levels: int,
    filled: float,
    values_dtype: torch.dtype,
    seed: int,
    data: st.DataObject,
) -> None:
    rng = generator(seed)
    density = integers(rng, 0, levels, batch, d_sae_in) / levels
    A = integers(rng, -levels, levels, d_sae_in, d_sae_out) / 128
    A = torch.where(torch.rand(A.shape, generator=rng) < filled, A, 0).to(values_dtype)
    k_prompt = data.draw(st.integers(0, d_sae_in))
    k_diff = data.draw(st.integers(0, d_sae_out))
    check_lookup(density, A, k_prompt, k_diff, edit, sign_guard, float64_backend)


@pytest.mark.product
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("sign_guard", [False, True])
@pytest.mark.parametrize(("d_sae_in", "d_sae_out"), [(1, 1), (37, 199), (199, 37), (513, 513)])
def test_float32(backend: Backend, d_sae_in: int, d_sae_out: int, sign_guard: bool, edit: EditKind) -> None:
    """Sparse maps on a grid (ties) and off it, scores added in float32 in ascending order of the rows."""
    rng = generator(d_sae_in)
    density = (integers(rng, 0, 12, 5, d_sae_in) / 12).float()
    for A in (integers(rng, -3, 3, d_sae_in, d_sae_out) / 64, normal(rng, d_sae_in, d_sae_out) / 8):
        sparse = torch.where(torch.rand(A.shape, generator=rng) < 0.05, A, 0).float()
        check_lookup(density, sparse, min(32, d_sae_in), min(16, d_sae_out), edit, sign_guard, backend)


@pytest.mark.parametrize("batch", [1, 2, 7, 33, 64])
def test_a_row_depends_on_nothing_else_in_the_batch(backend: Backend, batch: int) -> None:
    rng = generator(batch)
    conditional_map = dense_map((normal(rng, 30, 40) / 8).float()).to(backend.device)
    density = torch.rand(batch, 30, generator=rng).to(backend.device)
    whole = lookup(density, conditional_map, 8, 5, "both", backend=backend.name)
    again = lookup(density, conditional_map, 8, 5, "both", backend=backend.name)
    for row in {0, 1 % batch, batch // 2, batch - 1}:
        alone = lookup(density[row : row + 1], conditional_map, 8, 5, "both", backend=backend.name)
        for lists in (whole, again):
            for field in ("latents", "signs", "counts"):
                assert torch.equal(getattr(lists, field)[row], getattr(alone, field)[0])


A_SMALL = torch.tensor(
    [
        [4.0, -1.0, 0.0, 2.0, -3.0],
        [0.0, -1.0, 0.0, 2.0, -3.0],
        [0.0, 0.0, 0.0, 0.0, 0.0],
        [-4.0, 3.0, 0.0, 0.0, 7.0],
    ]
)
# density, k_prompt, k_diff, edit, sign_guard -> augment, ablate
TABLE: dict[str, tuple[list[float], int, int, EditKind, bool, list[int], list[int]]] = {
    "densest row decides": ([0.1, 0.9, 0.0, 0.2], 1, 2, "both", False, [3, 0], [4, 1]),
    "tied density takes the lower latent": ([0.5, 0.5, 0.5, 0.5], 1, 1, "both", False, [0], [4]),
    "rows add up": ([0.9, 0.0, 0.0, 0.8], 2, 2, "both", False, [4, 1], [0, 2]),
    "tied scores take the lower latent": ([0.0, 0.0, 1.0, 0.0], 1, 2, "ablate", False, [], [0, 1]),
    "tied scores, augment": ([0.0, 0.0, 1.0, 0.0], 1, 2, "augment", False, [0, 1], []),
    "in both sets is in neither": ([0.0, 0.0, 1.0, 0.0], 1, 2, "both", False, [], []),
    "partly in both": ([0.0, 1.0, 0.0, 0.0], 1, 3, "both", False, [3, 2], [4, 1]),
    "sign guard drops zeros": ([0.0, 1.0, 0.0, 0.0], 1, 4, "both", True, [3], [4, 1]),
    "sign guard drops the wrong sign": ([0.0, 1.0, 0.0, 0.0], 1, 5, "ablate", True, [], [4, 1]),
    "literal bottom-k keeps the wrong sign": ([0.0, 1.0, 0.0, 0.0], 1, 5, "ablate", False, [], [4, 1, 0, 2, 3]),
    "k_diff = 0": ([0.1, 0.9, 0.0, 0.2], 1, 0, "both", False, [], []),
    "k_prompt = 0": ([0.1, 0.9, 0.0, 0.2], 0, 2, "ablate", False, [], [0, 1]),
    "k_prompt = 0, guarded": ([0.1, 0.9, 0.0, 0.2], 0, 2, "ablate", True, [], []),
    "silent prompt": ([0.0, 0.0, 0.0, 0.0], 2, 2, "ablate", False, [], [4, 1]),
    "all of everything": ([0.1, 0.9, 0.0, 0.2], 4, 5, "ablate", False, [], [0, 2, 1, 4, 3]),
}


@pytest.mark.parametrize("case", TABLE)
def test_by_hand(backend: Backend, case: str) -> None:
    density, k_prompt, k_diff, edit, sign_guard, augment, ablate = TABLE[case]
    edits = check_lookup(torch.tensor([density]), A_SMALL, k_prompt, k_diff, edit, sign_guard, backend)
    assert (edits.augmented(0), edits.ablated(0)) == (augment, ablate)


def test_rows_are_added_in_ascending_order(backend: Backend) -> None:
    """2^24 + 1 - 2^24 is 0 in float32, 2^24 - 2^24 + 1 is 1: the order of the densities must not decide."""
    A = torch.tensor([[2.0**24, 0.5], [1.0, 0.0], [-(2.0**24), 0.0]])
    for density in ([0.9, 0.1, 0.5], [0.1, 0.5, 0.9], [0.5, 0.9, 0.1], [0.3, 0.3, 0.3]):
        assert check_lookup(torch.tensor([density]), A, 3, 1, "augment", False, backend).augmented(0) == [1]


@pytest.mark.parametrize("edit", EDITS)
def test_map_without_entries(backend: Backend, edit: EditKind) -> None:
    density = torch.rand(3, 6, generator=generator(0))
    check_lookup(density, torch.zeros(6, 9), 4, 3, edit, False, backend)
    assert not check_lookup(density, torch.zeros(6, 9), 4, 3, edit, True, backend).counts.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_density_of_any_dtype_and_stride(backend: Backend, dtype: torch.dtype) -> None:
    A = (integers(generator(0), -3, 3, 20, 15) / 4).float()
    wide = (integers(generator(1), 0, 8, 3, 40) / 8).to(dtype)
    conditional_map = dense_map(A).to(backend.device)
    strided = wide.to(backend.device)[:, ::2]
    contiguous = wide[:, ::2].float().contiguous().to(backend.device)
    found = lookup(strided, conditional_map, 4, 3, "both", backend=backend.name)
    expected = lookup(contiguous, conditional_map, 4, 3, "both", backend=backend.name)
    assert torch.equal(found.latents, expected.latents)
    assert torch.equal(found.counts, expected.counts)


def test_no_prompts(backend: Backend) -> None:
    edits = lookup(
        torch.zeros(0, 4, device=backend.device),
        dense_map(A_SMALL).to(backend.device),
        2,
        3,
        "both",
        backend=backend.name,
    )
    assert edits.latents.shape == (0, 6)
    assert edits.counts.shape == (0,)


def test_a_map_with_an_explicit_zero(backend: Backend) -> None:
    """A stored 0 scores like one that is not stored."""
    stored = CsrMap(torch.tensor([0, 3]), torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([0.0, -1.0, 0.0]), 4)
    edits = lookup(
        torch.ones(1, 1, device=backend.device), stored.check().to(backend.device), 1, 4, backend=backend.name
    )
    assert edits.ablated(0) == [1, 0, 2, 3]


@pytest.mark.parametrize("edit", EDITS)
def test_zeros_of_either_sign_are_tied(backend: Backend, edit: EditKind) -> None:
    """In the densities and in the map: ties go to the lower index, whatever the signs of the zeros."""
    A = torch.tensor([[1.0, 2.0, -3.0, 0.5], [-2.0, 1.0, 0.5, 3.0], [4.0, -1.0, 2.0, -2.0], [0.25, 0.5, -1.0, 1.0]])
    for density in ([-0.0, 0.0, -0.0, 0.0], [0.0, -0.0, 0.0, -0.0], [-0.0, -0.0, 0.0, 0.5], [0.5, -0.0, 0.0, -0.0]):
        for k_prompt in (1, 2, 3):
            check_lookup(torch.tensor([density]), A, k_prompt, 2, edit, False, backend)

    zeros = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    stored = CsrMap(torch.tensor([0, 4]), torch.arange(4, dtype=torch.int32), zeros, 4).check().to(backend.device)
    edits = lookup(torch.ones(1, 1, device=backend.device), stored, 1, 2, edit, backend=backend.name)
    chosen = {"augment": [[0, 1], []], "ablate": [[], [0, 1]], "both": [[], []]}[edit]  # in both sets is in neither
    assert [edits.augmented(0), edits.ablated(0)] == chosen


MAP = dense_map(A_SMALL)
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "density without a batch axis": ({"density": torch.zeros(4)}, r"density is \(4,\); expected \[B, d_sae_in = 4\]"),
    "density of another width": ({"density": torch.zeros(2, 5)}, r"density is \(2, 5\)"),
    "k_prompt negative": ({"k_prompt": -1}, "k_prompt is -1; expected 0 to d_sae_in = 4"),
    "k_prompt too large": ({"k_prompt": 5}, "k_prompt is 5; expected 0 to d_sae_in = 4"),
    "k_diff negative": ({"k_diff": -1}, "k_diff is -1; expected 0 to d_sae_out = 5"),
    "k_diff too large": ({"k_diff": 6}, "k_diff is 6; expected 0 to d_sae_out = 5"),
    "unknown edit": ({"edit": "remove"}, "edit is 'remove'; expected one of ablate, augment, both"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_named(case: str) -> None:
    change, message = REFUSED[case]
    arguments: dict[str, object] = {"density": torch.zeros(2, 4), "conditional_map": MAP, "k_prompt": 2, "k_diff": 2}
    lookup(**arguments)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInputError, match=message) as raised:
        lookup(**(arguments | change))  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(raised.value)


def test_unknown_backend_is_named() -> None:
    with pytest.raises(BackendUnavailableError, match="backend 'fastest' is not known"):
        lookup(torch.zeros(2, 4), MAP, 2, 2, backend="fastest")


def test_take_is_what_it_says() -> None:
    """The oracle's own selection, by hand."""
    values = np.array([1.0, 3.0, 3.0, -2.0, -2.0])
    assert equations.take(values, 3, 1) == [1, 2, 0]
    assert equations.take(values, 3, -1) == [3, 4, 0]
