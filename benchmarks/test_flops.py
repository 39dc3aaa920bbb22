"""FLOPs of the alignment stage, counted while the models' code runs on the meta device."""

from __future__ import annotations

import pytest
from record import Record

from dspa.bench.measurements import Column, Interval
from dspa.flops.alignment import AlignmentAssumptions, alignment_costs, published_figures, ratio
from dspa.flops.counter import PUBLISHED_MODELS, PublishedModel, counted_alignment, load_config, meta_model, model_shape
from dspa.flops.quantities import COLLECTED, RAHF
from dspa.flops.shapes import SteeringShape

D_SAE = 16384


# Counts have no noise, and `dspa flops` has those of all published models: here, one that would move with the code.
@pytest.mark.parametrize("published", PUBLISHED_MODELS[:1], ids=lambda published: published.config)
def test_alignment_stage(published: PublishedModel, record: Record) -> None:
    assumptions = AlignmentAssumptions()
    model = meta_model(load_config(published.config))
    shape = model_shape(model, published.label)
    steering = SteeringShape(published.input_layer, published.output_layer, D_SAE, D_SAE).check(shape)

    def check() -> None:
        assert f"{published_figures(assumptions).ratio:.2f}" == "4.47", "the published ratio is not reproduced"

    def run() -> tuple[Column, ...]:
        formulas = alignment_costs(shape, steering, assumptions)
        counted = list(counted_alignment(model, steering, assumptions))
        by_name = {cost.method: cost for cost in counted}
        both = ratio(counted, RAHF, COLLECTED, attention=True, sae=True)
        ours = by_name[COLLECTED].flops.total()
        formula = next(cost for cost in formulas if cost.method == RAHF).flops.total()
        return (
            Column("dspa.collect per triple, counted", "FLOPs", Interval.exactly(ours)),
            Column("RAHF-SCIT / dspa.collect, both counted", "x", Interval.exactly(both), better="higher"),
            Column(
                "RAHF-SCIT by formula with attention / dspa.collect, counted",
                "x",
                Interval.exactly(formula / ours),
                better="higher",
            ),
        )

    record(f"alignment stage, {published.label}", "FLOPs", run, check=check)
