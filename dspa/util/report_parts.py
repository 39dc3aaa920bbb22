"""What every report is made of: tables for the terminal, Markdown and HTML, charts, and the page around them."""

from __future__ import annotations

import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dspa.errors import InvalidInputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console

COLORS = ("#1f5fa8", "#e07b39", "#2f8f5b", "#8a4fa3", "#b03a48")

STYLE = """
body { font: 16px/1.55 system-ui, sans-serif; color: #1c2430; background: #fff; margin: 0 auto; max-width: 1120px;
  padding: 2rem 1.25rem 4rem; color-scheme: light; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 .4rem; }
h2 { font-size: 1.35rem; margin: 3rem 0 .5rem; padding-top: 1rem; border-top: 1px solid #d9dee5; }
h3 { font-size: 1.05rem; margin: 2rem 0 .2rem; }
p { max-width: 46rem; margin: .4rem 0 .8rem; }
p.note, figcaption { color: #55606e; font-size: .88rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; border-bottom: 1px solid #e6eaef; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th.left, td.left { text-align: left; }
th { font-weight: 600; border-bottom-color: #9aa5b1; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 1.2rem 1.6rem; }
figure { margin: 0; } svg { width: 100%; height: auto; }
.headline { display: flex; flex-wrap: wrap; gap: 1rem 2.5rem; margin: 1.2rem 0; }
.headline b { display: block; font-size: 1.8rem; line-height: 1.1; }
.headline span { font-size: .88rem; color: #55606e; }
.bars { margin: .3rem 0 1rem; font-size: .85rem; max-width: 52rem; }
.bars div { display: grid; grid-template-columns: 15rem 1fr 10rem; gap: 0 .6rem; align-items: center; }
.bars div { margin: .15rem 0; }
.bars i { display: block; height: .8rem; background: #1f5fa8; min-width: 1px; } .bars i.base { background: #e07b39; }
.bars b { font-weight: 400; font-variant-numeric: tabular-nums; white-space: nowrap; }
.runs { display: flex; flex-wrap: wrap; gap: .6rem 1.4rem; } .runs figure, .runs svg { width: 15rem; min-width: 0; }
@media (max-width: 640px) {
  .bars div { grid-template-columns: 1fr 9rem; } .bars span { grid-column: 1 / -1; }
  .charts figure { overflow-x: auto; } .charts svg { width: 38rem; }
}
pre { background: #f5f7f9; padding: .8rem 1rem; font-size: .82rem; overflow-x: auto; }
"""


@dataclass(frozen=True)
class Table:
    """A table with a sentence that says how to read it.

    Attributes:
        title, note: above and below it.
        columns: their heads.
        rows: cells, as many a row as there are columns.
        text_columns: the heads of columns of words, which are set to the left; the first is one in any case.
    """

    title: str
    note: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    text_columns: tuple[str, ...] = ()

    def is_text(self, index: int) -> bool:
        return index == 0 or self.columns[index] in self.text_columns

    def print(self, console: Console) -> None:
        from rich.markup import escape
        from rich.table import Table as RichTable

        drawn = RichTable(title=self.title, title_justify="left", caption=escape(self.note), caption_justify="left")
        for index, column in enumerate(self.columns):
            drawn.add_column(column, justify="left" if self.is_text(index) else "right", no_wrap=index == 0)
        for row in self.rows:
            drawn.add_row(*map(escape, row))
        console.print(drawn)
        console.print()

    def to_markdown(self) -> str:
        """With its title as a second heading."""
        sides = [" --- " if self.is_text(index) else " ---: " for index in range(len(self.columns))]
        lines = [f"## {self.title}", "", self.note, "", _markdown_row(self.columns), "|" + "|".join(sides) + "|"]
        return "\n".join([*lines, *map(_markdown_row, self.rows), ""])

    def to_html(self) -> str:
        rows = "".join(f"<tr>{self._html_cells('td', row)}</tr>" for row in self.rows)
        return (
            f'<h3>{html.escape(self.title)}</h3><p class="note">{html.escape(self.note)}</p>'
            f'<div class="scroll"><table><thead><tr>{self._html_cells("th", self.columns)}</tr></thead>'
            f"<tbody>{rows}</tbody></table></div>"
        )

    def _html_cells(self, tag: str, row: Sequence[str]) -> str:
        sides = [' class="left"' if index and self.is_text(index) else "" for index in range(len(row))]
        return "".join(f"<{tag}{side}>{html.escape(cell)}</{tag}>" for cell, side in zip(row, sides, strict=True))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def html_page(title: str, body: Sequence[str]) -> str:
    """A page that needs no other file."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )


def html_figure(svg: str, caption: str) -> str:
    """A chart with what it shows in words."""
    caption = html.escape(caption)
    return f'<figure role="img" aria-label="{caption}">{svg}<figcaption>{caption}</figcaption></figure>'


def new_figure(size: tuple[float, float]) -> Figure:
    """An empty matplotlib figure of so many inches.

    Raises:
        InvalidInputError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InvalidInputError("matplotlib is not installed; install it with: pip install 'dspa[plot]'") from error
    return Figure(figsize=size, layout="constrained")


def png_bytes(figure: Figure) -> bytes:
    return _saved(figure, "png", {"Software": None})


def svg_element(figure: Figure) -> str:
    """The figure as an `<svg>` element to put into a page; its words are text, which keeps the page small."""
    text = _saved(figure, "svg", {"Date": None, "Creator": None}).decode()
    return text[text.index("<svg") :]


def _saved(figure: Figure, kind: str, metadata: dict[str, Any]) -> bytes:
    """The same bytes for the same figure."""
    import matplotlib

    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "dspa", "svg.fonttype": "none"}):
        figure.savefig(buffer, format=kind, dpi=110, metadata=metadata)
    return buffer.getvalue()
