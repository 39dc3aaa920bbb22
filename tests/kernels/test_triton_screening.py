"""The screened Triton token_step: the same bits as dense, whatever the codes are worth, from few of the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace

import pytest
import torch
from kernel_cases import (
    KINDS,
    LOW_PRECISION,
    Kind,
    dense_map,
    edit_list,
    generator,
    integers,
    make_integer_sae,
    make_sae,
    normal,
    random_lists,
    same_bits,
)
from torch import Tensor

from dspa.kernels import EditList, SaeWeights, StepMode, TokenStats, available, token_step, token_step_with_lookup

if available()["triton"] != "available":
    pytest.skip(f"backend triton: {available()['triton']}", allow_module_level=True)

from dspa.kernels.token_step import triton as triton_step
from dspa.kernels.token_step.encoder_codes import EncoderCodes, codes_of, encode_weights, largest_columns
from dspa.kernels.token_step.triton import scratch_of, screen_scratch_of
from dspa.kernels.triton_common.launch import Launch
from dspa.kernels.triton_common.tiles import INTERPRETED
from dspa.sae.encode import encode, encoder_input

if not INTERPRETED.value:
    pytest.skip("these tests watch the interpreter; set TRITON_INTERPRET=1", allow_module_level=True)

from triton_interpreter import counting_bytes, interleaved

UNRANKED = [kind for kind in KINDS if kind.activation != "topk"]
SHAPE = (300, 330)  # more than one block of columns and one tile, multiples of nothing
COLUMNS = (3, 150, 299)  # of the massive channels


def case(kind: Kind, dtype: torch.dtype, batch: int, seed: int, massive: float = 1.0) -> tuple[SaeWeights, Tensor]:
    sae = make_sae(kind, *SHAPE, dtype, seed=3)
    rows = normal(generator(seed), batch, SHAPE[0]) * 2
    rows[:, COLUMNS] *= massive
    return sae, rows.to(dtype)


def lists_of(sae: SaeWeights, batch: int, seed: int) -> EditList:
    """Half of the lists augment, which always needs M_t."""
    edits = edit_list(*random_lists(sae, batch, 6, seed), 6)
    edits.signs[::2].fill_(-1)
    return edits


def run(
    sae: SaeWeights, rows: Tensor, edits: EditList, mode: StepMode, alpha: float | Tensor = 0.2
) -> tuple[Tensor, TokenStats]:
    hidden, stats = rows.clone(), TokenStats.zeros(len(rows), sae.d_sae)
    token_step(hidden, sae, edits, alpha, None, stats, mode=mode, backend="triton")
    return hidden, stats


def assert_same(sae: SaeWeights, rows: Tensor, edits: EditList, alpha: float | Tensor = 0.2) -> TokenStats:
    """Screened against dense: bits, counters, and M_t where it was needed. Returns the counters."""
    expected, dense = run(sae, rows, edits, "dense", alpha)
    written, stats = run(sae, rows, edits, "screened", alpha)
    assert same_bits(written, expected), f"other bits in rows {(written != expected).any(-1).nonzero()}"
    for name in ("seen", "edited", "nonfinite", "latent_edits"):
        assert torch.equal(getattr(stats, name), getattr(dense, name)), name
    known = stats.maximum_known.bool()
    assert torch.equal(stats.maximum[known], dense.maximum[known])
    assert_clean(sae, rows)
    return stats


def assert_clean(sae: SaeWeights, rows: Tensor) -> None:
    """The next launch finds the scratch as the first did."""
    codes = codes_of(sae, rows)
    if codes is not None:
        scratch = screen_scratch_of(sae, codes, len(rows))
        assert not scratch.floors.any()
        assert not scratch.screened.any()


@contextmanager
def screening(launches: list[Launch], expected: bool = True) -> Iterator[None]:
    """Checks that the launches within it screen, or do not."""
    before = len(launches)
    yield
    found = [launch.arguments["screen"] is not None for launch in launches[before:]]
    assert found
    assert found == [expected] * len(found)


# ---- the same bits ---------------------------------------------------------------------------------------------------


def test_a_screened_token_is_one_launch(launches: list[Launch]) -> None:
    sae, rows = case(Kind(), torch.bfloat16, 3, seed=4)
    edits = lists_of(sae, 3, 5)
    with screening(launches):
        written, _ = run(sae, rows, edits, "screened")
    assert len(launches) == 1
    assert same_bits(written, run(sae, rows, edits, "dense")[0])
    assert not same_bits(written, rows)


@pytest.mark.parametrize(
    ("dtype", "massive"), [(torch.float32, 100.0), (torch.bfloat16, 1.0), (torch.float16, 100.0)], ids=str
)
@pytest.mark.parametrize("kind", UNRANKED, ids=str)
def test_random_tokens(kind: Kind, dtype: torch.dtype, massive: float) -> None:
    sae, rows = case(kind, dtype, 20, seed=4, massive=massive)
    stats = assert_same(sae, rows, lists_of(sae, 20, 5), torch.rand(20, generator=generator(6)))
    assert 0 < int(stats.maximum_known.sum()) < 20


@pytest.mark.parametrize(
    "seed",
    [pytest.param(seed, marks=pytest.mark.long if seed in (0, 5, 11, 14) else pytest.mark.slow) for seed in range(36)],
)
def test_ten_thousand_tokens(seed: int) -> None:
    """Prompts of 256 tokens, for each of four kinds, two dtypes and massive channels or none. It takes minutes:
    `make test-all` runs four of them, each kind once, `make test-slow` the others."""
    kind = (Kind(), Kind("gated", subtract_b_dec=True), Kind("batchtopk", rescaled=True), Kind("relu"))[seed % 4]
    dtype, massive = (torch.bfloat16, torch.float32)[seed // 4 % 2], (1.0, 100.0)[seed // 8 % 2]
    sae, rows = case(kind, dtype, 256, seed, massive)
    edits = edit_list([[latent % 330] for latent in range(seed, seed + 256)], [[]] * 256, 1)
    assert int(assert_same(sae, rows, edits).maximum_known.sum()) > 0


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("kind", [kind for kind in UNRANKED if kind.normalization == "none"], ids=str)
def test_tokens_on_the_boundary(kind: Kind, alpha: float) -> None:
    """Small integers: activations sit on thresholds, maxima are tied, and `f == alpha * M_t` happens all the time."""
    sae = make_integer_sae(kind, 24, 260, torch.bfloat16, seed=5)
    rows = integers(generator(1), -1, 1, 24, 24).bfloat16()
    assert_same(sae, rows, lists_of(sae, 24, 2), alpha)


@pytest.mark.parametrize("kind", [Kind(), Kind("gated")], ids=str)
def test_what_is_not_finite(kind: Kind) -> None:
    """In rows, in weights, in biases, thresholds and scales: what is no number proves nothing."""
    plain, rows = case(kind, torch.bfloat16, 8, seed=4)
    rows[1, 7], rows[2], rows[3, 0], rows[4] = torch.nan, torch.inf, -torch.inf, 3e38
    edits = edit_list([[0, 1]] * 8, [[2, 3]] * 8, 4)
    W_enc, b_enc, threshold = plain.W_enc.clone(), plain.b_enc.clone(), plain.threshold.clone()
    W_enc[10, 5], W_enc[11], W_enc[200, 9], W_enc[201] = torch.nan, torch.inf, -torch.inf, 3e38
    b_enc[20], b_enc[21], b_enc[22] = torch.nan, -torch.inf, 1e38
    threshold[30], threshold[31] = -torch.inf, torch.inf
    for weights in (W_enc, plain.W_enc):
        sae = replace(plain, W_enc=weights, b_enc=b_enc, threshold=threshold if kind == Kind() else plain.threshold)
        assert int(assert_same(sae, rows, edits).nonfinite.sum()) >= 3


@pytest.mark.parametrize("kind", [Kind(rescaled=True), Kind("gated")], ids=str)
def test_latents_that_are_scaled_to_nothing(kind: Kind) -> None:
    """A magnitude may be its offset alone, or a norm 0: where no bound holds, and infinity times 0 is no number."""
    plain, rows = case(kind, torch.bfloat16, 6, seed=4)
    rows[3] = 1e36
    edits = edit_list([[0, 1]] * 6, [[2, 3]] * 6, 4)
    if plain.decoder_norm is not None:
        sae = replace(plain, decoder_norm=plain.decoder_norm.index_fill(0, torch.tensor([7, 250]), 0.0))
    else:
        assert plain.magnitude_scale is not None
        assert plain.magnitude_bias is not None
        still = torch.tensor([7, 250])
        sae = replace(
            plain,
            magnitude_scale=plain.magnitude_scale.index_fill(0, still, 0.0),
            magnitude_bias=plain.magnitude_bias.index_fill(0, still, 50.0),
        )
    assert_same(sae, rows, edits)


@pytest.mark.parametrize("scale", [1e-38, 1e-20, 1e15, 1e30])
def test_the_ends_of_float32(scale: float) -> None:
    plain, rows = case(Kind("relu"), torch.float32, 4, seed=4)
    assert_same(replace(plain, b_enc=plain.b_enc * scale), rows * scale, lists_of(plain, 4, 5))


@pytest.mark.parametrize("columns", [[], [0], [3, 150, 299]], ids=str)
def test_codes_of_any_columns_prove_the_same(columns: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which columns are exact is a guess about tokens to come."""
    sae, rows = case(Kind(), torch.bfloat16, 6, seed=4, massive=100.0)
    codes = encode_weights(sae.W_enc, torch.tensor(columns, dtype=torch.long))
    monkeypatch.setattr(triton_step, "codes_of", lambda *_: codes)
    assert_same(sae, rows, lists_of(sae, 6, 5))


