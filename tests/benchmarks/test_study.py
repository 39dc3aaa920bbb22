"""The study's parts by hand, and all of its stages after the SAEs on the organism, which answers in no time."""

from __future__ import annotations

import ast
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from study import capability, fluency, prompts, stages
from study.choice import chosen
from study.diagnosis import STRONGER
from study.evaluation import Answered, Measurement, clustered
from study.heldout import measurements, open_heldout
from study.methods import CONTROLS, DSPA, METHODS, UNSTEERED, file_name
from study.prompts import load, write
from study.settings import FULL, QUICK, TASKS, Run, Settings
from study.stages import STAGES, Stage, run_stages

import dspa
from dspa.offline.density_store import DensityStore
from dspa.organism import DATA, INPUT_LAYER, OUTPUT_LAYER

STUDY = Path(capability.__file__).parent


@pytest.mark.parametrize(
    ("text", "answer", "reply", "right"),
    [
        ("What is 2 + 3?", "5", "2 + 3 = 5", True),
        ("What is 2 + 3?", "5", "The sum is 6. No, 5.", False),
        ("What is 2 + 3?", "5", "I do not know.", False),
        ("Which day comes after Monday?", "Tuesday", "The day after Monday is Tuesday.", True),
        ("Which day comes after Monday?", "Tuesday", "Wednesday", False),
        ("How many days does April have?", "30", "April has 30 days.", True),
    ],
)
def test_a_question_is_answered_by_the_first_new_thing_of_its_sort(
    text: str, answer: str, reply: str, right: bool
) -> None:
    assert capability.Question(text, answer).is_answered_by(reply) is right


def test_computed_answers_are_right_and_not_in_the_question() -> None:
    questions = capability.questions(120, seed=1)
    assert questions == capability.questions(120, seed=1)
    for question in questions:
        assert question.is_answered_by(f"{question.text} {question.answer}.")
        if "+" in question.text or " - " in question.text:
            assert eval(question.text.removeprefix("What is ").removesuffix("?")) == int(question.answer)


@pytest.mark.parametrize(
    ("ids", "share"), [((1, 2, 3), 0), ((1, 2, 3, 4, 5), 0), ((1, 1, 1, 1, 1), 0.5), ((1, 2, 1, 2, 1, 2, 1), 0.5)]
)
def test_repetition_is_the_share_of_runs_that_occurred_before(ids: tuple[int, ...], share: float) -> None:
    assert fluency.repetition(ids) == share


@pytest.mark.parametrize(
    ("text", "ended", "malformed"),
    [
        ("Rome.", True, False),
        ("Rome", True, False),
        ("It is,", True, True),
        ("It is,", False, False),
        (" ", True, True),
    ],
)
def test_an_answer_is_malformed_where_it_ends_in_the_middle(text: str, ended: bool, malformed: bool) -> None:
    assert fluency.is_malformed(text, ended) is malformed


def answered(reward: float, *, repetition: float = 0, malformed: bool = False, loss: float | None = 1) -> Answered:
    return Answered("id", "fact", "text", 4, True, reward, repetition, malformed, loss)


def test_gains_are_paired_and_broken_answers_counted_once(tmp_path: Path) -> None:
    unsteered = Measurement("unsteered", "-", (), (answered(0), answered(1), answered(2)))
    rows = (answered(1, repetition=0.5, malformed=True), answered(2, loss=3), answered(3, loss=None))
    found = Measurement("DSPA", "setting", ("densities",), rows, (True, False), ("5", "6"))
    assert found.differences(unsteered).tolist() == [1] * 3
    assert (found.broken(), found.broken(2.0)) == (1 / 3, 2 / 3)
    assert found.losses.tolist() == [1, 3]
    found.save(tmp_path / "folder" / "found.json")
    assert Measurement.read(tmp_path / "folder" / "found.json") == found


