"""The backends under test: one list for all kernel tests. A backend that is missing is a skip that says why."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from kernel_cases import DEVICE_TYPES, Backend

from dspa.errors import BackendUnavailableError
from dspa.kernels import available
from dspa.kernels.registry import operations_for


def parameters() -> list[object]:
    """Every registered backend. One for a GPU carries its marker where there is one, and is a named skip elsewhere."""
    listed = []
    for name, status in available().items():
        device = DEVICE_TYPES.get(name, "cpu") if torch.cuda.is_available() else "cpu"
        marks = [pytest.mark.gpu] if device == "cuda" else []
        if status != "available":
            marks.append(pytest.mark.skip(reason=f"backend {name}: {status}"))
        listed.append(pytest.param(Backend(name, device), id=name, marks=marks))
    return listed


@pytest.fixture(params=parameters(), scope="session")
def backend(request: pytest.FixtureRequest) -> Backend:
    return request.param


@pytest.fixture(scope="session")
def float64_backend(backend: Backend) -> Backend:
    """A backend that serves float64. Refusing it is allowed, refusing anything else is not."""
    try:
        operations_for(backend.name, "token_step", (torch.zeros(1, 1, dtype=torch.float64, device=backend.device),))
    except BackendUnavailableError as refusal:
        pytest.skip(str(refusal))
    return backend


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The shapes here are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
