"""Scratch of the GPU steps of an SAE, kept between launches at fixed addresses, so that captured graphs may hold it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch

from dspa.kernels.operands import is_being_captured
from dspa.sae.weights import SaeWeights

LEAST_ROWS = 256
OF_COMPILED_CODE, SPARE = -1, -2  # in place of a stream

Key = tuple[int, int, int]  # stream, rows, entries of a list
Scratch = TypeVar("Scratch")


def rows_for(batch: int) -> int:
    """The rows of the scratch for a batch. Batches of several sizes share it, which bounds the memory, and lets one
    compiled graph serve every batch of up to `LEAST_ROWS`."""
    return LEAST_ROWS if batch <= LEAST_ROWS else 1 << (batch - 1).bit_length()


def kept(
    of_all: WeakKeyDictionary[SaeWeights, dict[Key, Scratch]],
    sae: SaeWeights,
    rows: int,
    entries: int,
    make: Callable[[], Scratch],
) -> Scratch:
    """The scratch of an SAE for some size on the current stream, made at its first use and kept as long as the SAE.

    Steps on different streams may run at the same time, so each stream has its own. A captured graph keeps that of the
    stream it was captured on. As nothing can be made during a capture, and compiled code does not see the stream, the
    first step on a GPU makes two more: one for code that `torch.compile` compiles, and a spare for the next stream on
    which a graph is captured. Without a spare a graph makes its own, anew at every replay, which is not kept.
    """
    of_sae = of_all.get(sae)
    if of_sae is None:
        of_sae = of_all[sae] = {}
    has_streams = runs_on_streams(sae.device)
    if torch.compiler.is_compiling():
        key = (OF_COMPILED_CODE if has_streams else 0, rows, entries)
        scratch = of_sae.get(key)
        if scratch is None:
            scratch = of_sae[key] = make()
        return scratch
    key = (stream_of(sae.device) if has_streams else 0, rows, entries)
    scratch = of_sae.get(key)
    if scratch is not None:
        return scratch
    spare = (SPARE, rows, entries)
    if has_streams and is_being_captured(sae.device):
        if spare not in of_sae:
            return make()
        scratch = of_sae[key] = of_sae.pop(spare)
        return scratch
    with torch.inference_mode(False):  # tensors of that mode could not be written outside of it
        for each in (key, (OF_COMPILED_CODE, rows, entries), spare) if has_streams else (key,):
            if each not in of_sae:
                of_sae[each] = make()
    if has_streams and torch.cuda.is_initialized():  # the spare is used on another stream first
        torch.cuda.current_stream(sae.device).synchronize()
    return of_sae[key]


def runs_on_streams(device: torch.device) -> bool:
    return device.type == "cuda"


def stream_of(device: torch.device) -> int:
    """The current stream of a GPU: its handle, as Triton and inductor ask for it, which is several times as fast as to
    make a `torch.cuda.Stream`."""
    return torch._C._cuda_getCurrentRawStream(device.index)
