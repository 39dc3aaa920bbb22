"""`token_step` in one Triton launch, whatever the batch.

The programs of a launch take numbers as they start. The first of them, one for each row of the batch, *prepare* a row:
they compute its listed latents. In lazy mode as many others *bound* M_t from below, beside them. The next ones *pass*
over one tile of `W_enc` each, for as many rows of the batch as a tile has tokens, and as far as some row needs M_t. The
next ones, some for each row, *finish*: they write the edit, each to a slice of the columns. The last one *clears* the
scratch. A program only ever waits for programs with lower numbers, which are running or done, so that a launch gets to
its end however few of its programs fit on the GPU at a time, and in whatever order they start. What a program will need
it loads, or asks for, before it waits. Where the step is screened, as many programs as pass come before them
(`screening.py`).

A row that the maxima so far have settled is edited while the pass goes on for others, and tiles may read it half
edited. That changes nothing: columns of a product are independent, and maxima only rise, so that it stays settled.

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
from dspa.kernels.token_step.triton_kernel.finish import clear, finish
from dspa.kernels.token_step.triton_kernel.prepare import bound, prepare
from dspa.kernels.token_step.triton_kernel.rows import preparing, slices_each
from dspa.kernels.token_step.triton_kernel.screening import clear_screen, measure_input
from dspa.kernels.token_step.triton_kernel.structures import BESIDE, PASSED, PREPARED, SLICE, STARTED
from dspa.kernels.triton_common.tiles import announce, fetch_ahead


@triton.jit(do_not_specialize=["batch"])
def token_step_kernel(
    hidden, encoder, decoder, edits, strength, stats, scratch, prompt, screen, batch, d_model, d_sae, k,
    ACTIVATION: tl.constexpr, NORMALIZATION: tl.constexpr, LAZY: tl.constexpr, X_PARTS: tl.constexpr,
    EDIT: tl.constexpr, GUARD: tl.constexpr,
    LATENTS: tl.constexpr, TOKENS: tl.constexpr, MODEL: tl.constexpr, AHEAD: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One token for each row of a batch; see the module, and `programs_of` for how many programs."""
    groups = tl.cdiv(batch, TOKENS)
    passes = tl.cdiv(d_sae, LATENTS) * groups
    slices = tl.cdiv(d_model, SLICE)
    each = slices_each(batch, slices)
    pieces = tl.cdiv(slices, each)
    prepared = preparing(batch, ACTIVATION, LAZY)
    screened = 0
    if screen is not None:
        screened = passes
    if AHEAD > 0:  # a program mostly starts in its turn, so what it will read is on the way before it has a number
        likely = tl.program_id(0) - prepared
        if (likely >= 0) & (likely < tl.minimum(passes, BESIDE * groups)):
            latents = likely // groups * LATENTS + tl.arange(0, LATENTS)
            if screen is not None:
                fetch_ahead(screen.codes + latents.to(tl.int64) * screen.width, AHEAD)
            else:
                fetch_ahead(encoder.W_enc + tl.minimum(latents, d_sae - 1).to(tl.int64) * d_model, AHEAD)
    number = tl.atomic_add(scratch.counters + STARTED, 1, sem="relaxed")
    if number < batch:
        prepare(
            number, hidden, encoder, edits, strength, scratch, prompt, d_model, d_sae,
            ACTIVATION, NORMALIZATION, LAZY, EDIT, GUARD,
        )  # fmt: skip
        if screen is not None:
            measure_input(number, hidden, encoder, scratch, screen, d_model, NORMALIZATION)
        announce(scratch.counters + PREPARED)
    elif number < prepared:
        bound(number - batch, hidden, encoder, strength, scratch, screen, d_model, d_sae, ACTIVATION, NORMALIZATION)
        announce(scratch.counters + PREPARED)
    elif number < prepared + screened:
        if screen is not None:
            tile = (number - prepared) // groups
            first_row = (number - prepared) % groups * TOKENS
            screen_rows(
                tile, first_row, hidden, encoder, strength, scratch, screen, batch, d_model, d_sae,
                ACTIVATION, NORMALIZATION, X_PARTS, LATENTS, TOKENS, MODEL,
            )  # fmt: skip
            announce(screen.counter)
    elif number < prepared + screened + passes:
        tile = (number - prepared - screened) // groups
        first_row = (number - prepared - screened) % groups * TOKENS
        pass_tile(
            tile, first_row, hidden, encoder, edits, strength, scratch, screen, batch, d_model, d_sae,
            ACTIVATION, NORMALIZATION, LAZY, X_PARTS, LATENTS, TOKENS, MODEL, AHEAD, EARLY,
        )  # fmt: skip
        passed = announce(scratch.counters + PASSED)
        if screen is not None:
            clear_screen(passed, passes, batch, screen)
    elif number < prepared + screened + passes + batch * pieces:
        piece = number - prepared - screened - passes
        finish(
            piece // pieces, piece % pieces, each, passes, hidden, encoder, decoder, edits, strength, stats, scratch,
            batch, d_model, k, ACTIVATION, NORMALIZATION, LAZY,
        )  # fmt: skip
    elif number == prepared + screened + passes + batch * pieces:  # else two launches share their scratch
        clear(batch * pieces, passes, batch, edits, scratch, ACTIVATION)
