"""What a set of SAE weights refuses, and what it tells."""

from __future__ import annotations

from dataclasses import replace

import equations
import numpy as np
import pytest
import torch
from kernel_cases import KINDS, Kind, as_equations, exact, generator, make_sae, normal

from dspa.errors import UnsupportedSaeError
from dspa.kernels import SaeWeights
from dspa.sae.encode import compute_dtype, encode

PLAIN = make_sae(Kind(), 8, 16, torch.bfloat16, seed=0)
GATED = make_sae(Kind("gated"), 8, 16, torch.float32, seed=0)
COMPACT = make_sae(Kind(compact=True), 8, 16, torch.float32, seed=0)
TOPK = make_sae(Kind("topk"), 8, 16, torch.float32, seed=0)

REFUSED: dict[str, tuple[SaeWeights, dict[str, object], str]] = {
    "unknown activation": (PLAIN, {"activation": "swish"}, "activation 'swish' is not known; expected one of jumprelu"),
    "unknown normalization": (PLAIN, {"normalization": "batch"}, "input normalization 'batch' is not known"),
    "W_enc with one axis": (PLAIN, {"W_enc": torch.zeros(8).bfloat16()}, r"W_enc is \(8,\)"),
    "W_enc of integers": (PLAIN, {"W_enc": torch.zeros(16, 8, dtype=torch.int8)}, "W_enc is .* torch.int8"),
    "W_enc transposed in memory": (PLAIN, {"W_enc": torch.zeros(8, 16).bfloat16().T}, r"W_enc .*\(not contiguous\)"),
    "W_dec of another shape": (PLAIN, {"W_dec": torch.zeros(15, 8).bfloat16()}, r"W_dec is \(15, 8\)"),
    "W_dec scalar beside decoder rows": (COMPACT, {"W_dec": torch.zeros(())}, r"W_dec is \(\)"),
    "W_dec of another dtype": (PLAIN, {"W_dec": torch.zeros(16, 8)}, "W_dec is .* torch.float32"),
    "b_enc too short": (PLAIN, {"b_enc": torch.zeros(15)}, r"b_enc is \(15,\)"),
    "b_enc in bfloat16": (PLAIN, {"b_enc": torch.zeros(16).bfloat16()}, "b_enc is .* torch.bfloat16"),
    "threshold scalar": (PLAIN, {"threshold": torch.zeros(())}, "threshold is "),
    "threshold expanded": (PLAIN, {"threshold": torch.zeros(1).expand(16)}, r"threshold .*\(not contiguous\)"),
    "b_dec of width d_sae": (PLAIN, {"b_dec": torch.zeros(16)}, r"b_dec is \(16,\)"),
    "b_dec missing": (PLAIN, {"b_dec": None, "subtract_b_dec": True}, "b_dec is missing"),
    "decoder rows in int64": (PLAIN, {"decoder_rows": torch.zeros(16, dtype=torch.int64)}, "decoder_rows is "),
    "k for jumprelu": (PLAIN, {"k": 3}, "k is 3 for a jumprelu SAE"),
    "topk without k": (TOPK, {"k": None}, "k is None for a topk SAE"),
    "k = 0": (TOPK, {"k": 0}, "k is 0; expected 1 to d_sae = 16"),
    "k too large": (TOPK, {"k": 17}, "k is 17; expected 1 to d_sae = 16"),
    "gated without a scale": (GATED, {"magnitude_scale": None}, "belong to gated SAEs"),
    "gated without a bias": (GATED, {"magnitude_bias": None}, "belong to gated SAEs"),
    "gates for jumprelu": (PLAIN, {"magnitude_scale": torch.ones(16), "magnitude_bias": torch.ones(16)}, "belong to"),
    "decoder norm too short": (TOPK, {"decoder_norm": torch.ones(8)}, r"decoder_norm is \(8,\)"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_represented_is_refused(case: str) -> None:
    sae, change, message = REFUSED[case]
    with pytest.raises(UnsupportedSaeError, match=message) as raised:
        replace(sae, **change)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_what_it_tells(kind: Kind, dtype: torch.dtype) -> None:
    sae = make_sae(kind, 8, 16, dtype, seed=0)
    assert (sae.d_sae, sae.d_model, sae.dtype, sae.device) == (16, 8, dtype, torch.device("cpu"))
    assert sae.to("cpu") is sae
    assert ("decoder_rows" in sae.tensors()) == kind.compact
    assert ("decoder_norm" in sae.tensors()) == kind.rescaled
    assert all(tensor.dtype in (dtype, sae.b_enc.dtype, torch.int32) for tensor in sae.tensors().values())


def test_to_moves_every_tensor_and_keeps_the_meaning() -> None:
    sae = make_sae(Kind("topk", "layer_norm", True, True, True), 8, 16, torch.float32, seed=0)
    moved = sae.to("meta")
    assert moved.tensors().keys() == sae.tensors().keys()
    assert all(tensor.device.type == "meta" for tensor in moved.tensors().values())
    meaning = ("activation", "k", "normalization", "subtract_b_dec")
    assert [getattr(moved, field) for field in meaning] == [getattr(sae, field) for field in meaning]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_encode_equals_the_equations(kind: Kind) -> None:
    """Leading axes included."""
    sae = make_sae(kind, 11, 23, torch.float64, seed=3)
    hidden = normal(generator(4), 2, 3, 11) * 3
    f = exact(encode(hidden, sae))
    assert f.shape == (2, 3, 23)
    given_sae = as_equations(sae)
    for b in range(2):
        for t in range(3):
            expected = equations.encode(exact(hidden[b, t]), given_sae)
            assert ((f[b, t] > 0) == (expected > 0)).all()
            assert np.abs(f[b, t] - expected).max() <= 1e-12 * expected.max()


@pytest.mark.parametrize("k", [1, 5, 16])
def test_topk_keeps_no_negative_value(k: int) -> None:
    sae = replace(TOPK, k=k, b_enc=torch.full((16,), -1e3))
    assert not encode(normal(generator(0), 4, 8).float(), sae).any()


def test_topk_keeps_k_beside_nan() -> None:
    b_enc = torch.full((16,), 1e3)
    b_enc[3] = torch.nan
    found = encode(normal(generator(0), 4, 8).float(), replace(TOPK, k=15, b_enc=b_enc))
    assert ((found > 0).sum(dim=-1) == 15).all()
    assert (found[:, 3] == 0).all()


@pytest.mark.parametrize(
    ("dtypes", "expected"),
    [
        ([torch.bfloat16, torch.bfloat16], torch.float32),
        ([torch.float16, torch.float32], torch.float32),
        ([torch.float64, torch.bfloat16], torch.float64),
        ([torch.bfloat16, torch.float64], torch.float64),
    ],
)
def test_what_is_accumulated_in(dtypes: list[torch.dtype], expected: torch.dtype) -> None:
    assert compute_dtype(*(torch.zeros(1, dtype=dtype) for dtype in dtypes)) == expected
