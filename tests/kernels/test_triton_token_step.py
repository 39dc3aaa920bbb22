"""The Triton token_step beyond the shared matrix: one launch, in any order of its programs, and what it moves."""

from __future__ import annotations

import gc
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from kernel_cases import (
    KINDS,
    LOW_PRECISION,
    Kind,
    decodable,
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

from dspa.errors import BackendUnavailableError
from dspa.kernels import (
    CsrMap,
    EditKind,
    EditList,
    SaeWeights,
    StepMode,
    TokenStats,
    available,
    token_step,
    token_step_with_lookup,
)

if available()["triton"] != "available":
    pytest.skip(f"backend triton: {available()['triton']}", allow_module_level=True)

import triton
import triton.language as tl

from dspa.kernels.backends.registry import operations_for
from dspa.kernels.lookup.triton_row import map_arguments
from dspa.kernels.native import encoder_arguments
from dspa.kernels.token_step import scratch as step_scratch
from dspa.kernels.token_step import triton as triton_step
from dspa.kernels.token_step.arguments import counter_arguments
from dspa.kernels.token_step.triton import NOT_SCREENED, StepScratch, scratch_of
from dspa.kernels.token_step.triton_kernel import rows as triton_rows
from dspa.kernels.token_step.triton_kernel.prepare import bound_by_latents
from dspa.kernels.token_step.triton_kernel.structures import RECENT, SLICE, Scratch
from dspa.kernels.triton_common import launch as triton_launch
from dspa.kernels.triton_common.launch import Launch
from dspa.kernels.triton_common.rows import ROW, Hidden, as_scalar, products_of
from dspa.kernels.triton_common.table import INTERPRETER, blocks, tile_of
from dspa.kernels.triton_common.tiles import INTERPRETED, Encoder, normalizer, scores
from dspa.sae.encode import encode, encoder_input

if not INTERPRETED.value:
    pytest.skip("these tests watch the interpreter; set TRITON_INTERPRET=1", allow_module_level=True)

from token_step_traffic import bytes_moved
from triton_interpreter import counting_bytes, in_sequence, interleaved

BATCH = 18  # two groups of rows
LATENTS = tile_of("token_step", INTERPRETER, 37, 300, False).latents  # that one program passes over


def case(kind: Kind, dtype: torch.dtype = torch.bfloat16) -> tuple[SaeWeights, Tensor, EditList]:
    """An SAE of several tiles, rows of several groups, and lists of more than one block."""
    sae = make_sae(kind, 37, 300, dtype, seed=3)
    rows = (normal(generator(4), BATCH, 37) * 2).bfloat16()
    edits = edit_list(*random_lists(sae, BATCH, 20, 5), 20)
    edits.signs[::2].fill_(-1)  # what may do without the pass
    return sae, rows, edits


def prompts() -> tuple[CsrMap, Tensor]:
    """A map to the latents of `case`, and a density for each of its rows."""
    return dense_map(integers(generator(6), -3, 3, 30, 300).float()), torch.rand(BATCH, 30, generator=generator(7))


def run(sae: SaeWeights, rows: Tensor, edits: EditList, mode: StepMode) -> tuple[Tensor, TokenStats]:
    hidden, stats = rows.clone(), TokenStats.zeros(len(rows), sae.d_sae)
    token_step(hidden, sae, edits, 0.2, None, stats, mode=mode, backend="triton")
    return hidden, stats


def assert_same_stats(found: TokenStats, expected: TokenStats) -> None:
    for field in fields(TokenStats):
        a, b = getattr(found, field.name), getattr(expected, field.name)
        assert torch.equal(a.nan_to_num(-1), b.nan_to_num(-1)), field.name


def assert_clean(sae: SaeWeights, batch: int, k: int) -> None:
    """The next launch finds the scratch as the first did."""
    scratch = scratch_of(sae, batch, k)
    for tensor in (scratch.counters, scratch.maxima, scratch.ranks):
        assert not tensor.any()


# ---- one launch ------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("mode", ["dense", "lazy"])
@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("gated", "layer_norm", subtract_b_dec=True)], ids=str)
def test_a_token_is_one_launch(kind: Kind, mode: StepMode, launches: list[Launch]) -> None:
    sae, rows, edits = case(kind)
    for token in range(2):
        run(sae, rows, edits, mode)
        assert len(launches) == token + 1
    assert_clean(sae, BATCH, 20)


@pytest.mark.long
@pytest.mark.parametrize("edit", ["ablate", "both"])
def test_a_token_with_lookup_is_one_launch(edit: EditKind, launches: list[Launch]) -> None:
    sae, rows, _ = case(Kind())
    conditional_map, density = prompts()
    hidden = rows.clone()
    lists = token_step_with_lookup(
        hidden, sae, density, conditional_map, 0.2, k_prompt=5, k_diff=3, edit=edit, backend="triton"
    )
    assert len(launches) == 1
    assert same_bits(hidden, run(sae, rows, lists, "lazy")[0])
    assert not same_bits(hidden, rows)


