"""The CPU backend: the three operations in C++, one pass over the encoder or none."""

from __future__ import annotations

import torch
from torch import Tensor

import dspa.kernels.backends.reference  # noqa: F401, registers itself first, so that "auto" asks it last
from dspa.kernels.backends.registry import Backend, OperationName, Operations, register_backend
from dspa.kernels.encode_density.cpu import encode_density
from dspa.kernels.lookup.cpu import lookup
from dspa.kernels.native import load_library
from dspa.kernels.token_step.cpu import token_step
from dspa.sae.weights import SaeWeights

_STORAGE = (torch.bfloat16, torch.float16, torch.float32)


def refuses(operation: OperationName, operands: tuple[Tensor, ...], sae: SaeWeights | None) -> str | None:
    """Why the kernels cannot serve a call: they run on the CPU and accumulate in float32."""
    tensors = operands if sae is None else (*operands, sae.W_enc)
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return f"a tensor is on {tensor.device}"
        if operation != "lookup" and tensor.dtype not in _STORAGE:
            return f"a tensor is {tensor.dtype}"
    return None


def load() -> Operations:
    """The operations, once the library is loaded."""
    load_library()
    return Operations(encode_density, lookup, token_step, refuses)


register_backend(Backend("cpu", ("cpu",), load))
