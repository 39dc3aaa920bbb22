"""Which backend a call gets, and what is said when there is none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from kernel_cases import Kind, backend_parameters, make_sae
from torch import Tensor

from dspa.errors import BackendUnavailableError, DspaError
from dspa.kernels import (
    Backend,
    EditList,
    Operations,
    SaeWeights,
    available,
    register_backend,
    token_step,
)
from dspa.kernels.backends import choice, registry
from dspa.kernels.backends.registry import OperationName, operations_for

HIDDEN = torch.zeros(1, 8)
STATUS, UNDER_TEST = available(), [parameter.id for parameter in backend_parameters()]  # of the registry as it is


class Named:
    """Operations that only say whose they are."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def __call__(self, *arguments: object, **options: object) -> object:
        raise AssertionError(f"called {self.owner}")


def operations(owner: str, refused: str | None = None) -> Operations:
    def refuses(operation: OperationName, operands: tuple[Tensor, ...], sae: SaeWeights | None) -> str | None:
        if refused and operands[0].dtype == torch.float64:
            return refused
        return None

    call = Named(owner)
    return Operations(call, call, call, refuses)  # pyright: ignore[reportArgumentType]


def owner(backend: str = "auto", dtype: torch.dtype = torch.float32) -> str:
    call = operations_for(backend, "token_step", (HIDDEN.to(dtype),)).token_step
    return call.owner if isinstance(call, Named) else "reference"


def missing() -> Operations:
    raise BackendUnavailableError("no compiler was found")


@pytest.mark.parametrize("name", ["reference", "cpu", "triton", "cuda"])
def test_the_backend_is_under_test(name: str) -> None:
    """A backend that is missing is one skip, here, and none in the tests of all backends."""
    if STATUS[name] != "available":
        pytest.skip(f"backend {name}: {STATUS[name]}")
    assert name in UNDER_TEST


@pytest.fixture(autouse=True)
def only_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    """A registry of its own for every test."""
    monkeypatch.setattr(registry, "_backends", {"reference": registry._backends["reference"]})
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.delenv("DSPA_BACKEND", raising=False)


def test_the_reference_is_always_there() -> None:
    assert available() == {"reference": "available"}
    assert owner() == owner("reference") == "reference"


def test_auto_asks_the_last_registered_first() -> None:
    register_backend(Backend("older", ("cpu",), lambda: operations("older")))
    register_backend(Backend("newer", ("cpu",), lambda: operations("newer")))
    assert owner() == "newer"
    assert owner("older") == "older"


def test_auto_passes_over_other_devices() -> None:
    register_backend(Backend("gpu", ("cuda",), lambda: operations("gpu")))
    assert owner() == "reference"
    assert owner("gpu") == "gpu"


def test_auto_passes_over_a_backend_that_is_missing_or_refuses() -> None:
    register_backend(Backend("fast", ("cpu",), lambda: operations("fast", refused="no float64")))
    register_backend(Backend("faster", ("cpu",), missing))
    assert owner() == "fast"
    assert owner(dtype=torch.float64) == "reference"


def test_a_named_backend_that_refuses_says_why() -> None:
    register_backend(Backend("fast", ("cpu",), lambda: operations("fast", refused="no float64")))
    with pytest.raises(BackendUnavailableError, match="'fast' does not serve this token_step: no float64"):
        owner("fast", torch.float64)


def test_a_missing_backend_says_why() -> None:
    register_backend(Backend("fast", ("cpu",), missing))
    assert available() == {"reference": "available", "fast": "no compiler was found"}
    with pytest.raises(BackendUnavailableError, match="'fast' is not available: no compiler was found"):
        owner("fast")


def test_an_unknown_backend_is_named_with_those_known() -> None:
    register_backend(Backend("fast", ("cpu",), missing))
    with pytest.raises(BackendUnavailableError, match="'best' is not known; expected auto, reference, fast") as raised:
        owner("best")
    assert isinstance(raised.value, DspaError)
    assert "\n" not in str(raised.value)


def test_loading_happens_once_and_late() -> None:
    loads = []

    def load() -> Operations:
        loads.append(1)
        return operations("fast")

    register_backend(Backend("fast", ("cpu",), load))
    assert not loads
    assert owner("reference") == "reference"
    assert not loads
    assert owner() == owner() == owner("fast") == "fast"
    assert len(loads) == 1


