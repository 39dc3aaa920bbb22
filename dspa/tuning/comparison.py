"""`dspa compare`: what several policies answer to the same prompts, with the edits marked."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from dspa.errors import InvalidInputError
from dspa.methods.policy import Policy
from dspa.offline.chat_template import chat_prompt, plain_prompt
from dspa.online.steering import steer
from dspa.online.trace import SteeringTrace, TracedEdit
from dspa.transformers_model import device_of, is_steered
from dspa.util.progress import track
from dspa.util.report_parts import html_page
from dspa.util.scalars import check_integer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

UNSTEERED = "unsteered"
STYLE = """<style>
mark { background: #fde9c8; border-bottom: 2px solid #e07b39; color: inherit; }
.answers { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1rem; }
.answers div { border: 1px solid #d9dee5; border-radius: 4px; padding: .6rem .8rem; overflow-wrap: anywhere; }
.answers h3 { margin: 0 0 .3rem; } .answers p { white-space: pre-wrap; }
</style>"""


@dataclass(frozen=True)
class AnswerToken:
    """A token of an answer.

    Attributes:
        text: what it adds to the text; empty for tokens that are not shown.
        edits: what was edited in the hidden state it was chosen from, that of the token before it.
    """

    text: str
    edits: tuple[TracedEdit, ...]


@dataclass(frozen=True)
class Answer:
    """What one policy answers to one prompt.

    Attributes:
        policy: its name.
        tokens: the tokens that were generated.
    """

    policy: str
    tokens: tuple[AnswerToken, ...]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def edited(self) -> int:
        """How many tokens were chosen from an edited state."""
        return sum(bool(token.edits) for token in self.tokens)

    def runs(self) -> list[tuple[str, tuple[TracedEdit, ...], bool]]:
        """The text in pieces: tokens that follow one another and are all edited or all not, joined, with the edits of
        the first of them; and whether they are edited. A space before an edited piece is no part of it."""
        found: list[tuple[str, tuple[TracedEdit, ...], bool]] = []
        for token in self.tokens:
            space = token.text[: len(token.text) - len(token.text.lstrip())]
            edited = bool(token.edits) and bool(token.text.strip())
            if found and found[-1][2] == edited:
                found[-1] = (found[-1][0] + token.text, found[-1][1], edited)
                continue
            if space and edited:
                found.append((space, (), False))
            found.append((token.text[len(space) :] if edited else token.text, token.edits, edited))
        return [run for run in found if run[0]]


@dataclass(frozen=True)
class ComparedPrompt:
    """A prompt and what each policy answers."""

    prompt: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Comparison:
    """What `compare` returns: every prompt with its answers, in the order of the policies."""

    prompts: tuple[ComparedPrompt, ...]

    def to_json(self) -> str:
        records = [
            {
                "prompt": each.prompt,
                "answers": [
                    {"policy": answer.policy, "text": answer.text, "tokens": [asdict(token) for token in answer.tokens]}
                    for answer in each.answers
                ],
            }
            for each in self.prompts
        ]
        return json.dumps(records, indent=1) + "\n"

    def print(self, console: Console) -> None:
        """A table for each prompt. Edited tokens are underlined on a terminal, and in «marks» elsewhere."""
        for each in self.prompts:
            console.print(_table(each, marks=not console.is_terminal))
            console.print()

    def to_html(self) -> str:
        """A page that needs no other file; an edited token says what was edited when it is pointed at."""
        body = [
            STYLE,
            "<h1>Policies side by side</h1>",
            '<p class="note">Marked: tokens chosen from an edited state; pointing at one shows the latents.</p>',
        ]
        for each in self.prompts:
            body.append(f'<h2>{html.escape(each.prompt)}</h2><div class="answers">')
            for answer in each.answers:
                text = "".join(_html_token(token) for token in answer.tokens)
                heading = f"<h3>{html.escape(answer.policy)}</h3>"
                note = f'<p class="note">{answer.edited} of {len(answer.tokens)} tokens edited</p>'
                body.append(f"<div>{heading}<p>{text}</p>{note}</div>")
            body.append("</div>")
        return html_page("Policies side by side", body)


def compare(
    model: nn.Module,
    tokenizer: Any,
    policies: Mapping[str, Policy],
    prompts: Sequence[str],
    *,
    unsteered: bool = True,
    chat: bool = True,
    max_new_tokens: int = 128,
    sample: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Comparison:
    """Answers of several policies to the same prompts.

    Args:
        model: the model, not steered at the moment.
        tokenizer: its tokenizer.
        policies: by name.
        prompts: texts.
        unsteered: whether the model as it is answers as well, first.
        chat: whether a prompt is a user's turn of a conversation, if the tokenizer has a chat template.
        max_new_tokens: of an answer.
        sample: sample instead of taking the likeliest token.
        seed: of the sampling, the same for every answer.
        progress: whether to draw a progress bar.

    Raises:
        InvalidInputError: if the model is steered, there is no prompt or nothing to compare, or an answer has no token.
        MismatchError: if a policy was made for another model.
    """
    if is_steered(model):
        raise InvalidInputError("the model is steered; call remove() on its steering before comparing")
    check_integer("max_new_tokens", max_new_tokens, 1)
    under: list[tuple[str, Policy | None]] = [(UNSTEERED, None)] if unsteered else []
    under += list(policies.items())
    if not under or not prompts:
        raise InvalidInputError("there is nothing to compare; pass policies and prompts")
    compared = []
    for prompt in track(prompts, "Answering", enabled=progress, unit="prompts"):
        ids = _prompt_ids(tokenizer, prompt, chat=chat)
        answers = []
        for name, policy in under:
            torch.manual_seed(seed)
            answers.append(_answer(model, tokenizer, name, policy, list(ids), max_new_tokens, sample))
        compared.append(ComparedPrompt(prompt, tuple(answers)))
    return Comparison(tuple(compared))


def _answer(
    model: Any, tokenizer: Any, name: str, policy: Policy | None, prompt: list[int], max_new_tokens: int, sample: bool
) -> Answer:
    ids = torch.tensor([prompt], device=device_of(model))
    trace: SteeringTrace | None = None
    with nullcontext() if policy is None else steer(model, policy, trace=True) as steering:
        output = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=sample, max_new_tokens=max_new_tokens
        )
        trace = None if steering is None else steering.trace()
    new = output[0, len(prompt) :].tolist()
    edits = {} if trace is None else {token.position: token.edits for token in trace.sequences[0].tokens}
    texts = ["", *(_decoded(tokenizer, new[: end + 1]) for end in range(len(new)))]
    pieces = [after[_shared(before, after) :] for before, after in pairwise(texts)]
    return Answer(
        name,
        tuple(AnswerToken(piece, edits.get(len(prompt) + at - 1, ())) for at, piece in enumerate(pieces)),
    )


def _prompt_ids(tokenizer: Any, prompt: str, *, chat: bool) -> tuple[int, ...]:
    if chat and tokenizer.chat_template:
        return chat_prompt(tokenizer, [{"role": "user", "content": prompt}])
    return plain_prompt(tokenizer, prompt)


def _decoded(tokenizer: Any, ids: list[int]) -> str:
    """Without the character that stands for one whose bytes are not all there yet."""
    return tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


def _shared(before: str, after: str) -> int:
    """How many characters two texts have in common at their beginning."""
    return next(
        (at for at, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), min(len(before), len(after))
    )


def _table(compared: ComparedPrompt, *, marks: bool) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(compared.prompt), title_justify="left")
    for answer in compared.answers:
        edited = f", {answer.edited} of {len(answer.tokens)} tokens edited" if answer.edited else ""
        table.add_column(Text(f"{answer.policy}{edited}"), ratio=1)
    table.add_row(*(_marked(answer, marks=marks) for answer in compared.answers))
    return table


def _marked(answer: Answer, *, marks: bool) -> Text:
    from rich.text import Text

    text = Text()
    for run, _, edited in answer.runs():
        if edited and marks:
            text.append(f"«{run}»")
        else:
            text.append(run, style="underline bold" if edited else "")
    return text


def _html_token(token: AnswerToken) -> str:
    if not token.edits or not token.text.strip():
        return html.escape(token.text)
    said = ", ".join(f"{edit.latent}: {edit.before:.3g} → {edit.after:.3g}" for edit in token.edits)
    bare = token.text.lstrip()
    space = token.text[: len(token.text) - len(bare)]
    return f'{space}<mark title="{html.escape(said)}">{html.escape(bare)}</mark>'
