"""For the kernel tests: the backends under test, the interpreter of Triton's kernels, one thread."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from adapter_cases import Version
from kernel_cases import Backend, Kind, backend_parameters, distinct_modes

from dspa.errors import BackendUnavailableError
from dspa.kernels.backends.registry import operations_for

if importlib.util.find_spec("triton") is not None and os.environ.get("TRITON_INTERPRET") == "1":
    import triton_interpreter

    triton_interpreter.speed_up()
    triton_interpreter.shuffle_programs()


def is_left_out(item: pytest.Item) -> bool:
    """Modes that are the same code as another one, where kernels are interpreted: that takes seconds. And adapters that
    have to rank all latents, where the backend does not: `test_what_ranks_all_latents_is_refused` has them."""
    if not isinstance(item, pytest.Function) or not hasattr(item, "callspec"):
        return False
    parameters = item.callspec.params
    backend = parameters.get("backend")
    version, kind = parameters.get("version"), parameters.get("kind")
    ranked = isinstance(version, Version) and version.clip and isinstance(kind, Kind) and kind.activation == "topk"
    other = isinstance(backend, Backend) and backend.name != "reference"
    if ranked and (other or item.path.name == "test_cuda_kernels.py"):
        return True
    if not isinstance(backend, Backend):
        return False
    if backend.name != "triton" or backend.device != "cpu":
        return False
    return parameters.get("mode", "dense") not in distinct_modes(backend)


# What GPU kernels without a GPU take seconds for, at every kind of SAE.
SECONDS_PER_CASE = (
    "a_row_depends_on_nothing_else_in_the_batch",
    "modes_agree_bit_for_bit",
    "segmentation_does_not_matter",
)


def is_emulated(item: pytest.Item) -> bool:
    """Whether a test runs GPU kernels on the CPU: through Triton's interpreter, or the shim of CUDA."""
    callspec = getattr(item, "callspec", None)
    backend = None if callspec is None else callspec.params.get("backend")
    if isinstance(backend, Backend):
        return backend.name == "triton" and backend.device == "cpu"
    return item.path.name in (
        "test_cuda_kernels.py",
        "test_triton_token_step.py",
        "test_triton_screening.py",
        "test_triton_density_and_lookup.py",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if is_emulated(item):
            item.add_marker(pytest.mark.emulated)
            if item.name.partition("[")[0].endswith(SECONDS_PER_CASE):
                item.add_marker(pytest.mark.long)
    left_out = [item for item in items if is_left_out(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        kept = set(items) - set(left_out)
        items[:] = [item for item in items if item in kept]


@pytest.fixture(params=backend_parameters(), scope="session")
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


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The Triton launches that a test makes."""
    from dspa.kernels.triton_common.launch import Launch

    made: list[object] = []
    original = Launch.run
    monkeypatch.setattr(Launch, "run", lambda launch: (made.append(launch), original(launch)))
    return made
