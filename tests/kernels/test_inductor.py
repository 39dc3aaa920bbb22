"""What inductor generates around a token step: the tensors that it writes to are passed as they are, not copied."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_cases import Kind, edit_list, generator, make_sae, normal, random_lists
from torch import Tensor
from torch._inductor.utils import run_and_get_code

from dspa.kernels import EditList, SaeWeights, TokenStats, available, token_step

BATCH, POSITIONS, D_MODEL, D_SAE, K = 3, 4, 48, 96, 8
STEP = re.compile(r"torch\.ops\.dspa\w*\.token_step\.default\((.*)\)")
ALLOCATION = re.compile(r"^ *\w+ = empty_strided_cpu\(", re.MULTILINE)
COPY = re.compile(r"\.copy_\(|clone\(|cpp_fused\w+\(", re.IGNORECASE)


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Model:
    """A step between two matrix products, for which inductor calls a library: no C++ is compiled.

    Attributes:
        given: the input, `[B, T, d_model]`.
    """

    def __init__(self, backend: str) -> None:
        if available().get(backend) != "available":
            pytest.skip(f"backend {backend}: {available().get(backend)}")
        self.backend = backend
        self.given = normal(generator(1), BATCH, POSITIONS, D_MODEL).float()
        self.weight = normal(generator(2), D_MODEL, D_MODEL).float() / 8
        self.sae: SaeWeights = make_sae(Kind(), D_MODEL, D_SAE, torch.float32, seed=0)
        self.lists: EditList = edit_list(*random_lists(self.sae, BATCH, K, 2), K)
        self.stats = TokenStats.zeros(BATCH, D_SAE)
        self.enabled = torch.ones(BATCH, dtype=torch.bool)
        self.edit(torch.zeros(BATCH, D_MODEL))  # makes the scratch

    def product(self, hidden: Tensor) -> Tensor:
        return (hidden.view(-1, D_MODEL) @ self.weight).view(hidden.shape)

    def edit(self, hidden: Tensor) -> None:
        token_step(hidden, self.sae, self.lists, 0.2, self.enabled, self.stats, backend=self.backend)

    def one_position(self, given: Tensor) -> Tensor:
        hidden = self.product(given)
        self.edit(hidden[:, -1])
        return self.product(hidden)

    def two_positions(self, given: Tensor) -> Tensor:
        hidden = self.product(given)
        self.edit(hidden[:, 1])
        self.edit(hidden[:, 2])
        return self.product(hidden)

    def two_layers(self, given: Tensor) -> Tensor:
        return self.one_position(self.one_position(given))

    def states_before_as_well(self, given: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.product(given)
        before = hidden.clone()
        self.edit(hidden[:, -1])
        return self.product(hidden), before


def code_of(function: Callable[..., object], given: Tensor) -> str:
    """The generated code of the call that the compiled function makes, and a check that it computes the same."""
    with torch.no_grad():
        expected = function(given)
        found, code = run_and_get_code(torch.compile(function, fullgraph=True), given)
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert len(code) == 1
    return code[0][code[0].index("def call(") : code[0].index("\nrunner = ")]


@pytest.mark.parametrize("backend", ["cpu", pytest.param("triton", marks=pytest.mark.emulated)])
@pytest.mark.parametrize("form", ["one_position", "two_positions", "two_layers"])
def test_no_argument_is_copied(form: str, backend: str) -> None:
    """Memory is allocated for the states and for the result, and is reused."""
    model = Model(backend)
    code = code_of(getattr(model, form), model.given)
    calls = STEP.findall(code)
    assert len(calls) == (1 if form == "one_position" else 2)
    assert len(ALLOCATION.findall(code)) == 2, code
    assert not COPY.search(code), code
    for call in calls:
        hidden, *others = re.findall(r"(?:buf|arg)\d\w*", call)
        assert hidden.startswith("buf")
        assert all(name.startswith("arg") for name in others), call  # they come from outside


@pytest.mark.long
def test_a_copy_would_show() -> None:
    """The states before the edit are needed as well, so there has to be one."""
    model = Model("cpu")
    code = code_of(model.states_before_as_well, model.given)
    assert COPY.search(code)
    assert len(ALLOCATION.findall(code)) > 2
