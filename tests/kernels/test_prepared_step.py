"""A prepared step computes what `token_step` does, whatever is passed to it, and takes little of Python's time."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import fields, replace
from itertools import cycle
from typing import Any
from unittest import mock

import pytest
import torch
from kernel_cases import (
    Kind,
    edit_list,
    generator,
    make_sae,
    normal,
    random_lists,
    same_bits,
)
from torch import Tensor

from dspa.errors import DspaError, InvalidInputError
from dspa.kernels import EditList, SaeWeights, TokenStats, available, token_step
from dspa.kernels.token_step import prepared
from dspa.kernels.token_step.prepared import PreparedStep

BATCH, D_MODEL, D_SAE, K = 3, 48, 96, 8
KINDS = (Kind(), Kind("topk"), Kind("gated", "layer_norm", compact=True))
BINDING = ("cpu", "triton")  # backends that lay steps out; Triton's do so through `direct_launches`


def sae_of(kind: Kind = KINDS[0], dtype: torch.dtype = torch.bfloat16) -> SaeWeights:
    return make_sae(kind, D_MODEL, D_SAE, dtype, seed=3)


def lists_of(sae: SaeWeights, seed: int = 4) -> EditList:
    return edit_list(*random_lists(sae, BATCH, K, seed), K)


def rows_of(seed: int = 5) -> Tensor:
    return (normal(generator(seed), BATCH, D_MODEL) * 2).bfloat16()


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.emulated] * (name == "triton")) for name in BINDING])
def binding(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend that lays steps out."""
    name = request.param
    if available().get(name) != "available":
        pytest.skip(f"backend {name}: {available().get(name)}")
    context: Any = nullcontext()
    if name == "triton":
        from direct_launches import direct_launches

        context = direct_launches()
    with context, torch.no_grad():
        yield name


def ready(sae: SaeWeights, lists: EditList, alpha: float | Tensor, backend: str, *counters: TokenStats) -> PreparedStep:
    """A step that is bound, and knows these counters."""
    step = PreparedStep(sae, lists, alpha, backend=backend)
    step.prepare(torch.bfloat16)
    off = torch.zeros(BATCH, dtype=torch.bool)
    for stats in counters:
        step(rows_of(), off, stats)
    return step


def no_checks() -> Any:
    """Within it, a call that goes to `token_step` fails."""
    return mock.patch.object(prepared, "token_step", side_effect=AssertionError("not the short way"))


def in_forms(rows: Tensor) -> dict[str, Tensor]:
    """The same hidden states, in other places of memory."""
    wide = torch.zeros(BATCH, 3, D_MODEL, dtype=rows.dtype)
    odd = torch.zeros(rows.numel() + 1, dtype=rows.dtype)[1:].view_as(rows)
    apart = torch.zeros(BATCH, D_MODEL + 1, dtype=rows.dtype)[:, :D_MODEL]
    columns = torch.zeros(D_MODEL, BATCH, dtype=rows.dtype).T
    forms = {
        "contiguous": torch.zeros_like(rows),
        "position": wide[:, 1],
        "odd": odd,
        "apart": apart,
        "columns": columns,
    }
    return {name: form.copy_(rows) for name, form in forms.items()}


@pytest.mark.parametrize("per_row", [False, True], ids=["alpha", "alpha of row"])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_a_prepared_step_is_a_token_step(binding: str, kind: Kind, per_row: bool) -> None:
    """Hidden states, flags, counters and lists change from call to call, and no call is checked again in full."""
    sae = sae_of(kind)
    lists, alpha = lists_of(sae), torch.tensor([0.1, 0.2, 0.4]) if per_row else 0.2
    found, expected = (TokenStats.zeros(BATCH, D_SAE) for _ in range(2))
    step = ready(sae, lists, alpha, binding, found)
    flags = torch.tensor([[True, False], [False, True], [True, True]])
    of_turn = cycle((None, flags[:, 0], flags[:, 1].clone()))
    with torch.no_grad():
        for turn, (form, enabled) in enumerate(zip([*in_forms(rows_of()), "contiguous"], of_turn, strict=False)):
            rows = rows_of(turn)
            short, full = in_forms(rows)[form], rows.clone()
            with no_checks():
                step(short, enabled, found)
            token_step(full, sae, lists, alpha, enabled, expected, backend=binding)
            assert same_bits(short.contiguous(), full), (form, turn)
    for counter in fields(found):
        assert torch.equal(getattr(found, counter.name).nan_to_num(-1), getattr(expected, counter.name).nan_to_num(-1))
    assert expected.edited.any()


