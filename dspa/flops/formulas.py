"""FLOPs and bytes of the method and of what it is compared with, by formula. Pure arithmetic: no tensor, no model.

A multiply-add is two FLOPs. `P` is the number of parameters; a token costs `2P` forward and `6P` in training
(forward, and twice as much backward). Three terms are kept apart so that each can be left out:

- linear: the weight matrices;
- attention: scores and weighted values, `4 * heads * head_dim` per layer and pair of query and key;
- sae: encoding, decoding, and an adapter where there is one; `2 d_model d_sae` per token and matrix.

Published figures: DSPA, arXiv 2603.21461, section 4 and appendix; FSRL, arXiv 2509.12934.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from dspa.errors import InvalidInputError
from dspa.offline.batching import BatchLimits, TripleLengths, chunks, plan_groups

AttentionPairs = Literal["square", "causal"]
Mode = Literal["dense", "lazy", "screened"]
MODES: tuple[Mode, ...] = ("dense", "lazy", "screened")

COLLECTED, PUBLISHED, RAHF, DPO, FSRL = "DSPA as collected here", "DSPA as published", "RAHF-SCIT", "DPO", "FSRL"


# --- what is added up -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """FLOPs by term."""

    linear: float = 0.0
    attention: float = 0.0
    sae: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.attention + other.attention, self.sae + other.sae)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.linear * factor, self.attention * factor, self.sae * factor)

    def total(self, attention: bool = True, sae: bool = True) -> float:
        return self.linear + (self.attention if attention else 0.0) + (self.sae if sae else 0.0)


@dataclass(frozen=True)
class Stage:
    """A step of a method, per preference triple."""

    name: str
    flops: Flops


@dataclass(frozen=True)
class MethodCost:
    """What aligning with a method costs, per preference triple.

    Attributes:
        method: its name.
        formula: the linear term, as it is published or as it is run.
        stages: what it consists of.
    """

    method: str
    formula: str
    stages: tuple[Stage, ...]

    @property
    def flops(self) -> Flops:
        return sum((stage.flops for stage in self.stages), Flops())


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that its FLOPs follow from.

    Attributes:
        name: what to call it.
        parameters: P, all of them; tied ones once.
        d_model: width of the residual stream.
        block_weights: per block, the elements of its weight matrices.
        qkv_weights: of these, the query, key and value projections.
        head_weights: elements of the matrix that gives the logits.
        query_width: heads times head_dim.
        key_width: key-value heads times head_dim.
        windows: per block, how many keys a query sees; None for all.
    """

    name: str
    parameters: int
    d_model: int
    block_weights: tuple[int, ...]
    qkv_weights: int
    head_weights: int
    query_width: int
    key_width: int
    windows: tuple[int | None, ...]

    @property
    def layers(self) -> int:
        return len(self.block_weights)

    @property
    def matrix_weights(self) -> int:
        """Elements of all matrices a token is multiplied with; an embedding that is only looked up is none."""
        return sum(self.block_weights) + self.head_weights

    def weights_through(self, layer: int) -> int:
        """P': the matrix elements of blocks 0 to `layer`."""
        return sum(self.block_weights[: layer + 1])

    def attention(self, queries: int, past: int, layers: range, pairs: AttentionPairs) -> float:
        """Attention FLOPs of one row in some layers.

        Args:
            queries: tokens of the call.
            past: tokens before them whose keys are in a cache.
            layers: which blocks.
            pairs: "square": every query with every key of the call, as an implementation with a mask computes and
                as `torch.utils.flop_counter` counts; "causal": only pairs that the mask leaves.
        """
        return float(sum(4 * self.query_width * _pairs(queries, past, self.windows[layer], pairs) for layer in layers))


def _pairs(queries: int, past: int, window: int | None, pairs: AttentionPairs) -> int:
    if pairs == "square":
        kept = past if window is None else min(past, window - 1)
        return queries * (kept + queries)
    if window is None:
        return queries * past + queries * (queries + 1) // 2
    return sum(min(past + query + 1, window) for query in range(queries))


@dataclass(frozen=True)
class SteeringShape:
    """Where the SAEs read and how wide they are.

    Raises:
        InvalidInputError: if a layer is not the model's.
    """

    input_layer: int
    output_layer: int
    d_sae_in: int = 16384
    d_sae_out: int = 16384

    def check(self, shape: ModelShape) -> SteeringShape:
        for which, layer in (("input", self.input_layer), ("output", self.output_layer)):
            if not 0 <= layer < shape.layers:
                raise InvalidInputError(f"{which} layer is {layer}; {shape.name} has layers 0 to {shape.layers - 1}")
        if self.input_layer > self.output_layer:
            raise InvalidInputError(f"input layer {self.input_layer} comes after output layer {self.output_layer}")
        return self


