"""The differentiable adapter step: values and gradients against autograd through the equations written out."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import SAE_KINDS, SaeKind, tiny_sae
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels import AdapterWeights, adapter_step
from dspa.kernels.adapter_step import differentiable
from dspa.kernels.adapter_step.differentiable import differentiable_adapter_step
from dspa.sae.autoencoder import SparseAutoencoder

TOKENS, D_MODEL, D_SAE = 7, 24, 56
BANDWIDTH = 0.05
VERSIONS = [("soft_threshold", True), ("soft_threshold", False), ("relu", False), ("relu", True), ("jump_relu", False)]
FORMS = {"sparse": 1.0, "dense": -1.0, "both": 0.2}  # share of firing latents from which on a chunk is dense


def random(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def adapter(activation: Any, clip: bool, *, seed: int = 0) -> AdapterWeights:
    """About half of the latents fire under soft_threshold, fewer in later tokens of `states`."""
    threshold = random(D_SAE, seed=seed + 2).abs() * 0.5
    return AdapterWeights(
        weight=random(D_SAE, D_MODEL, seed=seed, scale=D_MODEL**-0.5),
        bias=random(D_SAE, seed=seed + 1, scale=0.2),
        threshold=torch.zeros_like(threshold) if activation == "relu" else threshold,
        activation=activation,
        clip=clip,
    )


def states() -> Tensor:
    """Tokens of falling size, so that fewer and fewer latents fire."""
    return random(TOKENS, D_MODEL, seed=9) * torch.linspace(2.0, 0.2, TOKENS, dtype=torch.float64)[:, None]


def trained(weights: AdapterWeights) -> AdapterWeights:
    return replace(
        weights,
        weight=weights.weight.clone().requires_grad_(),
        bias=weights.bias.clone().requires_grad_(),
        threshold=weights.threshold.clone().requires_grad_(),
    )


class RectangleJump(torch.autograd.Function):
    """The jump of section 6 with its straight-through gradient, written out once more."""

    @staticmethod
    def forward(ctx: Any, r: Tensor, theta: Tensor) -> Tensor:
        ctx.save_for_backward(r, theta)
        return r * (r > theta)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        r, theta = ctx.saved_tensors
        window = ((r - theta) / BANDWIDTH).abs() < 0.5
        return gradients[0] * (r > theta), (-theta / BANDWIDTH * window * gradients[0]).sum(dim=0)


def written_out(h: Tensor, sae: SparseAutoencoder, a: AdapterWeights) -> tuple[Tensor, Tensor]:
    """h' = decode(u) + (h - decode(f)) as the paper has it, and the l1 norm of v."""
    x = h - sae.b_dec if sae.subtract_b_dec else h  # type: ignore[operator]
    product = x @ sae.W_enc.T
    z = product + sae.b_enc
    if sae.activation == "gated":
        f = (product * sae.magnitude_scale + sae.magnitude_bias).relu() * (z > 0)  # type: ignore[operator]
    elif sae.activation == "topk":
        kept = z.topk(sae.k or 1, dim=1).indices
        f = torch.zeros_like(z).scatter(1, kept, z.gather(1, kept).relu())
    else:
        f = z.relu() * (z > sae.threshold)
    y = x @ a.weight.T + a.bias
    if a.activation == "soft_threshold":
        v = y.sign() * (y.abs() - a.threshold).relu()
    elif a.activation == "relu":
        v = y.relu()
    else:
        v = RectangleJump.apply(y.relu(), a.threshold)
    assert isinstance(v, Tensor)
    u = (f + v).relu() if a.clip else f + v
    assert sae.W_dec is not None
    assert sae.b_dec is not None
    decoded, clean = u @ sae.W_dec + sae.b_dec, f @ sae.W_dec + sae.b_dec
    return decoded + (h - clean), v.abs().sum(dim=1)


def loss(hidden: Tensor, l1: Tensor) -> Tensor:
    """Something in which every output has its own gradient."""
    return (
        (hidden * random(*hidden.shape, seed=20)).sum() + hidden.square().mean() + (l1 * random(TOKENS, seed=21)).sum()
    )


