"""The choice of a backend for a call, and the errors where none serves it."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from kernel_cases import Kind, backend_parameters, make_sae

from dspa.errors import BackendUnavailableError, DspaError
from dspa.kernels import (
    Backend,
    EditList,
    Operations,
    SaeWeights,
    Serves,
    available,
    register_backend,
    token_step,
)
from dspa.kernels.backends import choice, registry
from dspa.kernels.backends.cuda import too_wide
from dspa.kernels.backends.interface import OperationName, refusal
from dspa.kernels.backends.registry import operations_for
from dspa.kernels.backends.table import BACKENDS

HIDDEN = torch.zeros(1, 8)
NO_FLOAT64 = Serves(token_step=(torch.float32,))
STATUS, UNDER_TEST = available(), [parameter.id for parameter in backend_parameters()]  # of the registry as it is


class Named:
    """Operations that only say whose they are."""

    def __init__(self, owner: str) -> None:
        self.owner = owner

    def __call__(self, *arguments: object, **options: object) -> object:
        raise AssertionError(f"called {self.owner}")


def operations(owner: str) -> Operations:
    call = Named(owner)
    return Operations(call, call, call)  # pyright: ignore[reportArgumentType]


def owner(backend: str = "auto", dtype: torch.dtype = torch.float32) -> str:
    call = operations_for(backend, "token_step", (HIDDEN.to(dtype),)).token_step
    return call.owner if isinstance(call, Named) else "reference"


def missing() -> Operations:
    raise BackendUnavailableError("no compiler was found")


@pytest.fixture
def all_backends() -> list[str]:
    """The names in the registry, before `only_reference` replaces it."""
    return list(registry._backends)


@pytest.mark.parametrize("name", ["reference", "cpu", "triton", "cuda"])
def test_the_backend_is_under_test(name: str) -> None:
    """A backend that is missing is one skip, here, and none in the tests of all backends."""
    if STATUS[name] != "available":
        pytest.skip(f"backend {name}: {STATUS[name]}")
    assert name in UNDER_TEST


@pytest.fixture(autouse=True)
def only_reference(monkeypatch: pytest.MonkeyPatch, all_backends: list[str]) -> None:
    """A registry of its own for every test."""
    monkeypatch.setattr(registry, "_backends", {"reference": registry._backends["reference"]})
    monkeypatch.setattr(registry, "_loaded", {})
    monkeypatch.setattr(registry, "_reported", set())
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
    register_backend(Backend("fast", ("cpu",), lambda: operations("fast"), NO_FLOAT64))
    register_backend(Backend("faster", ("cpu",), missing))
    assert owner() == "fast"
    assert owner(dtype=torch.float64) == "reference"


def test_a_named_backend_that_refuses_says_why() -> None:
    register_backend(Backend("fast", ("cpu",), lambda: operations("fast"), NO_FLOAT64))
    with pytest.raises(BackendUnavailableError, match=r"'fast' does not serve this token_step: .* torch\.float64"):
        owner("fast", torch.float64)


def test_a_backend_without_adapter_step_is_passed_over() -> None:
    """It is optional: a backend of one's own need not have it."""
    register_backend(Backend("fast", ("cpu",), lambda: operations("fast")))
    assert operations_for("auto", "adapter_step", (HIDDEN,)).adapter_step is not None
    with pytest.raises(BackendUnavailableError, match="'fast' does not serve this adapter_step: it does not have"):
        operations_for("fast", "adapter_step", (HIDDEN,))


def test_a_backend_that_does_not_rank_is_passed_over() -> None:
    call = Named("fast")
    own = Operations(call, call, call, adapter_step=call)  # pyright: ignore[reportArgumentType]
    register_backend(Backend("fast", ("cpu",), lambda: own, Serves(adapter_ranks=False)))
    assert operations_for("auto", "adapter_step", (HIDDEN,)) is own
    assert operations_for("auto", "adapter_step", (HIDDEN,), ranks_all=True) is not own
    with pytest.raises(BackendUnavailableError, match="it has to rank all latents of a row"):
        operations_for("fast", "adapter_step", (HIDDEN,), ranks_all=True)


