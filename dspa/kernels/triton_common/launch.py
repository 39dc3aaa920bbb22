"""Launching Triton kernels: whether that is possible here, for which architecture, and with which block sizes."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.jit import JITFunction

from dspa.errors import BackendUnavailableError
from dspa.kernels import gpu_architecture
from dspa.kernels.triton_common.table import INTERPRETER, Operation, Tile, tile_of
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

    def run(self) -> None:
        other_device = self.device.type == "cuda" and self.device.index != torch.cuda.current_device()
        with torch.cuda.device(self.device) if other_device else nullcontext():
            self.kernel[(self.programs,)](**self.arguments, **self.options)


def launch(kernel: Any, programs: int, arguments: dict[str, object], tile: Tile, device: torch.device) -> None:
    """Runs a kernel. Every launch of this package goes through here."""
    Launch(kernel, programs, arguments, tile, device, architecture(device)).run()


def activation_of(activation: str) -> str:
    """The three ways in which a kernel selects, see `tiles.scores`."""
    return activation if activation in ("topk", "gated") else "threshold"


def parts_of(hidden: torch.dtype, W_enc: torch.dtype, plain: bool) -> int:
    """How the encoder input is multiplied, see `tiles.add_products`. `plain`: it is the hidden state itself."""
    if plain and hidden == W_enc != torch.float32:
        return 0
    return {torch.bfloat16: 1, torch.float16: 2}.get(hidden, 3) if plain else 3
