"""What the study measures on triples, by hand on a tiny model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from study import diagnosis
from study.diagnosis import MOST_MEASURED, Reading, attempts, measured_triples, read
from study.methods import Try
from study.settings import FULL, QUICK, Settings

import dspa

LAYER = 1
ROWS = (((1, 9, 8, 7), (6, 5, 20)), ((1, 9), (30, 31, 32, 12, 6)))


@pytest.mark.parametrize(("triples", "measured"), [(6, 2), (30, 10), (500, MOST_MEASURED)])
def test_at_most_a_third_of_the_triples_is_measured(triples: int, measured: int) -> None:
    assert measured_triples(triples) == measured


@pytest.mark.parametrize("settings", [FULL, QUICK], ids=lambda settings: settings.name)
def test_no_training_sees_a_measured_triple(settings: Settings) -> None:
    assert settings.pairs_per_training <= settings.triples - measured_triples(settings.triples)


@pytest.mark.parametrize("scale", [None, 0.5])
def test_a_response_is_read_as_it_would_be_generated(tiny: tuple[Any, Any], scale: float | None) -> None:
    vector = torch.randn(tiny[0].config.hidden_size, generator=torch.Generator().manual_seed(0))
    policy = None if scale is None else dspa.VectorPolicy(vector, LAYER, scale)
    with torch.no_grad():
        logits, states = read(*tiny, ROWS, policy, LAYER)
        for place, (prompt, response) in enumerate(ROWS):
            ids = torch.tensor([[*prompt, *response]])
            plain = tiny[0](ids, output_hidden_states=True)
            edited = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
            before = plain.hidden_states[LAYER + 1][0, edited]
            after = states[place, -len(response) - 1 : -1]
            torch.testing.assert_close(after, before if scale is None else before + scale * vector)
            scores = logits[place, -len(response) - 1 : -1]
            assert torch.allclose(scores, plain.logits[0, edited], atol=1e-4) is (scale is None)


def test_an_effect_is_the_change_from_the_unsteered_model() -> None:
    unsteered = Reading(np.array([[-1.0, -2.0], [-2.0, -1.0]]), [torch.tensor([[3.0, 4.0]])] * 4)
    steered = Reading(np.array([[-1.0, -3.0], [-4.0, -1.0]]), [torch.tensor([[3.0, 5.0], [3.0, 4.0]])] * 4)
    found = steered.beside(unsteered)
    assert found["size"] == pytest.approx(0.1)  # a fifth of the norm at one of two tokens
    assert found["margin"][0] == pytest.approx((1 - 2) / 2)
    assert found["chosen"][0] == pytest.approx((0 - 2) / 2)
    assert found["raised"] == 0.5


def test_methods_are_made_without_the_measured_triples(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    def make(_material: Any, _index: int, count: int) -> Try:
        made.append(count)
        return Try("")

    class Recorded:
        def policy(self, _material: Any, count: int) -> None:
            made.append(count)

    monkeypatch.setattr(diagnosis, "CURVE", {"static list": make, "DSPA": make})
    monkeypatch.setattr(diagnosis, "STRONGER", {"stronger": lambda _: Recorded()})
    monkeypatch.setattr(diagnosis, "TRAINED", ())
    monkeypatch.setattr(diagnosis, "chosen", lambda *_: SimpleNamespace(index=0))
    material: Any = SimpleNamespace(run=None, task="concise", triples=range(30))
    for attempt in attempts(material).values():
        attempt()
    assert made == [20, 20, 20]
