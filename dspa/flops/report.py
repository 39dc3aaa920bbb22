"""What `dspa flops` found: as one record, and as tables, JSON, Markdown, a self-contained HTML page and a chart.

Nothing here depends on the time, the place or the order of anything: the same inputs give the same bytes.
"""

from __future__ import annotations

import html
import json
import platform
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspa.flops.formulas import (
    COLLECTED,
    FSRL,
    MODES,
    PUBLISHED,
    RAHF,
    AlignmentAssumptions,
    Flops,
    InferenceAssumptions,
    Machine,
    MethodCost,
    Mode,
    ModelShape,
    PublishedFigures,
    SteeringShape,
    Work,
    alignment_costs,
    break_even_tokens,
    collection_reference,
    decode_step,
    fsrl_token,
    prefill,
    published_figures,
    ratio,
    steer_prompt,
    steer_token,
)
from dspa.util.report_parts import COLORS, Table, html_figure, html_page, new_figure, png_bytes, svg_element

if TYPE_CHECKING:
    from rich.console import Console

SWEEP_D_SAE = tuple(2**power for power in range(12, 21))
TERMS = ((False, False), (False, True), (True, False), (True, True))
"""Attention counted, SAE counted."""


# --- the record -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Provenance:
    """What computed a report."""

    dspa: str
    commit: str
    python: str
    torch: str
    transformers: str

    @classmethod
    def here(cls) -> Provenance:
        return cls(*_version_and_commit(), platform.python_version(), *map(_version, ("torch", "transformers")))


@dataclass(frozen=True)
class RatioRow:
    """FLOPs of RAHF-SCIT as a multiple of ours, attention and SAE in or out on both sides; None if not counted."""

    attention: bool
    sae: bool
    modelled: float
    counted: float | None


@dataclass(frozen=True)
class TokenRow:
    """What a generated token costs on top of the model's own step, and where a weight-updating method breaks even."""

    mode: Mode
    work: Work
    flops_share: float
    bytes_share: float


@dataclass(frozen=True)
class BreakEven:
    """Generated tokens up to which DSPA costs fewer FLOPs in all than another method; None for any number."""

    method: str
    mode: Mode
    tokens: float | None


@dataclass(frozen=True)
class ModelReport:
    """Everything about one model. FLOPs of the alignment stage are per preference triple.

    `counted_over_formula` is our count over `2 P' (p + c + r)` with attention and SAE; `bare_ratio` the published
    formula of RAHF-SCIT, without attention, over everything we count.
    """

    shape: ModelShape
    steering: SteeringShape
    methods: tuple[MethodCost, ...]
    counted: tuple[MethodCost, ...]
    ratios: tuple[RatioRow, ...]
    counted_over_formula: float | None
    bare_ratio: float
    decode: Work
    prefill: Work
    prompt: Work
    tokens: tuple[TokenRow, ...]
    break_even: tuple[BreakEven, ...]

    @classmethod
    def from_measurements(
        cls,
        shape: ModelShape,
        steering: SteeringShape,
        options: ReportOptions,
        counted: Sequence[MethodCost] = (),
    ) -> ModelReport:
        a, i = options.alignment, options.inference
        methods = alignment_costs(shape, steering, a, options.parameters)
        own, prompt, added = decode_step(shape, i), steer_prompt(shape, steering, i), fsrl_token(shape, a)
        work: dict[Mode, Work] = {mode: steer_token(shape, steering, i, mode) for mode in MODES}
        by_name = {method.method: method for method in methods}
        ours = {method.method: method for method in counted or methods}[COLLECTED]
        return cls(
            shape=shape,
            steering=steering,
            methods=methods,
            counted=tuple(counted),
            ratios=tuple(
                RatioRow(
                    attention,
                    sae,
                    ratio(methods, RAHF, COLLECTED, attention=attention, sae=sae),
                    ratio(counted, RAHF, COLLECTED, attention=attention, sae=sae) if counted else None,
                )
                for attention, sae in TERMS
            ),
            counted_over_formula=(
                ours.flops.total() / collection_reference(shape, steering, a).total() if counted else None
            ),
            bare_ratio=by_name[RAHF].flops.total(attention=False) / ours.flops.total(),
            decode=own,
            prefill=prefill(shape, i),
            prompt=prompt,
            tokens=tuple(TokenRow(m, w, w.flops / own.flops, w.bytes / own.bytes) for m, w in work.items()),
            break_even=tuple(
                BreakEven(
                    name,
                    mode,
                    break_even_tokens(
                        cost, by_name[COLLECTED], options.triples, w, prompt, i, added if name == FSRL else 0.0
                    ),
                )
                for name, cost in by_name.items()
                if name not in (COLLECTED, PUBLISHED)
                for mode, w in work.items()
            ),
        )


