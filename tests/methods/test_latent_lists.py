"""Lists of several policies side by side, in buffers at fixed addresses, and the edit as autograd sees it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import D_MODEL, SAE_KINDS, SaeKind, tiny_model, tiny_policy
from torch import Tensor

from dspa.errors import InvalidInputError
from dspa.kernels import EditList
from dspa.kernels.token_step import prepared
from dspa.methods.latent_lists import LatentListEditor, LatentLists

CPU = torch.device("cpu")
MODEL: Any = tiny_model("llama")


def editor(alphas: tuple[float, ...] = (0.5, 0.9), kind: SaeKind = "jumprelu", longest: int = 8) -> LatentListEditor:
    sae = tiny_policy(MODEL, kind).output_sae
    lists = {name: LatentLists(2, sae, alpha, longest) for name, alpha in zip("ab", alphas, strict=False)}
    found = lists["a"].editor(lists, CPU, "reference", None)
    assert isinstance(found, LatentListEditor)
    return found


def lists_of(found: LatentListEditor, row: int) -> tuple[list[int], list[int]]:
    edits = found.selection()
    assert edits is not None
    return edits.augmented(row), edits.ablated(row)


def address_of(found: LatentListEditor) -> int:
    edits = found.selection()
    assert edits is not None
    return edits.latents.data_ptr()


def test_lists_of_different_lengths_stand_side_by_side_at_fixed_addresses() -> None:
    found = editor()
    found.begin_prompt(["a", "b", None])
    found.set_selection(EditList.from_lists([[1, 2, 3]], [[4]]), torch.tensor([0]))
    found.set_selection(EditList.from_lists([[5]], [[]]), torch.tensor([1]))
    assert [lists_of(found, row) for row in range(3)] == [([1, 2, 3], [4]), ([5], []), ([], [])]
    address = address_of(found)
    found.begin_prompt(["b", "b", "b"])
    assert [lists_of(found, row) for row in range(3)] == [([], [])] * 3
    found.set_selection(EditList.from_lists([[7]] * 3, [[8]] * 3), torch.arange(3))
    assert [lists_of(found, row) for row in range(3)] == [([7], [8])] * 3
    assert address_of(found) == address


def test_each_row_is_edited_with_the_strength_of_its_policy() -> None:
    """The step of a row is alpha times its M, so that two rows of one state move by 0.5 and 0.9 of it."""
    found = editor()
    state = torch.randn(1, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    f = found.sae.encode(state)[0]  # type: ignore[attr-defined]
    latent = int(f.argmax())
    found.begin_prompt(["a", "b"])
    found.set_selection(EditList.from_lists([[latent]] * 2, [[]] * 2), torch.arange(2))
    described = found.describe(state.expand(2, D_MODEL), None)
    for row, alpha in enumerate((0.5, 0.9)):
        edit = described[row]
        assert edit is not None
        ((change,),) = (edit.changes,)
        assert change.after == pytest.approx((1 + alpha) * float(f[latent]), rel=1e-12)


def test_a_list_longer_than_declared_is_refused() -> None:
    found = editor(longest=3)
    found.begin_prompt(["a"])
    with pytest.raises(InvalidInputError, match=r"selected lists of 4 latents; .* longest_list = 3"):
        found.set_selection(EditList.from_lists([[1, 2, 3]], [[4]]), torch.tensor([0]))


def test_what_the_backend_keeps_is_allocated_with_the_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a step without a row: later ones may be captured in a graph, which must not hold what is allocated in it."""
    steps: list[tuple[Any, ...]] = []
    monkeypatch.setattr(prepared, "token_step", lambda *arguments, **options: steps.append(arguments))
    found = editor()
    for _ in range(2):
        found.begin_prompt(["a", None])
    ((hidden, sae, edits, _, enabled, _),) = steps
    assert (hidden.shape, sae, edits) == ((2, D_MODEL), found.sae, found.selection())
    assert not enabled.any()


@pytest.mark.parametrize("kind", SAE_KINDS)
def test_the_differentiable_edit_is_the_edit_and_its_gradient_is_exact(kind: SaeKind) -> None:
    found = editor(kind=kind)
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 3, D_MODEL, dtype=torch.float64, generator=generator)
    found.begin_prompt(["a", "b"])
    found.set_selection(EditList.from_lists([[0, 1, 2, 3]] * 2, [[4, 5, 6, 7]] * 2), torch.arange(2))
    enabled = torch.tensor([[True, True, False], [True, False, True]])
    edited = hidden.clone()
    found.edit(edited, enabled, [None] * 3)
    assert not torch.equal(edited, hidden)

    def function(states: Tensor) -> Tensor:
        return found.differentiable_edit(states, enabled)

    torch.testing.assert_close(function(hidden), edited, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(function, (hidden.clone().requires_grad_(),))