# --- alignment stage --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class AlignmentAssumptions:
    """What the alignment-stage figures rest on. The defaults are the published ones.

    Attributes:
        prompt_tokens, chosen_tokens, rejected_tokens: p, c, r.
        rahf_tokens: L1, the length of RAHF-SCIT's step-1 examples.
        rahf_examples: effective examples per triple in step 1.
        rahf_passes: gradient passes over each.
        rahf_batch, rahf_step2_tokens: B and L2 of step 2.
        rahf_steps_per_triple: batches of step 2 per triple.
        rahf_frozen_passes: passes without gradient in step 2, beside one with.
        dpo_epochs: passes over the data.
        dpo_cached_reference: the reference model's log-probabilities are computed once, not in every epoch.
        fsrl_epochs: passes over the data.
        fsrl_d_sae: width of FSRL's SAE and adapter.
        fsrl_layer: where it sits; None for the middle of the model.
        pairs: which pairs of query and key attention counts.
        chunk: most tokens of a row in one call when densities are collected.

    Raises:
        InvalidInputError: if there is a length, a batch or a chunk below 1.
    """

    prompt_tokens: int = 1000
    chosen_tokens: int = 1000
    rejected_tokens: int = 1000
    rahf_tokens: int = 768
    rahf_examples: float = 4
    rahf_passes: float = 2
    rahf_batch: int = 64
    rahf_step2_tokens: int = 512
    rahf_steps_per_triple: float = 0.02
    rahf_frozen_passes: float = 3
    dpo_epochs: float = 1
    dpo_cached_reference: bool = True
    fsrl_epochs: float = 1
    fsrl_d_sae: int = 65536
    fsrl_layer: int | None = None
    pairs: AttentionPairs = "square"
    chunk: int = BatchLimits().chunk

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "chosen_tokens", "rejected_tokens", "rahf_tokens", "rahf_batch", "chunk"):
            if getattr(self, name) < 1:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected at least 1")

    @property
    def lengths(self) -> TripleLengths:
        return TripleLengths(self.prompt_tokens, self.chosen_tokens, self.rejected_tokens)

    @property
    def sequences(self) -> tuple[int, int]:
        """Tokens of x + y+ and of x + y-."""
        return self.prompt_tokens + self.chosen_tokens, self.prompt_tokens + self.rejected_tokens


def dspa_published(parameters: float, a: AlignmentAssumptions, shape: ModelShape | None = None) -> MethodCost:
    """Three whole forward passes: `2 P N (3p + c + r)`. With a shape, attention is counted too."""
    passes = (("forward x", a.prompt_tokens), ("forward x + y+", a.sequences[0]), ("forward x + y-", a.sequences[1]))
    stages = [Stage(name, _forward(parameters, tokens, a, shape)) for name, tokens in passes]
    return MethodCost(PUBLISHED, "2 P (3p + c + r)", tuple(stages))


def dspa_collected(shape: ModelShape, steering: SteeringShape, a: AlignmentAssumptions) -> MethodCost:
    """One triple of the assumed lengths, as `dspa.collect` runs it."""
    stages = collection_stages(shape, steering, [a.lengths], BatchLimits(chunk=a.chunk), a.pairs)
    return MethodCost(COLLECTED, "2 P' (p + c + r)", stages)


def collection_stages(
    shape: ModelShape,
    steering: SteeringShape,
    lengths: Sequence[TripleLengths],
    limits: BatchLimits,
    pairs: AttentionPairs = "square",
) -> tuple[Stage, ...]:
    """What `dspa.collect` runs for the triples of one shard: prompts once for both responses, nothing past the output
    layer, and there only the prompts' queries, keys and values (the queries are not used, but computed with them).
    Padding and what longer prompts of a group repeat are included."""
    steering.check(shape)
    last = steering.output_layer
    through = shape.weights_through(last)
    stops_early = steering.input_layer < last
    prompt_weights = through - shape.block_weights[last] + shape.qkv_weights if stops_early else through
    prompt_layers = range(last if stops_early else last + 1)
    prompts = responses = Flops()
    for group in plan_groups(lengths, limits):
        attention = _chunked_attention(shape, group.shared, 0, prompt_layers, limits.chunk, pairs)
        prompts += Flops(2.0 * prompt_weights * group.shared, attention) * len(group.triples)
        for rows in group.continuations:
            width = max(row.length for row in rows)
            attention = _chunked_attention(shape, width, group.shared, range(last + 1), limits.chunk, pairs)
            responses += Flops(2.0 * through * width, attention) * len(rows)
    encoded = sum(n.prompt for n in lengths), sum(n.chosen + n.rejected for n in lengths)
    prompts += Flops(sae=2.0 * shape.d_model * steering.d_sae_in * encoded[0])
    responses += Flops(sae=2.0 * shape.d_model * steering.d_sae_out * encoded[1])
    return (Stage("prompts once", prompts), Stage("both responses", responses))


