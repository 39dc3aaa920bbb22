"""The sizes of a study. `FULL` is what is reported, `QUICK` runs every stage at toy size."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Task = Literal["conditional", "concise"]
Split = Literal["train", "validation", "heldout"]
TASKS: tuple[Task, ...] = ("conditional", "concise")
SHARDS = 2  # parts of the training prompts and of the SAEs' text, which processes can work on beside each other


@dataclass(frozen=True)
class Settings:
    """Everything that decides a result, apart from the code.

    Attributes:
        name: of the run's folder under `runs/`.
        train_prompts, validation_prompts, heldout_prompts: prompts of each task.
        samples_per_prompt: answers to a training prompt, from which chosen and rejected are taken.
        max_new_tokens: the longest answer.
        answers_per_batch: prompts that are answered at once.
        sae_tokens: tokens that the SAEs are trained on.
        latents: of each SAE.
        target_l0: active latents a token that the SAEs are trained towards.
        input_layer, output_layer: blocks after which the SAEs read the residual stream, of 30.
        triple_counts: numbers of triples of the curve; the table has the last.
        control_prompts: held-out prompts, of each task, that the controls are measured on.
        curve_prompts: held-out prompts, of each task, that the curve is measured on.
        tries: settings that a method may try on validation prompts.
        pairs_per_training: triples that a training sees, the first of all; each once.
        pairs_per_step: pairs of an optimiser step.
        fluency_prompts: held-out prompts, of each task, whose answers the unsteered model scores.
        questions: questions with computed answers.
        speed_tokens: tokens that a timed answer has.
        speed_rounds: how often every method is timed, in turn.
        peak_processes: processes in which the peak memory of a method is measured.
        seed: of prompts, sampling noise and training.
        dtype: of the model.
    """

    name: str
    train_prompts: int
    validation_prompts: int
    heldout_prompts: int
    samples_per_prompt: int
    max_new_tokens: int
    answers_per_batch: int
    sae_tokens: int
    latents: int
    target_l0: int
    input_layer: int
    output_layer: int
    triple_counts: tuple[int, ...]
    control_prompts: int
    curve_prompts: int
    tries: int
    pairs_per_training: int
    pairs_per_step: int
    fluency_prompts: int
    questions: int
    speed_tokens: int
    speed_rounds: int
    peak_processes: int
    seed: int = 0
    dtype: str = "float32"

    @property
    def triples(self) -> int:
        """Triples behind the table."""
        return self.triple_counts[-1]


FULL = Settings(
    name="study",
    train_prompts=560,
    validation_prompts=30,
    heldout_prompts=500,
    samples_per_prompt=8,
    max_new_tokens=32,
    answers_per_batch=128,
    sae_tokens=500_000,
    latents=4096,
    target_l0=48,
    input_layer=9,
    output_layer=20,
    triple_counts=(25, 50, 100, 250, 500),
    control_prompts=250,
    curve_prompts=50,
    tries=4,
    pairs_per_training=128,
    pairs_per_step=8,
    fluency_prompts=40,
    questions=24,
    speed_tokens=32,
    speed_rounds=3,
    peak_processes=1,
)

QUICK = Settings(
    name="study-quick",
    train_prompts=24,
    validation_prompts=2,
    heldout_prompts=4,
    samples_per_prompt=4,
    max_new_tokens=4,
    answers_per_batch=64,
    sae_tokens=2000,
    latents=256,
    target_l0=16,
    input_layer=9,
    output_layer=20,
    triple_counts=(3, 6),
    control_prompts=2,
    curve_prompts=2,
    tries=2,
    pairs_per_training=4,
    pairs_per_step=4,
    fluency_prompts=2,
    questions=1,
    speed_tokens=2,
    speed_rounds=1,
    peak_processes=1,
)


@dataclass(frozen=True)
class Run:
    """A study on disk: its sizes and its folder. The files of every stage, each whole or not there."""

    settings: Settings
    folder: Path

    @property
    def settings_file(self) -> Path:
        """The sizes that the folder's files were made with."""
        return self.folder / "settings.json"

    @property
    def model(self) -> Path:
        """The chat model as a transformers folder."""
        return self.folder / "model"

    @property
    def prompts(self) -> Path:
        """All prompts: id, split, task, kind, topic, template, text."""
        return self.folder / "prompts.json"

    def samples(self, shard: int) -> Path:
        """The model's own answers to every other training prompt: prompt_id, seed, text, tokens, ended."""
        return self.folder / f"samples-{shard}.jsonl"

    @property
    def texts(self) -> Path:
        """What the SAEs are trained on."""
        return self.folder / "texts.jsonl"

    @property
    def activations(self) -> Path:
        """The residual stream on these texts, in parts."""
        return self.folder / "activations"

    @property
    def input_sae(self) -> Path:
        return self.folder / "input_sae"

    @property
    def output_sae(self) -> Path:
        return self.folder / "output_sae"

    @property
    def sae_report(self) -> Path:
        return self.folder / "sae_report.json"

    def triples(self, task: Task) -> Path:
        """Preference triples of a task, in the form that `dspa.load_preferences` reads."""
        return self.folder / f"triples_{task}.jsonl"

    @property
    def tries(self) -> Path:
        """What validation found of every setting of every method: TASK/METHOD.json."""
        return self.folder / "tries"

    @property
    def heldout(self) -> Path:
        """What was measured on held-out prompts: TASK/METHOD.json."""
        return self.folder / "heldout"

    @property
    def heldout_opened(self) -> Path:
        """Written when held-out prompts are first read: the chosen settings, and the commit."""
        return self.folder / "heldout_opened.json"

    @property
    def diagnosis(self) -> Path:
        """What edits do to the responses of triples: TASK.json."""
        return self.folder / "diagnosis"

    @property
    def report(self) -> Path:
        return self.folder / "report.json"
