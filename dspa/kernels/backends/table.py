"""The backends of this package, in the order in which "auto" tries them."""

from __future__ import annotations

import torch

from dspa.kernels.backends import cpu, cuda, reference, triton
from dspa.kernels.backends.interface import Backend, Serves

LOW_PRECISION = (torch.bfloat16, torch.float16, torch.float32)  # the kernels accumulate in float32

BACKENDS = (
    Backend(
        name="triton",
        device_types=("cuda",),
        load=triton.load,
        serves=Serves(
            devices=("cuda",),
            encode_density=LOW_PRECISION,
            lookup=LOW_PRECISION,
            token_step=LOW_PRECISION,
            token_step_with_lookup=LOW_PRECISION,
            adapter_step=LOW_PRECISION,
            adapter_ranks=False,
        ),
    ),
    Backend(
        name="cuda",
        device_types=("cuda",),
        load=cuda.load,
        serves=Serves(
            devices=("cuda",),
            encode_density=LOW_PRECISION,
            token_step=LOW_PRECISION,
            token_step_with_lookup=LOW_PRECISION,
            adapter_step=LOW_PRECISION,
            adapter_ranks=False,
        ),
    ),
    Backend(
        name="cpu",
        device_types=("cpu",),
        load=cpu.load,
        serves=Serves(
            devices=("cpu",),
            encode_density=LOW_PRECISION,
            token_step=LOW_PRECISION,
            adapter_step=LOW_PRECISION,
            adapter_ranks=False,
        ),
    ),
    Backend(name="reference", device_types=("cpu", "cuda"), load=reference.load),
)