def test_without_counters(binding: str) -> None:
    sae = sae_of()
    lists = lists_of(sae)
    step, rows, expected = ready(sae, lists, 0.2, binding), rows_of(), rows_of()
    token_step(expected, sae, lists, 0.2, backend=binding)
    with no_checks():
        step(rows)
    assert same_bits(rows, expected)


def test_lists_and_strengths_are_read_where_they_are(binding: str) -> None:
    sae = sae_of()
    lists, alpha = lists_of(sae), torch.full((BATCH,), 0.2)
    step = ready(sae, lists, alpha, binding)
    for seed in range(3):
        lists.copy_(lists_of(sae, seed))
        alpha.fill_(0.1 * seed)
        for _ in range(2):  # on a CPU, the first one looks at the lists
            rows, expected = rows_of(seed), rows_of(seed)
            step(rows)
            token_step(expected, sae, lists, alpha, backend=binding)
            assert same_bits(rows, expected)
        with no_checks():
            step(rows_of())


def test_weights_that_were_written_or_moved(binding: str) -> None:
    """Codes of the encoder are out of date after the one, addresses after the other."""
    for change in ("written", "moved"):
        sae = sae_of()
        assert sae.W_dec is not None
        lists = lists_of(sae)
        step = ready(sae, lists, 0.2, binding)
        step(rows_of())
        if change == "written":
            sae.W_enc.mul_(-1)
        else:
            sae.W_enc.data = sae.W_enc * -2
            sae.W_dec.data = sae.W_dec * 3
        for turn in range(3):
            rows, expected = rows_of(turn), rows_of(turn)
            step(rows)
            token_step(expected, sae, lists, 0.2, backend="reference")
            torch.testing.assert_close(rows, expected, rtol=2**-6, atol=2**-6)
            assert not same_bits(rows, rows_of(turn))
        with no_checks():
            step(rows_of())


WRONG: dict[str, dict[str, Any]] = {
    "a row less": {"hidden": torch.zeros(BATCH - 1, D_MODEL).bfloat16()},
    "a column less": {"hidden": torch.zeros(BATCH, D_MODEL - 1).bfloat16()},
    "integers": {"hidden": torch.zeros(BATCH, D_MODEL, dtype=torch.int16)},
    "sparse": {"hidden": torch.zeros(BATCH, D_MODEL).bfloat16().to_sparse()},
    "elsewhere": {"hidden": torch.zeros(BATCH, D_MODEL, device="meta").bfloat16()},
    "a list": {"hidden": [[0.0] * D_MODEL] * BATCH},
    "a flag less": {"enabled": torch.ones(BATCH - 1, dtype=torch.bool)},
    "flags of bytes": {"enabled": torch.ones(BATCH, dtype=torch.uint8)},
    "counters of another batch": {"stats": TokenStats.zeros(BATCH + 1, D_SAE)},
    "counters of another SAE": {"stats": TokenStats.zeros(BATCH, D_SAE + 1)},
}


@pytest.mark.parametrize("wrong", WRONG)
def test_what_token_step_refuses_is_refused(binding: str, wrong: str) -> None:
    """After calls that were right, with the same words."""
    sae = sae_of()
    lists = lists_of(sae)
    step = ready(sae, lists, 0.2, binding)
    step(rows_of())
    operands = {"hidden": rows_of(), "enabled": None, "stats": None} | WRONG[wrong]
    with pytest.raises(DspaError) as of_token_step:
        token_step(operands["hidden"], sae, lists, 0.2, operands["enabled"], operands["stats"], backend=binding)
    for _ in range(2):
        with pytest.raises(type(of_token_step.value)) as refusal:
            step(**operands)
        assert str(refusal.value) == str(of_token_step.value)