def test_held_out_prompts_are_read_in_one_place() -> None:
    def names_it(file: Path) -> bool:
        """In a call, by whatever name and as whatever argument."""
        return any(
            isinstance(part, ast.Constant) and part.value == "heldout"
            for node in ast.walk(ast.parse(file.read_text()))
            if isinstance(node, ast.Call)
            for part in [*node.args, *(keyword.value for keyword in node.keywords)]
        )

    assert [file.name for file in STUDY.glob("*.py") if names_it(file)] == ["heldout.py"]


def test_an_interval_is_that_of_other_groups() -> None:
    samples, alike = np.array([1.0, 1.0, 3.0, 3.0]), ["a", "a", "b", "b"]
    found = clustered(samples, [*alike, "cut off"])
    assert found.mean == 2
    assert found.half_width == pytest.approx(12.706, rel=1e-4)  # Student's with one degree of freedom, times 1
    apart = clustered(samples, ["a", "b", "c", "d"])
    assert apart.half_width == pytest.approx(3.182446 * samples.std(ddof=1) / 2, rel=1e-6)
    assert np.isnan(clustered(samples, ["a"] * 4).half_width)


def test_held_out_prompts_are_not_read_with_other_settings(tmp_path: Path) -> None:
    run = Run(QUICK, tmp_path)
    write(run)
    record = {"index": 0, "setting": "first", "notes": []}
    for task in TASKS:
        (run.tries / task).mkdir(parents=True)
        for method in METHODS:
            (run.tries / task / file_name(method)).write_text(json.dumps(record))
    assert open_heldout(run) == load(run, "heldout") == open_heldout(run)
    (run.tries / "concise" / file_name("DSPA")).write_text(json.dumps({**record, "setting": "second"}))
    with pytest.raises(SystemExit, match="used once"):
        open_heldout(run)
    with pytest.raises(SystemExit, match="used once"):
        open_heldout(Run(replace(QUICK, seed=1), tmp_path))


def test_a_folder_with_other_settings_is_refused(tmp_path: Path) -> None:
    run = Run(QUICK, tmp_path)
    run_stages(run, ["prompts"])
    assert len(load(run, "train")) == QUICK.train_prompts
    with pytest.raises(SystemExit, match=r"other settings \(seed, tries\); choose another folder by --runs"):
        run_stages(Run(replace(QUICK, seed=1, tries=3), tmp_path), ["prompts"])


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("settings", "jobs", "beside"), [(QUICK, 2, True), (QUICK, 1, False), (FULL, 2, False)])
@pytest.mark.usefixtures("two_threads")
def test_stages_of_one_group_run_beside_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings, jobs: int, beside: bool
) -> None:
    group = tuple(Stage(name, "prompts:write", 1, group="all", alone=True) for name in ("one", "two"))
    monkeypatch.setattr(stages, "STAGES", group)
    monkeypatch.setattr(stages, "IMPORTED", ("torch",))
    run = Run(replace(settings, train_prompts=2, validation_prompts=2, heldout_prompts=2), tmp_path)
    run_stages(run, jobs=jobs)
    for stage in group:
        assert json.loads(stage.record(run).read_text())["threads"] == (1 if beside else 2)


@pytest.mark.usefixtures("two_threads")
def test_stages_without_a_group_run_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alone = tuple(Stage(name, "prompts:write", 1) for name in ("one", "two"))
    monkeypatch.setattr(stages, "STAGES", alone)
    run = Run(QUICK, tmp_path)
    run_stages(run, jobs=2)
    assert [json.loads(stage.record(run).read_text())["threads"] for stage in alone] == [2, 2]


def test_a_stage_that_fails_stops_the_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    works, fails = Stage("works", "prompts:write", 1, group="both"), Stage("fails", "report:write", 1, group="both")
    later = Stage("later", "prompts:write", 1)
    monkeypatch.setattr(stages, "STAGES", (works, fails, later))
    monkeypatch.setattr(stages, "IMPORTED", ("torch",))
    run = Run(QUICK, tmp_path)
    with pytest.raises(SystemExit, match=r"^stage fails failed; what is done is kept"):
        run_stages(run, jobs=2)
    assert [stage.record(run).is_file() for stage in (works, fails, later)] == [True, False, False]


