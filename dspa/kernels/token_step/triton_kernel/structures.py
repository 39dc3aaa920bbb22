"""The arguments of the Triton kernel of a token step, its scratch, and the constants of both."""

from __future__ import annotations

from typing import NamedTuple

import triton.language as tl
from torch import Tensor

RECENT = tl.constexpr(16)  # argmax latents kept for a row
SLICE = tl.constexpr(512)  # columns of the model that are edited at a time
BESIDE = tl.constexpr(256)  # tiles whose programs start beside those that prepare; later ones hardly wait for them
FINISHING = tl.constexpr(256)  # programs that finish, as far as rows are split: more would not fit on a GPU at a time

# Counters of a launch.
STARTED, PREPARED, PASSED, FINISHED = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
# Bars of rows that need no pass.
DISABLED, NONFINITE, SETTLED = tl.constexpr(-1.0), tl.constexpr(-2.0), tl.constexpr(-3.0)
# Numbers of a row.
SHIFT, FACTOR, SCALE, LARGEST = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
NUMBERS = tl.constexpr(4)


class Edits(NamedTuple):
    """The tensors of an `EditList`, and its k."""

    latents: Tensor
    signs: Tensor
    counts: Tensor
    capacity: int


class Strength(NamedTuple):
    """alpha, or one for each row, and the flags of the rows."""

    alpha: float
    alpha_of_row: Tensor | None
    enabled: Tensor | None


class Stats(NamedTuple):
    """The tensors of `TokenStats`."""

    seen: Tensor
    edited: Tensor
    nonfinite: Tensor
    maximum: Tensor
    maximum_sum: Tensor
    maximum_known: Tensor
    latent_edits: Tensor


class Scratch(NamedTuple):
    """What the programs of a launch exchange. A launch restores it, except for `recent_argmax`.

    Attributes:
        counters: `[4]` int32, 0 between launches.
        bars: `[B]` float32: what alpha * M_t must reach for all listed latents of a row to vanish, NaN if they do not
            vanish whatever it is; or one of the negative numbers above.
        numbers: `[B, 4]` float32: what normalises the row, and its largest listed activation.
        maxima: `[B]` int64, the largest activation found by the pass, or what recent argmax latents prove, and which
            latent; 0 between launches.
        listed: `[B, k]` float32, scores of listed latents.
        ranks: `[B, k]` int32, for topk: how many latents are ahead of a listed one; 0 between launches.
        recent_argmax: `[B, 16]` int32, argmax latents of this row at earlier tokens, the most recent first, or -1.
    """

    counters: Tensor
    bars: Tensor
    numbers: Tensor
    maxima: Tensor
    listed: Tensor
    ranks: Tensor
    recent_argmax: Tensor
