"""Steer a language model with a sparse autoencoder while it generates (DSPA, arXiv 2603.21461).

The names below are loaded when they are first used, so that importing the package costs little.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from dspa.errors import (
    BackendUnavailableError,
    CorruptFileError,
    DspaError,
    InvalidInputError,
    MismatchError,
    UnsupportedSaeError,
)

if TYPE_CHECKING:
    from dspa import kernels
    from dspa.collection import collect
    from dspa.conditional_map import ConditionalDifferenceMap
    from dspa.density_store import DensityStore
    from dspa.policy import Policy, StaticPolicy, SteeringPolicy
    from dspa.preferences import PreferenceTriple, PreferenceTriples, load_preferences
    from dspa.sae import SparseAutoencoder
    from dspa.steering import Steering, steer
    from dspa.steering_summary import SteeringSummary
    from dspa.steering_trace import SteeringTrace

__version__ = "0.1.0"

_MODULE_OF = {
    "kernels": "dspa.kernels",
    "collect": "dspa.collection",
    "ConditionalDifferenceMap": "dspa.conditional_map",
    "DensityStore": "dspa.density_store",
    "Policy": "dspa.policy",
    "StaticPolicy": "dspa.policy",
    "SteeringPolicy": "dspa.policy",
    "PreferenceTriple": "dspa.preferences",
    "PreferenceTriples": "dspa.preferences",
    "load_preferences": "dspa.preferences",
    "SparseAutoencoder": "dspa.sae",
    "Steering": "dspa.steering",
    "SteeringSummary": "dspa.steering_summary",
    "SteeringTrace": "dspa.steering_trace",
    "steer": "dspa.steering",
}

__all__ = [
    "BackendUnavailableError",
    "ConditionalDifferenceMap",
    "CorruptFileError",
    "DensityStore",
    "DspaError",
    "InvalidInputError",
    "MismatchError",
    "Policy",
    "PreferenceTriple",
    "PreferenceTriples",
    "SparseAutoencoder",
    "StaticPolicy",
    "Steering",
    "SteeringPolicy",
    "SteeringSummary",
    "SteeringTrace",
    "UnsupportedSaeError",
    "collect",
    "kernels",
    "load_preferences",
    "steer",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'dspa' has no attribute {name!r}")
    module = importlib.import_module(_MODULE_OF[name])
    value = module if name == "kernels" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
