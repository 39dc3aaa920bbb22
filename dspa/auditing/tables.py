"""An audit as tables, for the terminal and as Markdown."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from dspa.auditing.records import AuditedLatent, AuditRecord, Example, PromptAudit, Quantiles
from dspa.methods.policy_edits import shortened
from dspa.util.report_parts import Table

if TYPE_CHECKING:
    from rich.console import Console

SHOWN_LATENTS, SHOWN_ROWS, SHOWN_PROMPTS, SHOWN_CLUSTERS = 25, 10, 12, 12  # lines of a table
SHOWN_TOKENS = 5  # of a logit lens
AROUND = 5  # tokens of an example on each side
PROMPT_LENGTH = 60  # characters

Text = Callable[[str], str]
Number = Callable[[int, "str | None"], str]


def tables(audit: AuditRecord, text: Text = str, number: Number = lambda latent, link: str(latent)) -> Iterator[Table]:
    """Every table, in the order they are shown; `text` and `number` write words and linked numbers."""
    yield _subject(audit, text)
    if audit.map is not None:
        yield _map(audit)
    if audit.measured is not None:
        yield _measured(audit)
    if audit.classes is not None:
        yield _classes(audit)
    if audit.latents:
        yield _latents(audit, text, number)
    if audit.measured is not None:
        if audit.measured.overlap is not None:
            yield _clusters(audit)
        yield _prompts(audit, text)
    if audit.map is not None:
        yield _rows(audit, number)


def print_audit(console: Console, audit: AuditRecord) -> None:
    """Prints the tables."""
    for table in tables(audit):
        table.print(console)


def to_markdown(audit: AuditRecord) -> str:
    """The tables as Markdown, latents linked to their pages."""

    def number(latent: int, link: str | None) -> str:
        return str(latent) if link is None else f"[{latent}]({link})"

    heading = f"# Audit of a {audit.subject.kind}\n"
    return "\n".join([heading, *(table.to_markdown() for table in tables(audit, markdown_text, number))])


def markdown_text(text: str) -> str:
    """Words that mean nothing in Markdown or HTML but themselves."""
    escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_\[\]#~])", r"\\\1", escaped)


def percent(share: float) -> str:
    return f"{share:.1%}"


def figure(value: float) -> str:
    return f"{value:.3g}"


def names_of(audit: AuditRecord) -> dict[str, str]:
    """What was audited, as names and values."""
    subject = audit.subject
    settings = ", ".join(f"{name} {value}" for name, value in subject.settings.items() if name != "strength")
    return {
        "policy": subject.kind,
        "model": subject.model or "any that fits",
        "edits after layer": str(subject.layer),
        "output SAE": subject.output_sae or "none",
        "settings": settings or f"strength {subject.settings['strength']}",
        **({} if subject.overlay is None else {"overlay": subject.overlay}),
        **({"changed since it was fitted": shortened(subject.changes)} if subject.changes else {}),
    }


def map_lines(audit: AuditRecord) -> dict[str, str]:
    """The facts of the map, as names and values."""
    facts = audit.map
    assert facts is not None
    lines = {
        "rows": f"{facts.shape[0]} (prompt latents), {facts.rows_used} of them with entries",
        "output latents named": f"{facts.columns_used} of {facts.shape[1]}",
        **(
            {"output latents left out": f"{facts.columns_left_out}, switched off or decided by the overlay"}
            if facts.columns_left_out
            else {}
        ),
        "entries": f"{facts.entries} ({percent(facts.sparsity)} are 0)",
        "size of an entry": f"mean {figure(facts.entry_size.mean)}, 90 % below {figure(facts.entry_size.p90)}, "
        f"largest {figure(facts.entry_size.maximum)}",
        "rows that hold half of the mass": str(facts.rows_for_half_the_mass),
        "preference triples": str(facts.triples),
    }
    if facts.always_open_mass is not None:
        share = percent(facts.always_open / facts.shape[0])
        lines["gates always open"] = (
            f"{facts.always_open} ({share}), with {percent(facts.always_open_mass)} of the mass"
        )
    return lines


def snippet(example: Example, around: int = AROUND) -> str:
    """An example as one line, its token in brackets."""
    first, end = max(0, example.focus - around), example.focus + around + 1
    parts = []
    for place, token in enumerate(example.tokens[first:end], start=first):
        text = token.text
        if place == example.focus:
            space = " " * (len(text) - len(text.lstrip()))
            text = f"{space}[{text.strip()}]"
        parts.append(text)
    return " ".join("".join(parts).split())


def lens_text(latent: AuditedLatent, which: str, shown: int = SHOWN_TOKENS) -> str:
    """Tokens of a logit lens in one line."""
    if latent.lens is None:
        return ""
    tokens = latent.lens.promoted if which == "promoted" else latent.lens.suppressed
    return " ".join(token.strip() or repr(token) for token, _ in tokens[:shown])


def _subject(audit: AuditRecord, text: Text) -> Table:
    made = audit.provenance
    note = f"Computed by dspa {made.dspa}, torch {made.torch}, transformers {made.transformers}."
    rows = tuple((name, text(value)) for name, value in names_of(audit).items())
    return Table("The policy", note, ("", "value"), rows, ("value",))


def _map(audit: AuditRecord) -> Table:
    note = (
        "The conditional-difference map A: a row for each of what a prompt is looked up by, a column for each latent."
    )
    return Table("The map", note, ("", "value"), tuple(map_lines(audit).items()), ("value",))


def _measured(audit: AuditRecord) -> Table:
    measured = audit.measured
    assert measured is not None
    share = measured.tokens_edited / measured.tokens_seen if measured.tokens_seen else 0.0
    note = (
        f"{len(measured.prompts)} prompts, {measured.decoding}: {measured.tokens_edited} of {measured.tokens_seen} "
        f"steered tokens were edited ({percent(share)}), {measured.edits} changes of latents. KL is that of the "
        "steered from the unsteered next-token distribution, in nats; the move of the residual stream is relative to "
        "its length."
    )

    def line(name: str, values: Quantiles) -> tuple[str, ...]:
        return name, *map(figure, (values.mean, values.median, values.p90, values.maximum))

    rows = (
        line("M_t, largest activation", measured.maximum),
        line("move of the residual stream, edited tokens", measured.move),
        line("KL, all tokens", measured.kl),
        line("KL, edited tokens", measured.kl_edited),
    )
    return Table("Steering", note, ("", "mean", "median", "90 %", "largest"), rows)


def _classes(audit: AuditRecord) -> Table:
    classes = audit.classes
    assert classes is not None
    note = (
        f"Shares of the {classes.of}. Labels decide {percent(classes.by_label)}; {percent(classes.by_rule)} are "
        "decided by a rule of positions and tokens, which nobody has validated."
    )
    rows = tuple((name, percent(share), classes.rule.get(name, "")) for name, share in classes.shares.items())
    return Table("Classes", note, ("class", "share", "by the rule, where"), rows, ("by the rule, where",))


def _latents(audit: AuditRecord, text: Text, number: Number) -> Table:
    latents = audit.latents
    columns: dict[str, Callable[[AuditedLatent], str]] = {"latent": lambda x: number(x.latent, x.link)}
    if any(latent.label for latent in latents):
        columns["label"] = lambda x: text(" ".join((x.label or "").split())[:PROMPT_LENGTH])
    if any(latent.latent_class for latent in latents):
        columns["class"] = lambda x: x.latent_class or ""
    if audit.map is not None:
        columns["rows -/+"] = lambda x: "" if x.map is None else f"{x.map.lowering}/{x.map.raising}"
        columns["mean entry"] = lambda x: "" if x.map is None else f"{x.map.mean:+.2g}"
    if any(latent.factor != 1 for latent in latents):
        columns["factor"] = lambda x: f"{x.factor:g}"
    if any(latent.overlay for latent in latents):
        columns["overlay"] = lambda x: x.overlay or ""
    if audit.map is not None:
        columns["led to by"] = lambda x: "" if x.map is None else " ".join(str(lead.row) for lead in x.map.leads[:3])
    if audit.measured is not None:
        columns["listed"] = lambda x: "0" if x.use is None else str(x.use.ablate_lists + x.use.augment_lists)
        columns["tokens edited"] = lambda x: "0" if x.use is None else str(x.use.tokens_edited)
        columns["of edits"] = lambda x: percent(0.0 if x.use is None else x.use.edit_share)
    if audit.lens is not None:
        columns["promotes"] = lambda x: text(lens_text(x, "promoted"))
    if audit.measured is not None:
        columns["most active on"] = lambda x: text(snippet(x.examples[0])) if x.examples else ""
    words = ("label", "class", "overlay", "led to by", "promotes", "most active on")
    rows = tuple(tuple(cell(latent) for cell in columns.values()) for latent in latents[:SHOWN_LATENTS])
    more = len(latents) - len(rows)
    order = "Most often edited first" if audit.measured is not None else "By their part of the map's mass"
    note = order + (f"; {more} more are in the JSON record." if more > 0 else ".")
    return Table("Output latents", note, tuple(columns), rows, words)


def _clusters(audit: AuditRecord) -> Table:
    assert audit.measured is not None
    overlap = audit.measured.overlap
    assert overlap is not None
    rows = tuple(
        (
            str(index),
            str(len(cluster.prompts)),
            f"{cluster.overlap:.2f}",
            " ".join(map(str, cluster.prompts[:8])) + (" ..." if len(cluster.prompts) > 8 else ""),
            " ".join(map(str, cluster.shared[:8])) + (" ..." if len(cluster.shared) > 8 else ""),
        )
        for index, cluster in enumerate(overlap.clusters[:SHOWN_CLUSTERS])
    )
    more = len(overlap.clusters) - len(rows)
    note = (
        f"Mean Jaccard overlap of the edit lists of two prompts: {overlap.mean:.2f}. Clusters by average linkage, "
        "joined down to an overlap of 0.5" + (f"; {more} more clusters." if more > 0 else ".")
    )
    columns = ("cluster", "prompts", "overlap", "which", "listed by half of them")
    return Table("Edit lists", note, columns, rows, ("which", "listed by half of them"))


def _prompts(audit: AuditRecord, text: Text) -> Table:
    assert audit.measured is not None
    prompts = audit.measured.prompts
    rows = tuple(
        (
            str(index),
            f"{prompt.tokens_edited}/{prompt.tokens_seen}",
            figure(prompt.mean_maximum),
            figure(prompt.mean_move),
            figure(prompt.mean_kl),
            "-" if prompt.cluster is None else str(prompt.cluster),
            text(short(prompt)),
        )
        for index, prompt in enumerate(prompts[:SHOWN_PROMPTS])
    )
    more = len(prompts) - len(rows)
    note = "Means over the prompt's tokens" + (f"; {more} more prompts are in the JSON record." if more > 0 else ".")
    columns = ("prompt", "edited/seen", "M_t", "move", "KL", "cluster", "text")
    return Table("Prompts", note, columns, rows, ("text",))


def short(prompt: PromptAudit) -> str:
    """A prompt in one short line."""
    line = " ".join(prompt.text.split())
    return line if len(line) <= PROMPT_LENGTH else line[: PROMPT_LENGTH - 3] + "..."


def _rows(audit: AuditRecord, number: Number) -> Table:
    facts = audit.map
    assert facts is not None
    rows = tuple(
        (
            number(row.row, row.link),
            str(row.entries),
            figure(row.mass),
            percent(row.share),
            f"{row.gate_count}" + (" (always)" if row.always_open else ""),
        )
        for row in facts.heaviest[:SHOWN_ROWS]
    )
    note = "The heaviest rows, by the sum of the sizes of their entries; for how many triples their gates were open."
    return Table("Rows of the map", note, ("prompt latent", "entries", "mass", "share", "gate open"), rows)