def test_registering_again_replaces() -> None:
    register_backend(Backend("fast", ("cpu",), missing))
    assert owner() == "reference"
    register_backend(Backend("fast", ("cpu",), lambda: operations("fast")))
    assert owner() == "fast"


def test_environment_variable_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    register_backend(Backend("fast", ("cpu",), lambda: operations("fast", refused="no float64")))
    monkeypatch.setenv("DSPA_BACKEND", "reference")
    assert owner() == "reference"
    assert owner("fast") == "fast", "an argument goes before the environment"
    for unset in ("auto", ""):
        monkeypatch.setenv("DSPA_BACKEND", unset)
        assert owner() == "fast"
    monkeypatch.setenv("DSPA_BACKEND", "fast")
    with pytest.raises(BackendUnavailableError, match="no float64"):
        owner(dtype=torch.float64)
    monkeypatch.setenv("DSPA_BACKEND", "fastest")
    with pytest.raises(BackendUnavailableError, match="'fastest' is not known"):
        owner()


def test_operations_are_reached_through_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    register_backend(Backend("fast", ("cpu",), lambda: operations("fast")))
    sae, edits = make_sae(Kind(), 8, 16, torch.float32, 0), EditList.empty(1, 1)
    with pytest.raises(AssertionError, match="called fast"):
        token_step(HIDDEN, sae, edits, 0.2)
    monkeypatch.setenv("DSPA_BACKEND", "reference")
    token_step(HIDDEN, sae, edits, 0.2)


# ---- what was measured -----------------------------------------------------------------------------------------------

MEASURED = {
    "sm_90": {
        "token_step": {(2304, 16384, False): "one", (4096, 131072, False): "other", (2304, 16384, True): "other"},
        "encode_density": {(2304, 16384, False): "other"},
    }
}


@pytest.mark.parametrize(
    ("operation", "architecture", "d_model", "d_sae", "topk", "expected"),
    [
        ("token_step", "sm_90", 2304, 16384, False, "one"),
        ("token_step", "sm_90", 2048, 24576, False, "one"),
        ("token_step", "sm_90", 4096, 65536, False, "other"),
        ("token_step", "sm_90", 4096, 131072, True, "other"),
        ("encode_density", "sm_90", 4096, 131072, True, "other"),
        ("token_step", "sm_80", 2304, 16384, False, None),
        ("lookup", "sm_90", 2304, 16384, False, None),
    ],
)
def test_the_nearest_measured_sae_decides(
    operation: str,
    architecture: str,
    d_model: int,
    d_sae: int,
    topk: bool,
    expected: str | None,
    measured: None,
) -> None:
    assert choice._nearest(operation, architecture, d_model, d_sae, topk) == expected


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(choice, "FASTEST", MEASURED)
    monkeypatch.setattr(choice, "architecture", lambda device: "sm_90")
    choice._nearest.cache_clear()
    yield
    choice._nearest.cache_clear()


class OnGpu:
    """What the registry looks at, of a tensor on a GPU."""

    device, dtype = torch.device("cuda", 0), torch.float32


@pytest.mark.parametrize(("d_sae", "expected"), [(16384, "one"), (131072, "other")])
def test_auto_asks_the_measured_fastest_first(d_sae: int, expected: str, measured: None) -> None:
    register_backend(Backend("one", ("cuda",), lambda: operations("one")))
    register_backend(Backend("other", ("cuda",), lambda: operations("other")))
    numbers = torch.empty(d_sae, device="meta")
    W_enc = torch.empty(d_sae, 2304 if d_sae == 16384 else 4096, device="meta")
    sae = SaeWeights(W_enc=W_enc, b_enc=numbers, threshold=numbers, activation="jumprelu")
    operands: Any = (OnGpu(),)

    def asked_first(operation: OperationName, sae: SaeWeights | None) -> Any:
        return operations_for("auto", operation, operands, sae).token_step

    assert asked_first("token_step", sae).owner == expected
    assert asked_first("lookup", None).owner == "other"
    register_backend(Backend(expected, ("cuda",), missing))
    assert asked_first("token_step", sae).owner == ("other" if expected == "one" else "one")


def test_no_backend_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_backends", {})
    with pytest.raises(BackendUnavailableError, match="no backend serves token_step on cpu"):
        owner()
