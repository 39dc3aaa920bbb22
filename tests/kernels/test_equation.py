"""The equation of the edit (docs/method.md, section 4), and its gradient."""

from __future__ import annotations

import math

import pytest
import torch

from dspa.kernels.token_step.equation import edited_activations


@pytest.mark.parametrize(
    ("activation", "sign", "alpha", "maximum", "expected"),
    [
        (3.0, -1, 0.5, 4.0, 1.0),
        (2.0, -1, 0.5, 4.0, 0.0),
        (1.0, -1, 0.5, 4.0, 0.0),
        (1.0, 1, 0.5, 4.0, 3.0),
        (0.0, 1, 0.5, 4.0, 0.0),
        (0.0, -1, 0.5, 4.0, 0.0),
        (3.0, 0, 0.5, 4.0, 3.0),
        (3.0, 1, 0.0, 4.0, 3.0),
        (math.inf, 1, 0.5, math.inf, math.inf),
    ],
)
def test_one_activation(activation: float, sign: int, alpha: float, maximum: float, expected: float) -> None:
    selected, signs = torch.tensor([activation]), torch.tensor([sign], dtype=torch.int8)
    assert edited_activations(selected, signs, alpha, torch.tensor(maximum)).item() == expected


def test_each_row_has_its_own_alpha_and_maximum() -> None:
    selected = torch.tensor([[3.0, 1.0], [3.0, 1.0]])
    signs = torch.tensor([[-1, 1], [-1, 1]], dtype=torch.int8)
    edited = edited_activations(selected, signs, torch.tensor([0.5, 0.25]), torch.tensor([4.0, 8.0]))
    assert edited.tolist() == [[1.0, 3.0], [1.0, 3.0]]
    assert edited_activations(selected, signs, 0.5, torch.tensor([4.0, 8.0])).tolist() == [[1.0, 3.0], [0.0, 5.0]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_is_that_of_the_activations(dtype: torch.dtype) -> None:
    edited = edited_activations(torch.ones(2, 3, dtype=dtype), torch.ones(2, 3), 0.1, torch.ones(2, dtype=dtype))
    assert edited.dtype == dtype
    assert edited[0, 0] == 1 + torch.tensor(0.1, dtype=dtype)


def test_gradients_reach_activations_alpha_and_maximum() -> None:
    selected = torch.tensor([[3.0, 1.0, 2.0, 0.0, 5.0]], dtype=torch.float64, requires_grad=True)
    signs = torch.tensor([[-1, -1, 1, 1, 0]], dtype=torch.int8)
    alpha = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    maximum = torch.tensor([4.0], dtype=torch.float64, requires_grad=True)
    edited_activations(selected, signs, alpha, maximum).sum().backward()
    assert selected.grad is not None
    assert selected.grad.tolist() == [[1.0, 0.0, 1.0, 1.0, 1.0]]
    assert alpha.grad is not None
    assert alpha.grad.tolist() == [0.0], "-M_t of the lowered latent and +M_t of the raised one"
    assert maximum.grad is not None
    assert maximum.grad.tolist() == [0.0]
