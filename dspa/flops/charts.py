"""A report as charts: one PNG of all of them, or each as an SVG element."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from dspa.flops.inference import fsrl_token, steer_token
from dspa.flops.quantities import COLLECTED, FSRL, MODES
from dspa.flops.report import FlopsReport, ModelReport
from dspa.flops.tables import number
from dspa.util.report_parts import COLORS, new_figure, png_bytes, svg_element

SWEEP_D_SAE = tuple(2**power for power in range(12, 21))
CHARTS = ("stages", "triples", "overhead", "total")
SHADES = (1.0, 0.6, 0.35)
CHARACTERS = 68  # as many fit into the longest bar
DARK = "#1c2430"  # for words on light shades
MODE_LABELS = {
    "dense": "dense: reads the whole encoder",
    "lazy": "lazy: skips it where the edit needs no M_t",
    "screened": "screened: reads a narrow copy first",
}
MODE_STYLES: dict[str, dict[str, Any]] = {  # told apart where they lie on one another
    "dense": {"linewidth": 4.0, "alpha": 0.35},
    "lazy": {"linewidth": 2.0, "linestyle": "--"},
    "screened": {"linewidth": 1.6, "linestyle": ":"},
}


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
            if width / most * CHARACTERS > len(stage.name):
                ink = "white" if shade > 0.8 else DARK
                axes.text(left + width / 2, y, stage.name, ha="center", va="center", fontsize=7, color=ink)
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
            share = [100 * w.bytes / model.decode.bytes for w in works]
            axes.plot(SWEEP_D_SAE, share, color=color, label=MODE_LABELS[mode])
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
    inks = dict(zip(MODES, (COLORS[0], COLORS[0], "black"), strict=True))
    for row in model.tokens:
        per_token = row.work.flops + model.prompt.flops / i.response_tokens
        axes.plot(
            generated,
            [cost[COLLECTED] + per_token * n for n in generated],
            color=inks[row.mode],
            label=f"DSPA, {MODE_LABELS[row.mode]}",
            **MODE_STYLES[row.mode],
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
