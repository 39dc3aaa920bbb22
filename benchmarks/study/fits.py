"""What is computed from the triples of a task. Each result is kept on disk, beside the seconds that it took."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lora_baselines import LoraOptions, train_lora
from safetensors.torch import load_file, save_file

import dspa
from dspa.kernels import EditList
from dspa.methods.fsrl.training import TrainingOptions, train
from dspa.methods.mean_vectors import ResponseMeans, response_means
from dspa.transformers_model import ModelFingerprint
from dspa.util.files import write_atomically
from study.model import load
from study.settings import Run, Task

Chat = list[dict[str, str]]

LORA_LEARNING_RATE = 5e-4
PAIRS_AT_ONCE = 4


@dataclass(frozen=True)
class Record:
    """How a result came about.

    Attributes:
        seconds: that it took.
        parameters: that were trained.
        history: of a training.
    """

    seconds: float
    parameters: int = 0
    history: Sequence[dict[str, Any]] = ()


@dataclass(eq=False)
class Material:
    """The model, the SAEs and the triples of a task, and what was computed from them."""

    run: Run
    task: Task
    model: Any
    tokenizer: Any
    input_sae: dspa.SparseAutoencoder
    output_sae: dspa.SparseAutoencoder

    @classmethod
    def load(cls, run: Run, task: Task) -> Material:
        model, tokenizer = load(run)
        saes = [dspa.SparseAutoencoder.from_sae_lens(folder) for folder in (run.input_sae, run.output_sae)]
        return cls(run, task, model, tokenizer, saes[0], saes[1])

    @cached_property
    def _lines(self) -> list[dict[str, Any]]:
        lines = self.run.triples(self.task).read_text().splitlines()
        return [json.loads(line) for line in lines[: self.run.settings.triples]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The triples as messages, as many as the table is measured with."""
        return [{part: row[part] for part in ("prompt", "chosen", "rejected")} for row in self._lines]

    @property
    def kinds(self) -> list[str]:
        """The kind of prompt of each triple."""
        return [row["kind"] for row in self._lines]

    @property
    def templates(self) -> list[str]:
        """The template of each triple's prompt."""
        return [row["template"] for row in self._lines]

    @cached_property
    def triples(self) -> dspa.PreferenceTriples:
        return dspa.load_preferences(self.rows, self.tokenizer)

    @property
    def folder(self) -> Path:
        return self.run.folder / "fits" / self.task

    @cached_property
    def densities(self) -> dspa.DensityStore:
        folder = self.folder / "densities"

        def make() -> Record:
            started = time.perf_counter()
            settings = self.run.settings
            dspa.collect(
                self.model,
                self.tokenizer,
                self.triples,
                input_sae=self.input_sae,
                output_sae=self.output_sae,
                input_layer=settings.input_layer,
                output_layer=settings.output_layer,
                out=folder,
                progress=True,
            )
            return Record(time.perf_counter() - started)

        self._once("densities", make)
        return dspa.DensityStore.open(folder)

    @cached_property
    def means(self) -> ResponseMeans:
        """Mean states of the responses after the output layer."""
        file = self.folder / "means.safetensors"
        layer = self.run.settings.output_layer

        def make() -> Record:
            started = time.perf_counter()
            found = response_means(self.model, self.triples, layer, progress=True)
            save_file({"chosen": found.chosen, "rejected": found.rejected}, file)
            return Record(time.perf_counter() - started)

        self._once("means", make)
        sides = load_file(file)
        model = ModelFingerprint.from_model(self.model)
        return ResponseMeans(layer, sides["chosen"], sides["rejected"], None, None, model, None)

    @cached_property
    def fsrl(self) -> dspa.FsrlPolicy:
        """The adapter at all positions, as published."""

        def make() -> Record:
            started = time.perf_counter()
            result = train(
                self.model,
                self.triples[: self.run.settings.pairs_per_training],
                self.output_sae,
                self.run.settings.output_layer,
                fsrl_options(self.run),
                out=self.folder / "fsrl-checkpoints",
                progress=True,
            )
            result.policy.save_pretrained(self.folder / "fsrl")
            trained = sum(getattr(result.policy.adapter, part).numel() for part in ("weight", "bias", "threshold"))
            return Record(time.perf_counter() - started, trained, [asdict(step) for step in result.steps])

        self._once("fsrl", make)
        return dspa.FsrlPolicy.from_pretrained(self.folder / "fsrl")

    def lora(self, objective: str) -> Path:
        """The folder of the adapters."""

        def make() -> Record:
            started = time.perf_counter()
            options = lora_options(self.run, objective)
            rows = self.rows[: self.run.settings.pairs_per_training]
            with torch.enable_grad():
                training = train_lora(self.model, self.tokenizer, rows, options, self.folder / objective)
            return Record(time.perf_counter() - started, training.parameters, training.history)

        self._once(objective, make)
        return self.folder / objective

    def record(self, name: str) -> Record:
        return Record(**json.loads((self.folder / f"{name}.json").read_text()))

    @torch.no_grad()
    def edit_lists(self, policy: dspa.SteeringPolicy, chats: Sequence[Chat]) -> EditList:
        """What a policy selects for prompts, a list for each."""
        batch = self.tokenizer.apply_chat_template(
            list(chats), add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
        )
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        with dspa.steer(self.model, policy) as steering:
            with steering.scoring(prompt_tokens=inputs["attention_mask"].sum(dim=1)):
                self.model(**inputs, use_cache=False, logits_to_keep=1)
            assert steering.edits is not None
            return steering.edits.rows(torch.arange(len(chats)))

    def _once(self, name: str, make: Callable[[], Record]) -> None:
        file = self.folder / f"{name}.json"
        if not file.is_file():
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomically(file, json.dumps(asdict(make())).encode())


def fsrl_options(run: Run) -> TrainingOptions:
    """One pass over the triples that a training sees."""
    settings = run.settings
    return TrainingOptions(
        epochs=1,
        pairs_per_step=settings.pairs_per_step,
        pairs_at_once=PAIRS_AT_ONCE,
        learning_rate=1e-3,
        l1=0.01,
        edit_positions="all",
        seed=settings.seed,
        checkpoint_every=4,
    )


def lora_options(run: Run, objective: str) -> LoraOptions:
    settings = run.settings
    return LoraOptions(
        objective,
        LORA_LEARNING_RATE,
        steps=settings.pairs_per_training // settings.pairs_per_step,
        pairs_per_step=settings.pairs_per_step,
        pairs_at_once=PAIRS_AT_ONCE,
        seed=settings.seed,
        progress=True,
    )


def fit(run: Run, task: Task) -> None:
    """Everything but LoRA."""
    material = Material.load(run, task)
    assert material.densities
    assert material.means
    assert material.fsrl


def train_dpo(run: Run, task: Task) -> None:
    Material.load(run, task).lora("dpo")


def train_simpo(run: Run, task: Task) -> None:
    Material.load(run, task).lora("simpo")


def first_means(means: ResponseMeans, count: int) -> ResponseMeans:
    """Those of the first triples."""
    return replace(means, chosen=means.chosen[:count], rejected=means.rejected[:count])
