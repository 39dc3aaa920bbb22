"""`token_step` in one Triton launch, whatever the batch; `triton_kernel/` holds the kernel."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dspa.kernels.backends.interface import StepMode
from dspa.kernels.lookup.triton_row import map_arguments, new_lists, prompt_of
from dspa.kernels.native import encoder_arguments
from dspa.kernels.token_step.arguments import strength_arguments
from dspa.kernels.token_step.encoder_codes import EncoderCodes, codes_of
from dspa.kernels.token_step.scratch import Key, kept, rows_for
from dspa.kernels.token_step.triton_kernel.kernel import token_step_kernel
from dspa.kernels.token_step.triton_kernel.screening import EXACT, NORMS, Screen
from dspa.kernels.token_step.triton_kernel.structures import (
    FINISHING,
    NUMBERS,
    RECENT,
    SLICE,
    Edits,
    Scratch,
    Stats,
    Strength,
)
from dspa.kernels.triton_common import launch as launching
from dspa.kernels.triton_common.launch import (
    Launch,
    activation_of,
    aligned,
    launch_of,
    parts_of,
    row_stride_of,
    tile_for,
    with_aligned_rows,
)
from dspa.kernels.triton_common.rows import Decoder, Hidden
from dspa.kernels.triton_common.table import Tile, blocks, for_batch
from dspa.kernels.triton_common.tiles import Encoder
from dspa.kernels.types import CsrMap, EditKind, EditList, TokenStats
from dspa.sae.weights import SaeWeights

BYTES_AHEAD = 512  # of a row of `W_enc`
LEAST_SCREENED = 16  # rows of the scratch of screened steps


@dataclass(frozen=True, eq=False)
class StepScratch:
    """The tensors of `Scratch`, for one SAE and one stream. Two steps that use it must not run at the same time."""

    counters: Tensor
    bars: Tensor
    numbers: Tensor
    maxima: Tensor
    listed: Tensor
    ranks: Tensor
    recent_argmax: Tensor

    @classmethod
    def allocate(cls, batch: int, k: int, device: torch.device) -> StepScratch:
        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        return cls(
            counters=zeros(4),
            bars=zeros(batch, dtype=torch.float32),
            numbers=zeros(batch, NUMBERS.value, dtype=torch.float32),
            maxima=zeros(batch, dtype=torch.int64),
            listed=zeros(batch, k, dtype=torch.float32),
            ranks=zeros(batch, k),
            recent_argmax=zeros(batch, RECENT.value) - 1,
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """In the order of the fields of `Scratch`."""
        return (self.counters, self.bars, self.numbers, self.maxima, self.listed, self.ranks, self.recent_argmax)

    def reset(self) -> None:
        """As it has to be found by a launch, whatever one before has left."""
        for tensor in (self.counters, self.maxima, self.ranks):
            tensor.zero_()


_scratch: WeakKeyDictionary[SaeWeights, dict[Key, StepScratch]] = WeakKeyDictionary()


def scratch_of(sae: SaeWeights, batch: int, k: int) -> StepScratch:
    """The scratch of an SAE on the current stream, for lists of this length and at least this batch."""
    rows = rows_for(batch)
    return kept(_scratch, sae, rows, k, lambda: StepScratch.allocate(rows, k, sae.device))


@dataclass(frozen=True, eq=False)
class ScreenScratch:
    """What the programs of a screened launch exchange, see `Screen`; for one SAE and one stream."""

    exact_inputs: Tensor
    norms: Tensor
    floors: Tensor
    uppers: Tensor
    screened: Tensor

    @classmethod
    def allocate(cls, rows: int, latents: int, device: torch.device) -> ScreenScratch:
        return cls(
            exact_inputs=torch.zeros(rows, EXACT.value, device=device),
            norms=torch.zeros(rows, NORMS.value, device=device),
            floors=torch.zeros(rows, dtype=torch.int64, device=device),
            uppers=torch.zeros(rows, latents, device=device),
            screened=torch.zeros(1, dtype=torch.int32, device=device),
        )

    def reset(self) -> None:
        """As it has to be found by a launch, whatever one before has left."""
        for tensor in (self.floors, self.screened):
            tensor.zero_()


NOT_SCREENED: tuple[None, ...] = (None,) * (len(fields(EncoderCodes)) + len(fields(ScreenScratch)))
_screen_scratch: WeakKeyDictionary[SaeWeights, dict[Key, ScreenScratch]] = WeakKeyDictionary()


def screen_scratch_of(sae: SaeWeights, codes: EncoderCodes, batch: int) -> ScreenScratch:
    """The scratch of an SAE on the current stream for at least this batch. It has a number for each latent and row, so
    no more rows than that."""
    rows, latents = max(LEAST_SCREENED, 1 << (batch - 1).bit_length()), codes.codes.shape[0]
    return kept(_screen_scratch, sae, rows, latents, lambda: ScreenScratch.allocate(rows, latents, sae.device))


def screen_arguments(hidden: Tensor, sae: SaeWeights, mode: StepMode | None) -> tuple[Tensor | None, ...]:
    """The arguments of `run` that only a screened step has: the fields of `EncoderCodes` and of `ScreenScratch`. The
    operation has no defaults for them, since torch 2.11 fails on a default of an argument that is written."""
    codes = codes_of(sae, hidden) if mode == "screened" else None
    if codes is None:
        return NOT_SCREENED
    return (*vars(codes).values(), *vars(screen_scratch_of(sae, codes, hidden.shape[0])).values())


def columns_ahead(W_enc: Tensor) -> int:
    """How many columns of `W_enc`, or of its codes, the first programs ask for before they know whether they are
    needed: at most an eighth of a row. On NVIDIA GPUs only."""
    columns = BYTES_AHEAD // W_enc.element_size()
    is_nvidia = launching.architecture(W_enc.device).startswith("sm_")
    return columns if is_nvidia and W_enc.shape[1] >= 8 * columns else 0


def programs_of(batch: int, d_model: int, d_sae: int, tile: Tile, activation: str, mode: StepMode) -> int:
    """How many programs a launch has: see `triton_kernel/kernel.py`."""
    preparing = batch if mode == "dense" or activation == "topk" else 2 * batch
    passing = blocks(d_sae, tile.latents) * blocks(batch, tile.tokens) * (2 if mode == "screened" else 1)
    slices = blocks(d_model, SLICE.value)
    each = min(slices, blocks(batch * slices, FINISHING.value))  # as `slices_each`
    return preparing + passing + batch * blocks(slices, each) + 1


def step_launch(
    hidden: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    threshold: Tensor,
    b_dec: Tensor | None,
    decoder_norm: Tensor | None,
    magnitude_scale: Tensor | None,
    magnitude_bias: Tensor | None,
    activation: str,
    k: int,
    normalization: str,
    W_dec: Tensor,
    decoder_rows: Tensor | None,
    latents: Tensor,
    signs: Tensor,
    counts: Tensor,
    alpha: float,
    alpha_of_row: Tensor | None,
    enabled: Tensor | None,
    seen: Tensor | None,
    edited: Tensor | None,
    nonfinite: Tensor | None,
    maximum: Tensor | None,
    maximum_sum: Tensor | None,
    maximum_known: Tensor | None,
    latent_edits: Tensor | None,
    counters: Tensor,
    bars: Tensor,
    numbers: Tensor,
    maxima: Tensor,
    listed: Tensor,
    ranks: Tensor,
    recent_argmax: Tensor,
    codes: Tensor | None,
    factors: Tensor | None,
    exact: Tensor | None,
    exact_columns: Tensor | None,
    is_exact: Tensor | None,
    exact_inputs: Tensor | None,
    norms: Tensor | None,
    floors: Tensor | None,
    uppers: Tensor | None,
    screened: Tensor | None,
    lazy: bool,
    density: Tensor | None = None,
    row_offsets: Tensor | None = None,
    columns: Tensor | None = None,
    values: Tensor | None = None,
    d_sae_out: int = 0,
    k_prompt: int = 0,
    k_diff: int = 0,
    edit: str = "ablate",
    sign_guard: bool = False,
) -> Launch:
    """The launch of the operation: a function of nothing but tensors, numbers and names. With a density, the lists are
    looked up first, and written. With codes, the step is screened. The hidden states have aligned rows."""
    batch, d_model = hidden.shape
    d_sae = W_enc.shape[0]
    x_parts = parts_of(hidden.dtype, W_enc.dtype, normalization == "none" and b_dec is None)
    tile = tile_for("token_step", W_enc, x_parts)
    if x_parts == 0 and codes is None:  # codes are small enough to be read again by further rows, from the cache
        tile = for_batch(tile, batch)
    stats = None
    if seen is not None:
        stats = Stats(seen, edited, nonfinite, maximum, maximum_sum, maximum_known, latent_edits)  # pyright: ignore[reportArgumentType]
    prompt = None
    if density is not None:
        assert row_offsets is not None  # a map comes whole
        assert columns is not None
        assert values is not None
        prompt = prompt_of(density, row_offsets, columns, values, d_sae_out, k_prompt, k_diff)
    screen = None
    if codes is not None:
        latents_of_codes, width = codes.shape
        assert latents_of_codes % tile.latents == 0  # codes are loaded without a mask
        screen = Screen(
            codes, factors, exact, exact_columns, is_exact, exact_inputs, norms, floors, uppers, screened,  # pyright: ignore[reportArgumentType]
            latents_of_codes, width,
        )  # fmt: skip
    mode = "screened" if screen is not None else "lazy" if lazy else "dense"
    return launch_of(
        token_step_kernel,
        programs_of(batch, d_model, d_sae, tile, activation, mode),
        {
            "hidden": Hidden(hidden, row_stride_of(hidden), hidden.stride(1)),
            "encoder": Encoder(W_enc, b_enc, threshold, b_dec, decoder_norm, magnitude_scale, magnitude_bias),
            "decoder": Decoder(W_dec, decoder_rows),
            "edits": Edits(latents, signs, counts, latents.shape[1]),
            "strength": Strength(float(alpha), aligned(alpha_of_row), aligned(enabled)),
            "stats": stats,
            "scratch": Scratch(counters, bars, numbers, maxima, listed, ranks, recent_argmax),
            "prompt": prompt,
            "screen": screen,
            "batch": batch,
            "d_model": d_model,
            "d_sae": d_sae,
            "k": k,
            "ACTIVATION": activation_of(activation),
            "NORMALIZATION": normalization,
            "LAZY": lazy,
            "X_PARTS": x_parts,
            "EDIT": edit,
            "GUARD": sign_guard,
            "LATENTS": tile.latents,
            "TOKENS": tile.tokens,
            "MODEL": tile.model,
            "AHEAD": columns_ahead(W_enc),
            # What is selected by rank is read anyway, and the ranks come after the products.
            "EARLY": x_parts == 0 and activation == "topk" and not lazy,
        },
        tile,
        hidden.device,
    )


def run(hidden: Tensor, *arguments: Any, **options: Any) -> None:
    """Launches the kernel, on a copy of hidden states that it cannot be launched on."""
    rows = with_aligned_rows(hidden)
    step_launch(rows, *arguments, **options).run()
    if rows is not hidden:
        hidden.copy_(rows)


run.__signature__ = inspect.signature(step_launch).replace(return_annotation=None)  # pyright: ignore[reportFunctionMemberAccess]

_WRITTEN = (
    "hidden", "seen", "edited", "nonfinite", "maximum", "maximum_sum", "maximum_known", "latent_edits",
    "counters", "bars", "numbers", "maxima", "listed", "ranks", "recent_argmax",
    "exact_inputs", "norms", "floors", "uppers", "screened",
)  # fmt: skip

# Compiled graphs see these operations; eager calls `run` itself, which spares them the bookkeeping.
operation = torch.library.custom_op("dspa_triton::token_step", run, mutates_args=_WRITTEN)
operation_with_lookup = torch.library.custom_op(
    "dspa_triton::token_step_with_lookup", run, mutates_args=(*_WRITTEN, "latents", "signs", "counts")
)


@operation_with_lookup.register_fake
@operation.register_fake
def _(*arguments: object, **options: object) -> None:
    """Everything happens in place, and no shape changes."""


def step_arguments(
    hidden: Tensor,
    sae: SaeWeights,
    lists: tuple[Tensor, Tensor, Tensor],
    alpha: float | Tensor,
    enabled: Tensor | None,
    stats: TokenStats | None,
    mode: StepMode | None,
) -> tuple[Any, ...]:
    """The arguments of `run`, up to the mode."""
    return (
        hidden,
        *encoder_arguments(sae),
        sae.W_dec,
        sae.decoder_rows,
        *lists,
        *strength_arguments(alpha, enabled, stats),
        *scratch_of(sae, lists[0].shape[0], lists[0].shape[1]).tensors(),
        *screen_arguments(hidden, sae, mode),
        mode != "dense",
    )


def call(compiled: Callable[..., None], sae: SaeWeights, *arguments: Any) -> None:
    """Runs a step, through the operation that a compiled graph sees or directly."""
    if torch.compiler.is_compiling():
        compiled(*arguments)
        return
    try:
        run(*arguments)
    except BaseException:
        for scratch in _scratch[sae].values():  # a launch that did not end leaves its counters anywhere
            if any(scratch.counters is argument for argument in arguments):
                scratch.reset()
        for scratch in _screen_scratch.get(sae, {}).values():
            if any(scratch.screened is argument for argument in arguments):
                scratch.reset()
        raise


def token_step(
    hidden: Tensor,
    sae: SaeWeights,
    edits: EditList,
    alpha: float | Tensor,
    enabled: Tensor | None,
    stats: TokenStats | None,
    mode: StepMode | None,
) -> None:
    """See `dspa.kernels.token_step`. The default is "lazy"; "screened" is served as that for topk, which ranks
    latents."""
    if hidden.shape[0] == 0:
        return
    lists = (edits.latents.contiguous(), edits.signs.contiguous(), edits.counts.contiguous())
    call(operation, sae, *step_arguments(hidden, sae, lists, alpha, enabled, stats, mode))


def token_step_with_lookup(
    hidden: Tensor,
    sae: SaeWeights,
    density: Tensor,
    conditional_map: CsrMap,
    k_prompt: int,
    k_diff: int,
    edit: EditKind,
    sign_guard: bool,
    alpha: float | Tensor,
    enabled: Tensor | None,
    stats: TokenStats | None,
    mode: StepMode | None,
) -> EditList:
    """See `dspa.kernels.token_step_with_lookup`. The lookup is part of the same launch."""
    lists = new_lists(density.shape[0], k_diff, edit, density.device)
    if hidden.shape[0] > 0:
        arguments = step_arguments(hidden, sae, lists, alpha, enabled, stats, mode)
        prompt = (density, *map_arguments(conditional_map), k_prompt, k_diff, edit, sign_guard)
        call(operation_with_lookup, sae, *arguments, *prompt)
    return EditList(*lists)
