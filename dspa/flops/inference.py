"""FLOPs and bytes of a generated token and of a prompt, of the model alone and of steering, by formula."""

from __future__ import annotations

from dataclasses import dataclass

from dspa.errors import InvalidInputError
from dspa.flops.quantities import MethodCost, Mode, Work
from dspa.flops.shapes import ModelShape, SteeringShape


@dataclass(frozen=True)
class InferenceAssumptions:
    """What the inference figures rest on.

    Attributes:
        batch: rows decoded at once; weights are read once for all of them.
        context: keys each row has in its cache.
        prompt_tokens, response_tokens: of a request; spread the prompt's cost over its response.
        weight_bytes, cache_bytes, sae_bytes: per element of the model, its key-value cache, and the SAEs.
        k_prompt, k_diff: rows of the map that are added up, and latents in an edit list.
        map_entries: entries of the map's rows.
        edited_latents: listed latents that are active on a token, of which decoder rows are read.
        pass_share: share of the tokens for which "lazy" cannot avoid the pass over the encoder (organism: about a
            third at the published setting; it depends on SAE and policy).
        screen_bytes: per element of the copy of the encoder that "screened" reads (1 for int8).
        survivors: share of the latents whose bound is not decisive and that are computed again in full precision.

    Raises:
        InvalidInputError: for a number out of range.
    """

    batch: int = 1
    context: int = 1024
    prompt_tokens: int = 1000
    response_tokens: int = 500
    weight_bytes: float = 2
    cache_bytes: float = 2
    sae_bytes: float = 2
    k_prompt: int = 32
    k_diff: int = 16
    map_entries: int = 32
    edited_latents: float = 1
    pass_share: float = 1 / 3
    screen_bytes: float = 1
    survivors: float = 0.02

    def __post_init__(self) -> None:
        for name in (
            "batch",
            "context",
            "prompt_tokens",
            "response_tokens",
            "weight_bytes",
            "cache_bytes",
            "sae_bytes",
        ):
            if getattr(self, name) <= 0:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected more than 0")
        for name in ("pass_share", "survivors"):
            if not 0 <= getattr(self, name) <= 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected 0 to 1")


def decode_step(shape: ModelShape, i: InferenceAssumptions) -> Work:
    """The model's own work for one generated token of one row: its share of the batch's weights, and its keys."""
    keys = [i.context if window is None else min(i.context, window) for window in shape.windows]
    flops = 2.0 * shape.matrix_weights + sum(4.0 * shape.query_width * n for n in keys)
    cache = sum(2.0 * shape.key_width * i.cache_bytes * n for n in keys)
    return Work(flops, shape.matrix_weights * i.weight_bytes / i.batch + cache)


def prefill(shape: ModelShape, i: InferenceAssumptions) -> Work:
    """The model's own work for one prompt; the head runs on the last token."""
    tokens = i.prompt_tokens
    attention = shape.attention(tokens, 0, range(shape.layers), "square")
    flops = 2.0 * sum(shape.block_weights) * tokens + 2.0 * shape.head_weights + attention
    cache = 2.0 * shape.key_width * i.cache_bytes * tokens * shape.layers
    return Work(flops, shape.matrix_weights * i.weight_bytes / i.batch + cache)


def steer_token(shape: ModelShape, steering: SteeringShape, i: InferenceAssumptions, mode: Mode) -> Work:
    """What steering adds per generated token and row.

    - dense: one pass over the encoder, `2 d_model d_sae`;
    - lazy: the listed latents, and the pass only where the edit depends on the maximum M_t;
    - screened: the same, but the pass reads a copy in lower precision and computes again what its bounds leave open.

    The pass of a batch is made for the rows that need it, and then reads the encoder once for all of them.
    """
    d_model, d_sae = shape.d_model, steering.d_sae_out
    edit = Work(2.0 * d_model * i.edited_latents, d_model * i.sae_bytes * i.edited_latents)
    latent = d_model * i.sae_bytes + 8  # an encoder row, its bias and its threshold
    if mode == "dense":
        return Work(2.0 * d_model * d_sae + edit.flops, d_sae * latent / i.batch + edit.bytes)
    listed = Work(2.0 * d_model * i.k_diff, i.k_diff * latent)
    per_row = i.pass_share
    per_batch = (1 - (1 - i.pass_share) ** i.batch) / i.batch
    if mode == "lazy":
        whole = Work(2.0 * d_model * d_sae * per_row, d_sae * latent * per_batch)
    else:
        screen = d_model * i.screen_bytes + 12  # a row of the copy, its scale, error bound, bias or threshold
        whole = Work(
            2.0 * d_model * d_sae * (1 + i.survivors) * per_row,
            d_sae * (screen * per_batch + latent * i.survivors * per_row),
        )
    return Work(edit.flops + listed.flops + whole.flops, edit.bytes + listed.bytes + whole.bytes)


def steer_prompt(shape: ModelShape, steering: SteeringShape, i: InferenceAssumptions) -> Work:
    """What steering adds per prompt: its densities under the input SAE, and the edit list from the map."""
    d_model, d_sae = shape.d_model, steering.d_sae_in
    flops = 2.0 * d_model * d_sae * i.prompt_tokens + i.k_prompt * i.map_entries
    hidden = d_model * i.sae_bytes * i.prompt_tokens
    encoder = d_sae * (d_model * i.sae_bytes + 8) / i.batch
    return Work(flops, encoder + hidden + i.k_prompt * i.map_entries * 8)


def break_even_tokens(
    method: MethodCost,
    ours: MethodCost,
    triples: int,
    per_token: Work,
    per_prompt: Work,
    i: InferenceAssumptions,
    method_token: float = 0.0,
) -> float | None:
    """Generated tokens from which on a method has cost fewer FLOPs in all.

    Args:
        method: the alignment stage of the other method.
        ours: the alignment stage of DSPA.
        triples: N.
        per_token: what steering adds to a token.
        per_prompt: what steering adds to a prompt.
        i: how many tokens share a prompt's cost.
        method_token: FLOPs the method adds per generated token; none if it changes the weights.

    Returns:
        None if it never has.
    """
    saved = (method.flops.total() - ours.flops.total()) * triples
    slope = per_token.flops + per_prompt.flops / i.response_tokens - method_token
    if saved <= 0:
        return 0.0
    return saved / slope if slope > 0 else None