@dataclass(frozen=True)
class ReportOptions:
    """The inputs of a report.

    Attributes:
        alignment, inference: the assumptions.
        triples: N of totals and break-even points.
        parameters: P of the published formulas instead of each model's own.
    """

    alignment: AlignmentAssumptions = field(default_factory=AlignmentAssumptions)
    inference: InferenceAssumptions = field(default_factory=InferenceAssumptions)
    triples: int = 1000
    parameters: float | None = None


@dataclass(frozen=True)
class MeasuredRow:
    """A quantity counted while a model with weights ran, beside its formula."""

    what: str
    counted: Flops
    modelled: Flops


@dataclass(frozen=True)
class FlopsReport:
    """A whole report."""

    provenance: Provenance
    options: ReportOptions
    published: PublishedFigures
    models: tuple[ModelReport, ...]
    machine: Machine | None = None
    measured_model: str | None = None
    measured: tuple[MeasuredRow, ...] = ()

    @classmethod
    def from_models(
        cls, options: ReportOptions, models: Sequence[ModelReport], machine: Machine | None = None
    ) -> FlopsReport:
        return cls(Provenance.here(), options, published_figures(options.alignment), tuple(models), machine)

    def with_measured(self, model: str, rows: Sequence[MeasuredRow]) -> FlopsReport:
        return replace(self, measured_model=model, measured=tuple(rows))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _version_and_commit() -> tuple[str, str]:
    """The package's version, and the commit of its checkout, or "none" where it is not run from one."""
    package = Path(__file__).parent

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", *arguments], cwd=package, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.SubprocessError):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return _version("dspa"), "none"
    changed = git("status", "--porcelain", "--untracked-files=no", ".")
    return _version("dspa"), f"{git('rev-parse', 'HEAD')}{' and changes' if changed else ''}"


# --- tables -----------------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Three significant digits, as the published figures are given."""
    return f"{value:.2e}"


def _percent(share: float) -> str:
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
        row += [_percent(work.flops / own.flops), _percent(work.bytes / own.bytes)] if own else ["-", "-"]
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
    yield break_even_table(report, model)


def print_report(console: Console, report: FlopsReport) -> None:
    """Prints the tables."""
    for table in tables(report):
        table.print(console)
    console.print(_provenance_line(report), style="dim", highlight=False)


def to_markdown(report: FlopsReport) -> str:
    """The tables as GitHub Markdown."""
    lines = ["# FLOPs of the alignment stage and of inference", ""]
    lines += [table.to_markdown() for table in tables(report)]
    lines += ["## Assumptions", "", "```json", _assumptions(report), "```", "", _provenance_line(report), ""]
    return "\n".join(lines)


def _assumptions(report: FlopsReport) -> str:
    return json.dumps(asdict(report.options), indent=2)


def _provenance_line(report: FlopsReport) -> str:
    p = report.provenance
    return f"dspa {p.dspa}, commit {p.commit}, Python {p.python}, torch {p.torch}, transformers {p.transformers}"


# --- charts -----------------------------------------------------------------------------------------------------------

CHARTS = ("stages", "triples", "overhead", "total")
SHADES = (1.0, 0.6, 0.35)


def draw(axes: Any, chart: str, report: FlopsReport, model: ModelReport) -> None:
    """Draws one of `CHARTS` for a model."""
    {"stages": _draw_stages, "triples": _draw_triples, "overhead": _draw_overhead, "total": _draw_total}[chart](
        axes, report, model
    )
    axes.spines[["top", "right"]].set_visible(False)


