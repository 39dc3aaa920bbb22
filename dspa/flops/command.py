"""`dspa flops`: from its options to a report and its files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args

from dspa.errors import InvalidInputError
from dspa.flops.alignment import AlignmentAssumptions
from dspa.flops.charts import draw_png
from dspa.flops.counter import PUBLISHED_MODELS, counted_alignment, load_config, meta_model, model_shape
from dspa.flops.inference import InferenceAssumptions
from dspa.flops.page import to_html
from dspa.flops.quantities import Machine, MeasuredStep, MethodCost
from dspa.flops.report import FlopsReport, ModelReport, ReportOptions
from dspa.flops.shapes import AttentionPairs, SteeringShape
from dspa.flops.tables import to_markdown
from dspa.offline.preferences import PreferenceTriple
from dspa.util.files import write_atomically
from dspa.util.progress import track
from dspa.util.records import read_json

AssumptionsT = TypeVar("AssumptionsT", AlignmentAssumptions, InferenceAssumptions)

PUBLISHED = {model.config: model for model in PUBLISHED_MODELS}
ORGANISM_TRIPLES = 64


def run_flops(options: Mapping[str, Any], *, progress: bool) -> FlopsReport:
    """The report for the options of `dspa flops`, its files written.

    Args:
        options: every option by name; see `dspa.cli.flops`.
        progress: whether to draw a progress bar.

    Raises:
        InvalidInputError: for an option that cannot be used, or a model that is not there.
        DspaError: if a file cannot be written.
    """
    if options["pairs"] not in get_args(AttentionPairs):
        raise InvalidInputError(f"pairs is {options['pairs']!r}; expected one of {', '.join(get_args(AttentionPairs))}")
    if options["triples"] < 1:
        raise InvalidInputError(f"triples is {options['triples']}; expected at least 1")
    chosen = ReportOptions(
        _assumptions(AlignmentAssumptions, options),
        _assumptions(InferenceAssumptions, options),
        options["triples"],
        options["parameters"],
    )
    names = options["model"] or [published.config for published in PUBLISHED_MODELS]
    models = [_model_report(name, options, chosen) for name in track(names, "FLOPs", enabled=progress, unit="models")]
    report = FlopsReport.from_models(chosen, models, _read_machine(options["machine"]))
    if options["measure"]:
        report = _measured(report, options)
    _write(report, options)
    return report


def _assumptions(kind: type[AssumptionsT], options: Mapping[str, Any]) -> AssumptionsT:
    return kind(**{field.name: options[field.name] for field in fields(kind) if field.name in options})


def _model_report(name: str, options: Mapping[str, Any], chosen: ReportOptions) -> ModelReport:
    model = meta_model(load_config(name))
    shape = model_shape(model, PUBLISHED[name.lower()].label if name.lower() in PUBLISHED else Path(name).stem)
    steering = _steering(name, options).check(shape)
    counted: list[MethodCost] = list(counted_alignment(model, steering, chosen.alignment)) if options["count"] else []
    return ModelReport.from_measurements(shape, steering, chosen, counted)


def _measured(report: FlopsReport, options: Mapping[str, Any]) -> FlopsReport:
    from dspa.flops.measure import measure_counts, measure_machine

    names = options["model"] or []
    if len(names) > 1:
        raise InvalidInputError(f"--measure takes one model with weights; got {len(names)}")
    model, name, triples, steering = _local_model(names[0], options) if names else _organism()
    context = getattr(model.config, "max_position_embeddings", None) or report.options.inference.context
    inference = replace(
        report.options.inference,
        prompt_tokens=min(report.options.inference.prompt_tokens, context),
        context=min(report.options.inference.context, context),
    )
    rows = measure_counts(model, name, triples, steering, inference)
    machine = measure_machine(report.models[0].shape.d_model)
    return replace(report, machine=machine).with_measured(name, tuple(rows))


def _organism() -> tuple[Any, str, tuple[PreferenceTriple, ...], SteeringShape]:
    from dspa.offline.preferences import load_preferences
    from dspa.organism import DATA, INPUT_LAYER, OUTPUT_LAYER, load_model, sae_folder, triples_file

    try:
        model, tokenizer = load_model(DATA)
        widths = [read_json(sae_folder(which, DATA) / "cfg.json")["d_sae"] for which in ("input", "output")]
        triples = load_preferences(str(triples_file(DATA)), tokenizer, limit=ORGANISM_TRIPLES)
    except (OSError, KeyError, ValueError) as error:
        raise InvalidInputError(f"the organism cannot be read: {error}") from error
    return model, "the organism", triples.triples, SteeringShape(INPUT_LAYER, OUTPUT_LAYER, *widths)


def _local_model(name: str, options: Mapping[str, Any]) -> tuple[Any, str, tuple[PreferenceTriple, ...], SteeringShape]:
    """A model with weights, and one triple of the assumed lengths, cut to its context."""
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, attn_implementation="eager").eval()
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"--measure needs a model with weights: {str(error).splitlines()[0]}") from error
    room = getattr(model.config, "max_position_embeddings", None) or 10**9
    prompt = min(options["prompt_tokens"], room // 2)
    chosen, rejected = (min(options[key], room - prompt) for key in ("chosen_tokens", "rejected_tokens"))
    triple = PreferenceTriple((0,) * prompt, (0,) * chosen, (0,) * rejected, chosen, rejected, "assumed lengths")
    return model, name, (triple,), _steering(name, options)


def _steering(name: str, options: Mapping[str, Any]) -> SteeringShape:
    known = PUBLISHED.get(name.lower())
    input_layer, output_layer = options["input_layer"], options["output_layer"]
    if known is not None:
        input_layer = known.input_layer if input_layer is None else input_layer
        output_layer = known.output_layer if output_layer is None else output_layer
    if input_layer is None or output_layer is None:
        raise InvalidInputError(f"{name} is none of the published models; pass --input-layer and --output-layer")
    return SteeringShape(input_layer, output_layer, options["d_sae_in"], options["d_sae_out"])


def _read_machine(path: Path | None) -> Machine | None:
    """The machine of an earlier report.

    Raises:
        InvalidInputError: if it cannot be read, or measured none.
    """
    if path is None:
        return None
    try:
        record = read_json(path)["machine"]
        if record is None:
            raise InvalidInputError(f"{path} measured no machine; make it with --measure")
        steps = tuple(MeasuredStep(**step) for step in record.pop("steps"))
        return Machine(**record, steps=steps)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidInputError(f"{path} is not a report of dspa flops ({error})") from error


def _write(report: FlopsReport, options: Mapping[str, Any]) -> None:
    contents = {
        "markdown": lambda: to_markdown(report).encode(),
        "html": lambda: to_html(report).encode(),
        "png": lambda: draw_png(report),
    }
    for kind, content in contents.items():
        path: Path | None = options[kind]
        if path is not None:
            write_atomically(path, content())
