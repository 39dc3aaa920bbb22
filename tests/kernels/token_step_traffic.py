"""How many bytes a `token_step` on a GPU moves: a static model, for the share of the memory bandwidth in benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dspa.sae.weights import SaeWeights

LISTED_AT_ONCE = 16  # entries of a list that are computed with one reading of the row
ROWS_AT_ONCE = 16  # rows of a batch that share a pass over W_enc; up to 64 where products are plain, on a GPU
COLUMNS_AT_ONCE = 512  # that one program edits


@dataclass(frozen=True)
class Traffic:
    """Bytes that the programs of one launch load and store, without lists, counters and scratch (some 100 a row).

    Attributes:
        encoder: of `W_enc`. With more than 16 rows every weight is asked for again by each further 16; they run side by
            side, so that a cache can answer.
        decoder: of `W_dec`.
        hidden: of the hidden states; all but the first reading come from a cache.
        parameters: of biases, thresholds and scales.
        compulsory: what must come from memory or go there: every byte of the four once.
    """

    encoder: int
    decoder: int
    hidden: int
    parameters: int
    compulsory: int

    @property
    def total(self) -> int:
        return self.encoder + self.decoder + self.hidden + self.parameters


def bytes_moved(
    sae: SaeWeights,
    hidden_dtype: torch.dtype,
    batch: int,
    *,
    listed: int,
    positive: int = 0,
    touched: int = 0,
    changed: int = 0,
    edited: int = 0,
    passes: bool = True,
    latents_per_program: int = 64,
) -> Traffic:
    """The bytes of one step of the Triton backend.

    Args:
        sae: the output SAE.
        hidden_dtype: of the hidden states `[batch, d_model]`.
        batch: rows, all of them enabled.
        listed: entries of each row's list.
        positive: entries of all lists together that score above 0. Their decoder rows are loaded before it is known
            whether they change.
        touched: rows with such an entry, which are loaded at that time.
        changed: entries that the edit changes.
        edited: rows that the edit changes.
        passes: whether the rows need the pass over `W_enc`, which in lazy mode they may not. Leaders are left out.
        latents_per_program: `latents` of the tile in use, see `dspa.kernels.triton_common.table`.
    """
    assert sae.W_dec is not None  # token_step checks it
    weight_row = sae.d_model * sae.dtype.itemsize
    hidden_row = sae.d_model * hidden_dtype.itemsize
    # b_enc and the threshold for most; topk has no threshold, gated two scales instead of it, and some a norm as well.
    per_latent = {"topk": 1, "gated": 3}.get(sae.activation, 2) + (sae.decoder_norm is not None)
    bias_row = 4 * sae.d_model if sae.subtract_b_dec else 0
    norm_readings = {"none": 0, "constant_norm_rescale": 1, "layer_norm": 2}[sae.normalization]

    readings = max(1, -(-listed // LISTED_AT_ONCE))
    groups = -(-batch // ROWS_AT_ONCE) if passes else 0
    tiles = -(-sae.d_sae // latents_per_program) if passes else 0
    norms_changed = 4 * changed * (sae.decoder_norm is not None) * -(-sae.d_model // COLUMNS_AT_ONCE)
    return Traffic(
        encoder=(batch * listed + groups * sae.d_sae) * weight_row,
        decoder=positive * weight_row,
        hidden=(batch * (readings + norm_readings + tiles) + touched + edited) * hidden_row,
        parameters=4 * per_latent * (batch * listed + groups * sae.d_sae)
        + bias_row * (batch * readings + groups * tiles)
        + norms_changed,
        compulsory=(sae.d_sae if passes else batch * listed) * (weight_row + 4 * per_latent)
        + changed * weight_row
        + (batch + edited) * hidden_row
        + bias_row,
    )