@pytest.mark.product
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", SAE_KINDS)
@pytest.mark.parametrize(("activation", "clip"), VERSIONS)
def test_values_and_gradients_equal_those_of_the_equations(
    activation: Any, clip: bool, kind: SaeKind, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(differentiable, "CHUNK_ELEMENTS", 2 * D_SAE)  # two tokens a chunk, the last one alone
    sae, h = tiny_sae(kind), states()
    ours, theirs = trained(adapter(activation, clip)), trained(adapter(activation, clip))
    found = differentiable_adapter_step(h, sae, ours, bandwidth=BANDWIDTH, dense_above=FORMS[form])
    hidden, l1 = written_out(h, sae, theirs)
    torch.testing.assert_close(found.hidden, hidden, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.l1, l1, rtol=1e-12, atol=1e-12)
    loss(found.hidden, found.l1).backward()
    loss(hidden, l1).backward()
    for name in ("weight", "bias") if activation == "relu" else ("weight", "bias", "threshold"):
        gradient = getattr(theirs, name).grad
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(getattr(ours, name).grad, gradient, rtol=1e-11, atol=1e-12)


@pytest.mark.long
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("clip", [True, False])
def test_gradcheck(form: str, clip: bool) -> None:
    sae, weights = tiny_sae("jumprelu"), adapter("soft_threshold", clip)
    h = states()[:3]

    def function(weight: Tensor, bias: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
        a = replace(weights, weight=weight, bias=bias, threshold=threshold)
        step = differentiable_adapter_step(h, sae, a, dense_above=FORMS[form])
        return step.hidden, step.l1

    inputs = trained(weights)
    assert torch.autograd.gradcheck(function, (inputs.weight, inputs.bias, inputs.threshold))


@pytest.mark.parametrize("kind", SAE_KINDS)
def test_gradients_reach_the_hidden_states_where_they_are_asked_for(kind: SaeKind) -> None:
    sae, weights = tiny_sae(kind), adapter("soft_threshold", True)
    inputs = [states().requires_grad_() for _ in range(2)]
    found = differentiable_adapter_step(inputs[0], sae, weights)
    loss(found.hidden, found.l1).backward()
    loss(*written_out(inputs[1], sae, weights)).backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("fraction", [None, 0.1])
@pytest.mark.parametrize(("activation", "clip"), VERSIONS)
def test_the_value_is_that_of_the_operation(activation: Any, clip: bool, fraction: float | None) -> None:
    sae, weights, expected = tiny_sae("jumprelu"), adapter(activation, clip), states()
    enabled = torch.tensor([True, False, True, True, False, True, True])
    found = differentiable_adapter_step(states(), sae, weights, enabled, steering_fraction=fraction)
    adapter_step(expected, sae, weights, enabled, steering_fraction=fraction, backend="reference")
    torch.testing.assert_close(found.hidden, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(found.hidden[~enabled], states()[~enabled])
    assert found.l1[~enabled].tolist() == [0, 0]
    assert (found.l0[enabled] > 0).all()


def test_a_negative_threshold_counts_as_zero_and_learns_nothing() -> None:
    sae, weights = tiny_sae("jumprelu"), adapter("soft_threshold", True)
    negative = trained(replace(weights, threshold=-weights.threshold))
    zero = trained(replace(weights, threshold=torch.zeros_like(weights.threshold)))
    steps = [differentiable_adapter_step(states(), sae, a) for a in (negative, zero)]
    assert torch.equal(steps[0].hidden, steps[1].hidden)
    for step in steps:
        loss(step.hidden, step.l1).backward()
    assert torch.equal(negative.weight.grad, zero.weight.grad)  # type: ignore[arg-type]
    assert not negative.threshold.grad.any()  # type: ignore[union-attr]
    assert zero.threshold.grad.any()  # type: ignore[union-attr]


def test_masked_latents_stay_out_and_learn_nothing() -> None:
    sae, weights = tiny_sae("jumprelu"), adapter("soft_threshold", True)
    threshold = weights.threshold.clone()
    threshold[::2] = torch.inf
    masked = trained(replace(weights, threshold=threshold))
    step = differentiable_adapter_step(states(), sae, masked)
    loss(step.hidden, step.l1).backward()
    for gradient in (masked.weight.grad, masked.bias.grad, masked.threshold.grad):
        assert gradient is not None
        assert not gradient[::2].any()
        assert gradient[1::2].any()


class Kept:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_memory_grows_with_active_latents() -> None:
    """What the backward pass keeps of a sparse step: entries, not a [T, d_sae] matrix."""
    sae, weights = tiny_sae("jumprelu"), adapter("soft_threshold", True)
    weights = trained(replace(weights, threshold=weights.threshold + 0.5))
    kept = weakref.WeakSet[Kept]()

    def pack(tensor: Tensor) -> Kept:
        wrapped = Kept(tensor)
        kept.add(wrapped)
        return wrapped

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda wrapped: wrapped.tensor):
        step = differentiable_adapter_step(0.2 * states(), sae, weights, dense_above=1.0)
    gc.collect()
    entries, parameters = int(step.l0.sum()), D_SAE * D_MODEL + 2 * D_SAE
    assert 0 < 5 * entries < TOKENS * D_SAE
    assert sum(each.tensor.numel() for each in kept) <= parameters + 5 * entries + TOKENS * D_MODEL + 2 * TOKENS


def test_a_compact_decoder_is_refused() -> None:
    sae = tiny_sae("jumprelu").with_decoder_rows(torch.arange(5))
    with pytest.raises(InvalidInputError, match="needs every decoder row"):
        differentiable_adapter_step(states(), sae, adapter("soft_threshold", True))
