"""The block sizes of the Triton kernels on each GPU: looked up, never tuned while a model generates."""

from __future__ import annotations

import math
import re
from functools import cache
from typing import Literal, NamedTuple

from dspa.kernels.triton_common.configurations import ENCODE_DENSITY, TOKEN_STEP, Sizes

Operation = Literal["token_step", "encode_density"]
Shape = tuple[int, int]
INTERPRETER = "interpreter"


class Tile(NamedTuple):
    """Block sizes of one kernel.

    Attributes:
        latents: rows of `W_enc` that one program multiplies; a power of 2.
        tokens: rows of the hidden states that it multiplies them with; a power of 2, at least 16.
        model: columns of both that it multiplies at a time; a power of 2, at least 16.
        warps: warps of a program.
        stages: blocks of columns that are loaded ahead.
    """

    latents: int
    tokens: int
    model: int
    warps: int
    stages: int


LOOKUP = Tile(latents=1, tokens=1, model=1, warps=8, stages=1)  # it has no tiles
_INTERPRETED = {"token_step": Tile(128, 16, 256, 1, 1), "encode_density": Tile(128, 64, 256, 1, 1)}
_TABLE: dict[Operation, dict[str, dict[Shape, tuple[Sizes, Sizes]]]] = {
    "token_step": TOKEN_STEP,
    "encode_density": ENCODE_DENSITY,
}


@cache
def tile_of(operation: Operation, architecture: str, d_model: int, d_sae: int, in_parts: bool) -> Tile:
    """The block sizes of an operation: those of the shape that is nearest, in the ratio of its sizes, on the
    architecture or the one it descends from. `in_parts`: whether factors are multiplied part by part
    (`tiles.add_products`), which takes more registers."""
    if architecture == INTERPRETER:
        return _INTERPRETED[operation]
    of_shape = _TABLE[operation][listed_architecture(architecture)]

    def distance(shape: Shape) -> float:
        return abs(math.log(shape[0] / d_model)) + abs(math.log(shape[1] / d_sae))

    return Tile(*of_shape[min(of_shape, key=distance)][in_parts])


def listed_architecture(architecture: str) -> str:
    """The newest architecture of the table that is not newer than the given one, or else its oldest."""
    if not architecture.startswith("sm_"):
        return "gfx942"
    listed = sorted((name for name in TOKEN_STEP if name.startswith("sm_")), key=_generation)
    not_newer = [name for name in listed if _generation(name) <= _generation(architecture)]
    return not_newer[-1] if not_newer else listed[0]


def _generation(architecture: str) -> int:
    found = re.search(r"\d+", architecture)
    return int(found[0]) if found else 0


def blocks(size: int, block: int) -> int:
    """The number of blocks that cover a size."""
    return -(-size // block)
