"""What a steering did token by token: recorded on request, printed as a table, drawn as a heat map."""

from __future__ import annotations

import functools
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.methods.policy import TokenEdit

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

SHOWN_TOKENS = 200  # rows of a printed table


@dataclass(frozen=True)
class TracedEdit:
    """One latent of one token, before and after its edit.

    Attributes:
        latent: its number in the output SAE.
        layer: the decoder layer after which it was edited.
        before, after: its activation, f~_j and f~'_j of method.md, section 4.
        link: its page on neuronpedia.org, if the SAE's metadata name one.
    """

    latent: int
    layer: int
    before: float
    after: float
    link: str | None = None


@dataclass(frozen=True)
class TracedToken:
    """One token at a position that is edited.

    Attributes:
        position: in its sequence, from 0, padding not counted.
        token_id: what was read there; None if embeddings were passed.
        in_prompt: whether it belongs to the prompt.
        maximum: M_t, the largest activation of all latents before edits; NaN if the hidden state was not finite.
        edits: the listed latents that were active, in the order of the edit list; empty where nothing was edited.
    """

    position: int
    token_id: int | None
    in_prompt: bool
    maximum: float
    edits: tuple[TracedEdit, ...]


@dataclass(frozen=True)
class TracedSequence:
    """One row of one generate call. With beam search, a row is whatever beam stood in it at each step.

    Attributes:
        call: which generate call, or which forward call with a prompt of its own, from 0.
        row: which row of its batch.
        policy: its policy's name; None for a row that was not steered.
        tokens: by position.
    """

    call: int
    row: int
    policy: str | None
    tokens: tuple[TracedToken, ...]


@dataclass(frozen=True)
class SteeringTrace:
    """Everything that was recorded since the policy was attached.

    Activations are computed again for the trace, by the reference encoder; where one lies within rounding of its
    threshold, the kernel that edited may have decided otherwise.

    Attributes:
        sequences: one for each row of each call.
        model_name: the folder or hub id the model was loaded from; None where it does not say.
    """

    sequences: tuple[TracedSequence, ...]
    model_name: str | None = None

    def to_table(self, tokenizer: Any = None) -> Table:
        """A rich table with a line per token; `tokenizer` shows tokens as text."""
        from rich.table import Table
        from rich.text import Text

        table = Table("call", "row", "position", "token", "M_t", "edits: latent before → after", title="Steering trace")
        for sequence, token in self._tokens()[:SHOWN_TOKENS]:
            edits = Text(", ").join(
                Text(
                    f"{edit.latent} {edit.before:.3g} → {edit.after:.3g}",
                    style=f"link {edit.link}" if edit.link else "",
                )
                for edit in token.edits
            )
            line = (str(sequence.call), str(sequence.row), str(token.position), _text(token, tokenizer))
            table.add_row(*line, f"{token.maximum:.3g}", edits)
        left_out = len(self._tokens()) - SHOWN_TOKENS
        if left_out > 0:
            table.caption = f"and {left_out} more tokens"
        return table

    def __rich__(self) -> Table:
        return self.to_table()

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, no_color=True)
        with console.capture() as captured:
            console.print(self.to_table())
        return captured.get()

    def _repr_html_(self) -> str:
        """The table for notebooks, latents linked to their pages."""
        lines = ["<tr><th>call</th><th>row</th><th>position</th><th>token</th><th>M_t</th><th>edits</th></tr>"]
        for sequence, token in self._tokens()[:SHOWN_TOKENS]:
            edits = ", ".join(_html(edit) for edit in token.edits)
            cells = (
                sequence.call,
                sequence.row,
                token.position,
                html.escape(_text(token, None)),
                f"{token.maximum:.3g}",
            )
            lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in (*cells, edits)) + "</tr>")
        return f"<table>{''.join(lines)}</table>"

    def plot(self, sequence: int = 0, *, tokenizer: Any = None, path: str | Path | None = None) -> Figure:
        """Draws one sequence as a heat map: tokens from left to right, edited latents from top to bottom, and in each
        field by how much the edit changed the activation.

        Args:
            sequence: which one, in the order of `sequences`.
            tokenizer: shows tokens as text; by default that of the model's own files, if they are here.
            path: where to write the picture; its ending says in which format.

        Raises:
            InvalidInputError: if there is no such sequence, or matplotlib is missing.
        """
        if not 0 <= sequence < len(self.sequences):
            raise InvalidInputError(f"sequence is {sequence}; the trace has {len(self.sequences)}, counted from 0")
        try:
            from dspa.online.notebook_figure import NotebookFigure
        except ModuleNotFoundError as error:
            raise InvalidInputError("matplotlib is not installed; install it with: pip install 'dspa[plot]'") from error
        traced = self.sequences[sequence]
        tokens = traced.tokens
        if tokenizer is None:
            tokenizer = _own_tokenizer(self.model_name)
        latents = sorted({(edit.layer, edit.latent) for token in tokens for edit in token.edits})
        change = torch.full((max(len(latents), 1), max(len(tokens), 1)), math.nan)
        for column, token in enumerate(tokens):
            for edit in token.edits:
                change[latents.index((edit.layer, edit.latent)), column] = edit.after - edit.before
        figure = NotebookFigure(figsize=(2 + 0.3 * change.shape[1], 1.5 + 0.25 * change.shape[0]), layout="constrained")
        axes = figure.subplots()
        largest = float(change.nan_to_num().abs().max()) or 1.0
        image = axes.imshow(change, cmap="coolwarm", vmin=-largest, vmax=largest, aspect="auto")
        axes.set_xticks(range(len(tokens)), [_text(token, tokenizer) for token in tokens], rotation=90)
        axes.set_yticks(range(len(latents)), [str(latent) for _, latent in latents])
        under = f"policy {traced.policy}" if traced.policy is not None else "not steered"
        axes.set_title(f"Edits of call {traced.call}, row {traced.row}: {under}", loc="left")
        axes.set_xlabel("token")
        axes.set_ylabel("output latent")
        figure.colorbar(image, label="change of its activation")
        if path is not None:
            figure.savefig(path)
        return figure

    def _tokens(self) -> list[tuple[TracedSequence, TracedToken]]:
        return [(sequence, token) for sequence in self.sequences for token in sequence.tokens]


