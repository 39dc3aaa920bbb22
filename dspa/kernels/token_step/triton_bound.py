"""The Triton `token_step` with its arguments laid out: one call of the compiled kernel for a token."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from triton.runtime import driver as triton_driver

from dspa.kernels.backends.interface import BoundStep, StepMode
from dspa.kernels.operands import is_being_captured
from dspa.kernels.token_step.arguments import are_passed_as_they_are, counter_arguments
from dspa.kernels.token_step.triton import step_arguments, step_launch, token_step
from dspa.kernels.triton_common.direct_launch import DirectLaunch, is_watched
from dspa.kernels.triton_common.launch import (
    ALIGNMENT,
    row_stride_of,
    with_aligned_rows,
)
from dspa.kernels.triton_common.tiles import INTERPRETED
from dspa.kernels.types import EditList, TokenStats
from dspa.sae.weights import SaeWeights

TRIAL_ALPHA = 0.5
driver: Any = triton_driver  # the types of what is active are unknown
VARYING = ("hidden", "strength", "stats")
_address = Tensor.data_ptr

# By batch: flags and counters that nobody asked for. They live as long as the SAE, since captured graphs hold them.
_unread: WeakKeyDictionary[SaeWeights, dict[int, tuple[Tensor, TokenStats]]] = WeakKeyDictionary()
_agreeing: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # by compiled kernel: what `computes_the_same` found


def unread_of(sae: SaeWeights, batch: int, device: torch.device) -> tuple[Tensor, TokenStats]:
    """Flags that are all set, and counters, for calls that have none."""
    of_sae = _unread.get(sae)
    if of_sae is None:
        of_sae = _unread[sae] = {}
    if batch not in of_sae:
        with torch.inference_mode(False):  # they are written in later calls, which may not be in inference mode
            every_row = torch.ones(batch, dtype=torch.bool, device=device)
            of_sae[batch] = every_row, TokenStats.zeros(batch, sae.d_sae, device)
    return of_sae[batch]


class BoundTritonStep:
    """See `dspa.kernels.backends.interface.BoundStep`.

    One compiled kernel serves every call: flags and counters are always passed, ones of its own where the caller has
    none. There is one launch for each stream, with the scratch of that stream.
    """

    def __init__(
        self, hidden: Tensor, sae: SaeWeights, edits: EditList, alpha: float | Tensor, mode: StepMode | None
    ) -> None:
        self._sae = sae
        self._edits = edits
        self._alpha = alpha
        self._mode: StepMode | None = mode
        self._hidden = torch.zeros_like(hidden)
        self._device = hidden.device
        self._index = hidden.device.index
        self._batch = batch = hidden.shape[0]
        self._row_stride = row_stride_of(self._hidden[:1])
        self._every_row, self._uncounted = unread_of(sae, batch, self._device)
        self._no_row = torch.zeros_like(self._every_row)
        strengths = [alpha] if isinstance(alpha, Tensor) else []
        self._watched = [*sae.tensors().values(), edits.latents, edits.signs, edits.counts, *strengths]
        self._addresses = [*map(_address, self._watched)]
        self._strength = (0.0, alpha.data_ptr()) if isinstance(alpha, Tensor) else (float(alpha), None)
        self._launches: dict[int, DirectLaunch] = {}

    def __call__(self, hidden: Tensor, enabled: Tensor | None, stats: TokenStats | None) -> bool:
        if [*map(_address, self._watched)] != self._addresses:
            return False
        rows = hidden.data_ptr()
        row_stride, column_stride = hidden.stride()
        if self._batch == 1:
            row_stride = self._row_stride
        if rows % ALIGNMENT or column_stride != 1 or row_stride % ALIGNMENT:
            copy = with_aligned_rows(hidden)
            is_done = self(copy, enabled, stats)
            hidden.copy_(copy)
            return is_done
        on = self._every_row if enabled is None else enabled
        flags = on.data_ptr()
        if flags % ALIGNMENT or not on.is_contiguous():
            on = on.clone(memory_format=torch.contiguous_format)
            flags = on.data_ptr()
        counted = self._uncounted if stats is None else stats
        counters = a, b, c, d, e, f, g = (*map(_address, counter_arguments(counted)),)
        stream = driver.active.get_current_stream(self._index)
        launch = self._launches.get(stream)
        if launch is None and not is_being_captured(self._device):
            self.lay_out()
            launch = self._launches[stream]
        is_elsewhere = driver.active.get_current_device() != self._index
        if launch is None or is_elsewhere or is_watched() or (a | b | c | d | e | f | g) % ALIGNMENT:
            token_step(hidden, self._sae, self._edits, self._alpha, on, counted, self._mode)
        else:
            launch(stream, ((rows, row_stride, 1), (*self._strength, flags), counters))
        return True

    def lay_out(self) -> Any:
        """Adds the launch for the current stream, and returns the compiled kernel. It is made once in the ordinary way,
        on no enabled row. Allocates nothing that stays, as a graph may be about to be captured on the stream.

        Raises:
            AttributeError: if this Triton is put together in another way than those that are known.
        """
        lists = (self._edits.latents, self._edits.signs, self._edits.counts)
        launch = step_launch(
            *step_arguments(self._hidden, self._sae, lists, self._alpha, self._no_row, self._uncounted, self._mode)
        )
        compiled = launch.run()
        self._launches[driver.active.get_current_stream(self._device.index)] = DirectLaunch(launch, compiled, VARYING)
        return compiled


def computes_the_same(compiled: Any, sae: SaeWeights, hidden: Tensor, k: int, alpha: float | Tensor, mode: Any) -> bool:
    """Whether direct launches of a kernel compute what ordinary ones do, bit for bit: tried on rows of `W_enc`, with
    lists of their latents. Waits for the device.

    Args:
        compiled: the kernel that the trial is about.
        sae, hidden, k, alpha, mode: of the step that it was compiled for.
    """
    batch, device = hidden.shape[0], hidden.device
    decodable = (
        torch.arange(sae.d_sae, device=device) if sae.decoder_rows is None else (sae.decoder_rows >= 0).nonzero()
    )
    listed = decodable.flatten()[:k]
    lists = EditList.empty(batch, k, device)
    lists.latents[:, : len(listed)] = listed
    lists.signs[:, : len(listed)] = 1 - 2 * (listed % 2)
    lists.counts.fill_(len(listed))
    strength = torch.full_like(alpha, TRIAL_ALPHA) if isinstance(alpha, Tensor) else TRIAL_ALPHA
    enabled = torch.arange(batch, device=device) % 4 != 3
    expected = 8 * sae.W_enc[torch.arange(batch, device=device) % sae.d_sae].to(hidden.dtype)
    found = expected.clone()
    stats, found_stats = (TokenStats.zeros(batch, sae.d_sae, device) for _ in range(2))
    for counters in (stats, found_stats):
        for number, counter in enumerate(counter_arguments(counters)):
            counter.fill_(number)  # which one is which shows
    token_step(expected, sae, lists, strength, enabled, stats, mode)
    trial = BoundTritonStep(found, sae, lists, strength, mode)
    try:
        if trial.lay_out() is not compiled:
            return False
        trial(found, enabled, found_stats)
    except (AttributeError, TypeError, ValueError, OverflowError, RuntimeError):
        return False
    pairs = [(expected, found), *zip(counter_arguments(stats), counter_arguments(found_stats), strict=True)]
    return all(torch.equal(one.view(torch.uint8), other.view(torch.uint8)) for one, other in pairs)


def bind_step(
    hidden: Tensor, sae: SaeWeights, edits: EditList, alpha: float | Tensor, mode: StepMode | None
) -> BoundStep | None:
    """See `dspa.kernels.backends.interface.BindStep`."""
    if mode == "screened":  # whose codes may be made again; `token_step` looks
        return None
    if is_interpreted() or is_watched() or not are_passed_as_they_are(edits, alpha):
        return None
    if isinstance(alpha, Tensor) and alpha.data_ptr() % ALIGNMENT:  # an ordinary launch reads a copy
        return None
    bound = BoundTritonStep(hidden, sae, edits, alpha, mode)
    try:
        compiled = bound.lay_out()
    except AttributeError:
        return None
    if compiled not in _agreeing:
        _agreeing[compiled] = computes_the_same(compiled, sae, hidden, edits.k, alpha, mode)
    return bound if _agreeing[compiled] else None


def is_interpreted() -> bool:
    """Whether kernels are interpreted; nothing is compiled then."""
    return bool(INTERPRETED.value)
