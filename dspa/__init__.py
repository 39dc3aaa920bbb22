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
    from dspa.auditing.audit import audit
    from dspa.auditing.report import PolicyAudit
    from dspa.kernels import AdapterWeights
    from dspa.methods.agreement import cross_validated_agreement
    from dspa.methods.conditional_map import ConditionalDifferenceMap, FitOptions
    from dspa.methods.explanation import PolicyExplanation
    from dspa.methods.fsrl.policy import FsrlPolicy
    from dspa.methods.personal import Overlay, PersonalPolicy, personalise
    from dspa.methods.policy import Policy
    from dspa.methods.policy_merge import merge
    from dspa.methods.static_policy import StaticPolicy
    from dspa.methods.steering_policy import SteeringPolicy
    from dspa.methods.vector_policy import VectorPolicy
    from dspa.offline.collection import collect
    from dspa.offline.density_store import DensityStore
    from dspa.offline.preferences import load_preferences
    from dspa.offline.triples import PreferenceTriple, PreferenceTriples
    from dspa.online.steering import Steering, steer
    from dspa.online.summary import SteeringSummary
    from dspa.online.trace import SteeringTrace
    from dspa.sae.autoencoder import SparseAutoencoder
    from dspa.sae.metadata import SaeMetadata
    from dspa.tuning.settings import TuningGrid
    from dspa.tuning.tune import TuningOptions, tune

__version__ = "0.1.0"

_MODULE_OF = {
    "kernels": "dspa.kernels",
    "AdapterWeights": "dspa.kernels",
    "PolicyAudit": "dspa.auditing.report",
    "audit": "dspa.auditing.audit",
    "cross_validated_agreement": "dspa.methods.agreement",
    "FsrlPolicy": "dspa.methods.fsrl.policy",
    "collect": "dspa.offline.collection",
    "ConditionalDifferenceMap": "dspa.methods.conditional_map",
    "FitOptions": "dspa.methods.conditional_map",
    "Overlay": "dspa.methods.personal",
    "PersonalPolicy": "dspa.methods.personal",
    "personalise": "dspa.methods.personal",
    "PolicyExplanation": "dspa.methods.explanation",
    "SaeMetadata": "dspa.sae.metadata",
    "DensityStore": "dspa.offline.density_store",
    "Policy": "dspa.methods.policy",
    "StaticPolicy": "dspa.methods.static_policy",
    "SteeringPolicy": "dspa.methods.steering_policy",
    "VectorPolicy": "dspa.methods.vector_policy",
    "PreferenceTriple": "dspa.offline.triples",
    "PreferenceTriples": "dspa.offline.triples",
    "merge": "dspa.methods.policy_merge",
    "load_preferences": "dspa.offline.preferences",
    "SparseAutoencoder": "dspa.sae.autoencoder",
    "Steering": "dspa.online.steering",
    "SteeringSummary": "dspa.online.summary",
    "SteeringTrace": "dspa.online.trace",
    "steer": "dspa.online.steering",
    "tune": "dspa.tuning.tune",
    "TuningGrid": "dspa.tuning.settings",
    "TuningOptions": "dspa.tuning.tune",
}

__all__ = [
    "AdapterWeights",
    "BackendUnavailableError",
    "ConditionalDifferenceMap",
    "CorruptFileError",
    "DensityStore",
    "DspaError",
    "FitOptions",
    "FsrlPolicy",
    "InvalidInputError",
    "MismatchError",
    "Overlay",
    "PersonalPolicy",
    "Policy",
    "PolicyAudit",
    "PolicyExplanation",
    "PreferenceTriple",
    "PreferenceTriples",
    "SaeMetadata",
    "SparseAutoencoder",
    "StaticPolicy",
    "Steering",
    "SteeringPolicy",
    "SteeringSummary",
    "SteeringTrace",
    "TuningGrid",
    "TuningOptions",
    "UnsupportedSaeError",
    "VectorPolicy",
    "audit",
    "collect",
    "cross_validated_agreement",
    "kernels",
    "load_preferences",
    "merge",
    "personalise",
    "steer",
    "tune",
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
