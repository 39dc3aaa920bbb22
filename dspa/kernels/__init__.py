"""Pure functions on tensors: the operations of the methods and their backends.

Depends on no model and no file. `available()` lists the backends, and why one is not available.
"""

from __future__ import annotations

from dspa.kernels.adapter_step import adapter_step
from dspa.kernels.adapter_weights import AdapterActivation, AdapterWeights
from dspa.kernels.backends.interface import AdapterMode, Backend, Operations, Serves, StepMode
from dspa.kernels.backends.registry import available, register_backend
from dspa.kernels.backends.table import BACKENDS
from dspa.kernels.encode_density import encode_density
from dspa.kernels.lookup import lookup
from dspa.kernels.token_step import token_step, token_step_with_lookup
from dspa.kernels.types import CsrMap, EditKind, EditList, TokenStats
from dspa.sae.weights import Activation, InputNormalization, SaeWeights

__all__ = [
    "Activation",
    "AdapterActivation",
    "AdapterMode",
    "AdapterWeights",
    "Backend",
    "CsrMap",
    "EditKind",
    "EditList",
    "InputNormalization",
    "Operations",
    "SaeWeights",
    "Serves",
    "StepMode",
    "TokenStats",
    "adapter_step",
    "available",
    "encode_density",
    "lookup",
    "register_backend",
    "token_step",
    "token_step_with_lookup",
]

for _backend in reversed(BACKENDS):  # the last one registered is the first that "auto" tries
    register_backend(_backend)