def collection_reference(shape: ModelShape, steering: SteeringShape, a: AlignmentAssumptions) -> Flops:
    """`2 P' (p + c + r)`, attention over blocks 0 to the output layer, and `2 d_model d_sae` per encoded token: what
    the count of the calls is compared with."""
    lengths, layers = a.lengths, range(steering.output_layer + 1)
    tokens = lengths.prompt + lengths.chosen + lengths.rejected
    attention = _chunked_attention(shape, lengths.prompt, 0, layers, a.chunk, a.pairs)
    for response in (lengths.chosen, lengths.rejected):
        attention += _chunked_attention(shape, response, lengths.prompt, layers, a.chunk, a.pairs)
    responses = lengths.chosen + lengths.rejected
    return Flops(
        2.0 * shape.weights_through(steering.output_layer) * tokens,
        attention,
        2.0 * shape.d_model * (steering.d_sae_in * lengths.prompt + steering.d_sae_out * responses),
    )


def rahf_scit(parameters: float, a: AlignmentAssumptions, shape: ModelShape | None = None) -> MethodCost:
    """`48 P N L1 + 12 P (B L2) (0.02 N)` under the published assumptions."""
    step1 = _forward(parameters, a.rahf_tokens, a, shape) * (3 * a.rahf_examples * a.rahf_passes)
    sequences = a.rahf_steps_per_triple * a.rahf_batch
    step2 = _forward(parameters, a.rahf_step2_tokens, a, shape) * (sequences * (a.rahf_frozen_passes + 3))
    formula = (
        f"{6 * a.rahf_examples * a.rahf_passes:g} P L1 + "
        f"{2 * a.rahf_frozen_passes + 6:g} P B L2 * {a.rahf_steps_per_triple:g}"
    )
    return MethodCost(RAHF, formula, (Stage("step 1: two models", step1), Stage("step 2: distillation", step2)))


def dpo(parameters: float, a: AlignmentAssumptions, shape: ModelShape | None = None) -> MethodCost:
    """Training on both sequences, and the reference model's forward passes."""
    forward = sum((_forward(parameters, tokens, a, shape) for tokens in a.sequences), Flops())
    reference_epochs = 1 if a.dpo_cached_reference else a.dpo_epochs
    formula = f"{6 * a.dpo_epochs + 2 * reference_epochs:g} P (2p + c + r)"
    return MethodCost(
        DPO,
        formula,
        (
            Stage("policy: forward and backward", forward * (3 * a.dpo_epochs)),
            Stage("reference: forward", forward * reference_epochs),
        ),
    )


def fsrl(shape: ModelShape, a: AlignmentAssumptions) -> MethodCost:
    """SimPO on an adapter: the model is frozen, so backward goes only through the activations above the SAE.

    Per token, matrices of `d_model * d_sae`: forward encode, adapter, decode; backward the decoder's input and the
    adapter's weights.
    """
    layer = fsrl_layer(shape, a)
    above = shape.matrix_weights - shape.weights_through(layer)
    tokens = sum(a.sequences)
    linear = float(shape.parameters) * 2 * tokens
    attention = sum(shape.attention(n, 0, range(shape.layers), a.pairs) for n in a.sequences)
    attention_above = sum(shape.attention(n, 0, range(layer + 1, shape.layers), a.pairs) for n in a.sequences)
    matrix = 2.0 * shape.d_model * a.fsrl_d_sae * tokens
    return MethodCost(
        FSRL,
        f"{2 * a.fsrl_epochs:g} (P + P_above) (2p + c + r)",
        (
            Stage("forward", Flops(linear, attention, 3 * matrix) * a.fsrl_epochs),
            Stage("backward", Flops(2.0 * above * tokens, 2 * attention_above, 2 * matrix) * a.fsrl_epochs),
        ),
    )


