"""A residual vector: what is added, where, what is refused, and that a saved policy is the same policy."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from altered_records import change_record
from tiny_models import D_MODEL, LAYERS, prompts, tiny_model
from torch import Tensor

from dspa import VectorPolicy
from dspa.errors import CorruptFileError, InvalidInputError, MismatchError
from dspa.kernels import EditList, TokenStats
from dspa.methods.vector_policy import ResidualVector, ResidualVectorEditor
from dspa.online.steering import steer
from dspa.transformers_model import ModelFingerprint

CPU = torch.device("cpu")
VECTOR = torch.arange(D_MODEL, dtype=torch.float64) - 7.5


def editor(**strengths: float) -> ResidualVectorEditor:
    vectors = {name: ResidualVector(2, VECTOR, strength) for name, strength in strengths.items()}
    found = next(iter(vectors.values())).editor(vectors, CPU, "auto", None)
    assert isinstance(found, ResidualVectorEditor)
    return found


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_each_row_gets_its_vector_rounded_once(dtype: torch.dtype) -> None:
    hidden = torch.randn(3, 2, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(dtype)
    found, edited = editor(a=0.5, b=-2.0), hidden.clone()
    found.begin_prompt(["a", None, "b"])
    stats = [TokenStats.zeros(3, 0), None]
    found.edit(edited, torch.tensor([[True, True], [True, True], [False, True]]), stats)
    for row, position, strength in [(0, 0, 0.5), (0, 1, 0.5), (1, 0, 0.0), (1, 1, 0.0), (2, 0, 0.0), (2, 1, -2.0)]:
        wide = torch.promote_types(dtype, torch.float64)
        expected = (hidden[row, position].to(wide) + strength * VECTOR).to(dtype)
        assert torch.equal(edited[row, position], expected), (row, position)
    assert (stats[0].seen.tolist(), stats[0].edited.tolist()) == ([1, 1, 0], [1, 0, 0])  # type: ignore[union-attr]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_with_nan_or_inf_is_left_alone_and_counted(value: float) -> None:
    hidden = torch.zeros(2, 1, D_MODEL)
    hidden[0, 0, 3] = value
    found, edited, stats = editor(a=1.0), hidden.clone(), TokenStats.zeros(2, 0)
    found.begin_prompt(["a", "a"])
    found.edit(edited, None, [stats])
    assert edited[0].equal(hidden[0]) or edited[0].isnan().any()
    assert torch.equal(edited[0].nan_to_num(), hidden[0].nan_to_num())
    assert torch.equal(edited[1, 0], VECTOR.float())
    assert (stats.nonfinite.tolist(), stats.edited.tolist()) == ([1, 0], [0, 1])


def test_the_differentiable_edit_is_the_edit_and_its_gradient_is_exact() -> None:
    vector = VECTOR.clone().requires_grad_()
    enabled = torch.tensor([[True, False], [True, True]])

    def function(states: Tensor, vector: Tensor) -> Tensor:
        found = ResidualVectorEditor({"a": ResidualVector(2, vector, 0.5)}, CPU)
        found.begin_prompt(["a", None])
        return found.differentiable_edit(states, enabled)

    hidden = torch.randn(2, 2, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = hidden.clone()
    expected[0, 0] += 0.5 * VECTOR
    assert torch.equal(function(hidden, vector), expected)
    assert torch.autograd.gradcheck(function, (hidden.requires_grad_(), vector))


def test_latents_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="select must return None"):
        editor(a=1.0).set_selection(EditList.empty(1, 1), torch.tensor([0]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vector": torch.zeros(2, 3)}, "the vector is (2, 3) torch.float32; expected [d_model] floating point"),
        ({"vector": torch.zeros(3, dtype=torch.int64)}, "torch.int64; expected [d_model] floating point"),
        ({"vector": torch.tensor([0.0, math.nan])}, "the vector holds NaN or Inf"),
        ({"scale": 1e308}, "scale is 1e+308; expected a finite float32"),
        ({"layer": 2.0}, "layer is 2.0; expected an integer"),
        ({"scale": math.inf}, "scale is inf; expected a finite float32"),
        ({"edit_positions": "some"}, "edit_positions is 'some'; expected one of"),
    ],
)
def test_bad_options_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        VectorPolicy(**{"vector": torch.zeros(3), "layer": 1, **arguments})
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (VectorPolicy(torch.zeros(D_MODEL), LAYERS), "vector layer is 4; this model's layers are 0 to 3"),
        (VectorPolicy(torch.zeros(5), 1), "the vector has 5 elements; expected the model's hidden size 24"),
    ],
)
def test_a_vector_that_does_not_fit_the_model_is_refused(policy: VectorPolicy, message: str) -> None:
    with pytest.raises(MismatchError) as error:
        steer(tiny_model(), policy)
    assert message in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("with_model", [False, True])
def test_a_saved_policy_is_the_same_policy(dtype: torch.dtype, with_model: bool, tmp_path: Path) -> None:
    model = ModelFingerprint.from_model(tiny_model()) if with_model else None
    policy = VectorPolicy(VECTOR.to(dtype), 2, -0.5, model=model, edit_positions="all", uncounted_token_ids=(1, 3))
    loaded = VectorPolicy.from_pretrained(policy.save_pretrained(tmp_path))
    assert torch.equal(loaded.vector, policy.vector)
    assert loaded.vector.dtype == dtype
    for name in ("layer", "scale", "model", "edit_positions", "uncounted_token_ids"):
        assert getattr(loaded, name) == getattr(policy, name)


@pytest.mark.parametrize(
    "change", [{"layer": "2"}, {"scale": None}, {"edit_positions": "some"}, {"uncounted_token_ids": 3}, {"model": {}}]
)
def test_a_spoilt_configuration_is_refused_in_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    VectorPolicy(VECTOR, 2).save_pretrained(tmp_path)
    change_record(tmp_path / "config.json", lambda config: config.update(change))
    with pytest.raises(CorruptFileError, match="does not hold a whole vector_policy"):
        VectorPolicy.from_pretrained(tmp_path)


def test_a_vector_steers_generation_and_zero_changes_nothing() -> None:
    model, rows = tiny_model(), prompts((5, 3))

    def logits() -> Tensor:
        with torch.no_grad():
            return model(torch.tensor(rows[:1])).logits

    plain = logits()
    with steer(model, VectorPolicy(VECTOR, 2, 0.0)) as steering:
        assert torch.equal(logits(), plain)
    assert steering.summary().tokens_edited == 0
    with steer(model, VectorPolicy(VECTOR, 2, 0.3)) as steering:
        assert not torch.equal(logits(), plain)
    assert (steering.summary().tokens_edited, steering.edits) == (1, None)
