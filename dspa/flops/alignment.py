"""FLOPs of the alignment stage of the method and of what it is compared with, by formula, per preference triple.

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

from dspa.errors import InvalidInputError
from dspa.flops.quantities import COLLECTED, DPO, FSRL, PUBLISHED, RAHF, Flops, MethodCost, Stage
from dspa.flops.shapes import AttentionPairs, ModelShape, SteeringShape
from dspa.offline.batching import BatchLimits, TripleLengths, chunks, plan_groups

PUBLISHED_PARAMETERS = 8e9


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
        fsrl_active: latents that its adapter fires at a token, once trained (version 3 on Gemma-2-2B).
        fsrl_falling: of these, those with a negative `v`.
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
    fsrl_active: float = 115
    fsrl_falling: float = 57
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
