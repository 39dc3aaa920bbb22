"""The Triton backend: the operations on a GPU, or anywhere through Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import importlib.util

from dspa.errors import BackendUnavailableError
from dspa.kernels.backends.interface import Operations


def load() -> Operations:
    """The operations, if their kernels can be run or interpreted here. Triton is imported here and not before."""
    if importlib.util.find_spec("triton") is None:
        raise BackendUnavailableError("triton is not installed; pip install triton")
    from dspa.kernels.triton_common.launch import check_available
    from dspa.kernels.triton_common.tiles import INTERPRETED

    check_available()
    from dspa.kernels.adapter_step.triton import adapter_step
    from dspa.kernels.encode_density.triton import encode_density
    from dspa.kernels.lookup.triton import lookup
    from dspa.kernels.token_step.triton import token_step, token_step_with_lookup
    from dspa.kernels.token_step.triton_bound import bind_step

    devices = ("cpu", "cuda") if INTERPRETED.value else None
    return Operations(encode_density, lookup, token_step, token_step_with_lookup, adapter_step, devices, bind_step)
