"""encode_density against the equations: exact where arithmetic is exact, within the undecided gates elsewhere."""

from __future__ import annotations

import itertools
from dataclasses import replace

import equations
import numpy as np
import pytest
import rounding_bounds
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_cases import (
    KINDS,
    LOW_PRECISION,
    Backend,
    Kind,
    as_equations,
    exact,
    generator,
    integers,
    make_integer_sae,
    make_sae,
    normal,
    poisoned_view,
    same_bits,
    with_threshold,
)
from torch import Tensor

from dspa.errors import BackendUnavailableError, InvalidInputError
from dspa.kernels import SaeWeights, encode_density

INTEGER_KINDS = tuple(kind for kind in KINDS if kind.normalization == "none")
DTYPE_PAIRS = [(hidden, weights) for hidden in LOW_PRECISION for weights in LOW_PRECISION]


def name(value: object) -> str:
    return str(value).removeprefix("torch.")


def count(rows: Tensor, offsets: list[int], sae: SaeWeights, backend: Backend) -> Tensor:
    """encode_density on strided rows in NaN surroundings, none of which may be written."""
    view, surroundings = poisoned_view(rows, backend.device)
    before = surroundings.clone()
    counts = encode_density(
        view, torch.tensor(offsets, device=backend.device), sae.to(backend.device), backend=backend.name
    )
    assert same_bits(surroundings, before)
    assert counts.dtype == torch.int32
    assert counts.shape == (len(offsets) - 1, sae.d_sae)
    assert counts.device.type == torch.device(backend.device).type
    return counts.cpu()


def cuts(tokens: int, segments: int, seed: int) -> list[int]:
    """Random offsets, empty segments included."""
    return [0, *sorted(np.random.default_rng(seed).integers(0, tokens + 1, segments - 1).tolist()), tokens]


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    tokens=st.integers(0, 8),
    segments=st.integers(1, 4),
    d_model=st.integers(1, 20),
    d_sae=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_float64_equals_the_equations(
    float64_backend: Backend, kind: Kind, tokens: int, segments: int, d_model: int, d_sae: int, seed: int
) -> None:
    sae = make_sae(kind, d_model, d_sae, torch.float64, seed)
    rows = normal(generator(seed + 1), tokens, d_model) * 3
    offsets = cuts(tokens, segments, seed)
    expected = equations.encode_density(exact(rows), offsets, as_equations(sae))
    assert (count(rows, offsets, sae, float64_backend).numpy() == expected).all()


@pytest.mark.product
@pytest.mark.parametrize(("hidden_dtype", "sae_dtype"), DTYPE_PAIRS, ids=name)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_low_precision_is_within_rounding(
    backend: Backend, kind: Kind, hidden_dtype: torch.dtype, sae_dtype: torch.dtype
) -> None:
    u = rounding_bounds.UNIT_ROUNDOFF[torch.float32]
    for number, (tokens, d_model, d_sae) in enumerate([(3, 1, 37), (9, 37, 129), (5, 199, 1)]):
        sae = make_sae(kind, d_model, d_sae, sae_dtype, seed=number)
        rows = (normal(generator(50 + number), tokens, d_model) * 3).to(hidden_dtype)
        offsets = cuts(tokens, 3, seed=number)
        counts = count(rows, offsets, sae, backend).numpy()
        least, most = rounding_bounds.density_range(exact(rows), offsets, as_equations(sae), u)
        assert ((least <= counts) & (counts <= most)).all()


@pytest.mark.product
@pytest.mark.parametrize(("hidden_dtype", "sae_dtype"), DTYPE_PAIRS, ids=name)
@pytest.mark.parametrize("kind", INTEGER_KINDS, ids=str)
def test_exact_arithmetic_gives_exact_counts(
    backend: Backend, kind: Kind, hidden_dtype: torch.dtype, sae_dtype: torch.dtype
) -> None:
    """Values on the threshold do not count, tied ranks go to the lower index."""
    for number, (tokens, d_model, d_sae) in enumerate([(4, 1, 1), (9, 5, 37), (6, 37, 70)]):
        sae = make_integer_sae(kind, d_model, d_sae, sae_dtype, seed=number)
        rows = integers(generator(number), -3, 3, tokens, d_model).to(hidden_dtype)
        offsets = cuts(tokens, 3, seed=number)
        expected = equations.encode_density(exact(rows), offsets, as_equations(sae))
        assert (count(rows, offsets, sae, backend).numpy() == expected).all()


