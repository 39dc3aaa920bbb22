"""The equations of the adapter (docs/method.md, section 6), and their gradients."""

from __future__ import annotations

import math

import pytest
import torch

from dspa.kernels import AdapterActivation
from dspa.kernels.adapter_step.equation import clipped, steering_activations


@pytest.mark.parametrize(
    ("activation", "y", "threshold", "expected"),
    [
        ("soft_threshold", 3.0, 1.0, 2.0),
        ("soft_threshold", -3.0, 1.0, -2.0),
        ("soft_threshold", 1.0, 1.0, 0.0),
        ("soft_threshold", -0.5, 1.0, 0.0),
        ("soft_threshold", -3.0, -1.0, -3.0),
        ("soft_threshold", 9.0, math.inf, 0.0),
        ("soft_threshold", math.nan, math.inf, 0.0),
        ("soft_threshold", -math.inf, 1.0, -math.inf),
        ("relu", 3.0, 0.0, 3.0),
        ("relu", -3.0, 0.0, 0.0),
        ("relu", 9.0, math.inf, 0.0),
        ("jump_relu", 3.0, 1.0, 3.0),
        ("jump_relu", 1.0, 1.0, 0.0),
        ("jump_relu", -0.5, -1.0, 0.0),
        ("jump_relu", math.inf, math.inf, 0.0),
    ],
)
def test_one_latent(activation: AdapterActivation, y: float, threshold: float, expected: float) -> None:
    v = steering_activations(torch.tensor([[y]]), torch.tensor([threshold]), activation)
    assert v.item() == expected


@pytest.mark.parametrize("activation", ["soft_threshold", "relu", "jump_relu"])
def test_nan_stays_nan(activation: AdapterActivation) -> None:
    assert steering_activations(torch.tensor([math.nan]), torch.tensor([0.5]), activation).isnan().all()


@pytest.mark.parametrize(("v", "f", "expected"), [(2.0, 3.0, 2.0), (-2.0, 3.0, -2.0), (-2.0, 1.5, -1.5), (-2.0, 0, 0)])
def test_the_clip_is_relu_of_the_sum(v: float, f: float, expected: float) -> None:
    delta = clipped(torch.tensor(v), torch.tensor(float(f)))
    assert delta.item() == expected
    assert f + delta.item() == max(f + v, 0)


def test_gradients_of_the_soft_threshold() -> None:
    """dv/dy = 1 and dv/dtheta = -sign(y) where a latent fires; 0 where it does not, is masked, or theta is clamped."""
    y = torch.tensor([[3.0, -3.0, 0.5, 3.0, 3.0]], dtype=torch.float64, requires_grad=True)
    threshold = torch.tensor([1.0, 1.0, 1.0, -1.0, math.inf], dtype=torch.float64, requires_grad=True)
    steering_activations(y, threshold, "soft_threshold").sum().backward()
    assert y.grad is not None
    assert y.grad.tolist() == [[1.0, 1.0, 0.0, 1.0, 0.0]]
    assert threshold.grad is not None
    assert threshold.grad.tolist() == [-1.0, 1.0, 0.0, 0.0, 0.0]


def test_gradients_of_the_clip() -> None:
    v = torch.tensor([2.0, -2.0, -2.0], dtype=torch.float64, requires_grad=True)
    f = torch.tensor([1.0, 3.0, 1.0], dtype=torch.float64, requires_grad=True)
    clipped(v, f).sum().backward()
    assert v.grad is not None
    assert v.grad.tolist() == [1.0, 1.0, 0.0]
    assert f.grad is not None
    assert f.grad.tolist() == [0.0, 0.0, -1.0]
