"""Standing in for a method: what calls see, what is put back, what copies get."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from dspa.online.hooks.method_patch import MethodPatch


class Doubling(MethodPatch):
    """Twice what the method returns."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * self.original(*args, **kwargs)


class Half(nn.Module):
    def forward(self, x: torch.Tensor, factor: float = 0.5) -> torch.Tensor:
        """Half of it."""
        return factor * x


ONE = torch.ones(1)


def test_calls_go_through_it_until_it_is_removed() -> None:
    module = Half()
    override = Doubling(module, "forward")
    assert module(ONE) == 0.5
    override.install()
    override.install()
    assert (module(ONE), module(ONE, factor=3)) == (1, 6)
    override.remove()
    override.remove()
    assert module(ONE) == 0.5
    assert "forward" not in vars(module)


def test_it_looks_like_the_method() -> None:
    module = Half()
    signature, doc = inspect.signature(module.forward), module.forward.__doc__
    Doubling(module, "forward").install()
    assert inspect.signature(module.forward) == signature
    assert module.forward.__doc__ == doc


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_overrides_on_top_of_each_other(order: tuple[int, int]) -> None:
    """Taken away from below, the lower one stays in the way, and calls go on passing through it."""
    module = Half()
    overrides = [Doubling(module, "forward"), Doubling(module, "forward")]
    for override in overrides:
        override.install()
    assert module(ONE) == 2
    for index in order:
        overrides[index].remove()
    assert module(ONE) == (0.5 if order == (1, 0) else 1)


def test_an_attribute_of_ones_own_is_put_back() -> None:
    module: Any = Half()
    own = module.forward = lambda x: 7 * x
    override = Doubling(module, "forward")
    override.install()
    assert module(ONE) == 14
    override.remove()
    assert module.forward is own


@pytest.mark.parametrize("make", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_the_method_bound_to_itself(make: Any) -> None:
    module = Half()
    Doubling(module, "forward").install()
    twin = make(module)
    assert (module(ONE), twin(ONE)) == (1, 0.5)
    assert twin.forward.__self__ is twin


def test_a_copy_keeps_an_attribute_of_its_own() -> None:
    module: Any = Half()
    module.forward = torch.neg
    Doubling(module, "forward").install()
    assert (module(ONE), copy.deepcopy(module)(ONE)) == (-2, -1)
