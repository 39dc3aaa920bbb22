"""Which kernel backends there are, why one is missing, and which one a call gets. The only global state."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from dspa.errors import BackendUnavailableError
from dspa.kernels.backends.choice import measured_fastest
from dspa.kernels.types import CsrMap, EditKind, EditList, TokenStats
from dspa.sae.weights import SaeWeights

OperationName = Literal["encode_density", "lookup", "token_step"]
StepMode = Literal["dense", "lazy", "screened"]
ENVIRONMENT_VARIABLE = "DSPA_BACKEND"


class EncodeDensity(Protocol):
    def __call__(self, hidden: Tensor, offsets: Tensor, sae: SaeWeights) -> Tensor: ...


class Lookup(Protocol):
    def __call__(
        self, density: Tensor, conditional_map: CsrMap, k_prompt: int, k_diff: int, edit: EditKind, sign_guard: bool
    ) -> EditList: ...


class TokenStep(Protocol):
    def __call__(
        self,
        hidden: Tensor,
        sae: SaeWeights,
        edits: EditList,
        alpha: float | Tensor,
        enabled: Tensor | None,
        stats: TokenStats | None,
        mode: StepMode | None,
    ) -> None: ...


class TokenStepWithLookup(Protocol):
    def __call__(
        self,
        hidden: Tensor,
        sae: SaeWeights,
        density: Tensor,
        conditional_map: CsrMap,
        k_prompt: int,
        k_diff: int,
        edit: EditKind,
        sign_guard: bool,
        alpha: float | Tensor,
        enabled: Tensor | None,
        stats: TokenStats | None,
        mode: StepMode | None,
    ) -> EditList: ...


def supports_everything(operation: OperationName, operands: tuple[Tensor, ...], sae: SaeWeights | None) -> str | None:
    """The answer of a backend without restrictions."""
    return None


@dataclass(frozen=True)
class Operations:
    """The operations of one backend. `refuses` says in a few words why a call cannot be served, or None if it can;
    "auto" then goes on to the next backend. `token_step_with_lookup` is there where one step does both."""

    encode_density: EncodeDensity
    lookup: Lookup
    token_step: TokenStep
    refuses: Callable[[OperationName, tuple[Tensor, ...], SaeWeights | None], str | None] = supports_everything
    token_step_with_lookup: TokenStepWithLookup | None = None


@dataclass(frozen=True)
class Backend:
    """A backend by name.

    Attributes:
        name: how `backend=` and DSPA_BACKEND call it.
        device_types: the devices on which "auto" may pick it.
        load: imports or builds what it needs; raises BackendUnavailableError with the reason where it cannot.
    """

    name: str
    device_types: tuple[str, ...]
    load: Callable[[], Operations]


_backends: dict[str, Backend] = {}
_loaded: dict[str, Operations | BackendUnavailableError] = {}
_reported: set[str] = set()


def register_backend(backend: Backend) -> None:
    """Adds a backend. "auto" asks those registered last first, unless measurements say otherwise
    (`dspa.kernels.backends.choice`): the reference comes first and so is the last resort."""
    _backends.pop(backend.name, None)
    _backends[backend.name] = backend
    _loaded.pop(backend.name, None)


def available() -> dict[str, str]:
    """Every registered backend with "available", or with the reason why it is not. Loads them all: torch.compile cannot
    load a backend while it traces a call of it."""
    answers = {name: _try_load(name) for name in _backends}
    return {name: str(answer) if isinstance(answer, Exception) else "available" for name, answer in answers.items()}


def operations_for(
    backend: str, operation: OperationName, operands: tuple[Tensor, ...], sae: SaeWeights | None = None
) -> Operations:
    """The operations that serve a call. Warns once if "auto" finds only the reference, because the others are missing.

    Args:
        backend: a backend's name, or "auto": what DSPA_BACKEND names, else the best one for the device.
        operation: which of the three.
        operands: the tensors that decide (the first one's device and the dtypes).
        sae: the SAE of the call, where there is one.

    Raises:
        BackendUnavailableError: if a backend asked for by name is unknown, missing, or refuses the call.
    """
    if backend == "auto":
        backend = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if backend != "auto":
        return _named(backend, operation, operands, sae)
    device = operands[0].device
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
            elif found.refuses(operation, operands, sae) is not None:
                refused = True
            else:
                if name == "reference" and missing and not refused:
                    _warn_once(f"the slow reference kernels run on {device.type}; {'; '.join(missing)}")
                return found
    raise BackendUnavailableError(f"no backend serves {operation} on {device.type}; the reference is not registered")


def _named(name: str, operation: OperationName, operands: tuple[Tensor, ...], sae: SaeWeights | None) -> Operations:
    if name not in _backends:
        raise BackendUnavailableError(f"backend {name!r} is not known; expected auto, {', '.join(_backends)}")
    found = _try_load(name)
    if isinstance(found, BackendUnavailableError):
        raise BackendUnavailableError(f"backend {name!r} is not available: {found}")
    reason = found.refuses(operation, operands, sae)
    if reason is not None:
        raise BackendUnavailableError(f"backend {name!r} does not serve this {operation}: {reason}; use backend='auto'")
    return found


def _warn_once(message: str) -> None:
    if message not in _reported and not torch.compiler.is_compiling():
        _reported.add(message)
        warnings.warn(message, stacklevel=3)


def _try_load(name: str) -> Operations | BackendUnavailableError:
    if name not in _loaded:
        try:
            _loaded[name] = _backends[name].load()
        except BackendUnavailableError as reason:
            _loaded[name] = reason
    return _loaded[name]
