"""Which rows and positions an editor edits, and what it counts: the rows of its group, and speculative positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import D_MODEL, tiny_model, tiny_policy

from dspa.kernels import EditList, token_step
from dspa.kernels.token_step import prepared
from dspa.online.layer_editor import LayerEditor
from dspa.online.policy_groups import editing_groups


def editor(*, all_rows: bool = False, alphas: tuple[float, ...] = (0.5, 0.9)) -> LayerEditor:
    model = tiny_model("llama")
    policies = {name: tiny_policy(model, alpha=alpha) for name, alpha in zip("ab", alphas, strict=False)}
    (group,) = editing_groups(policies)
    return LayerEditor(group, torch.device("cpu"), "reference", None, all_rows=all_rows)


@pytest.mark.parametrize(("accepted", "seen"), [(4, 1), (6, 3), (7, 4), (0, 1)])
def test_speculative_positions_count_when_they_are_accepted(accepted: int, seen: int) -> None:
    found = editor(all_rows=True, alphas=(0.5,))
    found.begin_prompt(["a"])
    found.set_selection(EditList.from_lists([list(range(6))], [[]]), torch.tensor([0]))
    hidden = torch.randn(1, 1, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def edit(position: int, *, positions: int = 1, counted: bool = True, speculative: bool = False) -> None:
        states = hidden.expand(1, positions, D_MODEL).clone()
        found.edit(states, position, None, counted=[counted] * positions, speculative=speculative)

    edit(3)
    edit(4, positions=3, speculative=True)
    stats = found.counters.of_batch(1)
    one = [tensor.clone() for tensor in (stats.latent_edits, stats.maximum_sum)]
    assert stats.seen.tolist() == [1]
    found.counters.commit(accepted, 1)
    assert stats.seen.tolist() == [seen]
    assert torch.equal(stats.latent_edits, seen * one[0])
    torch.testing.assert_close(stats.maximum_sum, seen * one[1])
    found.counters.commit(100, 1)
    assert stats.seen.tolist() == [seen]
    edit(7, counted=False)
    assert stats.seen.tolist() == [seen]


def test_counters_stand_before_the_first_edit() -> None:
    """What a captured graph writes to is not allocated inside of it."""
    found = editor()
    found.begin_prompt(["a", "b", None])
    (counters,) = found.counters.all()
    assert found.counters.of_batch(3) is counters
    assert counters.seen.tolist() == [0, 0, 0]


def test_rows_of_other_policies_and_disabled_positions_are_not_touched() -> None:
    found = editor()
    found.begin_prompt(["a", None, "b"])
    found.set_selection(EditList.from_lists([list(range(6))], [[]]), torch.tensor([0]))
    found.set_selection(EditList.from_lists([list(range(6))], [[]]), torch.tensor([2]))
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1, 1, D_MODEL, dtype=torch.float64, generator=generator).expand(3, 2, D_MODEL).clone()
    before = hidden.clone()
    found.edit(
        hidden, 0, torch.tensor([[True, True], [True, True], [False, True]]), counted=[True, True], speculative=False
    )
    changed = (hidden != before).any(dim=-1)
    assert changed.tolist() == [[True, True], [False, False], [False, True]]
    assert found.counters.of_batch(3).seen.tolist() == [2, 0, 1]


def test_a_batch_without_a_row_of_the_group_is_not_touched() -> None:
    found = editor()
    found.begin_prompt([None, None])
    hidden = torch.randn(2, 1, D_MODEL, dtype=torch.float64)
    before = hidden.clone()
    found.edit(hidden, 0, None, counted=[True], speculative=False)
    assert torch.equal(hidden, before)


def test_where_graphs_are_captured_such_a_batch_is_launched_and_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[int] = []

    def counting(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        launches.append(len(hidden))
        token_step(hidden, *args, **kwargs)

    monkeypatch.setattr(prepared, "token_step", counting)
    found = editor()
    assert not found.always_launches  # on a CPU
    found.always_launches = True
    found.begin_prompt([None, None])
    launches.clear()
    hidden = torch.randn(2, 1, D_MODEL, dtype=torch.float64)
    before = hidden.clone()
    found.edit(hidden, 0, None, counted=[True], speculative=False)
    assert torch.equal(hidden, before)
    assert launches == [2]
    assert not found.counters.totals().any()
