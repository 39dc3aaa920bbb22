"""The audit of a policy, as users get it: its record, and the forms in which it can be read."""

from __future__ import annotations

from dataclasses import dataclass

from dspa.auditing.page import to_html
from dspa.auditing.records import AuditRecord
from dspa.auditing.tables import print_audit, tables, to_markdown


@dataclass(frozen=True, repr=False)
class PolicyAudit(AuditRecord):
    """What an audit of a policy found, for terminals, notebooks, browsers and programs."""

    def to_markdown(self) -> str:
        """The tables, for a repository or an issue."""
        return to_markdown(self)

    def to_html(self) -> str:
        """One page that needs no other file."""
        return to_html(self)

    def __repr__(self) -> str:
        measured = "" if self.measured is None else f", {len(self.measured.prompts)} prompts"
        return f"PolicyAudit({self.subject.kind}, {len(self.latents)} latents{measured})"

    def _repr_html_(self) -> str:
        """For notebooks: the tables."""
        return "".join(table.to_html() for table in tables(self))

    def __str__(self) -> str:
        from rich.console import Console

        console = Console(width=160, no_color=True)
        with console.capture() as captured:
            print_audit(console, self)
        return captured.get()