@pytest.mark.long
@pytest.mark.parametrize("tokens", [32, 64])
@pytest.mark.parametrize("mode", ["dense", "lazy"])
@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("gated")], ids=str)
def test_tiles_of_more_tokens_find_the_same(
    kind: Kind, mode: StepMode, tokens: int, monkeypatch: pytest.MonkeyPatch, launches: list[Launch]
) -> None:
    """All sums are exact: the interpreter adds up wider products in another order."""
    sae = make_integer_sae(kind, 37, 300, torch.bfloat16, seed=3)
    rows = integers(generator(4), -3, 3, BATCH, 37).bfloat16()
    edits = edit_list(*random_lists(sae, BATCH, 20, 5), 20)
    expected, expected_stats = run(sae, rows, edits, mode)
    monkeypatch.setattr(triton_step, "for_batch", lambda tile, batch: tile._replace(tokens=tokens))
    written, stats = run(sae, rows, edits, mode)
    assert [launch.arguments["TOKENS"] for launch in launches] == [16, tokens]
    assert same_bits(written, expected)
    assert_same_stats(stats, expected_stats)


# ---- any order -------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.product
@pytest.mark.parametrize("slots", [2, 12])
@pytest.mark.parametrize("mode", ["dense", "lazy"])
@pytest.mark.parametrize("kind", [Kind(), Kind("topk", "layer_norm", compact=True)], ids=str)
def test_the_order_of_programs_changes_no_bit(kind: Kind, mode: StepMode, slots: int) -> None:
    """However few programs run at a time, in whatever order they start, the launch ends with the same bits."""
    sae, rows, edits = case(kind)
    expected, expected_stats = run(sae, rows, edits, mode)
    assert int(expected_stats.edited.sum()) > BATCH // 2
    with interleaved(slots, seed=slots) as runner:
        written, stats = run(sae, rows, edits, mode)
    assert len(runner.launches) == 1
    assert same_bits(written, expected)
    assert_same_stats(stats, expected_stats)
    assert_clean(sae, BATCH, 20)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["dense", "lazy"])
def test_rows_that_are_not_finite_hold_up_nobody(mode: StepMode) -> None:
    sae, rows, edits = case(Kind("topk"))
    rows[3], rows[17, 5] = torch.nan, torch.inf
    expected, expected_stats = run(sae, rows, edits, mode)
    assert expected_stats.nonfinite.nonzero().flatten().tolist() == [3, 17]
    with interleaved(4, seed=0):
        written, stats = run(sae, rows, edits, mode)
    assert same_bits(written, expected)
    assert_same_stats(stats, expected_stats)
    assert_clean(sae, BATCH, 20)


def poison(sae: SaeWeights, batch: int, k: int) -> None:
    """Fills what a launch does not expect to be clean, so that whoever reads it too early is found out."""
    scratch = scratch_of(sae, batch, k)
    for numbers in (scratch.numbers, scratch.listed):
        numbers.fill_(torch.nan)
    scratch.bars.fill_(77)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["dense", "lazy"])
@pytest.mark.parametrize(
    "kind", [Kind(), Kind("topk", "layer_norm", compact=True), Kind("gated", "layer_norm")], ids=str
)
def test_others_wait_for_a_program_that_is_late(kind: Kind, mode: StepMode) -> None:
    """A program stops right after it has taken its ticket; the others get as far as they can without it."""
    sae, rows, _ = case(kind)
    rows, listed = rows[:3], decodable(sae)[:20]
    edits = edit_list([listed[:10]] * 3, [listed[10:]] * 3, 20)
    expected, expected_stats = run(sae, rows, edits, mode)
    assert expected_stats.maximum_known.all(), "all rows need M_t"
    prepared = 3 if mode == "dense" or kind.activation == "topk" else 6
    passed = prepared + blocks(300, LATENTS)
    # The first and the last to prepare, to bound, to pass and to finish, and who clears.
    for late in sorted({0, 2, prepared - 3, prepared - 1, prepared, passed - 1, passed, passed + 2, passed + 3}):
        scratch_of(sae, 3, 20).recent_argmax.fill_(-1)
        poison(sae, 3, 20)
        with interleaved(None, seed=late, held=late) as runner:
            written, stats = run(sae, rows, edits, mode)
        assert runner.holds == 1
        assert same_bits(written, expected), late
        assert_same_stats(stats, expected_stats)
        assert_clean(sae, 3, 20)


def test_a_late_pass_that_nobody_needs_ends_before_the_next_launch() -> None:
    sae, rows, edits = case(Kind())
    rows, edits = rows[:3], edits.rows(torch.arange(3))
    expected, _ = run(sae, rows, edits, "lazy")
    with interleaved(None, seed=0, held=7) as runner:
        assert same_bits(run(sae, rows, EditList.empty(3, 20), "lazy")[0], rows)
    assert runner.holds == 1
    assert_clean(sae, 3, 20)
    assert same_bits(run(sae, rows, edits, "lazy")[0], expected)


