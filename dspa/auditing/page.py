"""An audit as one page that needs no other file and no network: searchable and sortable, light or dark, any width."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspa.auditing.records import CLASSES, AuditRecord, Example, ListOverlap
from dspa.auditing.tables import figure, lens_text, map_lines, names_of, percent, short

if TYPE_CHECKING:
    from jinja2 import Template

TEMPLATES = Path(__file__).parent / "templates"
SHOWN_LATENTS, SHOWN_ROWS, SHOWN_PROMPTS = 400, 200, 400  # the JSON record has all of them
DRAWN_PROMPTS = 96  # of the overlaps


def to_html(audit: AuditRecord) -> str:
    """The page."""
    overlap = None if audit.measured is None else audit.measured.overlap
    return _template().render(
        audit=audit,
        classes=(*CLASSES, "unclassified"),
        latents=audit.latents[:SHOWN_LATENTS],
        lens_text=lens_text,
        map_lines=None if audit.map is None else map_lines(audit),
        names=names_of(audit),
        overlap_cells=None if overlap is None else overlap_cells(overlap),
        prompts=() if audit.measured is None else audit.measured.prompts[:SHOWN_PROMPTS],
        rows=() if audit.map is None else audit.map.heaviest[:SHOWN_ROWS],
        shades=shades,
        short=short,
        tiles=tiles(audit),
    )


def tiles(audit: AuditRecord) -> list[tuple[str, str]]:
    """The figures at the top, with what they are."""
    found: list[tuple[str, str]] = []
    if audit.measured is not None:
        measured = audit.measured
        share = measured.tokens_edited / measured.tokens_seen if measured.tokens_seen else 0.0
        edited = sum(latent.use is not None and latent.use.tokens_edited > 0 for latent in audit.latents)
        found += [
            (percent(share), f"of {measured.tokens_seen} steered tokens were edited"),
            *([(str(edited), "latents were edited")] if edited else []),
            (percent(measured.move.mean), "mean move of the residual stream on an edited token"),
            (figure(measured.kl.mean), "nats per token, mean KL of steered from unsteered"),
        ]
        if measured.overlap is not None:
            found.append((f"{measured.overlap.mean:.2f}", "mean overlap of the edit lists of two prompts"))
    if audit.map is not None:
        found.append((str(audit.map.columns_used), "output latents are named by the map"))
        if audit.map.always_open is not None:
            share = audit.map.always_open / audit.map.shape[0]
            found.append((percent(share), "of the gates are always open"))
    return found


def shades(example: Example) -> list[int]:
    """How dark each token of an example is, in percent of the most active one."""
    highest = max(token.activation for token in example.tokens)
    return [round(100 * token.activation / highest) if highest > 0 else 0 for token in example.tokens]


def overlap_cells(overlap: ListOverlap) -> list[tuple[int, int, int]]:
    """Column, row and overlap in percent of the cells that are not empty, of the first prompts by cluster."""
    drawn = overlap.matrix[:DRAWN_PROMPTS]
    return [
        (x, y, round(100 * value))
        for y, row in enumerate(drawn)
        for x, value in enumerate(row[:DRAWN_PROMPTS])
        if round(100 * value)
    ]


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {"percent": percent, "figure": figure}
    environment.filters.update(filters)
    return environment.get_template("audit.html")
