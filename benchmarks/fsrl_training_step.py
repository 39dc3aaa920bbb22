"""A training step of the adapter, fused and in plain autograd: time, and the memory kept for the backward pass.

    python benchmarks/fsrl_training_step.py [--tokens 2048] [--d-sae 16384] [--active 115] [--out FILE]

Plain autograd is the original form: encode, adapter, two decodes and the error term. Gradients are compared first.
"""

from __future__ import annotations

import argparse
import json
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from dspa.kernels import AdapterWeights, SaeWeights
from dspa.kernels.adapter_step.differentiable import differentiable_adapter_step
from dspa.sae.encode import encode
from dspa.util.machine import processor_name

NAMES = ("weight", "bias", "threshold")


def case(tokens: int, d_model: int, d_sae: int, active: int) -> tuple[Tensor, SaeWeights, AdapterWeights]:
    """Random weights in float32, with thresholds such that about `active` latents of a token fire in either."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    share = torch.tensor(active / d_sae)
    two_sided = float(torch.distributions.Normal(0.0, 1.0).icdf(1 - share / 2))
    one_sided = float(torch.distributions.Normal(0.0, 1.0).icdf(1 - share))
    sae = SaeWeights(
        W_enc=random(d_sae, d_model) / d_model**0.5,
        b_enc=torch.zeros(d_sae),
        threshold=torch.full((d_sae,), one_sided),
        activation="jumprelu",
        W_dec=random(d_sae, d_model) / d_model**0.5,
    )
    adapter = AdapterWeights(
        weight=random(d_sae, d_model) / d_model**0.5, bias=torch.zeros(d_sae), threshold=torch.full((d_sae,), two_sided)
    )
    return random(tokens, d_model), sae, adapter


def plain(hidden: Tensor, sae: SaeWeights, adapter: AdapterWeights) -> tuple[Tensor, Tensor]:
    assert sae.W_dec is not None
    with torch.no_grad():
        f = encode(hidden, sae)
        error = hidden - f @ sae.W_dec
    y = hidden @ adapter.weight.T + adapter.bias
    v = y.sign() * torch.relu(y.abs() - adapter.threshold)
    return torch.relu(f + v) @ sae.W_dec + error, v.abs().sum(dim=1)


def fused(hidden: Tensor, sae: SaeWeights, adapter: AdapterWeights) -> tuple[Tensor, Tensor]:
    step = differentiable_adapter_step(hidden, sae, adapter)
    return step.hidden, step.l1


Form = Callable[[Tensor, SaeWeights, AdapterWeights], tuple[Tensor, Tensor]]


class Kept:
    """A tensor that autograd keeps."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def step(form: Form, hidden: Tensor, sae: SaeWeights, adapter: AdapterWeights) -> tuple[float, int, list[Tensor]]:
    """Seconds of forward and backward, bytes kept between them beside weights and input, and the gradients."""
    trained = replace(adapter, **{name: getattr(adapter, name).clone().requires_grad_() for name in NAMES})
    kept = weakref.WeakSet[Kept]()

    def pack(tensor: Tensor) -> Kept:
        wrapped = Kept(tensor)
        kept.add(wrapped)
        return wrapped

    given = {getattr(trained, name).data_ptr() for name in NAMES} | {hidden.data_ptr()}
    given |= {tensor.data_ptr() for tensor in sae.tensors().values()}
    begin = time.perf_counter()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda wrapped: wrapped.tensor):
        steered, l1 = form(hidden, sae, trained)
        loss = steered.square().mean() + 0.1 * l1.mean()
    forward = time.perf_counter() - begin
    storages = {each.tensor.untyped_storage().data_ptr(): each.tensor.untyped_storage().nbytes() for each in kept}
    memory = sum(size for address, size in storages.items() if address not in given)
    begin = time.perf_counter()
    loss.backward()
    seconds = forward + time.perf_counter() - begin
    return seconds, memory, [getattr(trained, name).grad for name in NAMES]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--d-model", type=int, default=2304)
    parser.add_argument("--d-sae", type=int, default=16384)
    parser.add_argument("--active", type=int, default=115)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    hidden, sae, adapter = case(options.tokens, options.d_model, options.d_sae, options.active)
    seconds: dict[str, list[float]] = {"plain": [], "fused": []}
    memory: dict[str, int] = {}
    for number in range(options.rounds):
        gradients: dict[str, list[Tensor]] = {}
        for name, form in (("plain", plain), ("fused", fused)):
            taken, memory[name], gradients[name] = step(form, hidden, sae, adapter)
            seconds[name].append(taken)
        if number == 0:
            for ours, theirs in zip(gradients["fused"], gradients["plain"], strict=True):
                scale = float(theirs.abs().max())
                torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-5 * scale)
    report: dict[str, Any] = {
        "shape": {name: getattr(options, name) for name in ("tokens", "d_model", "d_sae", "active")},
        "threads": torch.get_num_threads(),
        "processor": processor_name(),
        "seconds": seconds,
        "kept_bytes": memory,
        "faster": median(seconds["plain"]) / median(seconds["fused"]),
        "memory_ratio": memory["fused"] / memory["plain"],
    }
    print(json.dumps(report, indent=2))
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
