"""`token_step` in one Triton launch, whatever the batch.

The programs of a launch take numbers as they start. The first of them, one for each row of the batch, *prepare* a row:
they compute its listed latents and, in lazy mode, decide whether M_t is needed. The next ones *pass* over one tile of
`W_enc` each, for as many rows of the batch as a tile has tokens. The last ones, some for each row, *finish*: they write
the edit, each to a slice of the columns. A program only ever waits for programs with lower numbers, which are running
or done, so that a launch gets to its end however few of its programs fit on the GPU at a time, and in whatever order
they start. What a program will need it loads, or asks for, before it waits. Where the step is screened, as many
programs as pass come before them (`screening.py`).

Results do not depend on that order: maxima and integer counts are the same in any order, every other sum has a fixed
one. A row's bits do not depend on the batch: each row is one column of a product, which is summed in the same order
whether it has 16, 32 or 64.

The activations of listed latents come from one piece of code in all modes, and M_t is the largest of them and of what
the pass finds. So a bound that `lazy` proves from a listed latent holds for the M_t that `dense` computes, bit for bit.
The bound that it proves from a recent argmax latent allows for the rounding of both computations.
"""
# Inside kernels, pyright takes calls of other kernels for calls from Python, which do not return.
# pyright: reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from dspa.kernels.token_step.triton_kernel.encoder_pass import pass_tile, screen_rows
from dspa.kernels.token_step.triton_kernel.finish import finish
from dspa.kernels.token_step.triton_kernel.prepare import prepare
from dspa.kernels.token_step.triton_kernel.screening import clear_screen, measure_input
from dspa.kernels.token_step.triton_kernel.structures import PASSED, PREPARED, SLICE, STARTED
from dspa.kernels.triton_common.tiles import announce


@triton.jit(do_not_specialize=["batch"])
def token_step_kernel(
    hidden, encoder, decoder, edits, strength, stats, scratch, prompt, screen, batch, d_model, d_sae, k,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, LAZY: tl.constexpr, X_PARTS: tl.constexpr,
    EDIT: tl.constexpr, GUARD: tl.constexpr,
    LATENTS: tl.constexpr, TOKENS: tl.constexpr, MODEL: tl.constexpr, AHEAD: tl.constexpr,
):  # fmt: skip
    """One token for each row of a batch; see the module. `batch + passes + batch * slices` programs, and where it is
    screened `passes` more."""
    groups = tl.cdiv(batch, TOKENS)
    passes = tl.cdiv(d_sae, LATENTS) * groups
    slices = tl.cdiv(d_model, SLICE)
    screened = 0
    if screen is not None:
        screened = passes
    number = tl.atomic_add(scratch.counters + STARTED, 1, sem="relaxed")
    if number < batch:
        prepare(
            number, hidden, encoder, edits, strength, scratch, prompt, d_model, d_sae,
            ACTIVATION, NORMALIZATION, LAZY, EDIT, GUARD,
        )  # fmt: skip
        if screen is not None:
            measure_input(number, hidden, encoder, scratch, screen, d_model, NORMALIZATION)
        announce(scratch.counters + PREPARED)
    elif number < batch + screened:
        if screen is not None:
            screen_rows(
                (number - batch) // groups, (number - batch) % groups * TOKENS, hidden, encoder, strength, scratch,
                screen, batch, d_model, d_sae, ACTIVATION, NORMALIZATION, X_PARTS, LATENTS, TOKENS, MODEL, AHEAD,
            )  # fmt: skip
            announce(screen.counter)
    elif number < batch + screened + passes:
        tile = (number - batch - screened) // groups
        first_row = (number - batch - screened) % groups * TOKENS
        pass_tile(
            tile, first_row, hidden, encoder, edits, strength, scratch, screen, batch, d_model, d_sae,
            ACTIVATION, NORMALIZATION, LAZY, X_PARTS, LATENTS, TOKENS, MODEL, AHEAD,
        )  # fmt: skip
        passed = announce(scratch.counters + PASSED)
        if screen is not None:
            clear_screen(passed, passes, batch, screen)
    elif number < batch + screened + passes + batch * slices:  # else two launches share their scratch
        piece = number - batch - screened - passes
        finish(
            piece // slices, piece % slices, slices, passes, hidden, encoder, decoder, edits, strength, stats, scratch,
            batch, d_model, k, ACTIVATION, NORMALIZATION, LAZY,
        )  # fmt: skip
