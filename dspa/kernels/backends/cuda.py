"""The CUDA backend: the operations in CUDA C++, for NVIDIA GPUs from sm_80 on."""

from __future__ import annotations

import torch

from dspa.kernels.adapter_step.cuda import adapter_step
from dspa.kernels.backends.interface import OperationName, Operations
from dspa.kernels.encode_density.cuda import encode_density
from dspa.kernels.lookup.cuda import lookup
from dspa.kernels.native import load_cuda_library
from dspa.kernels.token_step.cuda import bind_step, token_step, token_step_with_lookup
from dspa.sae.weights import SaeWeights

# Of the layouts of csrc/cuda/token_step_tile.cuh and adapter_step.cuh, with room to spare: whole rows of the hidden
# states lie in a block's shared memory, four of them beside weights that cannot be loaded 16 bytes at a time.
ROWS_BESIDE_UNALIGNED_WEIGHTS = 4
COLUMNS_AT_A_TIME = 256
BYTES_BESIDE = 8192  # of a block: what it keeps of a row and its list, up to 256 entries


def cannot(operation: OperationName, sae: SaeWeights) -> str | None:
    """See `dspa.kernels.backends.interface.Cannot`: a model too wide for the shared memory of this GPU."""
    if operation in ("encode_density", "lookup"):
        return None
    return too_wide(sae, torch.cuda.get_device_properties(sae.device).shared_memory_per_block_optin)


def too_wide(sae: SaeWeights, shared_memory: int) -> str | None:
    """Whether a step may need more than so many bytes of shared memory."""
    weights = [sae.W_enc] if sae.W_dec is None else [sae.W_enc, sae.W_dec]
    aligned = all(
        tensor.data_ptr() % 16 == 0 and tensor.shape[1] * tensor.element_size() % 16 == 0 for tensor in weights
    )
    columns = -(-sae.d_model // COLUMNS_AT_A_TIME) * COLUMNS_AT_A_TIME
    rows = 1 if aligned else ROWS_BESIDE_UNALIGNED_WEIGHTS
    needed = rows * (4 * columns + BYTES_BESIDE)
    if needed <= shared_memory:
        return None
    beside = "" if aligned else " beside weights that are not aligned to 16 bytes"
    return f"d_model = {sae.d_model}{beside} needs {needed} bytes of shared memory, this GPU has {shared_memory}"


def load() -> Operations:
    """The operations, once the library is loaded."""
    load_cuda_library()
    return Operations(
        encode_density, lookup, token_step, token_step_with_lookup, adapter_step, bind_step=bind_step, cannot=cannot
    )