def test_auto_goes_on_where_a_launch_may_be_refused() -> None:
    """A backend by name is tried nevertheless."""
    call = Named("fast")

    def cannot(operation: OperationName, sae: SaeWeights) -> str | None:
        return "d_model is too large" if sae.d_model > 8 else None

    own = Operations(call, call, call, cannot=cannot)  # pyright: ignore[reportArgumentType]
    register_backend(Backend("fast", ("cpu",), lambda: own))
    for d_model, expected in ((8, True), (9, False)):
        W = torch.zeros(4, d_model)
        sae = SaeWeights(W_enc=W, W_dec=W, b_enc=torch.zeros(4), threshold=torch.zeros(4), activation="jumprelu")
        assert (operations_for("auto", "token_step", (torch.zeros(1, d_model),), sae) is own) == expected
        assert operations_for("fast", "token_step", (torch.zeros(1, d_model),), sae) is own


@pytest.mark.parametrize(
    ("d_model", "odd", "shared_memory", "fits"),
    [
        (3584, False, 99 * 1024, True),
        (3584, True, 99 * 1024, True),
        (8192, True, 99 * 1024, False),
        (8192, True, 227 * 1024, True),
        (16384, False, 99 * 1024, True),
        (32768, False, 99 * 1024, False),
        (3583, False, 64 * 1024, False),  # rows of odd length are not aligned
    ],
)
def test_models_too_wide_for_a_gpu(d_model: int, odd: bool, shared_memory: int, fits: bool) -> None:
    W = torch.zeros(4 * d_model + 1, dtype=torch.bfloat16)[int(odd) :][: 4 * d_model].view(4, d_model)
    sae = SaeWeights(W_enc=W, W_dec=W, b_enc=torch.zeros(4), threshold=torch.zeros(4), activation="jumprelu")
    assert (too_wide(sae, shared_memory) is None) == fits


def test_a_missing_backend_says_why() -> None:
    register_backend(Backend("fast", ("cpu",), missing))
    assert available() == {"reference": "available", "fast": "no compiler was found"}
    with pytest.raises(BackendUnavailableError, match="'fast' is not available: no compiler was found"):
        owner("fast")


def test_auto_warns_once_if_only_the_reference_is_there() -> None:
    register_backend(Backend("fast", ("cpu",), missing))
    with pytest.warns(UserWarning, match="slow reference kernels run on cpu; fast: no compiler was found$") as warned:
        assert [owner(), owner(), owner(dtype=torch.float64)] == ["reference"] * 3
    assert len(warned) == 1


def test_auto_does_not_warn_where_a_missing_backend_makes_no_difference() -> None:
    register_backend(Backend("fast", ("cpu",), lambda: operations("fast"), NO_FLOAT64))
    register_backend(Backend("faster", ("cpu",), missing))
    register_backend(Backend("of a GPU", ("cuda",), missing))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [owner(), owner(dtype=torch.float64), owner("reference")] == ["fast", "reference", "reference"]


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
    with pytest.warns(UserWarning, match="no compiler"):
        assert owner() == "reference"
    register_backend(Backend("fast", ("cpu",), lambda: operations("fast")))
    assert owner() == "fast"


def test_environment_variable_names_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    register_backend(Backend("fast", ("cpu",), lambda: operations("fast"), NO_FLOAT64))
    monkeypatch.setenv("DSPA_BACKEND", "reference")
    assert owner() == "reference"
    assert owner("fast") == "fast", "an argument goes before the environment"
    for unset in ("auto", ""):
        monkeypatch.setenv("DSPA_BACKEND", unset)
        assert owner() == "fast"
    monkeypatch.setenv("DSPA_BACKEND", "fast")
    with pytest.raises(BackendUnavailableError, match=r"a tensor is torch\.float64"):
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
    """The attributes of a tensor on a GPU that the registry reads."""

    device, dtype = torch.device("cuda", 0), torch.float32