@pytest.mark.parametrize("batch", [1, 2, 17])
def test_a_row_does_not_depend_on_its_batch(batch: int) -> None:
    sae, rows = case(Kind(), torch.bfloat16, batch, seed=4)
    edits = lists_of(sae, batch, 5)
    together, _ = run(sae, rows, edits, "screened")
    row = batch - 1
    alone, _ = run(sae, rows[row:], edits.rows(torch.tensor([row])), "screened")
    assert same_bits(alone, together[row:])


# ---- bounds ----------------------------------------------------------------------------------------------------------


def possible_scores(sae: SaeWeights, rows: Tensor) -> Tensor:
    """The largest activations that some order of summation finds, `[B, d_sae]` float64."""
    x, W_enc = encoder_input(rows.double(), sae)[0], sae.W_enc.double()
    product = x @ W_enc.T + sae.d_model * 2.0**-22 * (x.abs() @ W_enc.abs().T)
    z = (product + sae.b_enc) * (1.0 if sae.decoder_norm is None else sae.decoder_norm)
    if sae.magnitude_scale is not None and sae.magnitude_bias is not None:
        return torch.where(z > 0, product * sae.magnitude_scale + sae.magnitude_bias, 0.0).relu()
    return torch.where(z > sae.threshold, z, 0.0).relu()


