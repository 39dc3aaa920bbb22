"""What a steering did token by token: recorded on request, printed as a table, drawn as a heat map."""

from __future__ import annotations

import html
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels import EditList, SaeWeights
from dspa.online.policy_groups import PolicyGroup
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.sae.encode import encode

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
    """

    sequences: tuple[TracedSequence, ...]

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
            tokenizer: shows tokens as text.
            path: where to write the picture; its ending says in which format.

        Raises:
            InvalidInputError: if there is no such sequence, or matplotlib is missing.
        """
        if not 0 <= sequence < len(self.sequences):
            raise InvalidInputError(f"sequence is {sequence}; the trace has {len(self.sequences)}, counted from 0")
        try:
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise InvalidInputError("matplotlib is not installed; install it with: pip install 'dspa[plot]'") from error
        tokens = self.sequences[sequence].tokens
        latents = sorted({(edit.layer, edit.latent) for token in tokens for edit in token.edits})
        change = torch.full((max(len(latents), 1), max(len(tokens), 1)), math.nan)
        for column, token in enumerate(tokens):
            for edit in token.edits:
                change[latents.index((edit.layer, edit.latent)), column] = edit.after - edit.before
        figure = Figure(figsize=(2 + 0.3 * change.shape[1], 1.5 + 0.25 * change.shape[0]), layout="constrained")
        axes = figure.subplots()
        largest = float(change.nan_to_num().abs().max()) or 1.0
        image = axes.imshow(change, cmap="coolwarm", vmin=-largest, vmax=largest, aspect="auto")
        axes.set_xticks(range(len(tokens)), [_text(token, tokenizer) for token in tokens], rotation=90)
        axes.set_yticks(range(len(latents)), [str(latent) for _, latent in latents])
        axes.set_xlabel("token")
        axes.set_ylabel("output latent")
        figure.colorbar(image, label="change of its activation")
        if path is not None:
            figure.savefig(path)
        return figure

    def _tokens(self) -> list[tuple[TracedSequence, TracedToken]]:
        return [(sequence, token) for sequence in self.sequences for token in sequence.tokens]


class ListsOfBatch(Protocol):
    """What the recorder reads of an editor's buffers."""

    edits: EditList | None
    alpha: float | Tensor


@dataclass
class RecordedCall:
    """One call while it is recorded: by column and row, the tokens of one pass after another; later ones replace
    earlier ones, so that what was computed on trial and rejected is gone."""

    names: list[str | None]
    positions: list[list[int]]  # of each row's tokens, by column of the prompt
    lengths: list[int]  # tokens of each row in these columns
    prompt_tokens: list[int]  # how many of these are its prompt
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    maxima: dict[int, list[float | None]] = field(default_factory=dict)
    edits: dict[int, dict[int, dict[int, tuple[TracedEdit, ...]]]] = field(default_factory=dict)  # column, layer, row

    def position(self, column: int, row: int) -> int:
        """Of a token in its sequence, padding on either side not counted."""
        generated = column - len(self.positions[row])
        return self.positions[row][column] if generated < 0 else self.lengths[row] + generated