def test_a_launch_that_fails_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    sae, rows, edits = case(Kind())
    expected, _ = run(sae, rows, edits, "lazy")

    def fail(launch: Launch) -> None:
        cast = launch.arguments["scratch"]
        assert isinstance(cast, Scratch)
        cast.counters.fill_(7)
        raise RuntimeError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "run", fail)
        with pytest.raises(RuntimeError, match="stopped"):
            run(sae, rows, edits, "lazy")
    assert same_bits(run(sae, rows, edits, "lazy")[0], expected)


@pytest.mark.long
@pytest.mark.parametrize("mode", ["dense", "lazy"])
@pytest.mark.parametrize("kind", [Kind(), Kind("topk"), Kind("gated", "layer_norm")], ids=str)
def test_what_is_left_in_the_scratch_is_not_read(kind: Kind, mode: StepMode) -> None:
    sae, rows, edits = case(kind)
    expected, _ = run(sae, rows, edits, mode)
    poison(sae, BATCH, 20)
    assert same_bits(run(sae, rows, edits, mode)[0], expected)


@pytest.mark.long
def test_batches_share_their_scratch() -> None:
    """A prompt is a batch of its tokens: were there a scratch for each length, they would add up."""
    sae, rows, edits = case(Kind())
    expected, _ = run(sae, rows, edits, "lazy")
    for batch in (17, 3, 18, 11, 4):
        index = torch.arange(batch)
        assert same_bits(run(sae, rows[:batch], edits.rows(index), "lazy")[0], expected[:batch])
    found = {batch: scratch_of(sae, batch, 20) for batch in (1, 18, 256, 257, 300, 512, 513)}
    assert len({id(scratch) for scratch in found.values()}) == 3
    assert all(scratch.bars.shape[0] >= batch for batch, scratch in found.items())


# ---- streams ---------------------------------------------------------------------------------------------------------


@dataclass
class Streams:
    """A CPU that says it has streams, like a GPU."""

    current: int = 1
    is_captured: bool = False


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    state = Streams()
    monkeypatch.setattr(step_scratch, "runs_on_streams", lambda _: True)
    monkeypatch.setattr(step_scratch, "stream_of", lambda _: state.current)
    monkeypatch.setattr(step_scratch, "is_being_captured", lambda _: state.is_captured)
    return state