@pytest.mark.parametrize("massive", [1.0, 1000.0])
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
@pytest.mark.parametrize("kind", [Kind(), Kind("gated", subtract_b_dec=True), Kind("relu", "layer_norm")], ids=str)
def test_no_sum_exceeds_its_bound(kind: Kind, dtype: torch.dtype, massive: float) -> None:
    """In whatever order it is taken; and the bounds are within a quarter of the activations' standard deviation."""
    sae, rows = case(kind, dtype, 5, seed=4, massive=massive)
    always = edit_list([[int(latent)] for latent in encode(rows, sae).argmax(dim=1)], [[]] * 5, 1)
    run(sae, rows, always, "screened")
    codes = codes_of(sae, rows)
    assert codes is not None
    uppers = screen_scratch_of(sae, codes, 5).uppers[:5, : sae.d_sae].double()
    possible = possible_scores(sae, rows)
    assert (uppers >= possible).all()
    both = (uppers > 0) & (possible > 0)
    assert ((uppers - possible)[both]).median() < 0.25 * possible[both].std()


def test_codes_are_within_half_a_step() -> None:
    sae, rows = case(Kind(), torch.bfloat16, 4, seed=4, massive=100.0)
    columns = largest_columns(rows, sae)
    assert set(COLUMNS) <= set(columns.tolist())
    codes = encode_weights(sae.W_enc, columns)
    found = codes.codes[: SHAPE[1], : SHAPE[0]].double() * codes.factors[0, : SHAPE[1], None]
    found[:, columns] += codes.exact[: SHAPE[1], : len(columns)].double()
    missed = (found - sae.W_enc.double()).norm(dim=1)
    assert (missed <= codes.factors[1, : SHAPE[1]]).all()
    assert ((found - sae.W_enc.double()).abs() <= 0.5001 * codes.factors[0, : SHAPE[1], None]).all()
    assert not codes.codes[SHAPE[1] :].any()
    assert not codes.codes[:, SHAPE[0] :].any()
    assert torch.equal(codes.is_exact.nonzero().flatten(), columns.sort().values)


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("massive", [1.0, 100.0])
def test_most_weights_are_not_read(massive: float) -> None:
    """Also where a few channels tower above the others, as they do in residual streams."""
    sae = make_sae(Kind(), 512, 2048, torch.bfloat16, seed=7)
    rows = (normal(generator(1), 2, 512) * 2).bfloat16()
    rows[:, [5, 100, 400]] *= massive
    edits = edit_list([[int(latent)] for latent in encode(rows, sae).argmax(dim=1)], [[]] * 2, 1)
    expected, _ = run(sae, rows, edits, "dense")
    run(sae, rows, edits, "screened")
    codes = codes_of(sae, rows)
    assert codes is not None
    with counting_bytes({"W_enc": sae.W_enc, "codes": codes.codes}) as counted:
        written, _ = run(sae, rows, edits, "screened")
    assert same_bits(written, expected)
    assert counted.bytes["codes"] == 2048 * 512
    assert 2 * 2 * 1024 <= counted.bytes["W_enc"] < 0.02 * sae.W_enc.nbytes


