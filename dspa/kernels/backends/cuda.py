"""The CUDA backend: the operations in CUDA C++, for NVIDIA GPUs from sm_80 on."""

from __future__ import annotations

from dspa.kernels.adapter_step.cuda import adapter_step
from dspa.kernels.backends.interface import Operations
from dspa.kernels.encode_density.cuda import encode_density
from dspa.kernels.lookup.cuda import lookup
from dspa.kernels.native import load_cuda_library
from dspa.kernels.token_step.cuda import bind_step, token_step, token_step_with_lookup


def load() -> Operations:
    """The operations, once the library is loaded."""
    load_cuda_library()
    return Operations(encode_density, lookup, token_step, token_step_with_lookup, adapter_step, bind_step=bind_step)