@pytest.mark.parametrize("first", [1, 4, 7, 12])  # programs before the other launch: within each part of this one
def test_launches_on_two_streams_run_at_the_same_time(
    first: int, streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One launch stops half way; another of the same SAE runs from its beginning to its end."""
    sae, rows, edits = case(Kind())
    rows, edits, index = rows[:6], edits.rows(torch.arange(6)), torch.arange(3, 6)
    expected, expected_stats = run(sae, rows, edits, "lazy")
    expected_meanwhile, _ = run(sae, rows[3:], edits.rows(index), "lazy")
    programs, interpreted, meanwhile = [], Launch.run, []

    def run_in_two_parts(launch: Launch) -> None:
        programs.append(launch.programs)
        if len(programs) == 2:
            return interpreted(launch)
        interpreted(replace(launch, programs=first))
        streams.current = 2
        meanwhile.append(run(sae, rows[3:], edits.rows(index), "lazy")[0])
        streams.current = 1
        return interpreted(replace(launch, programs=launch.programs - first))

    with monkeypatch.context() as patch:
        patch.setattr(Launch, "run", run_in_two_parts)
        written, stats = run(sae, rows, edits, "lazy")
    assert len(programs) == 2
    assert programs[0] > 12
    assert same_bits(written, expected)
    assert_same_stats(stats, expected_stats)
    assert same_bits(meanwhile[0], expected_meanwhile)
    for streams.current in (1, 2):
        assert_clean(sae, 6, 20)


def test_each_stream_has_its_scratch_and_so_has_a_captured_graph(streams: Streams) -> None:
    sae, *_ = case(Kind())
    eager = scratch_of(sae, 3, 20)
    assert scratch_of(sae, 5, 20) is eager
    streams.current = 2
    other = scratch_of(sae, 3, 20)
    streams.current, streams.is_captured = 3, True
    of_graph = scratch_of(sae, 3, 20)
    assert scratch_of(sae, 4, 20) is of_graph, "made before the capture, as nothing can be made during one"
    streams.current = 4
    assert scratch_of(sae, 3, 20) is not scratch_of(sae, 3, 20), "without a spare: its own, which is not kept"
    streams.current = 3
    assert scratch_of(sae, 3, 20) is of_graph
    assert len({id(eager), id(other), id(of_graph)}) == 3


def test_other_streams_use_what_a_step_on_the_default_stream_made(
    streams: Streams, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first step on another stream may be a trial run of `torch.compile`, in which nothing that stays may be made;
    the next step on the default stream makes up for what was taken."""
    sae, *_ = case(Kind())
    made, allocate = list[StepScratch](), StepScratch.allocate

    def counted(*sizes: Any) -> StepScratch:
        made.append(allocate(*sizes))
        return made[-1]

    monkeypatch.setattr(StepScratch, "allocate", counted)
    streams.current = step_scratch.DEFAULT_STREAM
    of_default = scratch_of(sae, 3, 20)
    after_first, taken = len(made), []
    for streams.current in (5, 6):
        taken.append(scratch_of(sae, 3, 20))
    assert len(made) == after_first
    assert len({id(scratch) for scratch in (of_default, *taken)}) == 3
    streams.current = step_scratch.DEFAULT_STREAM
    assert scratch_of(sae, 3, 20) is of_default
    assert len(made) == after_first + len(taken)
    for streams.current, streams.is_captured in ((5, True), (6, False), (7, True), (8, False)):
        scratch_of(sae, 3, 20)
    assert len(made) == after_first + len(taken)
    assert scratch_of(sae, 3, 20) is not of_default


def test_numbers_past_the_end_of_a_launch_write_nothing() -> None:
    """As they are taken where two launches use one scratch in spite of all."""
    sae, rows, edits = case(Kind("topk"))
    scratch = scratch_of(sae, BATCH, 20)
    interpreted = Launch.run

    def run_past_the_end(launch: Launch) -> None:
        scratch.counters[0] = launch.programs
        before = [tensor.clone() for tensor in scratch.tensors()]
        interpreted(launch)
        before[0][0] += launch.programs
        assert all(torch.equal(tensor, old) for tensor, old in zip(scratch.tensors(), before, strict=True))
        scratch.counters.zero_()

    for mode in ("dense", "lazy"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Launch, "run", run_past_the_end)
            written, stats = run(sae, rows, edits, mode)
        assert same_bits(written, rows)
        assert_same_stats(stats, TokenStats.zeros(BATCH, sae.d_sae))


# ---- lazy ------------------------------------------------------------------------------------------------------------


def weights_read(sae: SaeWeights, rows: Tensor, edits: EditList, mode: StepMode) -> float:
    """How often all of `W_enc` was read."""
    with counting_bytes({"W_enc": sae.W_enc}) as counted:
        run(sae, rows, edits, mode)
    return counted.bytes["W_enc"] / (sae.W_enc.numel() * sae.W_enc.element_size())


def test_no_pass_where_no_listed_latent_is_active() -> None:
    sae, rows, edits = case(Kind())
    quiet = replace(sae, threshold=torch.full((300,), 1e9))
    assert weights_read(quiet, rows, edits, "lazy") == int(edits.counts.sum()) / 300
    assert weights_read(quiet, rows, edits, "dense") == int(edits.counts.sum()) / 300 + 2


@pytest.mark.long
@pytest.mark.parametrize("kind", [Kind("relu"), Kind("gated"), Kind("relu", "layer_norm")], ids=str)
def test_recent_argmax_latents_save_the_pass(kind: Kind) -> None:
    """A latent that towers above all others is remembered, and from then on proves the edit by itself."""
    plain, rows, _ = case(kind)
    biases = {"b_enc": plain.b_enc, "magnitude_bias": plain.magnitude_bias}
    towering = {name: bias.index_fill(0, torch.tensor([100]), 1e3) for name, bias in biases.items() if bias is not None}
    sae = replace(plain, **towering)
    edits = edit_list([[]] * BATCH, [list(range(16))] * BATCH, 16)
    reading = 16 * BATCH / 300
    assert weights_read(sae, rows, edits, "lazy") == pytest.approx(reading + 2 * LATENTS / 300), (
        "the first tile proves it"
    )
    recent_argmax = scratch_of(sae, BATCH, 16).recent_argmax
    assert (recent_argmax[:, 0] == 100).sum() > BATCH // 2
    known = int((recent_argmax[:, 0] == 100).sum())
    assert weights_read(sae, rows, edits, "lazy") == pytest.approx(reading + known / 300), "and the leader alone"
    expected, _ = run(sae, rows, edits, "dense")
    assert same_bits(run(sae, rows, edits, "lazy")[0], expected)


@pytest.mark.long
@pytest.mark.parametrize("recent_argmax", [-1, 300, 2**31 - 1, 17], ids=str)
def test_recent_argmax_latents_never_change_the_result(recent_argmax: int) -> None:
    sae, rows, edits = case(Kind())
    expected, dense = run(sae, rows, edits, "dense")
    scratch_of(sae, BATCH, 20).recent_argmax.fill_(recent_argmax)  # none, nonsense, nonsense, listed now and then
    written, stats = run(sae, rows, edits, "lazy")
    assert same_bits(written, expected)
    assert torch.equal(stats.latent_edits, dense.latent_edits)


@pytest.mark.long
def test_recent_argmax_latents_are_the_latest_maxima() -> None:
    sae, rows, edits = case(Kind("relu"))
    f = torch.relu(rows.float() @ sae.W_enc.float().T + sae.b_enc)
    edits = edit_list([[0, 1, 2]] * BATCH, [[]] * BATCH, 20)  # augmented, so that M_t is needed
    active = (f[:, :3] > 0).any(dim=1)
    f[:, :3] = 0
    for shift in range(3):
        run(sae, rows.roll(shift, 0), edits, "lazy")
    latest = [f.roll(shift, 0).argmax(dim=1) for shift in (2, 1, 0)]
    row = int((active & active.roll(1) & active.roll(2)).nonzero()[0])
    distinct = list(dict.fromkeys(int(latent[row]) for latent in latest))
    assert scratch_of(sae, BATCH, 20).recent_argmax[row, : len(distinct)].tolist() == distinct


# ---- what lazy proves ------------------------------------------------------------------------------------------------


@triton.jit
def bounds_kernel(
    hidden,
    encoder,
    recent_argmax,
    bounds,
    estimates,
    d_model,
    d_sae,
    ACTIVATION: tl.constexpr,
    NORMALIZATION: tl.constexpr,
):
    """The bound that the recent argmax latents of each row prove, and the largest of their scores, by one program."""
    row = tl.program_id(0)
    begin = hidden.rows + row * hidden.row_stride
    zero = tl.zeros([1, 1], tl.int32)
    shift, factor, _ = normalizer(begin + zero, hidden.column_stride, d_model, zero == 0, NORMALIZATION, ROW)
    shift = as_scalar(shift)
    factor = as_scalar(factor)
    latents = tl.load(recent_argmax + row * RECENT + tl.arange(0, RECENT))
    bound, _ = bound_by_latents(
        latents,
        begin,
        hidden.column_stride,
        encoder,
        shift,
        factor,
        d_model,
        d_sae,
        ACTIVATION,
        NORMALIZATION,
    )
    tl.store(bounds + row, bound)
    known = (latents >= 0) & (latents < d_sae)
    product, _, _ = products_of(
        latents, known, begin, hidden.column_stride, encoder, shift, factor, d_model, NORMALIZATION
    )
    tl.store(estimates + row, tl.max(scores(product, encoder, latents, known, ACTIVATION), axis=0))


def bounds_of(sae: SaeWeights, rows: Tensor, recent_argmax: Tensor) -> tuple[Tensor, Tensor]:
    """The bounds that `[B, n]` latents prove, and their largest scores without a proof; `[B]` float32 each."""
    bounds, estimates, padded = torch.empty(len(rows)), torch.empty(len(rows)), torch.full((len(rows), 16), -1)
    padded[:, : recent_argmax.shape[1]] = recent_argmax
    activation, _, normalization = encoder_arguments(sae)[-3:]
    constants: dict[str, Any] = {"ACTIVATION": triton_launch.activation_of(activation), "NORMALIZATION": normalization}
    bounds_kernel[(len(rows),)](
        Hidden(rows, *rows.stride()),
        Encoder(*encoder_arguments(sae)[:-3]),
        padded.int(),
        bounds,
        estimates,
        sae.d_model,
        sae.d_sae,
        **constants,
    )
    return bounds, estimates


def dense_maxima(sae: SaeWeights, rows: Tensor) -> Tensor:
    """M_t as the pass finds it, `[B]` float32."""
    stats = TokenStats.zeros(len(rows), sae.d_sae)
    token_step(rows.clone(), sae, EditList.empty(len(rows), 0), 0.2, None, stats, mode="dense", backend="triton")
    return stats.maximum.float()


ROUNDING = 2.0**-22  # of one product, at most, on a tensor core; in float32 it is a quarter of that


def products(sae: SaeWeights, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`W_enc h'` and the same of absolute values, `[B, d_sae]` float64."""
    x, W_enc = encoder_input(rows.double(), sae)[0], sae.W_enc.double()
    return x @ W_enc.T, x.abs() @ W_enc.abs().T


def certain_scores(sae: SaeWeights, rows: Tensor) -> Tensor:
    """The activations that every order of summation reaches, `[B, d_sae]` float64."""
    product, magnitude = products(sae, rows)
    product -= sae.d_model * ROUNDING * magnitude
    z = (product + sae.b_enc) * (1.0 if sae.decoder_norm is None else sae.decoder_norm)
    if sae.magnitude_scale is not None and sae.magnitude_bias is not None:
        gate, score = z, product * sae.magnitude_scale + sae.magnitude_bias
    else:
        gate, score = z - sae.threshold, z
    return torch.where(gate > 0, score, 0.0).relu()


def on_the_edge(sae: SaeWeights, rows: Tensor) -> tuple[SaeWeights, Tensor, Tensor]:
    """The SAE with gates that are just passed, by the latent with the largest product of a row: by more than float32
    can lose in any order, and by less than a tensor core can. With these rows and, `[B, 1]`, their latents."""
    product, magnitude = products(sae, rows)
    latents = product.argmax(dim=1)
    first = [latents.tolist().index(latent) for latent in latents.unique().tolist()]
    latents, rows = latents[first], rows[first]
    gate = (product - sae.d_model * ROUNDING / 2 * magnitude)[first, latents]
    if sae.activation == "gated":
        return replace(sae, b_enc=sae.b_enc.index_copy(0, latents, -gate.float())), rows, latents[:, None]
    gate = (gate + sae.b_enc[latents]) * (1.0 if sae.decoder_norm is None else sae.decoder_norm[latents])
    return replace(sae, threshold=sae.threshold.index_copy(0, latents, gate.float())), rows, latents[:, None]


@pytest.mark.long
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "kind",
    [
        Kind(),
        Kind("batchtopk", subtract_b_dec=True, rescaled=True),
        Kind("gated", subtract_b_dec=True),
        Kind("relu", "layer_norm"),
    ],
    ids=str,
)
def test_recent_argmax_latents_prove_no_more_than_every_pass_finds(kind: Kind, dtype: torch.dtype) -> None:
    """In whatever order it adds the products up: to a smaller sum, or one that does not pass the gate."""
    sae = make_sae(kind, 300, 300, dtype, seed=8)
    rows = (normal(generator(9), 32, 300) * 2).to(dtype)
    certain = certain_scores(sae, rows)
    recent_argmax = torch.cat([certain.topk(8).indices, torch.tensor([[-1, 300, 2**31 - 1]] * 32)], dim=1)
    bounds, _ = bounds_of(sae, rows, recent_argmax)
    assert (bounds <= certain.amax(dim=1)).all()
    assert (bounds >= certain.amax(dim=1) * (1 - 2e-3)).all()
    assert (bounds <= dense_maxima(sae, rows)).all()

    edge, rows, latents = on_the_edge(sae, rows)
    bounds, estimates = bounds_of(edge, rows, latents)
    assert (estimates > 0).all(), "without a proof the gates are passed"
    assert (bounds == 0).all()


@pytest.mark.long
@pytest.mark.parametrize("proof", ["a leader", "another tile", "the list"])
@pytest.mark.parametrize("kind", [Kind("relu"), Kind("gated", subtract_b_dec=True)], ids=str)
def test_lazy_is_exact_where_a_latent_is_about_to_vanish(kind: Kind, proof: str) -> None:
    """The listed latent is larger than alpha * M, or smaller, by a millionth: M is what may prove that it vanishes. All
    sums are exact, and the decoder is large enough that the hidden state shows a millionth of the edit."""
    rng = generator(3)
    plain = make_integer_sae(kind, 37, 300, torch.float32, seed=3)
    assert plain.W_dec is not None
    sae = replace(plain, W_enc=integers(rng, -60, 60, 300, 37).float(), W_dec=plain.W_dec * 2**10)
    rows = integers(rng, -60, 60, BATCH, 37).float()
    f = encode(rows.double(), sae)
    listed = f.argsort(dim=1)[:, -10]
    reached = f.max(dim=1)
    if proof == "another tile":  # the first one, where the maximum is in a later one
        reached = f[:, :LATENTS].max(dim=1)
        assert (f.argmax(dim=1) >= LATENTS).sum() >= 6
    elif proof == "the list":
        listed = reached.indices
    margin = torch.tensor([1e-6, -1e-6, 5e-6, -5e-6, 2e-5, 4e-5, -4e-5, 8e-5, 1e-4]).repeat(2)
    alpha = f.gather(1, listed[:, None])[:, 0] / reached.values * (1 - margin)
    edits = edit_list([[]] * BATCH, [[latent] for latent in listed.tolist()], 2)

    def step(mode: StepMode, strength: Tensor | float) -> tuple[Tensor, TokenStats]:
        hidden, stats = rows.clone(), TokenStats.zeros(BATCH, 300)
        with in_sequence():
            token_step(hidden, sae, edits, strength, None, stats, mode=mode, backend="triton")
        return hidden, stats

    expected, dense = step("dense", alpha)
    recent_argmax = scratch_of(sae, BATCH, 2).recent_argmax
    step("lazy", 0.01)
    assert torch.equal(recent_argmax[:BATCH, 0], f.argmax(dim=1).int()), "the pass was needed"
    if proof != "a leader":
        recent_argmax.fill_(-1)
    written, lazy = step("lazy", alpha)
    assert same_bits(written, expected)
    assert torch.equal(lazy.latent_edits, dense.latent_edits)
    if proof != "another tile":
        assert torch.equal(lazy.maximum_known.bool(), margin > 0)


# ---- many rows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("finishing", [12, 6], ids=lambda number: f"{number} programs")
def test_programs_that_finish_several_slices_change_no_bit(finishing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are many rows: two slices for a program and one for the last, or all three."""
    batch, d_model, d_sae = 6, 1100, 140
    assert blocks(d_model, SLICE.value) == 3
    sae = make_sae(Kind(compact=True), d_model, d_sae, torch.bfloat16, seed=3)
    rows = (normal(generator(4), batch, d_model) * 2).bfloat16()
    edits = edit_list(*random_lists(sae, batch, 20, 5), 20)
    expected, expected_stats = run(sae, rows, edits, "lazy")
    assert not same_bits(expected, rows)
    programs, interpreted = [], Launch.run

    def counted_run(launch: Launch) -> None:
        programs.append(launch.programs)
        interpreted(launch)

    monkeypatch.setattr(Launch, "run", counted_run)
    run(sae, rows, edits, "lazy")
    for module in (triton_step, triton_rows):
        monkeypatch.setattr(module, "FINISHING", tl.constexpr(finishing))
    written, stats = run(sae, rows, edits, "lazy")
    assert programs[0] - programs[1] == 3 * batch - finishing
    assert same_bits(written, expected)
    assert_same_stats(stats, expected_stats)
    assert_clean(sae, batch, 20)


# ---- large weights ---------------------------------------------------------------------------------------------------


def test_the_pass_over_weights_beyond_two_to_the_31st(monkeypatch: pytest.MonkeyPatch) -> None:
    """The maximum is in the last tile, whose offset does not fit 32 bits; most of the memory is never touched, and so
    never taken. The other tiles, which would take minutes here, count as passed."""
    d_model, d_sae = 4096, 2**19 + 64
    W = torch.from_numpy(np.zeros((d_sae, d_model), np.uint16)).view(torch.bfloat16)
    W[-1], W[3] = 2**-5, 2**-6
    zeros = torch.zeros(d_sae)
    sae = SaeWeights(W_enc=W, W_dec=W, b_enc=zeros, threshold=zeros + 1, activation="jumprelu")
    rows, stats = torch.ones(2, d_model, dtype=torch.bfloat16), TokenStats.zeros(2, d_sae)
    rows[1] = 2.0
    interpreted, finishing = Launch.run, 2 * blocks(d_model, SLICE.value)

    def run_some(launch: Launch) -> None:
        passes = launch.programs - 2 - finishing - 1
        interpreted(replace(launch, programs=2))
        scratch_of(sae, 2, 1).counters.copy_(torch.tensor([2 + passes - 1, 2, passes - 1, 0]))
        interpreted(replace(launch, programs=1 + finishing + 1))

    monkeypatch.setattr(Launch, "run", run_some)
    token_step(rows, sae, edit_list([[], []], [[3], [3]], 1), 0.25, None, stats, mode="dense", backend="triton")
    assert stats.maximum.tolist() == [128.0, 256.0]
    assert [row.float().unique().tolist() for row in rows] == [[0.5], [1.0]]  # f is 64 and 128, and is halved
    assert_clean(sae, 2, 1)


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("passes", [True, False])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.compact], ids=str)
def test_the_model_of_bytes_moved_is_what_the_kernel_loads(kind: Kind, passes: bool) -> None:
    sae, rows, _ = case(kind)
    rows = triton_launch.with_aligned_rows(rows)  # others are copied
    if not passes:
        sae = replace(sae, b_enc=torch.full((300,), -1e4))
    edits = edit_list([[0, 20]] * BATCH, [[100, 120]] * BATCH, 5)
    mode: StepMode = "dense" if passes else "lazy"
    groups = {
        "encoder": [sae.W_enc],
        "decoder": [sae.W_dec],
        "hidden": [rows],
        "parameters": [
            sae.b_enc,
            sae.threshold,
            sae.b_dec if sae.subtract_b_dec else None,
            sae.decoder_norm,
            sae.magnitude_scale,
            sae.magnitude_bias,
        ],
    }
    named = {f"{name} {i}": t for name, tensors in groups.items() for i, t in enumerate(tensors) if t is not None}
    stats = TokenStats.zeros(BATCH, 300)
    with counting_bytes(named) as counted:
        token_step(rows, sae, edits, 0.2, None, stats, mode=mode, backend="triton")
    positive = scratch_of(sae, BATCH, 5).listed[:BATCH, :4] > 0
    expected = bytes_moved(
        sae,
        rows.dtype,
        BATCH,
        listed=4,
        positive=int(positive.sum()),
        touched=int(positive.any(dim=1).sum()),
        changed=int(stats.latent_edits.sum()),
        edited=int(stats.edited.sum()),
        passes=passes,
        latents_per_program=LATENTS,
    )
    for name in groups:
        loaded = sum(number for key, number in counted.bytes.items() if key.startswith(name))
        assert loaded == getattr(expected, name), name
    assert bool(stats.edited.any()) == passes