def test_no_code_is_read_where_nothing_is_active() -> None:
    sae, rows = case(Kind(), torch.bfloat16, 3, seed=4)
    sae = replace(sae, threshold=torch.full((SHAPE[1],), 1e9))
    edits = lists_of(sae, 3, 5)
    run(sae, rows, edits, "screened")
    codes = codes_of(sae, rows)
    assert codes is not None
    with counting_bytes({"codes": codes.codes, "uppers": screen_scratch_of(sae, codes, 3).uppers}) as counted:
        assert same_bits(run(sae, rows, edits, "screened")[0], rows)
    assert counted.bytes == {"codes": 0, "uppers": 0}


def test_a_floor_may_settle_a_row() -> None:
    """Then no weight is read but those of the list; and M_t counts as not needed."""
    plain, rows = case(Kind("relu"), torch.bfloat16, 3, seed=4)
    sae = replace(plain, b_enc=plain.b_enc.index_fill(0, torch.tensor([100]), 1e3))
    edits = edit_list([[]] * 3, [list(range(6))] * 3, 6)
    expected, dense = run(sae, rows, edits, "dense")
    assert dense.edited.all()
    with counting_bytes({"W_enc": sae.W_enc}) as counted:
        written, stats = run(sae, rows, edits, "screened")
    assert same_bits(written, expected)
    assert not stats.maximum_known.any()
    assert counted.bytes["W_enc"] == 3 * 6 * SHAPE[0] * 2


def test_a_recent_argmax_latent_settles_a_row_before_codes_are_read() -> None:
    plain, rows = case(Kind("relu"), torch.bfloat16, 3, seed=4)
    sae = replace(plain, b_enc=plain.b_enc.index_fill(0, torch.tensor([100]), 1e3))
    edits = edit_list([[]] * 3, [list(range(6))] * 3, 6)
    expected, dense = run(sae, rows, edits, "dense")
    assert dense.edited.all()
    run(sae, rows, edits, "screened")
    codes = codes_of(sae, rows)
    assert codes is not None
    scratch_of(sae, 3, 6).recent_argmax[:, 0] = 100
    with counting_bytes({"W_enc": sae.W_enc, "codes": codes.codes}) as counted:
        assert same_bits(run(sae, rows, edits, "screened")[0], expected)
    assert counted.bytes == {"W_enc": 3 * (6 + 1) * SHAPE[0] * 2, "codes": 0}
    assert_clean(sae, rows)


# ---- any order -------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("slots", [2, 12])
@pytest.mark.parametrize("kind", [Kind(), Kind("gated", "layer_norm")], ids=str)
def test_the_order_of_programs_changes_no_bit(kind: Kind, slots: int) -> None:
    sae, rows = case(kind, torch.bfloat16, 18, seed=4)
    edits = lists_of(sae, 18, 5)
    expected, _ = run(sae, rows, edits, "dense")
    with interleaved(slots, seed=slots) as runner:
        written, _ = run(sae, rows, edits, "screened")
    assert len(runner.launches) == 1
    assert same_bits(written, expected)
    assert_clean(sae, rows)


@pytest.mark.long
def test_others_wait_for_a_program_that_is_late() -> None:
    """A program stops right after it has taken its ticket; the others get as far as they can without it."""
    sae, rows = case(Kind(), torch.bfloat16, 2, seed=4)
    edits = edit_list([[int(latent)] for latent in encode(rows, sae).argmax(dim=1)], [[]] * 2, 1)
    expected, _ = run(sae, rows, edits, "dense")
    run(sae, rows, edits, "screened")
    codes = codes_of(sae, rows)
    assert codes is not None
    # Prepare, bound, screen, pass, finish and clear: the first and the last of each.
    for late in (0, 1, 2, 3, 4, 6, 7, 9, 10, 11, 12):
        scratch = screen_scratch_of(sae, codes, 2)
        for numbers in (scratch.uppers, scratch.norms, scratch.exact_inputs):
            numbers.fill_(torch.nan)
        with interleaved(None, seed=late, held=late) as runner:
            written, _ = run(sae, rows, edits, "screened")
        assert runner.holds == 1
        assert same_bits(written, expected), late
        assert_clean(sae, rows)


