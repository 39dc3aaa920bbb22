"""What `dspa flops` found, as one record.

Nothing here depends on the time, the place or the order of anything: the same inputs produce the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

from dspa.flops.alignment import (
    AlignmentAssumptions,
    PublishedFigures,
    alignment_costs,
    collection_reference,
    published_figures,
    ratio,
)
from dspa.flops.fsrl import FsrlToken, FsrlTraining, fsrl_token, fsrl_tokens, fsrl_training
from dspa.flops.inference import (
    InferenceAssumptions,
    break_even_tokens,
    decode_step,
    prefill,
    steer_prompt,
    steer_token,
)
from dspa.flops.quantities import COLLECTED, FSRL, MODES, PUBLISHED, RAHF, Machine, MeasuredRow, MethodCost, Mode, Work
from dspa.flops.shapes import ModelShape, SteeringShape
from dspa.util.provenance import Provenance

TERMS = ((False, False), (False, True), (True, False), (True, True))
"""Attention counted, SAE counted."""


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
    fsrl_tokens: tuple[FsrlToken, ...]
    fsrl_training: tuple[FsrlTraining, ...]

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
            fsrl_tokens=fsrl_tokens(shape, a, i),
            fsrl_training=fsrl_training(shape, a, i),
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
