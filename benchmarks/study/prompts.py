"""The prompts of the study: topics put into templates, in six kinds, each split with its own of both."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import get_args

import numpy as np

from dspa.util.files import make_folder, write_atomically
from study.generation import Chat
from study.settings import Run, Settings, Split
from study.topics import MATERIAL

KINDS: tuple[str, ...] = tuple(MATERIAL)
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Prompt:
    """A user's message: `text` is the template with the topic filled in."""

    id: str
    split: Split
    kind: str
    topic: str
    template: str

    @property
    def text(self) -> str:
        return self.template.format(self.topic)

    @property
    def chat(self) -> Chat:
        return [{"role": "user", "content": self.text}]


def make_prompts(split: Split, count: int, seed: int) -> list[Prompt]:
    """`count` different prompts, the kinds in turn: the first n of them are balanced over kinds.

    Raises:
        ValueError: if there are not so many.
    """
    by_kind = [_of_kind(split, kind, seed) for kind in KINDS]
    available = min(map(len, by_kind)) * len(KINDS)
    if count > available:
        raise ValueError(f"{count} prompts are asked for; topics and templates of {split} make {available}")
    turns = (prompt for turn in zip(*by_kind, strict=False) for prompt in turn)
    return [prompt for prompt, _ in zip(turns, range(count), strict=False)]


def counts(settings: Settings) -> dict[Split, int]:
    """How many prompts each split has."""
    return {
        "train": settings.train_prompts,
        "validation": settings.validation_prompts,
        "heldout": settings.heldout_prompts,
    }


def write(run: Run) -> None:
    """Writes the prompts of all splits."""
    settings = run.settings
    prompts = [p for split, count in counts(settings).items() for p in make_prompts(split, count, settings.seed)]
    make_folder(run.folder)
    records = [{**asdict(prompt), "text": prompt.text} for prompt in prompts]
    write_atomically(run.prompts, (json.dumps(records, indent=1) + "\n").encode())


def load(run: Run, split: Split) -> list[Prompt]:
    """The prompts of a split, as they were written. Both tasks have the same."""
    records = json.loads(run.prompts.read_text())
    found = []
    for record in records:
        del record["text"]
        if record["split"] == split:
            found.append(Prompt(**record))
    return found


def _of_kind(split: Split, kind: str, seed: int) -> list[Prompt]:
    """All prompts of a kind, in random order."""
    material = MATERIAL[kind]
    pairs = [(topic, template) for topic in material.topics_of(split) for template in material.templates[split]]
    rng = np.random.default_rng([seed, SPLITS.index(split), KINDS.index(kind)])
    return [
        Prompt(f"{split}-{kind}-{number}", split, kind, *pairs[pair])
        for number, pair in enumerate(rng.permutation(len(pairs)))
    ]
