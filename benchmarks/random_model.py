"""Models of real shape with random weights: their speed is that of the real ones, and nothing has to be downloaded."""

from __future__ import annotations

import time
from functools import lru_cache
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.initialization import no_init_weights

from dspa.flops.counter import load_config

RANDOM_NUMBERS = 1 << 22  # drawn once and repeated: drawing billions would take longer than the benchmark


def random_model(name: str, dtype: torch.dtype, device: str = "cpu", **config_changes: Any) -> Any:
    """A model in evaluation mode whose hidden states stay finite.

    Args:
        name: a configuration that ships with the package, such as "gemma-2-2b", or anything `load_config` takes.
        dtype, device: of its weights.
        config_changes: fields of the configuration to set.
    """
    config = load_config(name)
    for field, value in config_changes.items():
        setattr(config, field, value)
    with no_init_weights(), torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    drawn = torch.randn(RANDOM_NUMBERS, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim < 2:
                parameter.zero_() if "gemma" in config.model_type else parameter.fill_(1)  # Gemma's norms add 1
                continue
            flat, scaled = parameter.view(-1), drawn / parameter.shape[1] ** 0.5
            for piece in flat.split(RANDOM_NUMBERS):
                piece.copy_(scaled[: len(piece)])
    return model.eval()


@lru_cache(maxsize=1)
def model_dtype() -> torch.dtype:
    """bfloat16, or float32 on a CPU without instructions for it, where plain torch is hundreds of times slower."""

    def seconds(dtype: torch.dtype) -> float:
        matrix, row = torch.ones(1024, 1024, dtype=dtype), torch.ones(1, 1024, dtype=dtype)
        row.matmul(matrix)
        start = time.perf_counter()
        for _ in range(10):
            row.matmul(matrix)
        return time.perf_counter() - start

    return torch.bfloat16 if seconds(torch.bfloat16) < 5 * seconds(torch.float32) else torch.float32