# ---- compiled graphs -------------------------------------------------------------------------------------------------


@pytest.mark.long
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_as_one_graph(compiler: str) -> None:
    gc.collect()  # an SAE of another test that goes while this compiles would change what the compiler looks at
    torch.compiler.reset()
    sae, rows, edits = case(Kind())
    stats = TokenStats.zeros(BATCH, 300)
    enabled = torch.ones(BATCH, dtype=torch.bool)

    def block(hidden: Tensor) -> Tensor:
        hidden = hidden * 2
        token_step(hidden, sae, edits, 0.2, enabled, stats, backend="triton")
        return hidden + 1

    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    assert same_bits(compiled(rows), block(rows))
    assert (stats.seen == 2).all()
    enabled.fill_(False)  # a flag on the device switches the edit off, without another graph
    assert same_bits(compiled(rows), rows * 2 + 1)


@pytest.mark.long
def test_one_graph_serves_every_batch() -> None:
    sae, rows, edits = case(Kind())
    compilations = 0

    def counting(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nonlocal compilations
        compilations += 1
        return graph

    def block(hidden: Tensor, lists: EditList) -> Tensor:
        hidden = hidden * 2
        token_step(hidden, sae, lists, 0.2, backend="triton")
        return hidden

    compiled = torch.compile(block, fullgraph=True, backend=counting)
    for batch in range(2, 15):
        lists = edits.rows(torch.arange(batch))
        assert same_bits(compiled(rows[:batch], lists), block(rows[:batch], lists))
    assert compilations <= 3  # the first batch, one for any other, and one where the scratch is there already


@pytest.mark.long
def test_compiles_as_one_graph_with_the_lookup() -> None:
    gc.collect()  # guards of the weak dictionary of scratch fail where another test's SAE has just gone
    torch.compiler.reset()
    sae, rows, _ = case(Kind())
    conditional_map, density = prompts()

    def block(hidden: Tensor) -> tuple[Tensor, Tensor]:
        hidden = hidden * 2
        lists = token_step_with_lookup(
            hidden, sae, density, conditional_map, 0.2, k_prompt=5, k_diff=3, edit="both", backend="triton"
        )
        return hidden + 1, lists.latents

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    (written, latents), (expected, expected_latents) = compiled(rows), block(rows)
    assert same_bits(written, expected)
    assert torch.equal(latents, expected_latents)
    assert not same_bits(written, rows * 2 + 1)


def step_arguments(sae: SaeWeights, hidden: Tensor, lists: EditList, optional: bool) -> tuple[object, ...]:
    """The arguments of the operation, with those that may be missing or without."""
    batch = len(hidden)
    return (
        hidden,
        *encoder_arguments(sae),
        sae.W_dec,
        sae.decoder_rows,
        lists.latents,
        lists.signs,
        lists.counts,
        0.2,
        torch.full((batch,), 0.2) if optional else None,
        torch.arange(batch) % 2 == 0 if optional else None,
        *(counter_arguments(TokenStats.zeros(batch, sae.d_sae)) if optional else (None,) * 7),
        *scratch_of(sae, batch, lists.k).tensors(),
        *NOT_SCREENED,
        True,
    )


@pytest.mark.long
@pytest.mark.parametrize("optional", [False, True])
@pytest.mark.parametrize("kind", [Kind(), Kind("gated", "layer_norm")], ids=str)
def test_passes_opcheck(kind: Kind, optional: bool) -> None:
    sae, rows, edits = case(kind)
    arguments = step_arguments(sae, rows[:2], edits.rows(torch.arange(2)), optional)
    torch.library.opcheck(torch.ops.dspa_triton.token_step.default, arguments)


@pytest.mark.long
@pytest.mark.parametrize("optional", [False, True])
def test_the_step_with_lookup_passes_opcheck(optional: bool) -> None:
    sae, rows, _ = case(Kind("topk"))
    conditional_map, density = prompts()
    arguments = step_arguments(sae, rows[:2], EditList.empty(2, 6), optional)
    prompt = (density[:2], *map_arguments(conditional_map), 5, 3, "both", False)
    torch.library.opcheck(torch.ops.dspa_triton.token_step_with_lookup.default, (*arguments, *prompt))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("hidden", "weights"), [(torch.float64, torch.float32), (torch.float32, torch.float64)])
