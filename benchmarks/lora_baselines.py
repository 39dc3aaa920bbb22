"""DPO and SimPO with LoRA on the organism, by trl and peft: `pip install 'dspa[baselines]'`."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dspa.organism.language import Triple

RANK, ALPHA = 8, 16
PAIRS_PER_STEP, PAIRS_AT_ONCE = 32, 8
BETA_DPO = 0.1  # as published
BETA_SIMPO, GAMMA_SIMPO = 10.0, 5.0  # as FSRL


def lora_model(
    model: Any, tokenizer: Any, triples: Sequence[Triple], objective: str, learning_rate: float, steps: int
) -> tuple[dict[str, Tensor], int, list[dict[str, Any]]]:
    """Trains LoRA on all linear layers of a copy.

    Args:
        model, tokenizer: the organism.
        triples: what it is trained on.
        objective: "dpo" or "simpo".
        learning_rate: of AdamW, constant after a short warm-up.
        steps: of 32 pairs.

    Returns:
        What is to be added to each weight, the number of trained parameters, and the trainer's log.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from peft import LoraConfig

    rows = [
        {
            "prompt": [{"role": "user", "content": triple.prompt.text}],
            "chosen": [{"role": "assistant", "content": triple.chosen.text}],
            "rejected": [{"role": "assistant", "content": triple.rejected.text}],
        }
        for triple in triples
    ]
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        shared: dict[str, Any] = {
            "output_dir": folder,
            "learning_rate": learning_rate,
            "max_steps": steps,
            "per_device_train_batch_size": PAIRS_AT_ONCE,
            "gradient_accumulation_steps": PAIRS_PER_STEP // PAIRS_AT_ONCE,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": max(1, steps // 100),
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 8,
            "disable_tqdm": True,
            "max_length": 512,
        }
        copied = copy.deepcopy(model)
        arguments: dict[str, Any] = {
            "model": copied,
            "train_dataset": Dataset.from_list(rows),
            "processing_class": copy.deepcopy(tokenizer),
            "peft_config": lora,
        }
        trainer: Any
        if objective == "dpo":
            from trl.trainer.dpo_config import DPOConfig
            from trl.trainer.dpo_trainer import DPOTrainer

            trainer = DPOTrainer(args=DPOConfig(beta=BETA_DPO, **shared), **arguments)
        else:
            from trl.experimental.cpo import CPOConfig, CPOTrainer

            simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": BETA_SIMPO, "simpo_gamma": GAMMA_SIMPO}
            trainer = CPOTrainer(args=CPOConfig(**simpo, **shared), **arguments)
        trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        trainer.train()
        merged = trainer.model.merge_and_unload()
    before = model.state_dict()
    added = {name: value - before[name] for name, value in merged.state_dict().items() if name in before}
    log = [{k: v for k, v in entry.items() if isinstance(v, (int, float))} for entry in trainer.state.log_history]
    return {name: value for name, value in added.items() if bool(value.any())}, trained, log


def merge_into_copy(model: Any, added: Mapping[str, Tensor], scale: float) -> Any:
    """A copy of the model with `scale` times what training added to its weights."""
    merged = copy.deepcopy(model)
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            if name in added:
                parameter.add_(scale * added[name])
    return merged.eval()