def test_a_launch_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, rows = case(Kind(), torch.bfloat16, 2, seed=4)
    edits = lists_of(sae, 2, 5)
    expected, _ = run(sae, rows, edits, "screened")
    codes = codes_of(sae, rows)
    assert codes is not None
    scratch = screen_scratch_of(sae, codes, 2)

    def fail(_: Launch) -> None:
        scratch.floors.fill_(7)
        scratch.screened.fill_(7)
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "run", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            run(sae, rows, edits, "screened")
    assert same_bits(run(sae, rows, edits, "screened")[0], expected)


# ---- the codes -------------------------------------------------------------------------------------------------------


def test_codes_are_made_once_and_again_when_weights_were_written() -> None:
    sae, rows = case(Kind(), torch.bfloat16, 2, seed=4)
    edits = lists_of(sae, 2, 5)
    assert_same(sae, rows, edits)
    first = codes_of(sae, rows)
    assert first is not None
    before = first.codes.clone()
    assert codes_of(sae, rows * 2) is first
    assert torch.equal(first.codes, before)
    sae.W_enc[7].mul_(-3)
    assert_same(sae, rows, edits)
    assert codes_of(sae, rows) is first, "graphs hold them"
    assert not torch.equal(first.codes, before)


def test_what_cannot_be_screened_is_lazy(launches: list[Launch]) -> None:
    """Ranks, scores that fall where products rise, and weights that do not tell when they are written."""
    gated, rows = case(Kind("gated"), torch.bfloat16, 2, seed=4)
    assert gated.magnitude_scale is not None
    with torch.inference_mode():
        unversioned = make_sae(Kind(), *SHAPE, torch.bfloat16, seed=3)
    falling = replace(gated, magnitude_scale=-gated.magnitude_scale)
    for sae in (case(Kind("topk"), torch.bfloat16, 2, seed=4)[0], falling, unversioned):
        edits = lists_of(sae, 2, 5)
        with screening(launches, expected=False):
            assert_same(sae, rows, edits)


@pytest.mark.long
def test_compiles_as_one_graph() -> None:
    sae, rows = case(Kind(), torch.bfloat16, 2, seed=4)
    edits = lists_of(sae, 2, 5)

    def block(hidden: Tensor) -> Tensor:
        hidden = hidden * 2
        token_step(hidden, sae, edits, 0.2, mode="screened", backend="triton")
        return hidden + 1

    expected = block(rows)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert same_bits(compiled(rows), expected)
    assert not same_bits(expected, rows * 2 + 1)


@pytest.mark.long
def test_the_lookup_is_part_of_the_launch(launches: list[Launch]) -> None:
    sae, rows = case(Kind(), torch.bfloat16, 3, seed=4)
    conditional_map = dense_map(integers(generator(6), -3, 3, 30, SHAPE[1]).float())
    density = torch.rand(3, 30, generator=generator(7))
    written = {}
    for mode in ("dense", "screened"):
        hidden = rows.clone()
        token_step_with_lookup(
            hidden, sae, density, conditional_map, 0.2, k_prompt=5, k_diff=3, edit="both", mode=mode, backend="triton"
        )
        written[mode] = hidden
    assert [launch.arguments["screen"] is not None for launch in launches] == [False, True]
    assert same_bits(written["screened"], written["dense"])
    assert not same_bits(written["dense"], rows)


def test_codes_have_the_fields_of_the_operation() -> None:
    """They are passed by name."""
    names = {field.name for kind in (EncoderCodes, triton_step.ScreenScratch) for field in fields(kind)}
    assert names <= set(triton_step.step_launch.__annotations__)


def test_exact_columns_are_chosen_at_the_first_states_that_are_not_all_zero() -> None:
    """A step that is prepared is tried on zeros. Codes are made again where they were, as graphs hold them."""
    sae = make_sae(Kind(), 64, 96, torch.bfloat16, seed=3)
    massive = [5, 17, 60]
    hidden = torch.ones(2, 64, dtype=torch.bfloat16)
    hidden[:, massive] = 300
    first = codes_of(sae, torch.zeros_like(hidden))
    assert first is not None
    assert codes_of(sae, torch.zeros_like(hidden)) is first
    found = codes_of(sae, hidden)
    assert found is not None
    assert found is first
    assert set(massive) <= set(found.exact_columns.tolist())
    kept = found.exact_columns.clone()
    codes_of(sae, hidden.flip(1))
    assert torch.equal(found.exact_columns, kept)
    expected = encode_weights(sae.W_enc, largest_columns(hidden, sae))
    assert all(torch.equal(a, b) for a, b in zip(vars(found).values(), vars(expected).values(), strict=True))
