"""What a setting does to the answers to some prompts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from dspa.util.estimate import Estimate
from dspa.util.files import write_atomically
from study import capability, fluency
from study.fits import Material
from study.generation import Answer, answers
from study.methods import Try
from study.prompts import Prompt
from study.rewards import reward


@dataclass(frozen=True)
class Answered:
    """An answer and what was found of it.

    Attributes:
        prompt_id, kind: of the prompt.
        text, tokens, ended: the answer; it was cut off where it has not ended.
        reward: by the task's rule.
        repetition: share of its runs of four tokens that occurred before.
        malformed: see `fluency.is_malformed`.
        loss: mean cross-entropy under the unsteered model, nats per token; None where it was not measured.
    """

    prompt_id: str
    kind: str
    text: str
    tokens: int
    ended: bool
    reward: float
    repetition: float
    malformed: bool
    loss: float | None


@dataclass(frozen=True)
class Measurement:
    """What was measured of one setting.

    Attributes:
        method, setting: their names.
        fits: what it was made from.
        answers: one for each prompt, in the order of the prompts.
        questions: of each question, whether the answer was right.
        answers_to_questions: as they were given.
    """

    method: str
    setting: str
    fits: tuple[str, ...]
    answers: tuple[Answered, ...]
    questions: tuple[bool, ...] = ()
    answers_to_questions: tuple[str, ...] = ()

    @property
    def rewards(self) -> NDArray[np.float64]:
        return np.array([each.reward for each in self.answers])

    @property
    def losses(self) -> NDArray[np.float64]:
        """Of the answers that were scored."""
        return np.array([each.loss for each in self.answers if each.loss is not None])

    def first(self, count: int) -> Measurement:
        """On the first prompts alone."""
        return replace(self, answers=self.answers[:count])

    def differences(self, other: Measurement) -> NDArray[np.float64]:
        """Of rewards, on the prompts of both, which are the first of each."""
        count = min(len(self.answers), len(other.answers))
        return self.first(count).rewards - other.first(count).rewards

    def loss_differences(self, other: Measurement) -> NDArray[np.float64]:
        """Of losses, on the first answers, which were scored of both."""
        count = min(len(self.losses), len(other.losses))
        return self.losses[:count] - other.losses[:count]

    def broken(self, largest_loss: float = np.inf) -> float:
        """The share of answers that are malformed, repeat themselves, or are less likely than a bound allows."""
        return float(
            np.mean(
                [
                    each.malformed
                    or each.repetition > fluency.MOST_REPEATED
                    or (each.loss is not None and each.loss > largest_loss)
                    for each in self.answers
                ]
            )
        )

    def perplexity(self) -> Estimate:
        """Of the answers under the unsteered model; the interval by the delta method."""
        loss = Estimate.from_samples(self.losses)
        return Estimate(float(np.exp(loss.mean)), float(np.exp(loss.mean)) * loss.half_width)

    def save(self, file: Path) -> None:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(asdict(self), indent=1).encode())

    @classmethod
    def read(cls, file: Path) -> Measurement:
        record = json.loads(file.read_text())
        record["answers"] = tuple(Answered(**each) for each in record["answers"])
        fields: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in record.items()}
        return cls(**fields)


def clustered(samples: NDArray[np.float64], groups: Sequence[str]) -> Estimate:
    """The mean, with an interval for other groups: samples of one group, such as prompts of one template, are not
    independent. It is that of the sums of deviations by group, by Student's distribution; NaN for a single group.

    Args:
        samples: `[N]`.
        groups: of the samples; more than N are cut off.
    """
    names, place = np.unique(np.array(groups[: len(samples)]), return_inverse=True)
    sums = np.bincount(place, weights=samples - samples.mean())
    if len(names) < 2:
        return Estimate(float(samples.mean()), float("nan"))
    variance = len(names) / (len(names) - 1) * float((sums**2).sum()) / len(samples) ** 2
    return Estimate(float(samples.mean()), float(student.ppf(0.975, len(names) - 1)) * variance**0.5)


def measure(
    material: Material,
    method: str,
    attempt: Try,
    prompts: Sequence[Prompt],
    *,
    seed: int,
    scored: int = 0,
    questions: int = 0,
) -> Measurement:
    """Sampled answers to prompts, with the same noise under every setting.

    Args:
        material: the model and what it is steered with.
        method: the name.
        attempt: the setting.
        prompts: what is answered.
        seed: of the noise.
        scored: of the first so many answers, the unsteered model's loss is measured.
        questions: how many questions of capability are asked, greedily.
    """
    settings = material.run.settings
    shared: dict[str, Any] = {"policy": attempt.policy, "seed": seed, "batch": settings.answers_per_batch}
    label = f"{method}: {attempt.setting}"[:60]
    asked = capability.questions(questions, settings.seed)
    with attempt.applied(material) as model:
        found = answers(
            model,
            material.tokenizer,
            [attempt.chat(prompt.text) for prompt in prompts],
            max_new_tokens=settings.max_new_tokens,
            progress=label,
            **shared,
        )
        replies: list[Answer] = []
        if asked:
            replies = answers(
                model,
                material.tokenizer,
                [attempt.chat(question.text) for question in asked],
                max_new_tokens=min(capability.MAX_NEW_TOKENS, settings.max_new_tokens),
                sample=False,
                progress="Questions",
                **shared,
            )
    losses = fluency.losses(
        material.model,
        material.tokenizer,
        [prompt.text for prompt in prompts[:scored]],
        [answer.ids for answer in found[:scored]],
    )
    return Measurement(
        method,
        attempt.setting,
        attempt.fits,
        tuple(
            Answered(
                prompt.id,
                prompt.kind,
                answer.text,
                answer.tokens,
                answer.ended,
                reward(material.task, prompt, answer.text, answer.tokens, answer.ended),
                fluency.repetition(answer.ids),
                fluency.is_malformed(answer.text, answer.ended),
                losses[place] if place < scored else None,
            )
            for place, (prompt, answer) in enumerate(zip(prompts, found, strict=True))
        ),
        tuple(question.is_answered_by(reply.text) for question, reply in zip(asked, replies, strict=True)),
        tuple(reply.text for reply in replies),
    )