class TraceRecorder:
    """Writes down what editors do. It computes activations once more, in plain torch, and changes nothing."""

    def __init__(self) -> None:
        self._calls: list[RecordedCall] = []

    def begin(self, names: list[str | None], present: Tensor, prompt_tokens: Tensor | None) -> None:
        """A prompt begins: the rows' policies, `[B, P]` nonzero where there is a token, and how many tokens of each row
        are its prompt, `[B]`; None if all of them are."""
        tokens = present.bool().cumsum(dim=1)
        lengths = tokens[:, -1].tolist()
        prompt = lengths if prompt_tokens is None else prompt_tokens.tolist()
        self._calls.append(RecordedCall(names, (tokens - 1).tolist(), lengths, prompt))

    def read(self, token_ids: Tensor | None, past: int) -> None:
        """A pass begins, over `token_ids [B, T]` from column `past` on."""
        if token_ids is not None and self._calls:
            for offset, ids in enumerate(token_ids.T.tolist()):
                self._calls[-1].token_ids[past + offset] = ids

    def before(
        self, group: PolicyGroup, sae: SaeWeights, hidden: Tensor, lists: ListsOfBatch, enabled: Tensor | None
    ) -> tuple[int, list[float | None], dict[int, tuple[TracedEdit, ...]]]:
        """A column `hidden [B, d_model]` is about to be edited: its layer, M_t by row, and what will be edited."""
        assert lists.edits is not None
        edits = lists.edits
        metadata = sae.metadata if isinstance(sae, SparseAutoencoder) else None
        f = encode(hidden, sae)
        maximum = f.amax(dim=1)
        on = torch.ones(len(f), dtype=torch.bool, device=f.device) if enabled is None else enabled
        finite = maximum.isfinite() & hidden.isfinite().all(dim=1)
        before = f.gather(1, edits.latents.long())
        after = before + edits.signs * (torch.as_tensor(lists.alpha, device=f.device).to(f.dtype) * maximum)[:, None]
        after = torch.where(edits.signs < 0, after.clamp(min=0), after)
        changed = edits.valid() & (before > 0) & (after != before) & (on & finite)[:, None]
        found = {}
        for row in on.nonzero().flatten().tolist():
            listed = zip(edits.latents[row].tolist(), before[row].tolist(), after[row].tolist(), strict=True)
            found[row] = tuple(
                TracedEdit(latent, group.layer, was, becomes, metadata and metadata.neuronpedia_page(latent))
                for (latent, was, becomes), edited in zip(listed, changed[row].tolist(), strict=True)
                if edited
            )
        known = torch.where(finite, maximum, math.nan).tolist()
        return group.layer, [known[row] if row in found else None for row in range(len(f))], found

    def record(self, column: int, step: Any) -> None:
        """The column was edited: keeps what `before` returned."""
        layer, maxima, found = step
        call = self._calls[-1]
        kept = call.maxima.setdefault(column, [None] * len(maxima))
        call.maxima[column] = [old if new is None else new for old, new in zip(kept, maxima, strict=True)]
        call.edits.setdefault(column, {})[layer] = found

    def settle(self, accepted: int) -> None:
        """Forgets the columns from `accepted` on: they were rejected."""
        if self._calls:
            call = self._calls[-1]
            for kept in (call.token_ids, call.maxima, call.edits):
                for column in [column for column in kept if column >= accepted]:
                    del kept[column]

    def trace(self) -> SteeringTrace:
        """Everything so far."""
        sequences = []
        for number, call in enumerate(self._calls):
            for row, name in enumerate(call.names):
                tokens = tuple(
                    TracedToken(
                        position=call.position(column, row),
                        token_id=call.token_ids[column][row] if column in call.token_ids else None,
                        in_prompt=call.position(column, row) < call.prompt_tokens[row],
                        maximum=float(maxima[row]),  # type: ignore[arg-type]
                        edits=tuple(
                            edit
                            for layer in sorted(call.edits[column])
                            for edit in call.edits[column][layer].get(row, ())
                        ),
                    )
                    for column, maxima in sorted(call.maxima.items())
                    if maxima[row] is not None
                )
                sequences.append(TracedSequence(number, row, name, tokens))
        return SteeringTrace(tuple(sequences))


def _text(token: TracedToken, tokenizer: Any) -> str:
    if token.token_id is None:
        return "?"
    return str(token.token_id) if tokenizer is None else repr(tokenizer.decode([token.token_id]))[1:-1]


def _html(edit: TracedEdit) -> str:
    number = str(edit.latent) if edit.link is None else f'<a href="{html.escape(edit.link)}">{edit.latent}</a>'
    return f"{number}&nbsp;{edit.before:.3g}&nbsp;→&nbsp;{edit.after:.3g}"
