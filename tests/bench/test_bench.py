"""`dspa bench` at toy shapes: what it checks, what its record holds, and what it refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import SaeKind, tiny_model, tiny_policy
from typer.testing import CliRunner

from dspa.bench import adapter, cases, operations
from dspa.bench.adapter import ADAPTER_MODES, EAGER_ADAPTER, UNTRAINED, AdapterCase, adapter_ways, eager_fsrl
from dspa.bench.cases import LISTS, NEEDS_MAXIMUM, Case, Shape
from dspa.bench.command import BenchOptions, run_bench
from dspa.bench.density_check import check_counts
from dspa.bench.eager import as_delta, plain_sae, with_error_term
from dspa.bench.measurements import Column, Interval, Row
from dspa.bench.operations import EAGER, OURS, READ, READ_ADAPTER, eager_dtypes, padded_latents
from dspa.bench.report import read_bandwidth, token_costs
from dspa.bench.tables import group_tables
from dspa.cli import app
from dspa.errors import InvalidInputError, MismatchError
from dspa.kernels import AdapterMode, SaeWeights, StepMode, adapter_step, available, encode_density, token_step

TOY = ["--d-model", "48", "--d-sae", "256", "--tokens", "8", "--seconds", "0.01"]
SHAPE = Shape(48, 256, torch.bfloat16, 1)
KINDS: tuple[SaeKind, ...] = ("jumprelu", "gated", "topk")
FIELDS = {"subject", "machine", "provenance", "rows", "read_bandwidth", "token_costs", "generation"}

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def small_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dspa.bench.timing.EVICTING_BYTES", 1 << 12)


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["bench", *TOY, *arguments])
    return result.exit_code, result.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model and a policy for it."""
    root = tmp_path_factory.mktemp("bench")
    model = tiny_model("llama", dtype=torch.float32)
    model.save_pretrained(root / "model")
    tiny_policy(model, dtype=torch.float32).save_pretrained(root / "policy")
    return root


def test_the_record_holds_every_field() -> None:
    code, output = invoke("--json")
    record = json.loads(output)
    assert code == 0
    assert set(record) == FIELDS
    assert [row["group"] for row in record["rows"]] == ["token_step", "encode_density", "adapter_step"]
    step = {column["name"]: column for column in record["rows"][0]["columns"]}
    assert set(step) >= {READ, EAGER, f"{EAGER}, float32", *(name for name, _, _ in OURS)}
    assert all(column["measured"]["value"] > 0 for column in step.values())
    columns = {column["name"] for column in record["rows"][2]["columns"]}
    assert columns == {READ_ADAPTER, EAGER_ADAPTER, f"{EAGER_ADAPTER}, float32", *ADAPTER_MODES, UNTRAINED}
    assert step[EAGER]["relative"] == {"value": 1.0, "low": 1.0, "high": 1.0}
    assert {cost["name"] for cost in record["token_costs"]} <= {name for name, _, _ in OURS}
    assert record["read_bandwidth"] > 0
    assert record["generation"] is None


@pytest.mark.parametrize("operation", [operation.name for operation in operations.OPERATIONS])
def test_one_operation_alone(operation: str) -> None:
    code, output = invoke("--operation", operation, "--json")
    assert code == 0
    assert [row["group"] for row in json.loads(output)["rows"]] == [operation]


def test_a_policy_and_its_model(folder: Path) -> None:
    page = folder / "bench.html"
    options = BenchOptions(
        tokens=8, policy=str(folder / "policy"), model=str(folder / "model"), batch=2, seconds=0.01, at_least=2
    )
    report = run_bench(options, html=page)
    assert not report.failed
    assert report.generation is not None
    assert report.generation.steps == 4 * 8
    assert report.generation.bytes_per_token > 0
    text = page.read_text()
    assert text.count("<svg") == 3
    assert "A generated token of model" in text
    assert "<script" not in text
    assert len(text) < 300_000


def test_a_random_sae_and_a_model(folder: Path) -> None:
    width = tiny_model("llama").config.hidden_size
    options = BenchOptions(
        d_model=width, d_sae=256, tokens=8, model=str(folder / "model"), operations=["token_step"], seconds=0.01
    )
    report = run_bench(options)
    assert report.generation is not None
    assert report.generation.predicted is not None