@pytest.mark.parametrize(("d_sae", "expected"), [(16384, "one"), (131072, "other")])
def test_auto_asks_the_measured_fastest_first(d_sae: int, expected: str, measured: None) -> None:
    register_backend(Backend("one", ("cuda",), lambda: operations("one")))
    register_backend(Backend("other", ("cuda",), lambda: operations("other")))
    numbers = torch.empty(d_sae, device="meta")
    W_enc = torch.empty(d_sae, 2304 if d_sae == 16384 else 4096, device="meta")
    sae = SaeWeights(W_enc=W_enc, b_enc=numbers, threshold=numbers, activation="jumprelu")
    tensors: Any = (OnGpu(),)

    def asked_first(operation: OperationName, sae: SaeWeights | None) -> Any:
        return operations_for("auto", operation, tensors, sae).token_step

    assert asked_first("token_step", sae).owner == expected
    assert asked_first("lookup", None).owner == "other"
    register_backend(Backend(expected, ("cuda",), missing))
    assert asked_first("token_step", sae).owner == ("other" if expected == "one" else "one")


# ---- what a backend serves -------------------------------------------------------------------------------------------


class On:
    """The attributes of a tensor that `refusal` reads."""

    def __init__(self, device: str, dtype: torch.dtype = torch.float32) -> None:
        self.device, self.dtype = torch.device(device), dtype


SERVES = Serves(devices=("cpu", "cuda"), encode_density=(torch.float32,))


@pytest.mark.parametrize(
    ("serves", "operation", "tensors", "expected"),
    [
        (Serves(), "token_step", (On("meta", torch.float64), On("cpu")), None),
        (SERVES, "encode_density", (On("cpu"),), None),
        (SERVES, "encode_density", (On("cuda:1"), On("cuda:1")), None),
        (SERVES, "encode_density", (On("meta"),), "a tensor is on meta"),
        (SERVES, "lookup", (On("cpu"), On("cuda:0")), "a tensor is on cuda:0, another on cpu"),
        (SERVES, "lookup", (On("cuda:0"), On("cuda:1")), "a tensor is on cuda:1, another on cuda:0"),
        (SERVES, "lookup", (On("cpu", torch.float64),), None),
        (SERVES, "encode_density", (On("cpu"), On("cpu", torch.float64)), "a tensor is torch.float64"),
    ],
)
def test_a_refusal_names_the_tensor(serves: Serves, operation: OperationName, tensors: Any, expected: str) -> None:
    assert refusal(serves, operation, tensors, None) == expected


def test_the_weights_of_an_sae_count_as_a_tensor() -> None:
    sae = make_sae(Kind(), 8, 16, torch.float64, 0)
    assert refusal(SERVES, "encode_density", (HIDDEN,), sae) == "a tensor is torch.float64"
    assert refusal(SERVES, "token_step", (HIDDEN,), sae) is None


def test_the_table_lists_the_backends_in_the_order_of_auto(all_backends: list[str]) -> None:
    assert [backend.name for backend in BACKENDS] == ["triton", "cuda", "cpu", "reference"]
    assert all_backends[:4] == [backend.name for backend in reversed(BACKENDS)]


def test_loading_may_decide_the_devices() -> None:
    serves = Serves(devices=("cuda",))
    interpreted = replace(operations("interpreted"), devices=("cpu",))
    register_backend(Backend("interpreted", ("cuda",), lambda: interpreted, serves))
    assert owner("interpreted") == "interpreted"
    register_backend(Backend("compiled", ("cuda",), lambda: operations("compiled"), serves))
    with pytest.raises(BackendUnavailableError, match="'compiled' does not serve this token_step: a tensor is on cpu"):
        owner("compiled")


def test_no_backend_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_backends", {})
    with pytest.raises(BackendUnavailableError, match="no backend serves token_step on cpu"):
        owner()
