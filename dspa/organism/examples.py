"""Responses to look at: sampled token by token, with the edited tokens marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from dspa.methods.steering_policy import SteeringPolicy
from dspa.online.steering import steer
from dspa.organism.evaluation import prompt_batch
from dspa.organism.language import MAX_RESPONSE_TOKENS, Prompt, parse, reward

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

EXAMPLES = 3


@dataclass(frozen=True)
class Example:
    """A response as pieces of text, each with whether the hidden state it was sampled from had been edited."""

    pieces: tuple[tuple[str, bool], ...]

    @property
    def text(self) -> str:
        return "".join(piece for piece, _ in self.pieces)


def sample_example(
    model: Gemma2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompt: Prompt,
    policy: SteeringPolicy | None,
    seed: int,
) -> Example:
    """One sampled response, watched token by token."""
    edited: list[int] = []
    batch = prompt_batch(tokenizer, [prompt])
    steering = None if policy is None else steer(model, policy)

    def watch(token_ids: Tensor, scores: Tensor) -> Tensor:
        edited.append(0 if steering is None else int(steering.counters(1).edited))
        return scores

    try:
        torch.manual_seed(seed)
        output = model.generate(  # type: ignore[attr-defined]
            **batch, do_sample=True, top_k=0, max_new_tokens=MAX_RESPONSE_TOKENS, logits_processor=[watch]
        )
    finally:
        if steering is not None:
            steering.remove()
    tokens = output[0, batch["input_ids"].shape[1] :]
    texts = ["", *(tokenizer.decode(tokens[: i + 1], skip_special_tokens=True) for i in range(len(tokens)))]
    marks = np.diff([0, *edited]) > 0
    return Example(tuple((texts[i + 1][len(texts[i]) :], bool(marks[i])) for i in range(len(tokens))))


def print_examples(
    console: Console,
    model: Gemma2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    policy: SteeringPolicy,
    prompts: Sequence[Prompt],
    seed: int,
) -> None:
    """Prints some prompts with an unsteered and a steered response side by side."""
    from rich.table import Table
    from rich.text import Text

    def shown(prompt: Prompt, example: Example) -> Text:
        text = Text()
        for piece, edited in example.pieces:
            starred = edited and not console.is_terminal and piece != ""  # the end of a response is not seen
            text.append(f"{piece}*" if starred else piece, "bold magenta" if edited else "")
        return text.append(f"\n[reward {reward(prompt.kind, parse(example.text).moves):+d}]", "dim")

    marked = "coloured" if console.is_terminal else "starred"
    table = Table(title=f"Published setting; edited tokens are {marked}", show_lines=True)
    for title in ("prompt", "unsteered", "steered"):
        table.add_column(title, ratio=1 if title == "prompt" else 2)
    kinds = list(dict.fromkeys(prompt.kind for prompt in prompts))[:EXAMPLES]
    for number, kind in enumerate(kinds):
        prompt = next(prompt for prompt in prompts if prompt.kind == kind)
        examples = [sample_example(model, tokenizer, prompt, chosen, seed + number) for chosen in (None, policy)]
        table.add_row(f"{prompt.text}\n[dim]({kind})", *(shown(prompt, example) for example in examples))
    console.print(table)
