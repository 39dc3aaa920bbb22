"""Pure functions on tensors: the three operations of the method and their backends.

Knows no model and no file. `available()` says which backends are there and why the rest is not.
"""

from __future__ import annotations

import dspa.kernels.cpu
import dspa.kernels.cuda
import dspa.kernels.reference
import dspa.kernels.triton  # noqa: F401, they register themselves
from dspa.kernels.encode_density import encode_density
from dspa.kernels.lookup import lookup
from dspa.kernels.operands import CsrMap, EditKind, EditList, TokenStats
from dspa.kernels.registry import Backend, Operations, StepMode, available, register_backend
from dspa.kernels.sae_weights import Activation, InputNormalization, SaeWeights
from dspa.kernels.token_step import token_step, token_step_with_lookup

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
