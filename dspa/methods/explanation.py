"""Why a policy edits what it edits for one prompt: which prompt latents fired, which rows of the map they picked, and
which latents these rows select (docs/method.md, section 3)."""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from dspa.errors import InvalidInputError
from dspa.kernels import CsrMap, EditList, encode_density
from dspa.methods.conditional_map import ConditionalDifferenceMap
from dspa.offline.chat_template import chat_prompt, plain_prompt
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.transformers_model import ModelFingerprint, decoder_stack, device_of, hidden_of, is_steered

if TYPE_CHECKING:
    from rich.table import Table

SHOWN = 10  # rows of a printed table
REASONS = 3  # rows of the map named for a latent


@dataclass(frozen=True)
class PickedRow:
    """A prompt latent whose row of the map was picked.

    Attributes:
        latent: its number in the input SAE.
        density: rho_i, the share of the prompt's counted tokens on which it is active.
        entries: how many output latents its row names.
        link: its page on neuronpedia.org, if the SAE's metadata name one.
    """

    latent: int
    density: float
    entries: int
    link: str | None = None


@dataclass(frozen=True)
class ExplainedEdit:
    """An output latent that is edited wherever it is active.

    Attributes:
        latent: its number in the output SAE.
        direction: what happens to it.
        score: s_j, the sum of its entries in the picked rows; positive if more frequent in preferred responses.
        reasons: the picked rows that add most to the score, as prompt latent and entry, largest first.
        link: its page on neuronpedia.org, if the SAE's metadata name one.
    """

    latent: int
    direction: Literal["augment", "ablate"]
    score: float
    reasons: tuple[tuple[int, float], ...]
    link: str | None = None


@dataclass(frozen=True)
class PolicyExplanation:
    """What a policy does for one prompt, and why.

    Attributes:
        prompt_tokens: tokens of the prompt.
        counted_tokens: those of them that make up the densities.
        active_latents: prompt latents active on at least one of these.
        rows: the picked rows, those that were picked first come first.
        edits: the edit list, in its order.
    """

    prompt_tokens: int
    counted_tokens: int
    active_latents: int
    rows: tuple[PickedRow, ...]
    edits: tuple[ExplainedEdit, ...]

    def to_tables(self, shown: int = SHOWN) -> tuple[Table, Table]:
        """Rich tables of the picked rows and of the edits, of at most so many lines each."""
        from rich.table import Table

        rows = Table("prompt latent", "density", "entries", title="Rows of the map that the prompt picked")
        for row in self.rows[:shown]:
            rows.add_row(_number(row.latent, row.link), f"{row.density:.3f}", str(row.entries))
        names = ("output latent", "edit", "score", "mostly from prompt latent (entry)")
        edits = Table(*names, title="Latents to be edited")
        for edit in self.edits[:shown]:
            edits.add_row(_number(edit.latent, edit.link), edit.direction, f"{edit.score:+.4f}", _reasons(edit))
        for table, entries in ((rows, self.rows), (edits, self.edits)):
            if len(entries) > shown:
                table.caption = f"and {len(entries) - shown} more"
        return rows, edits

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=100, no_color=True)
        with console.capture() as captured:
            console.print(self._heading())
            for table in self.to_tables():
                console.print(table)
        return captured.get()

    def __repr__(self) -> str:
        return (
            f"PolicyExplanation({self.counted_tokens} of {self.prompt_tokens} tokens counted, {self.active_latents} "
            f"latents active, {len(self.rows)} rows picked, {len(self.edits)} latents to be edited)"
        )

    def _repr_html_(self) -> str:
        """For notebooks: both tables, latents linked to their pages."""
        rows = [(_link(row.latent, row.link), f"{row.density:.3f}", str(row.entries)) for row in self.rows[:SHOWN]]
        edits = [
            (_link(edit.latent, edit.link), edit.direction, f"{edit.score:+.4f}", html.escape(_reasons(edit)))
            for edit in self.edits[:SHOWN]
        ]
        return (
            f"<p>{html.escape(self._heading())}</p>"
            + _html_table(
                ("prompt latent", "density", "entries"),
                rows,
                len(self.rows),
            )
            + _html_table(("output latent", "edit", "score", "mostly from (entry)"), edits, len(self.edits))
        )

    def _heading(self) -> str:
        return (
            f"{self.counted_tokens} of {self.prompt_tokens} prompt tokens count; {self.active_latents} prompt latents "
            "are active on some of them"
        )


class ExplainedPolicy(Protocol):
    """What is read of a `SteeringPolicy`."""

    @property
    def model(self) -> ModelFingerprint: ...
    @property
    def conditional_map(self) -> ConditionalDifferenceMap: ...
    @property
    def input_sae(self) -> SparseAutoencoder: ...
    @property
    def output_sae(self) -> SparseAutoencoder: ...
    @property
    def input_layer(self) -> int: ...
    @property
    def k_prompt(self) -> int: ...
    @property
    def uncounted_token_ids(self) -> tuple[int, ...]: ...

    def select(self, density: Tensor) -> EditList:
        """The edit lists of prompts of these densities."""
        ...


