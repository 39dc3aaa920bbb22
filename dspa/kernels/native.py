"""The library built from `csrc/`: loading it, and SAE weights as the arguments its operations take."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from dspa.errors import BackendUnavailableError
from dspa.kernels.sae_weights import SaeWeights

_PACKAGE = Path(__file__).parent.parent
_OTHER_BUILD = "DSPA_LIBRARY"  # names another build of the library, such as one with sanitizers


def load_library() -> None:
    """Makes `torch.ops.dspa` callable.

    Raises:
        BackendUnavailableError: if the library was not built, or does not fit this torch.
    """
    other = os.environ.get(_OTHER_BUILD)
    built = [Path(other)] if other else sorted(_PACKAGE.glob("_C*.so"))
    if not built:
        raise BackendUnavailableError(
            "the C++ library is not built; with a C++17 compiler, run pip install --no-build-isolation ."
        )
    try:
        torch.ops.load_library(str(built[0]))
    except OSError as error:
        raise BackendUnavailableError(f"{built[0].name} cannot be loaded ({error}); build it for this torch") from error


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