def test_float64_is_refused(hidden: torch.dtype, weights: torch.dtype) -> None:
    sae = make_sae(Kind(), 37, 64, weights, seed=0)
    with pytest.raises(BackendUnavailableError, match="float64"):
        token_step(torch.zeros(1, 37, dtype=hidden), sae, EditList.empty(1, 4), 0.2, backend="triton")


def test_auto_never_interprets() -> None:
    """Interpreting is for tests: on the CPU it is chosen by name only."""
    sae, rows, _ = case(Kind())
    operations = operations_for("auto", "token_step", (rows,), sae)
    assert operations.token_step.__module__ != "dspa.kernels.token_step.triton"


@pytest.mark.long
@pytest.mark.parametrize("dtype", LOW_PRECISION, ids=str)
def test_products_in_parts_are_as_precise_as_float32(dtype: torch.dtype) -> None:
    """Parts of 8 bits that add up to all of a number: the product of one column has no error but the last rounding."""
    assert triton_launch.parts_of(torch.float32, dtype, True) == 3
    plain = make_sae(Kind("relu"), 1, 128, dtype, seed=1)
    sae = replace(plain, b_enc=torch.zeros(128))
    rows = normal(generator(2), 64, 1).float()
    stats = TokenStats.zeros(64, 128)
    token_step(rows, sae, EditList.empty(64, 0), 0.2, None, stats, mode="dense", backend="triton")
    exact = torch.relu(rows.double() @ sae.W_enc.double().T).amax(dim=1)
    assert ((stats.maximum - exact).abs() <= 2**-23 * exact).all()
