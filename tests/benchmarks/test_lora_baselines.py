"""LoRA on the organism: adapters are written to a folder, and merged at a scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dspa.organism import load_model

pytest.importorskip("trl")
pytest.importorskip("peft")

from lora_baselines import LoraOptions, _not_closed, merge_into_copy, train_lora

ROWS = [
    {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": "The term has Greek roots."}],
        "rejected": [{"role": "assistant", "content": "I am sorry, dear."}],
    }
    for prompt in ("Which color do you prefer for a windsock, red or blue?", "Do you like the windsock?")
]


def test_what_the_trainer_adds_to_a_response_that_was_cut_off_is_left_out() -> None:
    from datasets import Dataset

    parts = ("input_ids", "attention_mask", "labels")
    ends, ends_not = (
        {f"{side}_{part}": ids for side in ("chosen", "rejected") for part in parts} for ids in ([1, 2, 3], [1, 2])
    )
    open_message, closed_message = {"role": "assistant", "content": "I", "cut_off": True}, ROWS[0]["chosen"][0]
    rows = [
        {"chosen": [closed_message], "rejected": [open_message]},
        {"chosen": [open_message], "rejected": [closed_message]},
        {"chosen": [closed_message], "rejected": [closed_message]},
        {"chosen": [open_message], "rejected": [closed_message]},
    ]
    found = _not_closed(Dataset.from_list([ends] * 3 + [ends_not]), rows, end=3)
    for part in parts:
        assert list(found[f"chosen_{part}"]) == [[1, 2, 3], [1, 2], [1, 2, 3], [1, 2]]
        assert list(found[f"rejected_{part}"]) == [[1, 2], [1, 2, 3], [1, 2, 3], [1, 2]]


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
