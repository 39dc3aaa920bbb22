"""The example of a method in CONTRIBUTING.md runs as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from naive_generation import generate, greedily, latents, naive_logits
from tiny_models import OUTPUT_LAYER, layer_of, prompts, tiny_model, tiny_policy
from torch import Tensor

from dspa import StaticPolicy
from dspa.kernels import EditList
from dspa.online.steering import steer

PAGE = Path(__file__).parents[1] / "CONTRIBUTING.md"
NEW = 6


def example() -> str:
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL) if "class " in block]
    return block


def prompt_counts(model: Any, sae: Any, prompt: list[int]) -> list[int]:
    """On how many prompt tokens each latent is active."""
    caught: list[Tensor] = []
    hook = layer_of(model, OUTPUT_LAYER).register_forward_hook(
        lambda module, args, output: caught.append(output if isinstance(output, Tensor) else output[0])
    )
    with torch.no_grad():
        model(torch.tensor([prompt]), use_cache=False)
    hook.remove()
    return (latents(caught[0][0], sae) > 0).sum(dim=0).tolist()


def test_the_example_is_short_and_steers_by_its_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    source = example()
    assert len([line for line in source.splitlines() if line.strip()]) <= 30
    module = ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # where dataclasses look up annotations
    exec(compile(source, str(PAGE), "exec"), vars(module))
    model, (prompt,) = tiny_model("llama"), prompts((6,))
    whole = tiny_policy(model, alpha=0.5)
    policy = vars(module)["PromptAblation"](whole.output_sae, OUTPUT_LAYER, k=6)
    unsteered = generate(model, [prompt], NEW)[0]
    with steer(model, {"mine": policy, "dspa": whole}, select=["mine", None]) as steering:
        found = generate(model, [prompt, prompt], NEW)
        assert steering.edits is not None
        chosen = steering.edits.ablated(0)
    counts = prompt_counts(model, whole.output_sae, prompt)
    assert sorted(counts[latent] for latent in chosen) == sorted(counts)[-6:]
    static = StaticPolicy.with_edits(whole, EditList.from_lists([[]], [chosen]))
    expected: list[int] = []
    for _ in range(NEW):
        expected += greedily(naive_logits(model, static, prompt, prompt + expected, ([], chosen))[-1:].float())
    assert found == [expected, unsteered]
    assert expected != unsteered
