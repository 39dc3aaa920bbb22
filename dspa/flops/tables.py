"""A report as tables: for the terminal and as Markdown."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

from dspa.flops.quantities import COLLECTED, MODES, Work
from dspa.flops.report import FlopsReport, ModelReport
from dspa.util.report_parts import Table

if TYPE_CHECKING:
    from rich.console import Console


def number(value: float) -> str:
    """Three significant digits, as the published figures are given."""
    return f"{value:.2e}"


def percent(share: float) -> str:
    return f"{share * 100:.3g} %"


def _tokens(value: float | None) -> str:
    return "never" if value is None else f"{value:.2e}"


def published_table(report: FlopsReport) -> Table:
    p = report.published
    rows = (
        ("DSPA, 2 P (3p + c + r)", number(p.dspa)),
        ("RAHF-SCIT step 1", number(p.rahf_step1)),
        ("RAHF-SCIT step 2", number(p.rahf_step2)),
        ("RAHF-SCIT", number(p.rahf)),
        ("RAHF-SCIT / DSPA", f"{p.ratio:.2f}"),
    )
    note = "The published comparison, recomputed: P = 8e9, no SAE, no attention; FLOPs per preference triple."
    return Table("Published figures", note, ("", "FLOPs per triple"), rows)


def alignment_table(report: FlopsReport, model: ModelReport) -> Table:
    counted = {method.method: method.flops.total() for method in model.counted}
    ours = next(method for method in model.methods if method.method == COLLECTED).flops.total()
    rows = []
    for method in model.methods:
        flops = method.flops
        row = [method.method, method.formula]
        row += [number(value) for value in (flops.linear, flops.attention, flops.sae, flops.total())]
        row += [number(counted[method.method])] if counted else []
        rows.append((*row, number(flops.total() * report.options.triples), f"{flops.total() / ours:.2f}"))
    columns = ("method", "linear term", "linear", "attention", "SAE", "total", *["counted"][: len(counted)])
    columns += (f"N = {report.options.triples}", "x ours")
    note = (
        f"FLOPs per preference triple, and for N of them. P = {model.shape.parameters:.3e}, "
        f"P' = {model.shape.weights_through(model.steering.output_layer):.3e} (weights of blocks 0 to "
        f"{model.steering.output_layer})."
    )
    if counted:
        note += (
            " Counted: the model run under torch's FLOP counter, where an embedding that is only looked up costs "
            "nothing; the formulas charge 2P for it."
        )
    return Table(f"{model.shape.name}: alignment stage", note, columns, tuple(rows), ("linear term",))


def ratio_table(model: ModelReport) -> Table:
    words = {False: "out", True: "in"}
    rows = [
        (
            f"attention {words[r.attention]}, SAE {words[r.sae]}",
            f"{r.modelled:.2f}",
            *([] if r.counted is None else [f"{r.counted:.2f}"]),
        )
        for r in model.ratios
    ]
    columns = ("terms, on both sides", "by formula", *(["by count"] if model.counted else []))
    note = f"RAHF-SCIT's published formula, without its attention, over all of ours: {model.bare_ratio:.2f}."
    if model.counted_over_formula is not None:
        note += f" Our count is {model.counted_over_formula:.4f} of 2 P' (p + c + r) + attention + SAE."
    title = f"{model.shape.name}: RAHF-SCIT over DSPA as collected here"
    return Table(title, note, columns, tuple(rows))


def inference_table(report: FlopsReport, model: ModelReport) -> Table:
    i, machine = report.options.inference, report.machine
    works: list[tuple[str, Work, Work | None]] = [("the model's own step, per token", model.decode, None)]
    works += [(f"steering, {row.mode}, per token", row.work, model.decode) for row in model.tokens]
    works += [("the model's own prefill, per prompt", model.prefill, None)]
    works += [("steering, per prompt", model.prompt, model.prefill)]
    rows = []
    for name, work, own in works:
        row = [name, number(work.flops), number(work.bytes)]
        row += [percent(work.flops / own.flops), percent(work.bytes / own.bytes)] if own else ["-", "-"]
        rows.append((*row, f"{work.seconds(machine) * 1e6:.4g}") if machine else tuple(row))
    columns = ("", "FLOPs", "bytes", "of the model's FLOPs", "of its bytes")
    note = (
        f"Batch {i.batch}, {i.context} tokens of context, prompts of {i.prompt_tokens} tokens. Assumed: lazy needs the "
        f"pass over the encoder for {i.pass_share:.0%} of the tokens, screened reads {i.screen_bytes:g} byte per "
        f"element and computes {i.survivors:.0%} of the latents again."
    )
    if machine:
        columns += ("us at the roofline",)
        note += (
            f" Roofline of {machine.name}: {machine.flops_per_second:.3g} FLOP/s, {machine.bytes_per_second:.3g} B/s."
        )
    return Table(f"{model.shape.name}: inference", note, columns, tuple(rows))


def fsrl_table(report: FlopsReport, model: ModelReport) -> Table:
    a = report.options.alignment
    own = model.decode.bytes
    rows = [
        (row.form, row.reads, number(row.work.flops), f"{row.work.bytes / 1e6:.4g}", percent(row.work.bytes / own))
        for row in model.fsrl_tokens
    ]
    training = "; ".join(
        f"{row.form} {number(row.flops)} FLOPs, {number(row.kept_bytes)} bytes kept" for row in model.fsrl_training
    )
    note = (
        f"FSRL's adapter at one generated token: an SAE {a.fsrl_d_sae} wide, A = {a.fsrl_active:g} latents fire, "
        f"A- = {a.fsrl_falling:g} of them with v < 0. A token of training, SAE and adapter alone: {training}."
    )
    columns = ("form", "reads", "FLOPs", "MB", "of the model's bytes")
    return Table(f"{model.shape.name}: FSRL at a token", note, columns, tuple(rows), ("form", "reads"))


def break_even_table(report: FlopsReport, model: ModelReport) -> Table:
    methods = dict.fromkeys(row.method for row in model.break_even)
    tokens = {(row.method, row.mode): row.tokens for row in model.break_even}
    rows = tuple((name, *(_tokens(tokens[name, mode]) for mode in MODES)) for name in methods)
    note = (
        f"Tokens that can be generated before the method would have cost fewer FLOPs in all: aligning on "
        f"{report.options.triples} triples, responses of {report.options.inference.response_tokens} tokens. RAHF-SCIT "
        "and DPO change the weights and add nothing to a token; FSRL adds its SAE and adapter."
    )
    return Table(f"{model.shape.name}: break-even", note, ("against", *MODES), rows)


def measured_table(report: FlopsReport) -> Table:
    rows = [
        (
            row.what,
            number(row.counted.total()),
            number(row.modelled.total()),
            f"{row.counted.total() / row.modelled.total():.4f}",
        )
        for row in report.measured
    ]
    note = "Counted while the model ran with its weights, beside the formula for the same lengths."
    return Table(f"Measured on {report.measured_model}", note, ("", "counted", "modelled", "ratio"), tuple(rows))


def tables(report: FlopsReport) -> Iterator[Table]:
    """Every table, in the order they are shown."""
    yield published_table(report)
    for model in report.models:
        yield from model_tables(report, model)
    if report.measured:
        yield measured_table(report)


def model_tables(report: FlopsReport, model: ModelReport) -> Iterator[Table]:
    yield alignment_table(report, model)
    yield ratio_table(model)
    yield inference_table(report, model)
    yield fsrl_table(report, model)
    yield break_even_table(report, model)


def print_report(console: Console, report: FlopsReport) -> None:
    """Prints the tables."""
    for table in tables(report):
        table.print(console)
    console.print(provenance_line(report), style="dim", highlight=False)


def to_markdown(report: FlopsReport) -> str:
    """The tables as GitHub Markdown."""
    lines = ["# FLOPs of the alignment stage and of inference", ""]
    lines += [table.to_markdown() for table in tables(report)]
    lines += ["## Assumptions", "", "```json", assumptions_json(report), "```", "", provenance_line(report), ""]
    return "\n".join(lines)


def assumptions_json(report: FlopsReport) -> str:
    return json.dumps(asdict(report.options), indent=2)


def provenance_line(report: FlopsReport) -> str:
    p = report.provenance
    return f"dspa {p.dspa}, commit {p.commit}, Python {p.python}, torch {p.torch}, transformers {p.transformers}"
