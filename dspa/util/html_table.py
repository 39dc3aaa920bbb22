"""Names and values as an HTML table, for notebooks."""

from __future__ import annotations

import html
from collections.abc import Mapping


def html_table(fields: Mapping[str, object]) -> str:
    """Names and values, side by side."""
    rows = (
        f"<tr><th>{html.escape(name)}</th><td>{html.escape(str(value))}</td></tr>" for name, value in fields.items()
    )
    return f"<table>{''.join(rows)}</table>"