@pytest.mark.long
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name)
def test_many_tokens(backend: Backend, dtype: torch.dtype) -> None:
    """More tokens than any block, segments that end inside one."""
    sae = make_integer_sae(Kind(), 3, 37, dtype, seed=0)
    rows = integers(generator(1), -3, 3, 1300, 3).to(dtype)
    offsets = [0, 0, 1, 511, 512, 513, 1100, 1100, 1300]
    z = exact(rows) @ exact(sae.W_enc).T + exact(sae.b_enc)
    active = (z > exact(sae.threshold)) & (z > 0)
    expected = [active[start:end].sum(axis=0) for start, end in itertools.pairwise(offsets)]
    assert (count(rows, offsets, sae, backend).numpy() == np.array(expected)).all()


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_segmentation_does_not_matter(backend: Backend, kind: Kind) -> None:
    """The same tokens, however they are cut, give the same total."""
    sae = make_sae(kind, 37, 70, torch.bfloat16, seed=0)
    rows = (normal(generator(1), 24, 37) * 3).bfloat16()
    whole = count(rows, [0, 24], sae, backend)[0]
    for offsets in ([0, 1, 24], [0, 0, 7, 7, 20, 24, 24], list(range(25))):
        assert torch.equal(count(rows, offsets, sae, backend).sum(dim=0), whole)
    shuffled = rows[torch.randperm(24, generator=generator(2))]
    assert torch.equal(count(shuffled, [0, 24], sae, backend)[0], whole)


def boundary_case(hidden_dtype: torch.dtype) -> tuple[Tensor, SaeWeights]:
    """Thresholds at the float32 value that z has on some token: the last bit of z decides."""
    sae = make_sae(Kind(), 131, 64, torch.float32, seed=0)
    rows = normal(generator(1), 64, 131).to(hidden_dtype)
    z = exact(rows) @ exact(sae.W_enc).T + exact(sae.b_enc)
    return rows, with_threshold(sae, torch.from_numpy(np.abs(z[np.arange(64), np.arange(64)])))


@pytest.mark.parametrize("hidden_dtype", LOW_PRECISION, ids=name)
def test_gates_on_the_boundary(backend: Backend, hidden_dtype: torch.dtype) -> None:
    rows, sae = boundary_case(hidden_dtype)
    u = rounding_bounds.UNIT_ROUNDOFF[torch.float32]
    for offsets in ([0, 64], [0, 1, 64], list(range(65))):
        counts = count(rows, offsets, sae, backend).numpy()
        least, most = rounding_bounds.density_range(exact(rows), offsets, as_equations(sae), u)
        assert (least < most).any(), "no gate is undecided: the test tests nothing"
        assert ((least <= counts) & (counts <= most)).all()


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16], ids=name)
def test_gates_on_the_boundary_do_not_depend_on_the_segmentation(backend: Backend, hidden_dtype: torch.dtype) -> None:
    if backend.name == "reference":
        pytest.skip("the rounding of torch's matrix product may depend on how many rows it has")
    rows, sae = boundary_case(hidden_dtype)
    whole = count(rows, [0, 64], sae, backend)[0]
    assert torch.equal(count(rows, list(range(65)), sae, backend).sum(dim=0), whole)


@pytest.mark.long
@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("relu", "layer_norm")], ids=str)
def test_runs_repeat(backend: Backend, kind: Kind) -> None:
    sae = make_sae(kind, 37, 70, torch.float16, seed=0)
    rows = (normal(generator(1), 40, 37) * 3).half()
    assert torch.equal(count(rows, [0, 13, 40], sae, backend), count(rows, [0, 13, 40], sae, backend))


@pytest.mark.product
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=name)
@pytest.mark.parametrize("kind", [Kind("relu"), Kind("topk"), Kind("gated", "layer_norm")], ids=str)
def test_nonfinite_tokens_activate_nothing(backend: Backend, kind: Kind, dtype: torch.dtype) -> None:
    sae = make_sae(kind, 37, 70, dtype, seed=0)
    rows = (normal(generator(1), 12, 37) * 3).to(dtype)
    bad = [0, 5, 6, 11]
    spoiled = rows.clone()
    for row, value in zip(bad, (torch.nan, torch.inf, -torch.inf, torch.nan), strict=True):
        spoiled[row, row] = value
    spoiled[5] = torch.nan
    each = count(rows, list(range(13)), sae, backend)
    each[bad] = 0
    assert torch.equal(count(spoiled, list(range(13)), sae, backend), each)
    assert torch.equal(count(spoiled, [0, 6, 12], sae, backend), torch.stack([each[:6].sum(0), each[6:].sum(0)]).int())


