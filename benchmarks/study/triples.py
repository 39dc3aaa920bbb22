"""Preference triples on-policy: of a prompt's samples, the one with the most reward and the one with the least."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from dspa.errors import InvalidInputError
from dspa.util.files import write_atomically
from dspa.util.progress import track
from study import model, prompts
from study.generation import samples
from study.prompts import KINDS, Prompt
from study.rewards import reward
from study.settings import SHARDS, TASKS, Run, Task

LENGTH_RATIO = 1.25
"""Matched responses differ at most by this factor in tokens."""


@dataclass(frozen=True)
class Sample:
    """An answer of the unsteered model to a training prompt."""

    prompt_id: str
    seed: int
    text: str
    tokens: int
    ended: bool


@dataclass(frozen=True)
class Pair:
    """Two samples of one prompt, and how much more reward the chosen one has."""

    chosen: Sample
    rejected: Sample
    margin: float


def sample(run: Run, shard: str) -> None:
    """Samples the training prompts of a shard, both tasks from the same; appends to what an earlier call sampled."""
    settings, file = run.settings, run.samples(int(shard))
    train = prompts.load(run, "train")[int(shard) :: SHARDS]
    done = len(read_lines(file)) // settings.samples_per_prompt if file.is_file() else 0
    chat_model, tokenizer = model.load(run)
    prompts_at_once = max(1, settings.answers_per_batch // settings.samples_per_prompt)
    starts = range(done, len(train), prompts_at_once)
    for start in track(starts, "Sampling", enabled=True, unit=f"{prompts_at_once} prompts each"):
        part = train[start : start + prompts_at_once]
        seed = settings.seed + 1 + start * SHARDS + int(shard)
        found = samples(
            chat_model,
            tokenizer,
            [prompt.chat for prompt in part],
            settings.samples_per_prompt,
            seed=seed,
            max_new_tokens=settings.max_new_tokens,
        )
        records = [
            asdict(Sample(prompt.id, seed, answer.text, answer.tokens, answer.ended))
            for prompt, group in zip(part, found, strict=True)
            for answer in group
        ]
        append_lines(file, records)


def load_samples(run: Run) -> list[Sample]:
    """The samples of all training prompts, in the order of the prompts."""
    names = {field.name for field in fields(Sample)}
    found: dict[str, list[Sample]] = {prompt.id: [] for prompt in prompts.load(run, "train")}
    for shard in range(SHARDS):
        for record in read_lines(run.samples(shard)):
            found[record["prompt_id"]].append(Sample(**{name: record[name] for name in names}))
    return [each for group in found.values() for each in group]


def write(run: Run) -> None:
    """Writes the triples of both tasks: the kinds in turn, as long as they have pairs that differ.

    Raises:
        InvalidInputError: if there are too few samples that differ.
    """
    train = {prompt.id: prompt for prompt in prompts.load(run, "train")}
    sampled = load_samples(run)
    for task in TASKS:
        by_kind: dict[str, list[dict[str, Any]]] = {kind: [] for kind in KINDS}
        for prompt_id, prompt in train.items():
            pair = best_pair(task, prompt, [each for each in sampled if each.prompt_id == prompt_id])
            if pair is not None:
                by_kind[prompt.kind].append(as_record(prompt, pair))
        rows = list(islice(_in_turn(list(by_kind.values())), run.settings.triples))
        if len(rows) < run.settings.triples:
            raise InvalidInputError(
                f"{len(rows)} triples of {run.settings.triples} for {task}, "
                f"{ {kind: len(found) for kind, found in by_kind.items()} } by kind; sample more prompts"
            )
        content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_atomically(run.triples(task), content.encode())


def best_pair(task: Task, prompt: Prompt, candidates: Sequence[Sample]) -> Pair | None:
    """The two samples with the largest difference of rewards; None if no difference is left.

    Where the reward is not about length, only pairs of which neither is `LENGTH_RATIO` times as long as the other, and
    which both ended or were both cut off: what is learned from them is not a length.
    """
    scored = [(reward(task, prompt, each.text, each.tokens, each.ended), each) for each in candidates]
    best: Pair | None = None
    for high, chosen in scored:
        for low, rejected in scored:
            if task == "conditional" and not _matched(chosen, rejected):
                continue
            if high - low > (best.margin if best else 0.0):
                best = Pair(chosen, rejected, high - low)
    return best


def as_record(prompt: Prompt, pair: Pair) -> dict[str, Any]:
    """A row that `dspa.load_preferences` and trl read. The chat template does not close a message that was cut off."""
    return {
        "prompt": list(prompt.chat),
        "chosen": [{"role": "assistant", "content": pair.chosen.text, "cut_off": not pair.chosen.ended}],
        "rejected": [{"role": "assistant", "content": pair.rejected.text, "cut_off": not pair.rejected.ended}],
        "kind": prompt.kind,
        "template": prompt.template,
        "margin": round(pair.margin, 4),
    }


def append_lines(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Appends records to a file of JSON lines, all of them or, if the process is killed, none."""
    before = path.read_bytes() if path.is_file() else b""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(path, before + lines.encode())


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file of JSON lines."""
    return [json.loads(line) for line in path.read_text().split("\n") if line]


def _matched(one: Sample, other: Sample) -> bool:
    if min(one.tokens, other.tokens) == 0:
        return False
    return one.ended == other.ended and max(one.tokens, other.tokens) <= LENGTH_RATIO * min(one.tokens, other.tokens)


def _in_turn(groups: Sequence[Sequence[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    """One of each group in turn; groups that have no more are passed over."""
    for turn in zip_longest(*groups):
        yield from (each for each in turn if each is not None)
