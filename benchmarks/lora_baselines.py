"""DPO and SimPO with LoRA, by trl and peft: `pip install 'dspa[baselines]'`."""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

RANK, ALPHA = 8, 16
BETA_DPO = 0.1  # as published
BETA_SIMPO, GAMMA_SIMPO = 10.0, 5.0  # as FSRL


@dataclass(frozen=True)
class LoraOptions:
    """How LoRA is trained.

    Attributes:
        objective: "dpo" or "simpo".
        learning_rate: of AdamW, constant after a short warm-up.
        steps: of the optimiser.
        pairs_per_step, pairs_at_once: pairs in a step, and those that run together.
        seed: of the order of pairs and of the adapters.
        progress: whether to draw a progress bar.
    """

    objective: str
    learning_rate: float
    steps: int
    pairs_per_step: int = 32
    pairs_at_once: int = 8
    seed: int = 42
    progress: bool = False


@dataclass(frozen=True)
class LoraTraining:
    """The number of trained parameters, and the trainer's log."""

    parameters: int
    history: list[dict[str, Any]]


def train_lora(
    model: Any, tokenizer: Any, rows: Sequence[Mapping[str, Any]], options: LoraOptions, out: Path
) -> LoraTraining:
    """Trains LoRA on all linear layers of a copy, and writes the adapters to a folder.

    Args:
        model, tokenizer: a chat model.
        rows: prompt, chosen and rejected as lists of messages; a response with a true `cut_off` is not closed, if the
            chat template does not close it.
        options: how.
        out: the folder.
    """
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from datasets import Dataset
    from peft import LoraConfig

    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")
    with tempfile.TemporaryDirectory() as folder:
        shared: dict[str, Any] = {
            "output_dir": folder,
            "learning_rate": options.learning_rate,
            "max_steps": options.steps,
            "per_device_train_batch_size": options.pairs_at_once,
            "gradient_accumulation_steps": options.pairs_per_step // options.pairs_at_once,
            "lr_scheduler_type": "constant_with_warmup",
            "warmup_steps": max(1, options.steps // 100),
            "gradient_checkpointing": False,
            "bf16": False,
            "use_cpu": True,
            "save_strategy": "no",
            "report_to": "none",
            "logging_steps": 8,
            "disable_tqdm": not options.progress,
            "max_length": 512,
            "seed": options.seed,
        }
        arguments: dict[str, Any] = {
            "model": copy.deepcopy(model),
            "train_dataset": Dataset.from_list([dict(row) for row in rows]),
            "processing_class": copy.deepcopy(tokenizer),
            "peft_config": lora,
        }
        trainer: Any
        if options.objective == "dpo":
            from trl.trainer.dpo_config import DPOConfig
            from trl.trainer.dpo_trainer import DPOTrainer

            trainer = DPOTrainer(args=DPOConfig(beta=BETA_DPO, **shared), **arguments)
        else:
            from trl.experimental.cpo import CPOConfig, CPOTrainer

            simpo = {"loss_type": "simpo", "cpo_alpha": 0.0, "beta": BETA_SIMPO, "simpo_gamma": GAMMA_SIMPO}
            trainer = CPOTrainer(args=CPOConfig(**simpo, **shared), **arguments)
            trainer.train_dataset = _not_closed(trainer.train_dataset, rows, tokenizer.eos_token_id)
        parameters = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
        trainer.train()
    trainer.model.save_pretrained(out)
    log = [{k: v for k, v in entry.items() if isinstance(v, (int, float))} for entry in trainer.state.log_history]
    return LoraTraining(parameters, log)


def _not_closed(dataset: Any, rows: Sequence[Mapping[str, Any]], end: int) -> Any:
    """CPO's tokens without the end of the sequence that its trainer adds to responses that were cut off."""
    parts = ("input_ids", "attention_mask", "labels")

    def opened(feature: Mapping[str, Any], row: int) -> dict[str, Any]:
        cut_off = [side for side in ("chosen", "rejected") if rows[row][side][-1].get("cut_off")]
        sides = [side for side in cut_off if feature[f"{side}_input_ids"][-1] == end]
        return {f"{side}_{part}": feature[f"{side}_{part}"][:-1] for side in sides for part in parts}

    return dataset.map(opened, with_indices=True)


def merge_into_copy(model: Any, adapters: Path, scale: float) -> Any:
    """A copy of the model with `scale` times what training added to its weights."""
    from peft import PeftConfig, PeftModel

    config: Any = PeftConfig.from_pretrained(str(adapters))
    config.lora_alpha = ALPHA * scale
    with torch.no_grad():
        return PeftModel.from_pretrained(copy.deepcopy(model), str(adapters), config=config).merge_and_unload().eval()