def _draw_stages(axes: Any, report: FlopsReport, model: ModelReport) -> None:
    most = max(method.flops.total() for method in model.methods)
    for y, (method, color) in enumerate(zip(model.methods, COLORS, strict=True)):
        left = 0.0
        for stage, shade in zip(method.stages, SHADES, strict=False):
            width = stage.flops.total()
            axes.barh(y, width, left=left, color=color, alpha=shade, height=0.62)
            if width > 0.3 * most:
                axes.text(left + width / 2, y, stage.name, ha="center", va="center", fontsize=7, color="white")
            left += width
        axes.text(left + most * 0.01, y, number(left), va="center", fontsize=8)
    axes.set_yticks(range(len(model.methods)), [method.method for method in model.methods])
    axes.invert_yaxis()
    axes.set_xlim(0, most * 1.16)
    axes.set_xlabel("FLOPs per triple, attention and SAE included")
    axes.set_title(f"{model.shape.name}: alignment stage, by stage", fontsize=10)


def _draw_triples(axes: Any, report: FlopsReport, model: ModelReport) -> None:
    triples = (10, 100_000)
    for method, color in zip(model.methods, COLORS, strict=True):
        axes.plot(triples, [method.flops.total() * n for n in triples], color=color, label=method.method)
    axes.axvline(report.options.triples, color="0.6", linewidth=0.8, linestyle=":")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("preference triples N")
    axes.set_ylabel("FLOPs")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"{model.shape.name}: FLOPs against N", fontsize=10)


def _draw_overhead(axes: Any, report: FlopsReport, model: ModelReport) -> None:
    i, machine = report.options.inference, report.machine
    for mode, color in zip(MODES, COLORS, strict=False):
        works = [steer_token(model.shape, replace(model.steering, d_sae_out=width), i, mode) for width in SWEEP_D_SAE]
        if machine is None:
            axes.plot(SWEEP_D_SAE, [100 * w.bytes / model.decode.bytes for w in works], color=color, label=mode)
            flops = [100 * w.flops / model.decode.flops for w in works]
            axes.plot(SWEEP_D_SAE, flops, color=color, linestyle="--", linewidth=1)
        else:
            axes.plot(SWEEP_D_SAE, [1e6 * w.seconds(machine) for w in works], color=color, label=f"{mode}, roofline")
            steps = [s for s in machine.steps if s.mode == mode and s.d_model == model.shape.d_model]
            label = f"{mode}, measured" if steps else None
            axes.plot([s.d_sae for s in steps], [1e6 * s.seconds for s in steps], "o", color=color, label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel("d_sae")
    if machine is None:
        axes.plot([], [], color="0.4", label="bytes")
        axes.plot([], [], color="0.4", linestyle="--", linewidth=1, label="FLOPs")
        axes.set_ylabel("% of the model's decode step")
    else:
        axes.axhline(1e6 * model.decode.seconds(machine), color="0.5", linestyle=":", label="the model's own step")
        axes.set_ylabel(f"us per token on {machine.name}", fontsize=8)
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"{model.shape.name}: overhead per token, batch {i.batch}, context {i.context}", fontsize=10)


def _draw_total(axes: Any, report: FlopsReport, model: ModelReport) -> None:
    i, triples = report.options.inference, report.options.triples
    generated = [10.0 ** (quarter / 4) for quarter in range(5 * 4, 11 * 4 + 1)]
    cost = {method.method: method.flops.total() * triples for method in model.methods}
    for row, style in zip(model.tokens, ("-", "--", ":"), strict=True):
        per_token = row.work.flops + model.prompt.flops / i.response_tokens
        axes.plot(
            generated,
            [cost[COLLECTED] + per_token * n for n in generated],
            style,
            color=COLORS[0],
            label=f"DSPA, {row.mode}",
        )
    for method, color in zip(model.methods[2:], COLORS[2:], strict=True):
        added = fsrl_token(model.shape, report.options.alignment) if method.method == FSRL else 0.0
        axes.plot(generated, [cost[method.method] + added * n for n in generated], color=color, label=method.method)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("generated tokens")
    axes.set_ylabel("FLOPs beyond the model's own")
    axes.legend(frameon=False, fontsize=8)
    axes.set_title(f"{model.shape.name}: alignment on {triples} triples, then generation", fontsize=10)


def draw_png(report: FlopsReport) -> bytes:
    """All charts of all models as one PNG.

    Raises:
        InvalidInputError: if matplotlib is not installed.
    """
    figure = new_figure((22, 4.6 * len(report.models)))
    grid: Any = figure.subplots(len(report.models), len(CHARTS), squeeze=False)
    for row, model in zip(grid, report.models, strict=True):
        for axes, chart in zip(row, CHARTS, strict=True):
            draw(axes, chart, report, model)
    return png_bytes(figure)