def fsrl_layer(shape: ModelShape, a: AlignmentAssumptions) -> int:
    """The layer of FSRL's SAE, from 0. The default is 12 of Gemma-2-2B's 26, as published.

    Raises:
        InvalidInputError: if the model has no such layer.
    """
    layer = shape.layers // 2 - 1 if a.fsrl_layer is None else a.fsrl_layer
    if not 0 <= layer < shape.layers:
        raise InvalidInputError(f"fsrl_layer is {layer}; {shape.name} has layers 0 to {shape.layers - 1}")
    return layer


def _forward(parameters: float, tokens: int, a: AlignmentAssumptions, shape: ModelShape | None) -> Flops:
    attention = shape.attention(tokens, 0, range(shape.layers), a.pairs) if shape else 0.0
    return Flops(2.0 * parameters * tokens, attention)


def _chunked_attention(
    shape: ModelShape, tokens: int, past: int, layers: range, chunk: int, pairs: AttentionPairs
) -> float:
    return sum(shape.attention(len(span), past + span.start, layers, pairs) for span in chunks(tokens, chunk))


# --- inference --------------------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes that go through memory."""

    flops: float
    bytes: float

    def seconds(self, machine: Machine) -> float:
        """The roofline's bound: whichever of arithmetic and memory takes longer."""
        return max(self.flops / machine.flops_per_second, self.bytes / machine.bytes_per_second)


@dataclass(frozen=True)
class Machine:
    """What a machine can do at most; measured, or from a data sheet.

    Attributes:
        name: processor or device.
        flops_per_second: of matrix products.
        bytes_per_second: of reading memory.
        steps: measured times of steering one token.
    """

    name: str
    flops_per_second: float
    bytes_per_second: float
    steps: tuple[MeasuredStep, ...] = ()


@dataclass(frozen=True)
class MeasuredStep:
    """Median time of one `token_step`, batch 1."""

    d_model: int
    d_sae: int
    mode: Mode
    seconds: float


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


def fsrl_token(shape: ModelShape, a: AlignmentAssumptions) -> float:
    """FLOPs that FSRL adds to a generated token: encode, adapter, decode."""
    return 6.0 * shape.d_model * a.fsrl_d_sae


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
        i: tells how many tokens share a prompt's cost.
        method_token: FLOPs the method adds per generated token; none if it changes the weights.

    Returns:
        None if it never has.
    """
    saved = (method.flops.total() - ours.flops.total()) * triples
    slope = per_token.flops + per_prompt.flops / i.response_tokens - method_token
    if saved <= 0:
        return 0.0
    return saved / slope if slope > 0 else None


# --- the published figures --------------------------------------------------------------------------------------------


PUBLISHED_PARAMETERS = 8e9


@dataclass(frozen=True)
class PublishedFigures:
    """The published comparison: FLOPs per triple, and RAHF-SCIT's as a multiple of DSPA's."""

    dspa: float
    rahf_step1: float
    rahf_step2: float
    rahf: float
    ratio: float


def published_figures(a: AlignmentAssumptions, parameters: float = PUBLISHED_PARAMETERS) -> PublishedFigures:
    """By the formulas alone: no SAE, no attention."""
    dspa, rahf = dspa_published(parameters, a).flops.total(), rahf_scit(parameters, a)
    step1, step2 = (stage.flops.total() for stage in rahf.stages)
    return PublishedFigures(dspa, step1, step2, step1 + step2, (step1 + step2) / dspa)


def alignment_costs(
    shape: ModelShape, steering: SteeringShape, a: AlignmentAssumptions, parameters: float | None = None
) -> tuple[MethodCost, ...]:
    """Every method, attention counted, per triple.

    Args:
        shape: the model.
        steering: layers and widths of the SAEs.
        a: the assumptions.
        parameters: P of the published formulas; None for the model's own.
    """
    P = parameters or shape.parameters
    return (
        dspa_collected(shape, steering, a),
        dspa_published(P, a, shape),
        rahf_scit(P, a, shape),
        dpo(P, a, shape),
        fsrl(shape, a),
    )


def ratio(costs: Sequence[MethodCost], method: str, to: str, *, attention: bool, sae: bool) -> float:
    """How many times the FLOPs of `to` the method `method` needs."""
    by_name = {cost.method: cost.flops for cost in costs}
    return by_name[method].total(attention, sae) / by_name[to].total(attention, sae)