def explain_prompt(
    policy: ExplainedPolicy, model: nn.Module, prompt: str | Sequence[int] | Tensor, tokenizer: Any, chat: bool
) -> PolicyExplanation:
    """See `SteeringPolicy.explain`."""
    ids = _token_ids(prompt, tokenizer, chat)
    policy.model.check(model)
    uncounted = torch.tensor(policy.uncounted_token_ids, dtype=torch.int64)
    counted = ~torch.isin(ids, uncounted)
    if not bool(counted.any()):
        return PolicyExplanation(len(ids), 0, 0, (), ())
    hidden = _hidden_after(model, policy.input_layer, ids)[counted]
    offsets = torch.tensor([0, len(hidden)], device=hidden.device)
    counts = encode_density(hidden.contiguous(), offsets, policy.input_sae.to(hidden.device))
    density = (counts / len(hidden)).float().cpu()
    row = density[0]
    fitted = policy.conditional_map
    matrix, choosing = fitted.matrix.to("cpu"), fitted.choosing(density)[0]
    count = fitted.rows_per_prompt(policy.k_prompt)
    picked = choosing.sort(descending=True, stable=True).indices[:count].sort().values.tolist()
    of_rows = {latent: _entries(matrix, latent) for latent in picked}
    selection = policy.select(density)
    edits = []
    for place in range(int(selection.counts[0])):
        latent, sign = int(selection.latents[0, place]), int(selection.signs[0, place])
        parts = [(latent_in, entries[latent]) for latent_in, entries in of_rows.items() if latent in entries]
        parts.sort(key=lambda part: (-abs(part[1]), part[0]))
        edits.append(
            ExplainedEdit(
                latent,
                "augment" if sign > 0 else "ablate",
                sum(entry for _, entry in parts),
                tuple(parts[:REASONS]),
                policy.output_sae.metadata.neuronpedia_page(latent),
            )
        )
    page = policy.input_sae.metadata.neuronpedia_page
    rows = [
        PickedRow(place, float(row[place]), len(of_rows[place]), page(place))
        for place in sorted(picked, key=lambda place: (-float(choosing[place]), place))
    ]
    return PolicyExplanation(len(ids), len(hidden), int((row > 0).sum()), tuple(rows), tuple(edits))


def _token_ids(prompt: str | Sequence[int] | Tensor, tokenizer: Any, chat: bool) -> Tensor:
    if isinstance(prompt, str):
        if tokenizer is None:
            raise InvalidInputError("a text needs its tokenizer to be explained; pass tokenizer=, or token ids")
        if chat and tokenizer.chat_template:
            return torch.tensor(chat_prompt(tokenizer, [{"role": "user", "content": prompt}]))
        return torch.tensor(plain_prompt(tokenizer, prompt))
    ids = torch.as_tensor(prompt).cpu()
    ids = ids[0] if ids.ndim == 2 and len(ids) == 1 else ids
    if ids.ndim != 1 or not len(ids) or ids.is_floating_point():
        raise InvalidInputError(f"the prompt has token ids of shape {tuple(ids.shape)}; expected those of one prompt")
    return ids.long()


class _EnoughSeenError(Exception):
    """Leaves the forward pass: nothing that comes after is used."""


@torch.no_grad()
def _hidden_after(model: nn.Module, layer: int, ids: Tensor) -> Tensor:
    """`[T, d_model]` after a layer, of a prompt alone."""
    if is_steered(model):
        raise InvalidInputError("the model is steered; explain a prompt before it is, or after remove()")
    stack = decoder_stack(model)
    caught: list[Tensor] = []

    def catch(module: nn.Module, args: object, output: Any) -> None:
        caught.append(hidden_of(output)[0])
        raise _EnoughSeenError

    handle = stack.layers[layer].register_forward_hook(catch)
    try:
        stack.module(input_ids=ids[None].to(device_of(stack.module)), use_cache=False)
    except _EnoughSeenError:
        pass
    finally:
        handle.remove()
    return caught[0]


def _entries(matrix: CsrMap, row: int) -> dict[int, float]:
    span = slice(int(matrix.row_offsets[row]), int(matrix.row_offsets[row + 1]))
    return dict(zip(matrix.columns[span].tolist(), matrix.values[span].tolist(), strict=True))


def _reasons(edit: ExplainedEdit) -> str:
    return ", ".join(f"{latent} ({entry:+.4f})" for latent, entry in edit.reasons) or "no picked row names it"


def _number(latent: int, link: str | None) -> Any:
    from rich.text import Text

    return Text(str(latent), style=f"link {link}" if link else "")


def _link(latent: int, link: str | None) -> str:
    return str(latent) if link is None else f'<a href="{html.escape(link)}">{latent}</a>'


def _html_table(names: Sequence[str], rows: Sequence[Sequence[str]], count: int) -> str:
    head = "".join(f"<th>{name}</th>" for name in names)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    more = f"<caption>and {count - len(rows)} more</caption>" if count > len(rows) else ""
    return f"<table>{more}<tr>{head}</tr>{body}</table>"