def draw_svg(chart: str, report: FlopsReport, model: ModelReport) -> str:
    """One chart as an SVG element.

    Raises:
        InvalidInputError: if matplotlib is not installed.
    """
    figure = new_figure((7.2, 4.2))
    draw(figure.add_subplot(), chart, report, model)
    return svg_element(figure)


# --- page -------------------------------------------------------------------------------------------------------------

CAPTIONS = {
    "stages": "What each method computes for one preference triple, from left to right:",
    "triples": "Every method's alignment stage grows in proportion to the triples it sees. Dotted: the N used below.",
    "overhead": "What steering adds to a generated token as the sparse autoencoder gets wider. Where times are shown, "
    "the roofline is that of main memory: an encoder that stays in the processor's cache is read faster.",
    "total": "Steering pays a little for every token; a method that changes the weights pays before the first one. "
    "Where the lines cross, the latter would have been cheaper. FSRL pays at both times.",
}


def to_html(report: FlopsReport) -> str:
    """One page that needs no other file.

    Raises:
        InvalidInputError: if matplotlib is not installed.
    """
    body = [_introduction(report), published_table(report).to_html()]
    for model in report.models:
        body.append(f"<h2>{html.escape(model.shape.name)}</h2>")
        body.append(f"<p>{_model_sentence(model)}</p>")
        charts = "".join(_html_chart(chart, report, model) for chart in CHARTS)
        body.append(f'<div class="charts">{charts}</div>')
        body += [table.to_html() for table in model_tables(report, model)]
    if report.measured:
        body += ["<h2>Measured</h2>", measured_table(report).to_html()]
    body.append("<h2>Assumptions and versions</h2>")
    body.append("<p>Each of these is an option of <code>dspa flops</code>.</p>")
    body.append(f"<pre>{html.escape(_assumptions(report))}</pre>")
    body.append(f'<p class="note">{html.escape(_provenance_line(report))}</p>')
    return html_page("FLOPs of DSPA", body)


def _html_chart(chart: str, report: FlopsReport, model: ModelReport) -> str:
    caption = CAPTIONS[chart]
    if chart == "stages":
        caption += " " + "; ".join(f"{m.method}: {', '.join(s.name for s in m.stages)}" for m in model.methods) + "."
    return html_figure(draw_svg(chart, report, model), caption)


def _introduction(report: FlopsReport) -> str:
    headline = "".join(
        f"<div><b>{_best(model):.2f}x</b><span>{html.escape(model.shape.name)}</span></div>" for model in report.models
    )
    counted = all(model.counted for model in report.models)
    return (
        "<h1>What steering with DSPA costs</h1>"
        "<p>DSPA steers a language model's answers by editing a few latents of a sparse autoencoder (SAE) while it "
        "generates. It needs no training: the alignment stage only runs preference triples (a prompt, a chosen and a "
        "rejected response) through the model and notes how often each latent is active. RAHF-SCIT, DPO and FSRL "
        "train instead. This page adds up the floating-point operations of both: once before the first answer, and "
        "then for every prompt and token.</p>"
        f'<div class="headline">{headline}</div>'
        "<p>So many times the alignment-stage FLOPs of DSPA, as this package runs it, does RAHF-SCIT need; attention "
        f"and SAEs included on both sides, {'both counted while running the models' if counted else 'by formula'}. "
        f"The published ratio is {report.published.ratio:.2f}: there DSPA runs three whole forward passes. Here each "
        "prompt runs once for both of its responses, and only as far as the layer that is read.</p>"
    )


def _best(model: ModelReport) -> float:
    row = model.ratios[-1]
    return row.modelled if row.counted is None else row.counted


def _model_sentence(model: ModelReport) -> str:
    s, dense = model.steering, model.tokens[0]
    return (
        f"{model.shape.parameters / 1e9:.2f} billion parameters in {model.shape.layers} layers; prompts are read after "
        f"layer {s.input_layer} by an SAE of {s.d_sae_in} latents, responses after layer {s.output_layer} by one of "
        f"{s.d_sae_out}. Steering a token adds at most {_percent(dense.flops_share)} to the FLOPs and "
        f"{_percent(dense.bytes_share)} to the bytes of the model's own step."
    )
