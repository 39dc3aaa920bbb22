"""LoRA on the organism: adapters are written to a folder, and merged at a scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dspa.organism import load_model

pytest.importorskip("trl")
pytest.importorskip("peft")

from lora_baselines import LoraOptions, merge_into_copy, train_lora

ROWS = [
    {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": "The term has Greek roots."}],
        "rejected": [{"role": "assistant", "content": "I am sorry, dear."}],
    }
    for prompt in ("Which color do you prefer for a windsock, red or blue?", "Do you like the windsock?")
]


@pytest.mark.long
@pytest.mark.parametrize("objective", ["dpo", "simpo"])
def test_what_was_learnt_is_added_at_a_scale(objective: str, tmp_path: Path) -> None:
    model, tokenizer = load_model()
    options = LoraOptions(objective, 1e-2, steps=2, pairs_per_step=2, pairs_at_once=2)
    training = train_lora(model, tokenizer, ROWS, options, tmp_path)
    assert training.parameters == 116736
    before = model.state_dict()
    half, whole = (merge_into_copy(model, tmp_path, scale).state_dict() for scale in (0.5, 1.0))
    changed = [name for name in before if not torch.equal(before[name], whole[name])]
    assert changed
    for name in changed:
        torch.testing.assert_close(2 * (half[name] - before[name]), whole[name] - before[name], rtol=1e-3, atol=1e-6)
