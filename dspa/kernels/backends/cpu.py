"""The CPU backend: the operations in C++, with at most one pass over the encoder, or the adapter's weight."""

from __future__ import annotations

from dspa.kernels.adapter_step.cpu import adapter_step
from dspa.kernels.backends.interface import Operations
from dspa.kernels.encode_density.cpu import encode_density
from dspa.kernels.lookup.cpu import lookup
from dspa.kernels.native import load_library
from dspa.kernels.token_step.cpu import bind_step, token_step


def load() -> Operations:
    """The operations, once the library is loaded."""
    load_library()
    return Operations(encode_density, lookup, token_step, adapter_step=adapter_step, bind_step=bind_step)
