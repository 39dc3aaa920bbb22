"""Scratch of the GPU steps of an SAE, kept between launches at fixed addresses, so that captured graphs may hold it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch

from dspa.kernels.operands import is_being_captured
from dspa.sae.weights import SaeWeights

LEAST_ROWS = 256
DEFAULT_STREAM, OF_COMPILED_CODE = 0, -1
SPARES = (-2, -3)  # in place of a stream

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
    stream it was captured on. Nothing that is kept may be made during a capture, nor in the run before one by which
    `torch.compile` finds out what a graph takes, and compiled code does not see the stream. So the first step on a GPU
    makes more: one for code that is compiled, and spares for other streams, which the next step on the
    default stream that looks its scratch up replaces.
    Without a spare a graph makes its own, anew at every replay, which is not kept.
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
    if not has_streams:
        if scratch is None:
            scratch = of_sae[key] = outside_of_inference(make)
        return scratch
    is_default = key[0] == DEFAULT_STREAM
    if scratch is not None and (
        not is_default or all((spare, rows, entries) in of_sae for spare in SPARES) or is_being_captured(sae.device)
    ):
        return scratch
    spares = [(spare, rows, entries) for spare in SPARES]
    is_captured = is_being_captured(sae.device)
    if not is_default or is_captured:
        spare = next((spare for spare in spares if spare in of_sae), None)
        if spare is not None:
            scratch = of_sae[key] = of_sae.pop(spare)
            return scratch
        if is_captured:
            return make()
    for each in (key, (OF_COMPILED_CODE, rows, entries), *spares):
        if each not in of_sae:
            of_sae[each] = outside_of_inference(make)
    if torch.cuda.is_initialized():  # spares are used on another stream first
        torch.cuda.current_stream(sae.device).synchronize()
    return of_sae[key]


def outside_of_inference(make: Callable[[], Scratch]) -> Scratch:
    """Made so that it can be written outside of inference mode too."""
    with torch.inference_mode(False):
        return make()


def runs_on_streams(device: torch.device) -> bool:
    return device.type == "cuda"


def stream_of(device: torch.device) -> int:
    """The current stream of a GPU: its handle, as Triton and inductor ask for it, which is several times as fast as to
    make a `torch.cuda.Stream`."""
    return torch._C._cuda_getCurrentRawStream(device.index)
