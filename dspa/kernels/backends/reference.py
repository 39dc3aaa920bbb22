"""The reference backend: plain torch on any device, any floating dtype; the oracle of all tests."""

from __future__ import annotations

from dspa.kernels.backends.registry import Backend, Operations, register_backend
from dspa.kernels.encode_density.reference import encode_density
from dspa.kernels.lookup.reference import lookup
from dspa.kernels.token_step.reference import token_step

register_backend(Backend("reference", ("cpu", "cuda"), lambda: Operations(encode_density, lookup, token_step)))
