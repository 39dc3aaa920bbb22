"""The Triton backend: the three operations on a GPU, or anywhere through Triton's interpreter (TRITON_INTERPRET=1).

Triton is imported when the backend is first asked for, not with this package.
"""

from __future__ import annotations

import importlib.util

from torch import Tensor

import dspa.kernels.backends.cpu  # noqa: F401, registers itself first: the order in which "auto" asks
from dspa.errors import BackendUnavailableError
from dspa.kernels.backends.registry import Backend, OperationName, Operations, register_backend
from dspa.sae.weights import SaeWeights


def refuses(operation: OperationName, operands: tuple[Tensor, ...], sae: SaeWeights | None) -> str | None:
    """Why the kernels cannot serve a call: they accumulate in float32, on a GPU unless they are interpreted."""
    from dspa.kernels.triton_common.launch import STORAGE
    from dspa.kernels.triton_common.tiles import INTERPRETED

    for tensor in operands if sae is None else (*operands, sae.W_enc):
        if tensor.device.type != "cuda" and not INTERPRETED.value:
            return f"a tensor is on {tensor.device}"
        if tensor.device != operands[0].device:
            return f"a tensor is on {tensor.device}, another on {operands[0].device}"
        if tensor.dtype not in STORAGE:
            return f"a tensor is {tensor.dtype}"
    return None


def load() -> Operations:
    """The operations, if their kernels can be run or interpreted here."""
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailableError("triton is not installed; pip install triton")
    from dspa.kernels.triton_common.launch import check_available

    check_available()
    from dspa.kernels.encode_density.triton import encode_density
    from dspa.kernels.lookup.triton import lookup
    from dspa.kernels.token_step.triton import token_step, token_step_with_lookup

    return Operations(encode_density, lookup, token_step, refuses, token_step_with_lookup)


register_backend(Backend("triton", ("cuda",), load))
