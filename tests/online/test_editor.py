"""Buffers that stay where they are, lists of several policies side by side, and tokens on trial."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import D_MODEL, tiny_model, tiny_policy

from dspa.errors import InvalidInputError
from dspa.kernels import EditList, token_step
from dspa.online import editor as token_editor
from dspa.online.editor import TokenEditor
from dspa.online.policy_groups import editing_groups


def editor(*, all_rows: bool = False, alphas: tuple[float, ...] = (0.5, 0.9)) -> TokenEditor:
    model = tiny_model("llama")
    policies = {name: tiny_policy(model, alpha=alpha) for name, alpha in zip("ab", alphas, strict=False)}
    (group,) = editing_groups(policies)
    return TokenEditor(group, policies, torch.device("cpu"), "reference", None, all_rows=all_rows, recorder=None)


def lists_of(edits: EditList | None, row: int) -> tuple[list[int], list[int]]:
    assert edits is not None
    return edits.augmented(row), edits.ablated(row)


def test_lists_of_different_lengths_stand_side_by_side_at_fixed_addresses() -> None:
    found = editor()
    found.begin(["a", "b", None])
    found.take(EditList.from_lists([[1, 2, 3]], [[4]]), torch.tensor([0]), 3)
    found.take(EditList.from_lists([[5]], [[]]), torch.tensor([1]), 3)
    buffers = found.buffers(3)
    assert [lists_of(buffers.edits, row) for row in range(3)] == [([1, 2, 3], [4]), ([5], []), ([], [])]
    assert buffers.rows.tolist() == [True, True, False]
    assert isinstance(buffers.alpha, torch.Tensor)
    assert buffers.alpha.tolist() == [0.5, 0.9, 0.0]
    assert buffers.edits is not None
    addresses = [tensor.data_ptr() for tensor in (buffers.edits.latents, buffers.rows, buffers.alpha)]
    found.begin(["b", "b", "b"])
    assert [lists_of(buffers.edits, row) for row in range(3)] == [([], [])] * 3
    found.take(EditList.from_lists([[7]] * 3, [[8]] * 3), torch.arange(3), 3)
    assert [lists_of(buffers.edits, row) for row in range(3)] == [([7], [8])] * 3
    assert [tensor.data_ptr() for tensor in (buffers.edits.latents, buffers.rows, buffers.alpha)] == addresses


def test_a_longer_list_keeps_the_shorter_ones() -> None:
    found = editor()
    found.begin(["a", "b"])
    found.take(EditList.from_lists([[1]], [[]]), torch.tensor([0]), 2)
    found.take(EditList.from_lists([[2, 3]], [[4, 5]]), torch.tensor([1]), 2)
    assert [lists_of(found.buffers(2).edits, row) for row in range(2)] == [([1], []), ([2, 3], [4, 5])]


@pytest.mark.parametrize("names", [["a", None], [None, None]], ids=str)
def test_what_the_backend_keeps_is_made_with_the_lists(
    names: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a step without a row: later ones may be captured in a graph, which must not hold what is made in it."""
    steps: list[tuple[Any, ...]] = []
    monkeypatch.setattr(token_editor, "token_step", lambda *arguments, **options: steps.append(arguments))
    found = editor()
    found.always_launches = True
    for _ in range(2):
        found.begin(names)
        if names[0] is not None:
            found.take(EditList.from_lists([[1, 2, 3]], [[4]]), torch.tensor([0]), 2)
    ((hidden, sae, edits, _, enabled),) = steps
    assert (hidden.shape, sae, edits) == ((2, D_MODEL), found.sae, found.buffers(2).edits)
    assert not enabled.any()


def test_one_strength_is_a_number() -> None:
    assert editor(alphas=(0.5, 0.5)).buffers(2).alpha == 0.5


@pytest.mark.parametrize(("accepted", "seen"), [(4, 1), (6, 3), (7, 4), (0, 1)])
def test_columns_on_trial_count_when_they_are_accepted(accepted: int, seen: int) -> None:
    found = editor(all_rows=True, alphas=(0.5,))
    found.begin(["a"])
    found.take(EditList.from_lists([list(range(20))], [[]]), torch.tensor([0]), 1)
    hidden = torch.randn(1, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def edit(column: int, **options: Any) -> None:
        found.edit(hidden.clone(), column, None, **options)

    edit(3, counted=True, on_trial=False)
    for column in (4, 5, 6):
        edit(column, counted=True, on_trial=True)
    stats = found.buffers(1).stats
    one = [tensor.clone() for tensor in (stats.latent_edits, stats.maximum_sum)]
    assert stats.seen.tolist() == [1]
    found.settle(accepted, 1)
    assert stats.seen.tolist() == [seen]
    assert torch.equal(stats.latent_edits, seen * one[0])
    torch.testing.assert_close(stats.maximum_sum, seen * one[1])
    found.settle(100, 1)
    assert stats.seen.tolist() == [seen]
    edit(7, counted=False, on_trial=False)
    assert stats.seen.tolist() == [seen]


def test_a_row_of_nobody_is_not_touched() -> None:
    found = editor()
    found.begin([None, None])
    hidden = torch.randn(2, D_MODEL, dtype=torch.float64)
    before = hidden.clone()
    found.edit(hidden, 0, None, counted=True, on_trial=False)
    assert torch.equal(hidden, before)


def test_where_graphs_are_captured_a_row_of_nobody_is_launched_and_not_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    launches: list[int] = []

    def counting(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        launches.append(len(hidden))
        token_step(hidden, *args, **kwargs)

    monkeypatch.setattr("dspa.online.editor.token_step", counting)
    found = editor()
    assert not found.always_launches  # on a CPU
    found.always_launches = True
    found.begin([None, None])
    launches.clear()
    hidden = torch.randn(2, D_MODEL, dtype=torch.float64)
    before = hidden.clone()
    found.edit(hidden, 0, None, counted=True, on_trial=False)
    assert torch.equal(hidden, before)
    assert launches == [2]
    assert not found.totals().any()


def test_lists_stay_where_they_are_whichever_policy_of_the_group_comes_first() -> None:
    model = tiny_model("llama")
    policies = {"short": tiny_policy(model, k_diff=2), "long": tiny_policy(model, k_diff=7)}
    (group,) = editing_groups(policies)
    found = TokenEditor(group, policies, torch.device("cpu"), "reference", None, all_rows=False, recorder=None)
    addresses = set()
    for name, length in (("short", 4), ("long", 14)):
        found.begin([name])
        found.take(EditList.from_lists([list(range(length))], [[]]), torch.tensor([0]), 1)
        assert lists_of(found.buffers(1).edits, 0) == (list(range(length)), [])
        addresses.add(found.buffers(1).edits.latents.data_ptr())  # type: ignore[union-attr]
    assert len(addresses) == 1


def test_an_edit_before_the_lists_are_known_is_refused() -> None:
    found = editor()
    found.begin(["a"])
    with pytest.raises(InvalidInputError, match="after layer 2 before a prompt was read"):
        found.edit(torch.zeros(1, D_MODEL), 0, None, counted=True, on_trial=False)
