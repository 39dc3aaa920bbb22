"""FLOPs and bytes by formula, against the published figures and against sums written out here."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dspa.errors import InvalidInputError
from dspa.flops.alignment import (
    AlignmentAssumptions,
    alignment_costs,
    collection_reference,
    collection_stages,
    published_figures,
    ratio,
)
from dspa.flops.fsrl import AUTOGRAD, DELTA, DENSE, REPOSITORY, SCREENED, SPARSE, fsrl_token, fsrl_tokens, fsrl_training
from dspa.flops.inference import (
    InferenceAssumptions,
    break_even_tokens,
    decode_step,
    prefill,
    steer_prompt,
    steer_token,
)
from dspa.flops.quantities import COLLECTED, DPO, MODES, PUBLISHED, RAHF, Flops, Machine, Work
from dspa.flops.shapes import ModelShape, SteeringShape
from dspa.offline.batching import BatchLimits, TripleLengths, chunks, plan_groups


def gqa_shape(
    name: str, d: int, ff: int, layers: int, heads: int, kv: int, head_dim: int, vocabulary: int, tied: bool
) -> ModelShape:
    """A decoder with gated MLPs, its matrices written out."""
    block = d * heads * head_dim * 2 + d * kv * head_dim * 2 + 3 * d * ff
    matrices = layers * block + vocabulary * d
    return ModelShape(
        name=name,
        parameters=matrices + (0 if tied else vocabulary * d),
        d_model=d,
        block_weights=(block,) * layers,
        qkv_weights=d * head_dim * (heads + 2 * kv),
        head_weights=vocabulary * d,
        query_width=heads * head_dim,
        key_width=kv * head_dim,
        windows=(None,) * layers,
    )


GEMMA_2B = gqa_shape("gemma-2-2b", 2304, 9216, 26, 8, 4, 256, 256000, True)
GEMMA_9B = gqa_shape("gemma-2-9b", 3584, 14336, 42, 16, 8, 256, 256000, True)
QWEN_8B = gqa_shape("qwen3-8b", 4096, 12288, 36, 32, 8, 128, 151936, False)
MODELS = [(GEMMA_2B, (7, 24), 9.5), (GEMMA_9B, (9, 39), 8.3), (QWEN_8B, (9, 18), 15.0)]
TINY = gqa_shape("tiny", 8, 16, 4, 2, 1, 4, 32, True)


def test_published_figures_to_the_digit() -> None:
    p = published_figures(AlignmentAssumptions())
    assert [f"{value:.2e}" for value in (p.dspa, p.rahf, p.rahf_step1, p.rahf_step2)] == [
        "8.00e+13",
        "3.58e+14",
        "2.95e+14",
        "6.29e+13",
    ]
    assert f"{p.ratio:.2f}" == "4.47"


def test_the_published_ratio_does_not_depend_on_the_model() -> None:
    for P in (1e6, 2.6e9):
        assert published_figures(AlignmentAssumptions(), P).ratio == pytest.approx(4.472832)


def test_every_assumption_moves_what_it_is_about() -> None:
    a, P = AlignmentAssumptions(), 8e9
    base = published_figures(a, P)
    assert published_figures(replace(a, prompt_tokens=2000), P).dspa == base.dspa * 8 / 5
    assert published_figures(replace(a, rahf_tokens=1536), P).rahf_step1 == base.rahf_step1 * 2
    assert published_figures(replace(a, rahf_examples=2, rahf_passes=1), P).rahf_step1 == base.rahf_step1 / 4
    assert published_figures(replace(a, rahf_batch=128), P).rahf_step2 == base.rahf_step2 * 2
    assert published_figures(replace(a, rahf_steps_per_triple=0.01), P).rahf_step2 == base.rahf_step2 / 2
    assert published_figures(replace(a, rahf_frozen_passes=0), P).rahf_step2 == base.rahf_step2 / 2


@pytest.mark.parametrize(("shape", "layers", "least"), MODELS, ids=lambda value: getattr(value, "name", ""))
def test_our_ratio_by_formula(shape: ModelShape, layers: tuple[int, int], least: float) -> None:
    costs = alignment_costs(shape, SteeringShape(*layers), AlignmentAssumptions())
    ratios = [
        ratio(costs, RAHF, COLLECTED, attention=attention, sae=sae)
        for attention, sae in ((True, True), (True, False), (False, True), (False, False))
    ]
    assert ratios[0] >= least
    assert ratios[0] == min(ratios)
    # without both, and without leaving out the prompt's part of the last block: the published formula over 2 P' (p+c+r)
    through = shape.weights_through(layers[1])
    published = 44728.32 * shape.parameters / (6000 * through)
    assert published <= ratios[3] <= published * 1.02


def test_collection_is_the_sum_of_its_matrix_products() -> None:
    """Written out for 5 prompt tokens and responses of 3 tokens, chunks of 4, layers 1 and 2."""
    d, block, qkv = 8, TINY.block_weights[0], TINY.qkv_weights
    stages = collection_stages(TINY, SteeringShape(1, 2, 16, 24), [TripleLengths(5, 3, 3)], BatchLimits(chunk=4))
    prompt_pairs = 4 * 4 + 1 * 5
    assert stages[0].flops == Flops(2 * 5 * (2 * block + qkv), 2 * 4 * 8 * prompt_pairs, 2 * d * 16 * 5)
    assert stages[1].flops == Flops(2 * 6 * 3 * block, 3 * 4 * 8 * 2 * 3 * 8, 2 * d * 24 * 6)


def test_where_the_prompt_is_read_last_its_blocks_run_whole() -> None:
    stages = collection_stages(TINY, SteeringShape(2, 2), [TripleLengths(5, 3, 3)], BatchLimits())
    assert stages[0].flops.linear == 2 * 5 * 3 * TINY.block_weights[0]


def test_the_reference_formula_is_close_to_what_runs() -> None:
    for shape, layers, _ in MODELS:
        a = AlignmentAssumptions()
        ours = alignment_costs(shape, SteeringShape(*layers), a)[0].flops
        reference = collection_reference(shape, SteeringShape(*layers), a)
        assert 0.98 <= ours.total() / reference.total() <= 1
        assert ours.sae == reference.sae == 2 * shape.d_model * 16384 * 3000


@pytest.mark.parametrize(("queries", "past", "window"), [(5, 0, None), (5, 3, None), (5, 3, 4), (2, 9, 4), (1, 7, 3)])
def test_attention_pairs_are_those_of_a_mask(queries: int, past: int, window: int | None) -> None:
    shape = replace(TINY, windows=(window,) * 4)
    seen = sum(
        1
        for query in range(past, past + queries)
        for key in range(past + queries)
        if key <= query and (window is None or query - key < window)
    )
    assert shape.attention(queries, past, range(1), "causal") == 4 * shape.query_width * seen
    assert shape.attention(queries, past, range(4), "causal") == 4 * shape.attention(queries, past, range(1), "causal")
    cached = past if window is None else min(past, window - 1)
    assert shape.attention(queries, past, range(1), "square") == 4 * shape.query_width * queries * (cached + queries)


def test_causal_pairs_lower_only_attention() -> None:
    square, causal = (
        alignment_costs(GEMMA_2B, SteeringShape(7, 24), AlignmentAssumptions(pairs=pairs))
        for pairs in ("square", "causal")
    )
    for one, other in zip(square, causal, strict=True):
        assert one.flops.linear == other.flops.linear
        assert one.flops.sae == other.flops.sae
        assert 0.49 <= other.flops.attention / one.flops.attention <= 1


def test_dpo_epochs_and_cached_reference() -> None:
    def linear(**changes: object) -> float:
        costs = alignment_costs(TINY, SteeringShape(1, 2), replace(AlignmentAssumptions(), **changes))  # type: ignore[arg-type]
        return next(cost for cost in costs if cost.method == DPO).flops.linear

    once = linear()
    assert once == 8 * TINY.parameters * 4000
    assert linear(dpo_epochs=3) == once * 20 / 8
    assert linear(dpo_epochs=3, dpo_cached_reference=False) == once * 3


# --- inference --------------------------------------------------------------------------------------------------------


def test_dense_is_about_one_and_a_half_percent_of_a_gemma_step() -> None:
    i = InferenceAssumptions()
    dense = steer_token(GEMMA_2B, SteeringShape(7, 24), i, "dense")
    assert 0.01 < dense.flops / decode_step(GEMMA_2B, i).flops < 0.015
    assert dense.flops == 2 * 2304 * 16384 + 2 * 2304
    assert dense.bytes == 16384 * (2 * 2304 + 8) + 2 * 2304


@pytest.mark.parametrize("batch", [1, 4, 64])
def test_modes_in_order_and_weights_shared_by_a_batch(batch: int) -> None:
    i = InferenceAssumptions(batch=batch)
    steering = SteeringShape(7, 24)
    work = {mode: steer_token(GEMMA_2B, steering, i, mode) for mode in MODES}
    assert work["lazy"].flops < work["dense"].flops
    assert work["lazy"].bytes < work["dense"].bytes * 1.02 + 16 * 4700
    alone = steer_token(GEMMA_2B, steering, InferenceAssumptions(), "dense")
    assert work["dense"].flops == alone.flops
    assert work["dense"].bytes <= alone.bytes / batch + 2 * 2304


def test_lazy_without_any_pass_reads_the_list_only() -> None:
    i = InferenceAssumptions(pass_share=0, edited_latents=0)
    assert steer_token(GEMMA_2B, SteeringShape(7, 24), i, "lazy") == Work(2 * 2304 * 16, 16 * (2 * 2304 + 8))
    always = InferenceAssumptions(pass_share=1, edited_latents=0)
    dense = steer_token(GEMMA_2B, SteeringShape(7, 24), always, "dense")
    lazy = steer_token(GEMMA_2B, SteeringShape(7, 24), always, "lazy")
    assert lazy.flops - dense.flops == 2 * 2304 * 16


def test_model_steps() -> None:
    i = InferenceAssumptions(context=10, prompt_tokens=3)
    step, prompt = decode_step(TINY, i), prefill(TINY, i)
    matrices = 4 * TINY.block_weights[0] + 32 * 8
    assert step == Work(2 * matrices + 4 * 4 * 8 * 10, 2 * matrices + 4 * 2 * 4 * 2 * 10)
    assert prompt.flops == 2 * 3 * 4 * TINY.block_weights[0] + 2 * 32 * 8 + 4 * 4 * 8 * 9
    assert steer_prompt(TINY, SteeringShape(1, 2, 16), i).flops == 2 * 8 * 16 * 3 + 32 * 32


def test_windows_bound_the_keys_of_a_step() -> None:
    i = InferenceAssumptions(context=100)
    windowed = replace(TINY, windows=(7, None, 7, None))
    keys = (decode_step(windowed, i).flops - 2 * TINY.matrix_weights) / (4 * 8)
    assert keys == 7 + 100 + 7 + 100


def test_break_even_is_where_the_sums_meet() -> None:
    i, triples = InferenceAssumptions(), 100
    costs = {cost.method: cost for cost in alignment_costs(GEMMA_2B, SteeringShape(7, 24), AlignmentAssumptions())}
    token = steer_token(GEMMA_2B, SteeringShape(7, 24), i, "dense")
    prompt = steer_prompt(GEMMA_2B, SteeringShape(7, 24), i)
    tokens = break_even_tokens(costs[RAHF], costs[COLLECTED], triples, token, prompt, i)
    assert tokens is not None
    ours = costs[COLLECTED].flops.total() * triples + tokens * token.flops + tokens / 500 * prompt.flops
    assert ours == pytest.approx(costs[RAHF].flops.total() * triples)
    assert break_even_tokens(costs[COLLECTED], costs[PUBLISHED], triples, token, prompt, i) == 0
    added = fsrl_token(GEMMA_2B, AlignmentAssumptions())
    assert break_even_tokens(costs[RAHF], costs[COLLECTED], triples, token, prompt, i, added) is None


def test_fsrl_at_a_token() -> None:
    """65k wide on Gemma-2-2B: a matrix is 302 MB and 0.302 GFLOP, a row 4608 bytes."""
    a, i = AlignmentAssumptions(fsrl_active=115, fsrl_falling=57), InferenceAssumptions()
    work = {token.form: token.work for token in fsrl_tokens(GEMMA_2B, a, i)}
    matrix, row, small = 2 * 2304 * 65536, 2 * 2304, 8 * 65536  # small: bias and threshold
    assert work[REPOSITORY] == Work(4 * matrix, 4 * (matrix + small))
    assert work[DENSE] == Work(2 * matrix + 115 * row, 2 * (matrix + small) + 115 * row)
    assert work[DELTA] == Work(matrix + 172 * row, matrix + small + 172 * row)
    assert work[SCREENED].bytes == pytest.approx(matrix / 2 + 20 * 65536 + 172 * row + 0.02 * matrix)
    assert fsrl_token(GEMMA_2B, a) == work[DELTA].flops
    shared = {token.form: token.work for token in fsrl_tokens(GEMMA_2B, a, replace(i, batch=4))}
    assert shared[DELTA] == Work(work[DELTA].flops, (matrix + small) / 4 + 172 * row)
    training = {form.form: form for form in fsrl_training(GEMMA_2B, a, i)}
    assert training[AUTOGRAD].flops == 5 * matrix
    assert training[SPARSE].flops == matrix + (172 + 230) * row
    assert training[AUTOGRAD].kept_bytes > 100 * training[SPARSE].kept_bytes


def test_the_roofline_is_the_slower_of_two() -> None:
    machine = Machine("m", flops_per_second=100, bytes_per_second=10)
    assert Work(1000, 10).seconds(machine) == 10
    assert Work(100, 100).seconds(machine) == 10


@pytest.mark.parametrize(
    "make",
    [
        lambda: AlignmentAssumptions(prompt_tokens=0),
        lambda: AlignmentAssumptions(chunk=0),
        lambda: InferenceAssumptions(batch=0),
        lambda: InferenceAssumptions(pass_share=1.5),
        lambda: SteeringShape(0, 4).check(TINY),
        lambda: SteeringShape(3, 2).check(TINY),
        lambda: alignment_costs(TINY, SteeringShape(0, 1), AlignmentAssumptions(fsrl_layer=4)),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(make: object) -> None:
    with pytest.raises(InvalidInputError, match=r"^[^\n]+$"):
        make()  # type: ignore[operator]


# --- batches ----------------------------------------------------------------------------------------------------------


def test_chunks_cover_a_row() -> None:
    assert [list(span) for span in chunks(5, 2)] == [[0, 1], [2, 3], [4]]
    assert chunks(0, 2) == []


def test_every_response_is_in_one_continuation() -> None:
    lengths = [TripleLengths(3 + n % 4, 1 + n % 5, 9 - n % 3) for n in range(23)]
    for limits in (BatchLimits(), BatchLimits(triples=1), BatchLimits(triples=3), BatchLimits(tokens=60)):
        groups = plan_groups(lengths, limits)
        assert sorted(t for group in groups for t in group.triples) == list(range(23))
        for group in groups:
            assert len(group.triples) <= limits.triples
            assert group.shared == min(lengths[t].prompt for t in group.triples)
            rows = [row for rows in group.continuations for row in rows]
            assert sorted((r.triple, r.response) for r in rows) == sorted(
                (t, which) for t in group.triples for which in ("chosen", "rejected")
            )
            for row in rows:
                assert row.length == lengths[row.triple].prompt - group.shared + lengths[row.triple].response(
                    row.response
                )
            if len(group.triples) > 1:
                assert 2 * len(group.triples) * (group.shared + max(r.length for r in rows)) <= limits.tokens


def test_long_prompts_of_other_lengths_run_apart_and_equal_ones_together() -> None:
    apart = plan_groups([TripleLengths(1000, 10, 10), TripleLengths(500, 10, 10)], BatchLimits())
    assert [group.triples for group in apart] == [(1,), (0,)]
    together = plan_groups([TripleLengths(1000, 10, 10)] * 3, BatchLimits())
    assert [group.triples for group in together] == [(0, 1, 2)]
    assert len(plan_groups([TripleLengths(1000, 10, 900)], BatchLimits())[0].continuations) == 2