@dataclass
class RecordedCall:
    """One call while it is recorded: by position in the batch and row, the tokens of one pass after another; later ones
    replace earlier ones, so that rejected tokens are gone."""

    names: list[str | None]
    places: list[list[int]]  # of each row's tokens in its sequence, by position of the prompt
    lengths: list[int]  # tokens of each row at these positions
    prompt_tokens: list[int]  # how many of these are its prompt
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    maxima: dict[int, list[float | None]] = field(default_factory=dict)
    # by position, layer and row
    edits: dict[int, dict[int, dict[int, tuple[TracedEdit, ...]]]] = field(default_factory=dict)

    def place(self, position: int, row: int) -> int:
        """Of a token in its sequence, padding on either side not counted."""
        generated = position - len(self.places[row])
        return self.places[row][position] if generated < 0 else self.lengths[row] + generated


class TraceRecorder:
    """Records what editors do, call by call. Changes no result."""

    def __init__(self) -> None:
        self._calls: list[RecordedCall] = []

    def begin_prompt(self, names: list[str | None], attention_mask: Tensor, prompt_lengths: Tensor | None) -> None:
        """A prompt begins: the rows' policies, `[B, P]` nonzero where there is a token, and how many tokens of each row
        are its prompt, `[B]`; None if all of them are."""
        tokens = attention_mask.bool().cumsum(dim=1)
        lengths = tokens[:, -1].tolist()
        prompt = lengths if prompt_lengths is None else prompt_lengths.tolist()
        self._calls.append(RecordedCall(names, (tokens - 1).tolist(), lengths, prompt))

    def read(self, token_ids: Tensor | None, start: int) -> None:
        """A pass begins, over `token_ids [B, T]` from position `start` of the batch on."""
        if token_ids is not None and self._calls:
            for offset, ids in enumerate(token_ids.T.tolist()):
                self._calls[-1].token_ids[start + offset] = ids

    def record(self, position: int, layer: int, edits: Sequence[TokenEdit | None]) -> None:
        """The edits of one position, for each row; None for rows left alone."""
        call = self._calls[-1]
        kept = call.maxima.setdefault(position, [None] * len(edits))
        call.maxima[position] = [old if edit is None else edit.maximum for old, edit in zip(kept, edits, strict=True)]
        of_layer = call.edits.setdefault(position, {}).setdefault(layer, {})  # several editors may share a layer
        edited = {
            row: tuple(
                TracedEdit(change.latent, layer, change.before, change.after, change.link) for change in edit.changes
            )
            for row, edit in enumerate(edits)
            if edit is not None
        }
        of_layer.update(edited)

    def commit(self, accepted: int) -> None:
        """Forgets the positions from `accepted` on: their tokens were rejected."""
        if self._calls:
            call = self._calls[-1]
            for kept in (call.token_ids, call.maxima, call.edits):
                for position in [position for position in kept if position >= accepted]:
                    del kept[position]

    def trace(self) -> SteeringTrace:
        """Everything so far."""
        sequences = []
        for number, call in enumerate(self._calls):
            for row, name in enumerate(call.names):
                tokens = tuple(
                    TracedToken(
                        position=call.place(position, row),
                        token_id=call.token_ids[position][row] if position in call.token_ids else None,
                        in_prompt=call.place(position, row) < call.prompt_tokens[row],
                        maximum=float(maxima[row]),  # type: ignore[arg-type]
                        edits=tuple(
                            edit
                            for layer in sorted(call.edits[position])
                            for edit in call.edits[position][layer].get(row, ())
                        ),
                    )
                    for position, maxima in sorted(call.maxima.items())
                    if maxima[row] is not None
                )
                sequences.append(TracedSequence(number, row, name, tokens))
        return SteeringTrace(tuple(sequences))


def _text(token: TracedToken, tokenizer: Any) -> str:
    if token.token_id is None:
        return "?"
    return str(token.token_id) if tokenizer is None else repr(tokenizer.decode([token.token_id]))[1:-1]


@functools.lru_cache(maxsize=4)
def _own_tokenizer(model_name: str | None) -> Any:
    """The tokenizer in a model's folder, or in the hub's cache; None where there is none. Nothing is fetched."""
    if model_name is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model_name, local_files_only=True)
    except (OSError, ValueError, KeyError):
        return None


def _html(edit: TracedEdit) -> str:
    number = str(edit.latent) if edit.link is None else f'<a href="{html.escape(edit.link)}">{edit.latent}</a>'
    return f"{number}&nbsp;{edit.before:.3g}&nbsp;→&nbsp;{edit.after:.3g}"