def test_zero_vector_without_a_norm_activates_nothing(backend: Backend) -> None:
    sae = replace(make_sae(Kind("relu", "constant_norm_rescale"), 8, 16, torch.float32, 0), b_enc=torch.ones(16))
    assert not count(torch.zeros(2, 8), [0, 2], sae, backend).any()


def test_nothing_active(backend: Backend) -> None:
    sae = with_threshold(make_sae(Kind(), 8, 16, torch.float32, 0), torch.full((16,), 1e9))
    assert not count(normal(generator(0), 5, 8).float(), [0, 2, 5], sae, backend).any()


@pytest.mark.parametrize("offsets", [[0], [0, 0], [0, 0, 0]], ids=str)
def test_no_tokens(backend: Backend, offsets: list[int]) -> None:
    sae = make_sae(Kind(), 8, 16, torch.float32, 0)
    assert not count(torch.zeros(0, 8), offsets, sae, backend).any()


def test_segments_need_not_cover_all_tokens(backend: Backend) -> None:
    sae = make_sae(Kind(), 8, 16, torch.float32, 0)
    rows = normal(generator(0), 9, 8).float()
    whole = count(rows, list(range(10)), sae, backend)
    assert torch.equal(count(rows, [2, 5, 7], sae, backend), torch.stack([whole[2:5].sum(0), whole[5:7].sum(0)]).int())


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=name)
def test_offsets_of_either_width(backend: Backend, dtype: torch.dtype) -> None:
    sae = make_sae(Kind(), 8, 16, torch.float32, 0).to(backend.device)
    rows = normal(generator(0), 9, 8).float().to(backend.device)
    counts = encode_density(rows, torch.tensor([0, 4, 9], dtype=dtype, device=rows.device), sae, backend=backend.name)
    assert torch.equal(counts.cpu(), count(rows.cpu(), [0, 4, 9], sae.to("cpu"), backend))


def test_an_input_sae_needs_no_decoder(backend: Backend) -> None:
    sae = make_sae(Kind(), 8, 16, torch.bfloat16, 0)
    rows = normal(generator(0), 5, 8).bfloat16()
    assert torch.equal(
        count(rows, [0, 5], replace(sae, W_dec=None, b_dec=None), backend), count(rows, [0, 5], sae, backend)
    )


SAE = make_sae(Kind(), 8, 16, torch.float32, seed=0)
REFUSED: dict[str, tuple[dict[str, object], str]] = {
    "hidden with three axes": (
        {"hidden": torch.zeros(2, 1, 8)},
        r"hidden is \(2, 1, 8\) .*; expected \[N, d_model = 8\]",
    ),
    "hidden of another width": ({"hidden": torch.zeros(2, 7)}, r"hidden is \(2, 7\)"),
    "hidden of integers": ({"hidden": torch.zeros(2, 8, dtype=torch.int64)}, "hidden is .*torch.int64"),
    "one token without its axis": ({"hidden": torch.zeros(8)}, r"hidden is \(8,\)"),
    "offsets as a column": ({"offsets": torch.zeros(2, 1, dtype=torch.int64)}, r"offsets are \(2, 1\)"),
    "no offsets": ({"offsets": torch.zeros(0, dtype=torch.int64)}, r"offsets are \(0,\)"),
    "offsets that are not integers": ({"offsets": torch.zeros(2)}, r"offsets are \(2,\) torch.float32"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_arguments_are_named(case: str) -> None:
    change, message = REFUSED[case]
    arguments: dict[str, object] = {"hidden": torch.zeros(2, 8), "offsets": torch.tensor([0, 2]), "sae": SAE}
    encode_density(**arguments)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInputError, match=message) as raised:
        encode_density(**(arguments | change))  # pyright: ignore[reportArgumentType]
    assert "\n" not in str(raised.value)


def test_unknown_backend_is_named() -> None:
    with pytest.raises(BackendUnavailableError, match="backend 'fastest' is not known"):
        encode_density(torch.zeros(2, 8), torch.tensor([0, 2]), SAE, backend="fastest")
