"""A report as one self-contained HTML page."""

from __future__ import annotations

import html

from dspa.flops.charts import CHARTS, draw_svg
from dspa.flops.report import FlopsReport, ModelReport
from dspa.flops.tables import assumptions_json, measured_table, model_tables, percent, provenance_line, published_table
from dspa.util.report_parts import html_figure, html_page

CAPTIONS = {
    "stages": "What each method computes for one preference triple, from left to right:",
    "triples": "Every method's alignment stage grows in proportion to the triples it sees. Dotted: the N used below.",
    "overhead": "What steering adds to a generated token as the sparse autoencoder gets wider. Where times are shown, "
    "the roofline is that of main memory: an encoder that stays in the processor's cache is read faster.",
    "total": "Steering pays a little for every token; a method that changes the weights pays before the first one. "
    "Where the lines cross, the latter would have been cheaper. FSRL pays at both times. Lazy and screened need nearly "
    "the same FLOPs and lie on one another; they differ in the bytes they read.",
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
    body.append(f"<pre>{html.escape(assumptions_json(report))}</pre>")
    body.append(f'<p class="note">{html.escape(provenance_line(report))}</p>')
    return html_page("FLOPs of DSPA", body)


def _html_chart(chart: str, report: FlopsReport, model: ModelReport) -> str:
    caption = CAPTIONS[chart]
    if chart == "stages":
        caption += " " + "; ".join(f"{m.method}: {', '.join(s.name for s in m.stages)}" for m in model.methods) + "."
    return html_figure(draw_svg(chart, report, model), caption)


def _introduction(report: FlopsReport) -> str:
    headline = "".join(
        f"<div><b>{_best(model):.2f}x</b><span>RAHF-SCIT / DSPA, {html.escape(model.shape.name)}</span></div>"
        for model in report.models
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
        f"{s.d_sae_out}. Steering a token adds at most {percent(dense.flops_share)} to the FLOPs and "
        f"{percent(dense.bytes_share)} to the bytes of the model's own step."
    )
