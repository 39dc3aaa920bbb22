"""`adapter_step` in three Triton launches, whatever the batch; `triton_kernel.py` holds the kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from dspa.kernels.adapter_step.arguments import adapter_arguments, row_arguments
from dspa.kernels.adapter_step.triton_kernel import Adapter, Counters, Lists, change, decode, fire
from dspa.kernels.adapter_weights import AdapterWeights
from dspa.kernels.backends.interface import AdapterMode
from dspa.kernels.native import encoder_arguments
from dspa.kernels.triton_common.launch import (
    activation_of,
    aligned,
    launch,
    parts_of,
    row_stride_of,
    tile_for,
    with_aligned_rows,
)
from dspa.kernels.triton_common.rows import ROW, TOKENS, Decoder, Hidden
from dspa.kernels.triton_common.table import blocks
from dspa.kernels.triton_common.tiles import Encoder
from dspa.kernels.types import TokenStats
from dspa.sae.weights import SaeWeights

MOST_ENTRIES = 16 << 20  # of all lists at a time: 256 MiB
LIST_WARPS, LIST_STAGES = 4, 2


def run(
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
    weight: Tensor,
    bias: Tensor,
    adapter_threshold: Tensor,
    adapter_activation: str,
    clip: bool,
    enabled: Tensor | None,
    seen: Tensor | None,
    edited: Tensor | None,
    nonfinite: Tensor | None,
    latent_edits: Tensor | None,
) -> None:
    """Launches the kernels: the operation as a function of nothing but tensors, numbers and names."""
    given, hidden, enabled = hidden, with_aligned_rows(hidden), aligned(enabled)
    d_sae, d_model = weight.shape
    device = hidden.device
    x_parts = parts_of(hidden.dtype, weight.dtype, normalization == "none" and b_dec is None)
    tile = tile_for("token_step", weight, x_parts)
    tiles = blocks(d_sae, tile.latents)
    list_tile = tile._replace(warps=min(LIST_WARPS, tile.warps), stages=min(LIST_STAGES, tile.stages))
    covering = 1 << (tiles - 1).bit_length()  # a power of 2
    encoder = Encoder(W_enc, b_enc, threshold, b_dec, decoder_norm, magnitude_scale, magnitude_bias)
    at_once = max(TOKENS.value, MOST_ENTRIES // d_sae // TOKENS.value * TOKENS.value)
    for first in range(0, hidden.shape[0], at_once):
        rows = hidden[first : first + at_once]
        batch = rows.shape[0]
        on = None if enabled is None else enabled[first : first + at_once]
        counters = None
        if seen is not None and edited is not None and nonfinite is not None and latent_edits is not None:
            here = slice(first, first + at_once)
            counters = Counters(seen[here], edited[here], nonfinite[here], latent_edits)
        lists = new_lists(batch, tiles, d_sae, device)
        of_hidden = Hidden(rows, row_stride_of(rows), rows.stride(1))
        sizes: dict[str, object] = {"d_model": d_model, "d_sae": d_sae}
        fires: dict[str, object] = {
            "hidden": of_hidden,
            "adapter": Adapter(weight, bias, adapter_threshold),
            "b_dec": b_dec,
            "enabled": on,
            "lists": lists,
            "batch": batch,
            "SOFT": adapter_activation == "soft_threshold",
            "NORMALIZATION": normalization,
            "X_PARTS": x_parts,
            "LATENTS": tile.latents,
            "MODEL": tile.model,
        }
        launch(fire, tiles * blocks(batch, TOKENS.value), fires | sizes, tile, device)
        changes: dict[str, object] = {
            "hidden": of_hidden,
            "encoder": encoder,
            "lists": lists,
            "CLIP": clip,
            "ACTIVATION": activation_of(activation),
            "NORMALIZATION": normalization,
            "LATENTS": tile.latents,
            "TILES": covering,
        }
        launch(change, batch * tiles, changes | sizes, list_tile, device)
        decodes: dict[str, object] = {
            "hidden": of_hidden,
            "decoder": Decoder(W_dec, decoder_rows),
            "decoder_norm": decoder_norm,
            "enabled": on,
            "counters": counters,
            "lists": lists,
            "NORMALIZATION": normalization,
            "LATENTS": tile.latents,
            "TILES": covering,
        }
        launch(decode, batch * blocks(d_model, ROW.value), decodes | sizes, list_tile, device)
    if hidden is not given:
        given.copy_(hidden)


def new_lists(batch: int, tiles: int, d_sae: int, device: torch.device) -> Lists:
    """Memory for the lists of a batch; nothing of it is read before it is written."""

    def empty(columns: int, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.empty(batch, columns, dtype=dtype, device=device)

    return Lists(
        fired=empty(tiles),
        bad=empty(tiles),
        numbers=empty(3, torch.float32),
        tile_latents=empty(d_sae),
        tile_values=empty(d_sae, torch.float32),
        latents=empty(d_sae),
        changes=empty(d_sae, torch.float32),
    )


# Compiled graphs see this operation; eager calls `run` itself, which spares them the bookkeeping.
operation = torch.library.custom_op(
    "dspa_triton::adapter_step", run, mutates_args=("hidden", "seen", "edited", "nonfinite", "latent_edits")
)


@operation.register_fake
def _(*arguments: object, **options: object) -> None:
    """Everything happens in place, and no shape changes."""


def adapter_step(
    hidden: Tensor,
    sae: SaeWeights,
    adapter: AdapterWeights,
    enabled: Tensor | None,
    stats: TokenStats | None,
    steering_fraction: float | None,
    mode: AdapterMode | None,
) -> None:
    """See `dspa.kernels.adapter_step`. "screened" is served as "dense"."""
    assert steering_fraction is None  # the backend's entry in the table refuses it
    assert sae.W_dec is not None  # the dispatcher checks it
    if hidden.shape[0] == 0:
        return
    step = operation if torch.compiler.is_compiling() else run
    step(
        hidden,
        *encoder_arguments(sae),
        sae.W_dec,
        sae.decoder_rows,
        *adapter_arguments(adapter),
        *row_arguments(enabled, stats),
    )
