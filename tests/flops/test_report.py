"""`dspa flops`: what it prints and writes, the same bytes every time, and what it refuses."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

import dspa.flops.measure as measuring
from dspa.cli import app, flops
from dspa.errors import InvalidInputError
from dspa.flops.command import run_flops
from dspa.flops.counter import load_config
from dspa.flops.page import to_html
from dspa.flops.quantities import Machine, MeasuredStep
from dspa.flops.report import FlopsReport
from dspa.flops.tables import to_markdown
from dspa.util.provenance import Provenance

CONFIG = Qwen3Config(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=4,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=64,
)
SMALL = ["--prompt-tokens", "12", "--chosen-tokens", "8", "--rejected-tokens", "6", "--context", "24"]
SMALL += ["--rahf-tokens", "8", "--rahf-step2-tokens", "6", "--fsrl-d-sae", "64", "--d-sae-in", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with weights."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("model") / "small"
    Qwen3ForCausalLM(CONFIG).save_pretrained(path)
    return path


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["flops", *map(str, arguments)], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def small(folder: Path, *arguments: object) -> str:
    return invoke("--model", folder, "--input-layer", 1, "--output-layer", 2, *SMALL, *arguments)


def options(folder: Path, **changes: Any) -> dict[str, Any]:
    """The options of the command with their defaults, as its function gets them."""
    defaults = {name: parameter.default for name, parameter in inspect.signature(flops).parameters.items()}
    return {**defaults, "model": [str(folder)], "input_layer": 1, "output_layer": 2, "count": False, **changes}


class Page(HTMLParser):
    """Collects what a page refers to and which elements it leaves open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.long
def test_the_same_inputs_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    outputs = []
    for run in ("a", "b"):
        paths = [tmp_path / f"{run}.{kind}" for kind in ("md", "html", "png")]
        text = small(folder, "--json", "--markdown", paths[0], "--html", paths[1], "--png", paths[2])
        outputs.append((text, *[path.read_bytes() for path in paths]))
    assert outputs[0] == outputs[1]
    assert outputs[0][3].startswith(b"\x89PNG")


@pytest.mark.long
def test_json_holds_everything_that_was_computed(folder: Path) -> None:
    record = json.loads(small(folder, "--json"))
    assert f"{record['published']['dspa']:.2e}" != "8.00e+13"  # by these lengths
    assert record["options"]["alignment"]["prompt_tokens"] == 12
    assert record["models"][0]["shape"]["layers" if "layers" in record["models"][0]["shape"] else "name"] == "small"
    assert {m["method"] for m in record["models"][0]["counted"]} == {
        m["method"] for m in record["models"][0]["methods"]
    }
    assert set(record["provenance"]) == {"dspa", "commit", "python", "torch", "transformers"}
    assert record["machine"] is None


def test_published_figures_are_printed() -> None:
    text = invoke("--no-count", "--model", "gemma-2-2b")
    for figure in ("8.00e+13", "2.95e+14", "6.29e+13", "3.58e+14", "4.47"):
        assert figure in text


@pytest.mark.long
def test_the_page_is_whole_and_needs_nothing_else(folder: Path) -> None:
    report = run_flops(options(folder), progress=False)
    text = to_html(report)
    page = Page(text)
    assert page.open == []
    assert all(reference.startswith("#") for reference in page.references)
    assert "@import" not in text
    assert "url(http" not in text
    assert page.tags.count("svg") == 4
    assert page.tags.count("table") == 6
    assert "script" not in page.tags


@pytest.mark.long
def test_text_from_a_configuration_is_escaped(folder: Path) -> None:
    report = run_flops(options(folder), progress=False)
    shape = replace(report.models[0].shape, name="<script>[red]")
    report = replace(report, models=(replace(report.models[0], shape=shape),))
    assert "<script>" not in to_html(report)


def test_markdown_tables_are_rectangular(folder: Path) -> None:
    lines = to_markdown(run_flops(options(folder), progress=False)).splitlines()
    tables: list[list[int]] = [[]]
    for line in lines:
        if line.startswith("|"):
            tables[-1].append(line.count("|"))
        elif tables[-1]:
            tables.append([])
    assert all(len(set(table)) <= 1 for table in tables)
    assert len([table for table in tables if table]) == 6


@pytest.mark.long
def test_measured_counts_stand_beside_the_formulas(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "BANDWIDTH_BYTES", 2**16)
    monkeypatch.setattr(measuring, "MATRIX_SIZE", 16)
    monkeypatch.setattr(measuring.measure_machine, "__defaults__", ("cpu", (64, 128)))
    report = run_flops(
        options(folder, measure=True, prompt_tokens=12, chosen_tokens=8, rejected_tokens=6), progress=False
    )
    assert len(report.measured) == 5
    for row in report.measured:
        assert (row.counted.linear, row.counted.sae) == (row.modelled.linear, row.modelled.sae), row.what
        assert row.counted.total() == pytest.approx(row.modelled.total(), rel=0.02), row.what
    assert report.machine is not None
    assert [step.d_sae for step in report.machine.steps] == [64, 128]
    assert all(step.seconds > 0 for step in report.machine.steps)
    assert "roofline" in to_html(report)


@pytest.mark.long
def test_a_machine_of_an_earlier_report_is_drawn(folder: Path, tmp_path: Path) -> None:
    machine = Machine("a machine", 1e12, 1e11, (MeasuredStep(32, 4096, "dense", 1e-4),))
    report = replace(run_flops(options(folder), progress=False), machine=machine)
    (tmp_path / "earlier.json").write_text(report.to_json())
    again = run_flops(options(folder, machine=tmp_path / "earlier.json"), progress=False)
    assert again.machine == machine
    assert "a machine" in to_html(again)


@pytest.mark.parametrize("content", ["", "{}", '{"machine": null}', '{"machine": {"steps": [{}]}}'])
def test_a_file_without_a_machine_is_refused(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "report.json").write_text(content)
    with pytest.raises(InvalidInputError, match=r"^[^\n]+$"):
        run_flops(options(folder, machine=tmp_path / "report.json"), progress=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"pairs": "round"}, "pairs is 'round'; expected one of square, causal"),
        ({"triples": 0}, "triples is 0"),
        ({"input_layer": None}, "pass --input-layer and --output-layer"),
        ({"output_layer": 4}, "output layer is 4; small has layers 0 to 3"),
        ({"model": ["no/such/folder"]}, "no configuration at 'no/such/folder'"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_bad_options_are_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"^[^\n]*{words}[^\n]*$"):
        run_flops(options(folder, **changes), progress=False)


def test_reports_name_what_made_them(folder: Path) -> None:
    provenance = Provenance.here()
    assert provenance.torch == torch.__version__
    assert provenance.commit == "none" or len(provenance.commit.split()[0]) == 40
    report = FlopsReport.from_models(run_flops(options(folder), progress=False).options, ())
    assert provenance.commit in to_markdown(report)


@pytest.mark.parametrize("content", ["[" * 10**5, '{"machine": ' * 10**5, "[]", '"x"', "NaN", "1" * 5000])
def test_odd_json_is_one_line(folder: Path, tmp_path: Path, content: str) -> None:
    (tmp_path / "odd.json").write_text(content)
    for use in (
        lambda: run_flops(options(folder, machine=tmp_path / "odd.json"), progress=False),
        lambda: load_config(str(tmp_path / "odd.json")),
    ):
        with pytest.raises(InvalidInputError, match=r"^[^\n]+$"):
            use()