def test_lists_that_became_wrong_are_refused(binding: str) -> None:
    sae = sae_of()
    lists, alpha = lists_of(sae), torch.full((BATCH,), 0.2)
    step = ready(sae, lists, alpha, binding)
    step(rows_of())
    lists.latents[0, 0] = D_SAE
    lists.counts[0] = 1
    for _ in range(2):
        with pytest.raises(InvalidInputError, match=f"name latents .* to {D_SAE}"):
            step(rows_of())
    lists.latents[0, 0] = 0
    alpha[1] = -1
    for _ in range(2):
        with pytest.raises(InvalidInputError, match="alpha holds"):
            step(rows_of())


def test_another_dtype_is_bound_as_well(binding: str) -> None:
    sae = sae_of()
    lists = lists_of(sae)
    step = ready(sae, lists, 0.2, binding)
    for dtype in (torch.float32, torch.float16):
        rows, expected = rows_of().to(dtype), rows_of().to(dtype)
        step(rows)
        token_step(expected, sae, lists, 0.2, backend=binding)
        assert same_bits(rows, expected)
        with no_checks():
            step(rows_of().to(dtype))


def test_recorded_calls_are_not_short(binding: str) -> None:
    """Autograd's rules for writing in place are those of `token_step`."""
    sae = sae_of()
    step = ready(sae, lists_of(sae), 0.2, binding)
    with torch.enable_grad(), no_checks(), pytest.raises(AssertionError, match="not the short way"):
        step(rows_of())


def test_an_empty_batch(binding: str) -> None:
    sae = sae_of()
    step = PreparedStep(sae, EditList.empty(0, K), 0.2, backend=binding)
    step.prepare(torch.bfloat16)
    step(torch.zeros(0, D_MODEL).bfloat16())


def test_the_reference_is_never_bound() -> None:
    sae = sae_of()
    lists = lists_of(sae)
    step, rows, expected = ready(sae, lists, 0.2, "reference"), rows_of(), rows_of()
    step(rows)
    token_step(expected, sae, lists, 0.2, backend="reference")
    assert same_bits(rows, expected)


@pytest.mark.parametrize("compiler", ["eager", pytest.param("aot_eager", marks=pytest.mark.long)])
def test_compiled_models_see_a_token_step(binding: str, compiler: str) -> None:
    sae = sae_of()
    lists = lists_of(sae)
    step = ready(sae, lists, 0.2, binding)

    def block(hidden: Tensor) -> Tensor:
        hidden = hidden * 2
        step(hidden)
        return hidden

    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    assert same_bits(compiled(rows_of()), block(rows_of()))


# ---- direct launches of Triton ---------------------------------------------------------------------------------------

on_triton = pytest.mark.skipif(available().get("triton") != "available", reason="backend triton is not available")


@on_triton
def test_each_call_is_one_direct_launch() -> None:
    from direct_launches import direct_launches

    sae, stats = sae_of(), TokenStats.zeros(BATCH, D_SAE)
    with direct_launches() as (kernels, driver), torch.no_grad():
        step = ready(sae, lists_of(sae), 0.2, "triton", stats)
        compiled = len(kernels)
        flags = torch.ones(BATCH, 2, dtype=torch.bool)
        before = sum(kernel.calls for kernel in kernels)
        calls = 0
        for rows in in_forms(rows_of()).values():
            for enabled, counters in ((None, None), (flags[:, 0], None), (flags[:, 1], stats)):
                step(rows, enabled, counters)
                calls += 1
        assert sum(kernel.calls for kernel in kernels) == before + calls
        assert len(kernels) == compiled
        assert {kernel.stream for kernel in kernels} == {driver.stream, None}


