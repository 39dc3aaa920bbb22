"""Scratch of the GPU steps of an SAE, kept between launches at fixed addresses, so that captured graphs may hold it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch

from dspa.sae.weights import SaeWeights

LEAST_ROWS = 256

Key = TypeVar("Key")
Scratch = TypeVar("Scratch")


def rows_for(batch: int) -> int:
    """The rows of the scratch for a batch. Batches of several sizes share it, which bounds the memory, and lets one
    compiled graph serve every batch of up to `LEAST_ROWS`."""
    return LEAST_ROWS if batch <= LEAST_ROWS else 1 << (batch - 1).bit_length()


def kept(
    of_all: WeakKeyDictionary[SaeWeights, dict[Key, Scratch]], sae: SaeWeights, key: Key, make: Callable[[], Scratch]
) -> Scratch:
    """The scratch of an SAE for some size, made at its first use and kept as long as the SAE.

    A graph that is being captured uses existing scratch. Scratch made during the capture belongs to the graph, which
    makes it anew at every replay; it is not kept, as its contents are undefined outside the graph.
    """
    of_sae = of_all.get(sae)
    if of_sae is None:
        of_sae = of_all[sae] = {}
    scratch = of_sae.get(key)
    if scratch is None:
        if torch.compiler.is_compiling():
            scratch = make()
        else:
            with torch.inference_mode(False):  # tensors of that mode could not be written outside of it
                scratch = make()
        if not _is_being_captured(sae.device):
            of_sae[key] = scratch
    return scratch


def _is_being_captured(device: torch.device) -> bool:
    return device.type == "cuda" and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
