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
MOST_TOKENS = 64  # that share a pass


class Tile(NamedTuple):
    """Block sizes of one kernel.

    Attributes:
        latents: rows of `W_enc` that one program multiplies; a power of 2.
        tokens: rows of the hidden states that it multiplies them with; a power of 2, at least 16. See `for_batch`.
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


def for_batch(tile: Tile, batch: int) -> Tile:
    """A tile of `token_step` with room for all tokens of a batch, up to 64, so that `W_enc` is read once for all of
    them. What it holds in shared memory grows by half at most: there are fewer stages instead. The number of warps,
    which decides about the order of sums, stays."""
    tokens = min(MOST_TOKENS, max(tile.tokens, 1 << (batch - 1).bit_length()))
    if tile.warps == 1 or tokens == tile.tokens:  # the interpreter sums wider products in another order
        return tile
    room = 3 * (tile.latents + tile.tokens) * tile.stages // 2
    return tile._replace(tokens=tokens, stages=max(2, min(tile.stages, room // (tile.latents + tokens))))


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
