"""The reference backend: plain torch on any device, any floating dtype; all tests compare with it."""

from __future__ import annotations

from dspa.kernels.adapter_step.reference import adapter_step
from dspa.kernels.backends.interface import Operations
from dspa.kernels.encode_density.reference import encode_density
from dspa.kernels.lookup.reference import lookup
from dspa.kernels.token_step.reference import token_step


def load() -> Operations:
    """The operations."""
    return Operations(encode_density, lookup, token_step, adapter_step=adapter_step)
