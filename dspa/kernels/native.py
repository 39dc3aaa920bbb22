"""The libraries built from `csrc/`: loading them, and SAE weights as the arguments their operations take."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from dspa.errors import BackendUnavailableError
from dspa.sae.weights import SaeWeights

_PACKAGE = Path(__file__).parent.parent
_OTHER_BUILD = "DSPA_LIBRARY"  # names another build of the library, such as one with sanitizers


def load_library() -> None:
    """Makes `torch.ops.dspa` callable.

    Raises:
        BackendUnavailableError: if the library was not built, or does not fit this torch.
    """
    other = os.environ.get(_OTHER_BUILD)
    built = [Path(other)] if other else sorted(_PACKAGE.glob("_C.*so"))
    if not built:
        raise BackendUnavailableError(
            "the C++ library is not built; install a wheel of dspa, or, with a C++17 compiler, run "
            "DSPA_BUILD=require pip install . in its sources"
        )
    _load(built[0])


def load_cuda_library() -> None:
    """Makes `torch.ops.dspa` callable on tensors on an NVIDIA GPU.

    Raises:
        BackendUnavailableError: if the library was not built, does not fit this torch, or finds no GPU it is for; the
            message says which GPUs it was built for.
    """
    built = sorted(_PACKAGE.glob("_C_cuda.*so"))
    if not built:
        raise BackendUnavailableError(
            "the CUDA library is not built; with nvcc on the PATH, run DSPA_CUDA=require pip install . in the sources "
            "of dspa"
        )
    load_library()  # it defines the operations
    _load(built[0])
    architectures: str = torch.ops.dspa.cuda_architectures()
    if not torch.cuda.is_available():
        raise BackendUnavailableError(f"built for {architectures}; no NVIDIA GPU found")
    capability = torch.cuda.get_device_capability()
    if not _is_served(architectures.split(", "), capability):
        raise BackendUnavailableError(
            f"built for {architectures}; this GPU is sm_{capability[0]}{capability[1]}: build again on this machine"
        )


def _is_served(architectures: list[str], capability: tuple[int, int]) -> bool:
    """Machine code runs on later GPUs of its own generation, "90a" on sm_90 alone. The newest that is not for one chip
    alone is there in portable code too, for all later ones."""
    own = 10 * capability[0] + capability[1]
    names = [name.removeprefix("sm_") for name in architectures]
    plain = [int(name) for name in names if name.isdigit()]
    of_generation = any(number // 10 == capability[0] and number <= own for number in plain)
    return f"{own}a" in names or of_generation or bool(plain and max(plain) <= own)


def _load(library: Path) -> None:
    try:
        torch.ops.load_library(str(library))
    except OSError as error:
        raise BackendUnavailableError(f"{library.name} cannot be loaded ({error}); build it for this torch") from error


def encoder_arguments(
    sae: SaeWeights,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, str, int, str]:
    """What encoding needs of an SAE, in the order of the operations' schemas."""
    return (
        sae.W_enc,
        sae.b_enc,
        sae.threshold,
        sae.b_dec if sae.subtract_b_dec else None,
        sae.decoder_norm,
        sae.magnitude_scale,
        sae.magnitude_bias,
        sae.activation,
        sae.k or 0,
        sae.normalization,
    )