@on_triton
@pytest.mark.parametrize("spoiled", ["hidden", "edits", "strength", "stats", "scratch", "batch", "nothing"])
def test_a_triton_that_is_another_is_not_launched_directly(spoiled: str) -> None:
    """A trial when the step is prepared shows whether direct launches compute the same."""
    from direct_launches import direct_launches

    def spoil(named: dict[str, Any]) -> None:
        if spoiled == "hidden":
            named["hidden"] = named["hidden"]._replace(row_stride=0)
        elif spoiled == "edits":
            named["edits"] = named["edits"]._replace(counts=torch.zeros(BATCH, dtype=torch.int32))
        elif spoiled == "strength":
            named["strength"] = named["strength"]._replace(alpha=0.25)
        elif spoiled == "stats":
            named["stats"] = named["stats"]._replace(seen=named["stats"].nonfinite, nonfinite=named["stats"].seen)
        elif spoiled == "scratch":
            raise TypeError("function takes exactly 20 arguments")
        elif spoiled == "batch":
            named["hidden"], named["stats"] = (
                named["hidden"]._replace(rows=torch.zeros(BATCH, D_MODEL).bfloat16()),
                None,
            )

    sae = sae_of()
    lists, rows, expected = lists_of(sae), rows_of(), rows_of()
    with direct_launches(spoil) as (kernels, _), torch.no_grad():
        step = ready(sae, lists, 0.2, "triton")
        before = sum(kernel.calls for kernel in kernels)
        step(rows)
        assert (sum(kernel.calls for kernel in kernels) > before) == (spoiled == "nothing")
        token_step(expected, sae, lists, 0.2, backend="triton")
    assert same_bits(rows, expected)


@on_triton
def test_each_stream_has_a_launch_of_its_own() -> None:
    from direct_launches import direct_launches

    sae = sae_of()
    lists = lists_of(sae)
    with direct_launches() as (kernels, driver), torch.no_grad():
        step = ready(sae, lists, 0.2, "triton")
        for stream in (1, 2, 1):
            driver.stream = stream
            rows, expected = rows_of(), rows_of()
            with no_checks():
                step(rows)
            token_step(expected, sae, lists, 0.2, backend="triton")
            assert same_bits(rows, expected)
            assert {kernel.stream for kernel in kernels} == {stream, None}


@on_triton
@pytest.mark.parametrize("reason", ["a profiler", "another device", "odd counters"])
def test_what_cannot_be_launched_directly_is_launched(reason: str) -> None:
    from direct_launches import direct_launches
    from triton import knobs

    sae = sae_of()
    lists, rows, expected = lists_of(sae), rows_of(), rows_of()
    stats = TokenStats.zeros(BATCH, D_SAE)
    if reason == "odd counters":
        stats = replace(stats, seen=torch.zeros(BATCH + 1, dtype=torch.int64)[1:])
    with direct_launches() as (kernels, driver), torch.no_grad():
        step = ready(sae, lists, 0.2, "triton", stats)
        seen = int(stats.seen.sum())
        before = sum(kernel.calls for kernel in kernels)
        hook = knobs.runtime.launch_enter_hook

        def profile(metadata: object) -> None: ...

        if reason == "a profiler":
            hook.add(profile)
        elif reason == "another device":
            driver.device = 1
        try:
            with no_checks():
                step(rows, None, stats)
        finally:
            hook.remove(profile)
        assert sum(kernel.calls for kernel in kernels) == before
        assert int(stats.seen.sum()) == seen + BATCH
        token_step(expected, sae, lists, 0.2, backend="triton")
    assert same_bits(rows, expected)


# ---- what it costs ---------------------------------------------------------------------------------------------------

MOST_CALLS = {"cpu": 35, "triton": 75}


def calls_of(function: Any) -> int:
    """How many functions of Python and C a call calls: the same on every machine."""
    count = 0

    def profile(_: object, event: str, __: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return count


def test_a_step_calls_few_functions(binding: str) -> None:
    """benchmarks/host_time.py measures the time; this watches over what it depends on."""
    sae, stats = sae_of(), TokenStats.zeros(BATCH, D_SAE)
    lists, rows, enabled = lists_of(sae), rows_of(), torch.ones(BATCH, dtype=torch.bool)
    step = ready(sae, lists, 0.2, binding, stats)
    if binding == "triton":
        from direct_launches import FakeKernel

        def nothing(*_: object) -> None: ...

        with mock.patch.object(FakeKernel, "run", nothing):
            step = ready(sae, lists, 0.2, binding, stats)
            found = calls_of(lambda: step(rows, enabled, stats))
    else:
        found = calls_of(lambda: step(rows, enabled, stats))
    assert found <= MOST_CALLS[binding], found