def test_a_policy_for_another_model_is_refused(folder: Path, tmp_path: Path) -> None:
    tiny_model("gemma2", dtype=torch.float32).save_pretrained(tmp_path / "other")
    options = BenchOptions(
        tokens=8, policy=str(folder / "policy"), model=str(tmp_path / "other"), operations=["token_step"], seconds=0.01
    )
    with pytest.raises(MismatchError):
        run_bench(options)


@pytest.mark.parametrize("kind", KINDS)
def test_sae_kinds(kind: SaeKind) -> None:
    """The case of a given SAE passes its own check, and the eager edits compute the same in float64."""
    policy = tiny_policy(tiny_model("llama"), kind, dtype=torch.float64)
    case = Case.from_sae(policy.output_sae, 1, 0.2, "reference")
    case.check(("dense", "lazy"), tuple(name for name in LISTS if name in case.lists))
    expected = case.step(NEEDS_MAXIMUM, "dense")
    plain = plain_sae(case.sae)
    assert plain is not None
    latents = padded_latents(case, NEEDS_MAXIMUM)
    for edit in (with_error_term, as_delta):
        torch.testing.assert_close(edit(plain, case.hidden, latents, 0.2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_of_a_case(kind: SaeKind) -> None:
    """It passes its own check, and the eager form computes the same in float64."""
    policy = tiny_policy(tiny_model("llama"), kind, dtype=torch.float64)
    adapters = AdapterCase(Case.from_sae(policy.output_sae, 2, 0.2, "reference"))
    adapters.check()
    plain = plain_sae(adapters.case.sae)
    assert plain is not None
    sae, weight = adapters.case.sae, adapters.adapter.weight.T
    b_dec = sae.b_dec if sae.subtract_b_dec else None
    written = eager_fsrl(plain, weight, adapters.adapter, adapters.case.hidden, b_dec)
    torch.testing.assert_close(written, adapters.step("dense"), rtol=1e-12, atol=1e-12)


def test_an_sae_that_normalizes_has_no_eager_form() -> None:
    assert plain_sae(replace(Case(SHAPE, "auto").sae, normalization="layer_norm")) is None


def test_with_batch_is_the_case_of_that_batch() -> None:
    ours, fresh = Case(SHAPE, "auto").with_batch(4), Case(replace(SHAPE, batch=4), "auto")
    assert torch.equal(ours.hidden, fresh.hidden)
    assert ours.shape == fresh.shape
    assert ours.lists.keys() == fresh.lists.keys()
    for name, edits in fresh.lists.items():
        assert torch.equal(ours.lists[name].latents, edits.latents)


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_counts_are_found(kind: SaeKind) -> None:
    sae = tiny_policy(tiny_model("llama"), kind, dtype=torch.float32).input_sae
    hidden = torch.randn(8, sae.d_model, generator=torch.Generator().manual_seed(0))
    offsets = torch.tensor([0, 3, 8])
    counts = encode_density(hidden, offsets, sae)
    check_counts(counts, hidden, offsets, sae)
    counts[1, 0] = 8 - counts[1, 0] if counts[1, 0] != 4 else 0
    with pytest.raises(AssertionError, match="counts differ by more than rounding"):
        check_counts(counts, hidden, offsets, sae)


def broken_step(hidden: torch.Tensor, *arguments: Any, mode: StepMode | None = None, **options: Any) -> None:
    token_step(hidden, *arguments, mode=mode, **options)
    if mode == "lazy":
        hidden += 1


def broken_density(*arguments: Any, **options: Any) -> torch.Tensor:
    return encode_density(*arguments, **options) + 1


def broken_adapter(hidden: torch.Tensor, *arguments: Any, mode: AdapterMode | None = None, **options: Any) -> None:
    adapter_step(hidden, *arguments, mode=mode, **options)
    if mode == "screened":
        hidden += 1


@pytest.mark.parametrize(
    ("module", "name", "broken", "group", "words"),
    [
        (cases, "token_step", broken_step, "token_step", "lazy differs from dense"),
        (adapter, "adapter_step", broken_adapter, "adapter_step", "screened differs from dense"),
        (operations, "encode_density", broken_density, "encode_density", "counts differ by more than rounding"),
    ],
)
def test_a_wrong_result_is_a_failed_row_and_exit_code_1(
    module: Any, name: str, broken: Any, group: str, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, name, broken)
    code, output = invoke("--json")
    assert code == 1
    failed = {row["group"]: row for row in json.loads(output)["rows"] if row["failed"]}
    assert list(failed) == [group]
    assert failed[group]["failed"] == words
    assert failed[group]["columns"] == []
    code, output = invoke()
    assert code == 1
    assert f"FAILED: {words}" in output


def test_predicted_cost_is_bytes_over_bandwidth() -> None:
    read = Column(READ, "ms", Interval.exactly(2.0), bytes_read=20_000_000)
    step = Column("dense", "ms", Interval.exactly(3.0), bytes_read=5_000_000)
    rows = (Row("row", "token_step", (read, Column("eager", "ms", Interval.exactly(9.0)), step)),)
    assert read_bandwidth(rows) == 10.0
    (cost,) = token_costs(rows, 10.0)
    assert (cost.name, cost.predicted, cost.measured) == ("dense", 0.5, 3.0)
    assert token_costs(rows, None) == ()


@pytest.mark.skipif(available()["cpu"] != "available", reason="bytes are counted in the C++ library")
def test_bytes_are_counted() -> None:
    case = Case(SHAPE, "cpu")
    whole = case.sae.W_enc.nbytes
    assert (operations.bytes_read(case, NEEDS_MAXIMUM, "dense") or 0) >= whole
    assert 0 < (operations.bytes_read(case, "none active", "lazy") or 0) < whole
    dense, screened, untrained = (way.bytes_read for way in adapter_ways(AdapterCase(case)))
    assert dense == untrained == whole
    assert screened is not None
    assert screened < whole


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--d-model", "0"], "d_model is 0; expected at least 2"),
        (["--d-sae", "3"], "d_sae is 3; expected at least 64"),
        (["--batch", "0"], "batch is 0"),
        (["--tokens", "2"], "tokens is 2"),
        (["--dtype", "float12"], "dtype is 'float12'; expected one of bfloat16, float16, float32"),
        (["--model-dtype", "int8"], "model_dtype is 'int8'"),
        (["--seconds", "0"], "seconds is 0"),
        (["--operation", "sing"], "operation is 'sing'; expected one of token_step, encode_density"),
        (["--backend", "abacus"], "backend 'abacus' cannot be measured: expected one of auto, "),
        (["--device", "tpu"], "device is 'tpu'; expected cpu, cuda or cuda:N"),
        (["--policy", "no/such/policy/here"], "no policy at no/such/policy/here"),
        (["--model", "no/such/model/here"], "model 'no/such/model/here' cannot be loaded"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], words: str) -> None:
    result = CliRunner().invoke(app, ["bench", *TOY, *arguments])
    assert isinstance(result.exception, InvalidInputError)
    assert str(result.exception).startswith(words)
    assert "\n" not in str(result.exception)


def test_a_model_of_another_width_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"hidden states of .* wide; expected d_model = 48, pass --d-model"):
        run_bench(BenchOptions(d_model=48, d_sae=256, model=str(folder / "model")))


def test_an_sae_that_edits_nothing_is_refused() -> None:
    sae: SaeWeights = Case(SHAPE, "auto").sae
    nothing = replace(sae, decoder_rows=torch.full((sae.d_sae,), -1, dtype=torch.int32))
    with pytest.raises(InvalidInputError, match="one of 0 latents with a decoder row"):
        Case.from_sae(nothing, 1, 0.2, "auto")


@pytest.mark.parametrize(("products", "dtypes"), [(1, ["bfloat16", "float32"]), (10**9, ["float32"])], ids=str)
def test_a_call_of_16_bits_that_takes_too_long_is_left_out(products: int, dtypes: list[str]) -> None:
    case = Case(SHAPE, "auto")
    found, left_out = eager_dtypes(case.sae, products, seconds_a_call=1)
    assert [str(dtype).removeprefix("torch.") for dtype in found] == dtypes
    assert left_out.startswith("plain torch in bfloat16, about ") == ("bfloat16" not in dtypes)
    row = Row("row", "group", (), left_out=left_out)
    assert Row.from_json(row.as_json()) == row
    [table] = group_tables([row])
    assert ("Left out" in table.note) == bool(left_out)
