"""Triton compiles a kernel once for an SAE: nothing that differs from call to call makes it compile another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_cases import Kind, edit_list, generator, make_sae, normal, random_lists
from torch import Tensor

from dspa.errors import BackendUnavailableError
from dspa.kernels import AdapterWeights, CsrMap, TokenStats, adapter_step, available, encode_density, lookup, token_step

if available()["triton"] != "available":
    pytest.skip(f"backend triton: {available()['triton']}", allow_module_level=True)

from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from dspa.kernels.triton_common import launch as triton_launch
from dspa.kernels.triton_common.launch import Launch

D_MODEL, D_SAE, K = 48, 96, 8
BATCHES = (1, 2, 3, 16)  # that are multiplied together
H100 = GPUTarget("cuda", 90, 32)


def specialization(launch: Launch) -> tuple[str, ...]:
    """What Triton looks a compiled kernel up by."""
    kernel = launch.kernel
    options = getattr(kernel, "kwargs", {})  # of an interpreted kernel, which is not a JITFunction
    function: Any = JITFunction(kernel.fn, do_not_specialize=options.get("do_not_specialize"))
    binder = create_function_from_signature(function.signature, function.params, make_backend(H100))
    _, specialized, _ = binder(**launch.arguments)
    return (kernel.__name__, *map(str, specialized))


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """Within it, launches are recorded and not run."""
    launches: list[Launch] = []
    with mock.patch.object(Launch, "run", autospec=True, side_effect=launches.append):
        yield launches


def in_forms(rows: Tensor) -> list[Tensor]:
    """The same hidden states in other places of memory: as they are, one position of several, at an odd address, an odd
    distance apart, column by column."""
    batch, width = rows.shape
    wide = torch.zeros(batch, 3, width, dtype=rows.dtype)
    odd = torch.zeros(rows.numel() + 1, dtype=rows.dtype)[1:].view_as(rows)
    apart = torch.zeros(batch, width + 1, dtype=rows.dtype)[:, :width]
    columns = torch.zeros(width, batch, dtype=rows.dtype).T
    return [form.copy_(rows) for form in (torch.zeros_like(rows), wide[:, 1], odd, apart, columns)]


def at_odd_address(tensor: Tensor) -> Tensor:
    room = torch.zeros(tensor.numel() + 1, dtype=tensor.dtype)
    return room[1:].view_as(tensor).copy_(tensor)


def sae() -> Any:
    return make_sae(Kind(), D_MODEL, D_SAE, torch.bfloat16, seed=0)


def steps(with_alphas: bool) -> Iterator[Callable[[], object]]:
    """Token steps with a number for alpha, or one for each row."""
    weights = sae()
    for batch in BATCHES:
        lists, stats = edit_list(*random_lists(weights, batch, K, 1), K), TokenStats.zeros(batch, D_SAE)
        flags = torch.ones(batch, 3, dtype=torch.bool)
        alphas: tuple[Any, ...] = (0.2, 0, 1, 16, 1.0)
        if with_alphas:
            alphas = (torch.full((batch,), 0.2), at_odd_address(torch.full((batch,), 0.2)), torch.ones(batch).double())
        for form in in_forms(normal(generator(2), batch, D_MODEL).bfloat16()):
            for alpha, enabled in zip(alphas, (flags[:, 0], flags[:, 1], flags[:, 2].clone()) * 2, strict=False):
                yield lambda form=form, alpha=alpha, on=enabled, lists=lists, stats=stats: token_step(
                    form, weights, lists, alpha, on, stats, backend="triton"
                )


def densities() -> Iterator[Callable[[], object]]:
    weights = sae()
    for tokens in (1, 2, 16, 17, 33):
        for form in in_forms(normal(generator(2), tokens, D_MODEL).bfloat16()):
            for offsets in (torch.tensor([0, tokens]), torch.tensor([5, 0, tokens])[1:]):
                yield lambda form=form, offsets=offsets: encode_density(form, offsets, weights, backend="triton")


def adapter_steps() -> Iterator[Callable[[], object]]:
    weights = sae()
    adapter = AdapterWeights(
        weight=weights.W_enc, bias=weights.b_enc, threshold=weights.threshold, activation="soft_threshold", clip=True
    )
    for batch in BATCHES:
        stats, flags = TokenStats.zeros(batch, D_SAE), torch.ones(batch, 3, dtype=torch.bool)
        for number, form in enumerate(in_forms(normal(generator(2), batch, D_MODEL).bfloat16())):
            yield lambda form=form, on=flags[:, number % 3], stats=stats: adapter_step(
                form, weights, adapter, on, stats, backend="triton"
            )


def lookups() -> Iterator[Callable[[], object]]:
    columns, values = torch.zeros(D_SAE, dtype=torch.int32), torch.ones(D_SAE)
    conditional_map = CsrMap(torch.arange(D_SAE + 1), columns, values, D_SAE)
    for prompts in BATCHES:
        for density in in_forms(torch.rand(prompts, D_SAE, generator=generator(3))):
            yield lambda density=density: lookup(density, conditional_map, 4, 4, backend="triton")


CALLS = {
    "token_step": lambda: steps(False),
    "token_step, alpha of row": lambda: steps(True),
    "encode_density": densities,
    "adapter_step": adapter_steps,
    "lookup": lookups,
}


@pytest.mark.parametrize("operation", CALLS)
def test_every_call_uses_the_same_kernels(operation: str) -> None:
    """Whatever the strides, addresses and batch of hidden states and flags, and the value of alpha."""
    found: dict[str, set[tuple[str, ...]]] = {}
    with recorded() as launches:
        for call in CALLS[operation]():
            call()
    for launch in launches:
        found.setdefault(launch.kernel.__name__, set()).add(specialization(launch))
    assert found
    assert {name: len(keys) for name, keys in found.items()} == dict.fromkeys(found, 1)
    assert len(launches) >= 20


def test_a_specialization_shows_here() -> None:
    """The hidden states as they come would be compiled again."""
    weights = sae()
    lists = edit_list(*random_lists(weights, 2, K, 1), K)
    rows = normal(generator(2), 2, D_MODEL).bfloat16()
    with recorded() as launches, mock.patch.object(triton_launch, "has_aligned_rows", return_value=True):
        for form in (rows, in_forms(rows)[2], in_forms(rows)[3]):
            token_step(form, weights, lists, 0.2, backend="triton")
    assert len({specialization(launch) for launch in launches}) > 1


@pytest.mark.emulated
def test_hidden_states_in_any_form_are_edited_where_they_are() -> None:
    weights = sae()
    lists = edit_list(*random_lists(weights, 3, K, 1), K)
    rows = normal(generator(2), 3, D_MODEL).bfloat16()
    expected = rows.clone()
    token_step(expected, weights, lists, 0.2, backend="triton")
    assert not torch.equal(expected, rows)
    for form in in_forms(rows):
        token_step(form, weights, lists, 0.2, backend="triton")
        assert torch.equal(form, expected)


class Kernel:
    """A kernel that is compiled, and loaded when it is launched first. Loading ends a capture."""

    __name__ = "token_step_kernel"

    def __init__(self) -> None:
        self.compiled = SimpleNamespace(module=None)
        self.launches = 0

    def warmup(self, *, grid: tuple[int, ...], **_: object) -> Any:
        return self.compiled

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        def launched(**_: object) -> Any:
            self.compiled.module = self
            self.launches += 1
            return self.compiled

        return launched


def test_a_first_call_inside_a_capture_is_refused() -> None:
    kernel = Kernel()
    launch = Launch(kernel, 1, {}, triton_launch.tile_for("token_step", sae().W_enc, 0), torch.device("cpu"), "sm_90")
    with mock.patch.object(triton_launch, "is_being_captured", return_value=True):
        with pytest.raises(BackendUnavailableError, match=r"^a graph is being captured .* before the capture$"):
            launch.run()
        assert kernel.launches == 0
    launch.run()
    with mock.patch.object(triton_launch, "is_being_captured", return_value=True):
        launch.run()
    assert kernel.launches == 2