def test_a_stage_took_what_its_interrupted_passes_took_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, run = Stage("prompts", "prompts:write", 1), Run(QUICK, tmp_path)
    monkeypatch.setattr(stages, "STAGES", (stage,))

    def interrupted(_run: Run) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(prompts, "write", interrupted)
        for passes in (1, 2):
            with pytest.raises(KeyboardInterrupt):
                run_stages(run)
            assert json.loads(stage.interrupted(run).read_text())["passes"] == passes
    assert not stage.record(run).is_file()
    stage.interrupted(run).write_text(json.dumps({"passes": 2, "seconds": 1000.0, "processor_seconds": 900.0}))
    run_stages(run)
    found = json.loads(stage.record(run).read_text())
    assert found["passes"] == 3
    assert 1000 < found["seconds"] < 1500
    assert 900 < found["processor_seconds"] < 1500


@pytest.mark.long
def test_all_stages_after_the_saes(tmp_path: Path) -> None:
    settings = replace(QUICK, input_layer=INPUT_LAYER, output_layer=OUTPUT_LAYER, latents=512)
    run = Run(settings, tmp_path)
    for link, target in ((run.input_sae, "input_sae"), (run.output_sae, "output_sae")):
        link.symlink_to(DATA / target)
    shutil.copytree(DATA / "model", run.model)
    template = run.model / "chat_template.jinja"
    template.write_text(template.read_text().replace("('user', ", "('system', 'user', "))
    write(run)
    run.sae_report.write_text(json.dumps({"input_sae": {"l0": 16.0}, "output_sae": {"l0": 17.0}, "why": "shipped"}))
    rows = [json.loads(line) for line in (DATA / "triples.jsonl").read_text().splitlines()[: settings.triples]]
    for task in TASKS:
        templates = ("one", "one", "two", "two", "three", "three")
        lines = [json.dumps({**row, "template": template}) for row, template in zip(rows, templates, strict=True)]
        run.triples(task).write_text("\n".join(lines) + "\n")
    names = [stage.name for stage in STAGES]
    later = names[names.index("fit-conditional") :]
    run_stages(run, later)
    report = json.loads(run.report.read_text())
    for task in TASKS:
        rows = report["tasks"][task]["rows"]
        assert list(rows) == [*METHODS, *CONTROLS]
        assert rows[UNSTEERED]["gain"] == [0, 0]
        for name, row in rows.items():
            assert row["prompts"] == (settings.control_prompts if name in CONTROLS else settings.heldout_prompts)
        assert all(len(chosen(run, task, method).notes) <= settings.tries for method in METHODS)
        assert [point["triples"] for point in report["tasks"][task]["curve"]["DSPA"]] == list(settings.triple_counts)
        found = measurements(run, task)["DSPA"]
        assert np.isclose(rows["DSPA"]["reward"][0], found.rewards.mean())
        found = report["tasks"][task]["diagnosis"]
        setting = DSPA[chosen(run, task, "DSPA").index]
        expected = dspa.cross_validated_agreement(
            DensityStore.open(run.folder / "fits" / task / "densities"),
            per_edit=True,
            edit=setting.edit,
            gate_rule=setting.gate_rule,
        )
        assert found["agreement"]["DSPA"]["own list"] == [expected.mean, expected.half_width]
        assert set(found["agreement"]["DSPA, other templates"]) >= {"own list", "static list"}
        assert {"FSRL", "DPO, LoRA", "DSPA, ridge", *STRONGER} < set(found["effect"])
        assert found["effect"]["CAA"]["size"] > 0
    assert set(report["costs"]["align_flops"]) == {"densities", "means", "fsrl", "dpo", "simpo"}
    assert all(value > 0 for value in report["costs"]["align_flops"].values())
    tables = (tmp_path / "tables.md").read_text()
    assert all(f"| {method} |" in tables for method in METHODS)
    for name in ("gains", "curve", "fluency"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    done = run.report.stat().st_mtime_ns
    run_stages(run, later)
    assert run.report.stat().st_mtime_ns == done
