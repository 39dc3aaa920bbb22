"""Which kernel backends there are, why one is not available, and which one serves a call. The only global state."""

from __future__ import annotations

import os
import warnings
from dataclasses import replace

import torch
from torch import Tensor

from dspa.errors import BackendUnavailableError
from dspa.kernels.backends.choice import measured_fastest
from dspa.kernels.backends.interface import Backend, OperationName, Operations, TokenStepWithLookup, refusal
from dspa.sae.weights import SaeWeights

ENVIRONMENT_VARIABLE = "DSPA_BACKEND"

_backends: dict[str, Backend] = {}  # the last one is the first that "auto" tries
_loaded: dict[str, Operations | BackendUnavailableError] = {}
_reported: set[str] = set()


def register_backend(backend: Backend) -> None:
    """Adds a backend, or replaces the one of the same name. "auto" tries it before those registered earlier, unless
    measurements say otherwise (`dspa.kernels.backends.choice`)."""
    _backends.pop(backend.name, None)
    _backends[backend.name] = backend
    _loaded.pop(backend.name, None)


def available() -> dict[str, str]:
    """Every registered backend with "available", or with the reason why it is not. Loads them all: torch.compile cannot
    load a backend while it traces a call of it."""
    found = {name: _try_load(name) for name in _backends}
    return {name: str(result) if isinstance(result, Exception) else "available" for name, result in found.items()}


def operations_for(
    backend: str,
    operation: OperationName,
    tensors: tuple[Tensor, ...],
    sae: SaeWeights | None = None,
    *,
    ranks_all: bool = False,
) -> Operations:
    """The operations of the backend that serves a call. Warns once if "auto" finds only the reference, because
    the others are missing.

    Args:
        backend: a backend's name, or "auto": the one in DSPA_BACKEND, else the first for the device that serves the
            call.
        operation: the operation to call.
        tensors: the tensors whose device and dtype decide; the device of the first is that of the call.
        sae: the SAE of the call, where there is one.
        ranks_all: whether an adapter step has to rank all latents of a row.

    Raises:
        BackendUnavailableError: if a backend named explicitly is unknown, not available, or does not serve the call.
    """
    return _choose(backend, operation, tensors, sae, ranks_all)[1]


def step_with_lookup_for(
    backend: str, hidden: Tensor, density: Tensor, map_values: Tensor, sae: SaeWeights
) -> TokenStepWithLookup | None:
    """The combined operation of the backend that serves a token step; None where it has none or does not serve these
    prompt features. Arguments and errors as for `operations_for`."""
    name, operations = _choose(backend, "token_step", (hidden,), sae)
    tensors = (hidden, density, map_values)
    if refusal(_backends[name].serves, "token_step_with_lookup", tensors, sae) is not None:
        return None
    return operations.token_step_with_lookup


def _choose(
    backend: str,
    operation: OperationName,
    tensors: tuple[Tensor, ...],
    sae: SaeWeights | None,
    ranks_all: bool = False,
) -> tuple[str, Operations]:
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if backend != "auto":
        return backend, _named(backend, operation, tensors, sae, ranks_all)
    device = tensors[0].device
    fastest, order = measured_fastest(operation, device, sae), list(reversed(_backends))
    if fastest in _backends:
        order.insert(0, fastest)
    missing: list[str] = []
    refused = False
    for name in order:
        if device.type in _backends[name].device_types or name == "reference":
            found = _try_load(name)
            if isinstance(found, BackendUnavailableError):
                missing.append(f"{name}: {found}")
            elif _reason(name, found, operation, tensors, sae, ranks_all) is not None or _cannot(found, operation, sae):
                refused = True
            else:
                if name == "reference" and missing and not refused:
                    _warn_once(f"the slow reference kernels run on {device.type}; {'; '.join(missing)}")
                return name, found
    raise BackendUnavailableError(f"no backend serves {operation} on {device.type}; the reference is not registered")


def _named(
    name: str, operation: OperationName, tensors: tuple[Tensor, ...], sae: SaeWeights | None, ranks_all: bool
) -> Operations:
    if name not in _backends:
        raise BackendUnavailableError(f"backend {name!r} is not known; expected auto, {', '.join(_backends)}")
    found = _try_load(name)
    if isinstance(found, BackendUnavailableError):
        raise BackendUnavailableError(f"backend {name!r} is not available: {found}")
    reason = _reason(name, found, operation, tensors, sae, ranks_all)
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} does not serve this {operation}: {reason}; use backend='auto'")
    return found


def _reason(
    name: str,
    found: Operations,
    operation: OperationName,
    tensors: tuple[Tensor, ...],
    sae: SaeWeights | None,
    ranks_all: bool,
) -> str | None:
    """Why a loaded backend does not serve a call, or None if it does."""
    if operation == "adapter_step" and found.adapter_step is None:
        return "it does not have this operation"
    return refusal(_backends[name].serves, operation, tensors, sae, ranks_all=ranks_all)


def _cannot(found: Operations, operation: OperationName, sae: SaeWeights | None) -> str | None:
    return None if found.cannot is None or sae is None else found.cannot(operation, sae)


def _warn_once(message: str) -> None:
    if message not in _reported and not torch.compiler.is_compiling():
        _reported.add(message)
        warnings.warn(message, stacklevel=3)


def _try_load(name: str) -> Operations | BackendUnavailableError:
    if name not in _loaded:
        backend = _backends[name]
        try:
            operations = backend.load()
        except BackendUnavailableError as reason:
            _loaded[name] = reason
        else:
            _loaded[name] = operations
            if operations.devices is not None:
                _backends[name] = replace(backend, serves=replace(backend.serves, devices=operations.devices))
    return _loaded[name]
