"""Pure functions on tensors: the three operations of the method and their backends.

Knows no model and no file. `available()` says which backends are there and why the rest is not.
"""

from __future__ import annotations

import dspa.kernels.backends.cpu
import dspa.kernels.backends.cuda
import dspa.kernels.backends.reference
import dspa.kernels.backends.triton  # noqa: F401, they register themselves
from dspa.kernels.backends.registry import Backend, Operations, StepMode, available, register_backend
from dspa.kernels.encode_density import encode_density
from dspa.kernels.lookup import lookup
from dspa.kernels.token_step import token_step, token_step_with_lookup
from dspa.kernels.types import CsrMap, EditKind, EditList, TokenStats
from dspa.sae.weights import Activation, InputNormalization, SaeWeights

__all__ = [
    "Activation",
    "Backend",
    "CsrMap",
    "EditKind",
    "EditList",
    "InputNormalization",
    "Operations",
    "SaeWeights",
    "StepMode",
    "TokenStats",
    "available",
    "encode_density",
    "lookup",
    "register_backend",
    "token_step",
    "token_step_with_lookup",
]
