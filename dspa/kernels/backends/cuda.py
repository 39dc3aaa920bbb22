"""The CUDA backend: the three operations in CUDA C++, for NVIDIA GPUs from sm_80 on."""

from __future__ import annotations

import torch
from torch import Tensor

import dspa.kernels.backends.reference  # noqa: F401, registers itself first, so that "auto" asks it last
from dspa.kernels.backends.registry import Backend, OperationName, Operations, register_backend
from dspa.kernels.encode_density.cuda import encode_density
from dspa.kernels.lookup.cuda import lookup
from dspa.kernels.native import load_cuda_library
from dspa.kernels.token_step.cuda import token_step, token_step_with_lookup
from dspa.sae.weights import SaeWeights

_STORAGE = (torch.bfloat16, torch.float16, torch.float32)


def refuses(operation: OperationName, operands: tuple[Tensor, ...], sae: SaeWeights | None) -> str | None:
    """Why the kernels cannot serve a call: they run on a GPU and accumulate in float32."""
    tensors = operands if sae is None else (*operands, sae.W_enc)
    for tensor in tensors:
        if tensor.device.type != "cuda":
            return f"a tensor is on {tensor.device}"
        if tensor.device != operands[0].device:
            return f"a tensor is on {tensor.device}, another on {operands[0].device}"
        if operation != "lookup" and tensor.dtype not in _STORAGE:
            return f"a tensor is {tensor.dtype}"
    return None


def load() -> Operations:
    """The operations, once the library is loaded."""
    load_cuda_library()
    return Operations(encode_density, lookup, token_step, refuses, token_step_with_lookup)


register_backend(Backend("cuda", ("cuda",), load))
