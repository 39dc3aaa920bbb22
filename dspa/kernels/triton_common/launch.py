"""Launching Triton kernels: whether that is possible here, for which architecture, and with which block sizes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, overload

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from dspa.errors import BackendUnavailableError
from dspa.kernels import gpu_architecture
from dspa.kernels.operands import is_being_captured
from dspa.kernels.triton_common.table import INTERPRETER, Operation, Tile, blocks, tile_of
from dspa.kernels.triton_common.tiles import INTERPRETED

MOST_REGISTERS = 255  # of a thread of an NVIDIA GPU


def check_available() -> None:
    """Raises BackendUnavailableError, with the reason, if kernels can be neither run on a GPU nor interpreted."""
    if INTERPRETED.value:
        if isinstance(tl.sum, JITFunction):
            raise BackendUnavailableError("TRITON_INTERPRET was set after triton was imported; set it before")
    elif not torch.cuda.is_available():
        raise BackendUnavailableError("no GPU; set TRITON_INTERPRET=1 to interpret the kernels on the CPU")


def tile_for(operation: Operation, W_enc: Tensor, x_parts: int) -> Tile:
    """The block sizes of an operation for this encoder on its device; `x_parts` from `parts_of`."""
    d_sae, d_model = W_enc.shape
    in_parts = x_parts > 1 or (W_enc.dtype != torch.bfloat16 and x_parts > 0)
    return tile_of(operation, architecture(W_enc.device), d_model, d_sae, in_parts)


def architecture(device: torch.device) -> str:
    """The name of a device in the table: that of a GPU, or "interpreter"."""
    return INTERPRETER if INTERPRETED.value else gpu_architecture.architecture(device)


@dataclass(frozen=True)
class Launch:
    """A kernel, how many programs of it, their arguments by name, its block sizes, and where it runs."""

    kernel: Any
    programs: int
    arguments: dict[str, object]
    tile: Tile
    device: torch.device
    architecture: str

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler. Contraction is off, so that results have the bits that the source defines. The
        assembler may use all registers; otherwise it spills a few, to run more programs at a time."""
        options = {"num_warps": self.tile.warps, "num_stages": self.tile.stages, "enable_fp_fusion": False}
        if self.architecture.startswith("sm_"):
            options["maxnreg"] = MOST_REGISTERS
        return options

    def run(self) -> Any:
        """Launches it, and returns the compiled kernel.

        Raises:
            BackendUnavailableError: if the kernel is not loaded yet and a graph is being captured.
        """
        other_device = self.device.type == "cuda" and self.device.index != torch.cuda.current_device()
        with torch.cuda.device(self.device) if other_device else nullcontext():
            if is_being_captured(self.device):
                self._check_loaded()
            return self.kernel[(self.programs,)](**self.arguments, **self.options)

    def _check_loaded(self) -> None:
        """Loading is not allowed during a capture. It would fail with an error of the driver, and end the capture."""
        compiled = self.kernel.warmup(grid=(self.programs,), **self.arguments, **self.options)
        if getattr(compiled, "module", compiled) is None:
            raise BackendUnavailableError(
                f"a graph is being captured and {self.kernel.__name__} was not launched on such operands before; make "
                "the same call once before the capture"
            )


def launch_of(kernel: Any, programs: int, arguments: dict[str, object], tile: Tile, device: torch.device) -> Launch:
    """A launch, to be run. Every launch of this package is made here."""
    return Launch(kernel, programs, arguments, tile, device, architecture(device))


def launch(kernel: Any, programs: int, arguments: dict[str, object], tile: Tile, device: torch.device) -> None:
    """Runs a kernel."""
    launch_of(kernel, programs, arguments, tile, device).run()


# Triton compiles a kernel again for pointers and numbers that are no multiples of 16, and for numbers that are 1; for
# elements of tuples, whatever its decorator says. What may differ from call to call is put into one form instead.
ALIGNMENT = 16


@overload
def aligned(tensor: Tensor) -> Tensor: ...
@overload
def aligned(tensor: Tensor | None) -> Tensor | None: ...
def aligned(tensor: Tensor | None) -> Tensor | None:
    """A tensor that is read, or a copy of it at a multiple of 16 bytes."""
    return tensor if tensor is None or tensor.data_ptr() % ALIGNMENT == 0 else tensor.clone()


def has_aligned_rows(hidden: Tensor) -> bool:
    """Whether hidden states can be passed to a kernel as they are: at a multiple of 16 bytes, contiguous rows that are
    a multiple of 16 elements apart."""
    row_stride, column_stride = hidden.stride()
    apart = row_stride % ALIGNMENT == 0 or hidden.shape[0] == 1
    return apart and column_stride == 1 and hidden.data_ptr() % ALIGNMENT == 0


def with_aligned_rows(hidden: Tensor) -> Tensor:
    """Hidden states that can be passed to a kernel, `[N, d_model]`: these, or a copy."""
    if has_aligned_rows(hidden):
        return hidden
    rows, d_model = hidden.shape
    return hidden.new_empty(rows, row_stride_of(hidden))[:, :d_model].copy_(hidden)


def row_stride_of(hidden: Tensor) -> int:
    """How many elements rows are apart; for a single row, the least that it can be."""
    rows, d_model = hidden.shape
    return hidden.stride(0) if rows > 1 and has_aligned_rows(hidden) else blocks(d_model, ALIGNMENT) * ALIGNMENT


def activation_of(activation: str) -> str:
    """The three ways in which a kernel selects, see `tiles.scores`."""
    return activation if activation in ("topk", "gated") else "threshold"


def parts_of(hidden: torch.dtype, W_enc: torch.dtype, plain: bool) -> int:
    """How the encoder input is multiplied, see `tiles.add_products`. `plain`: it is the hidden state itself."""
    if plain and hidden == W_enc != torch.float32:
        return 0
    return {torch.bfloat16: 1, torch.float16: 2}.get(hidden, 3) if plain else 3
