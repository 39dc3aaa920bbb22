"""Ctrl-C while attaching, detaching, selecting and generating leaves nothing behind; see tests/soak/interrupts.py."""

from __future__ import annotations

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from naive_generation import generate, is_clean, naive_generate
from soak.interrupts import SCENARIOS, Subject, interrupted
from tiny_models import layer_of, prompts, tiny_model, tiny_policy
from torch import nn

from dspa.online.hooks.running import Ownership, RunningCall
from dspa.online.steering import steer


@pytest.fixture(scope="module")
def subject() -> Subject:
    torch.set_num_threads(1)
    return Subject()


STEPS = {"attach": 5, "detach": 1, "leave": 1, "select": 1, "generating": 97}
LONG = ("attach", "detach", "leave", "generating")


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.long) if n in LONG else n for n in SCENARIOS])
def test_an_interrupt_leaves_nothing_behind(subject: Subject, name: str) -> None:
    """At every line of what is short, at some of what is long; `make soak` takes all of them."""
    count = at = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        while interrupted(subject, name, 1 + at) is not None:
            count, at = count + 1, at + STEPS[name]
    assert count >= 5


@pytest.mark.parametrize("again", [1, 2])
def test_entered_again_a_removed_steering_steers(again: int) -> None:
    model, rows = tiny_model("llama"), prompts((6, 4))
    policy = tiny_policy(model)
    unsteered, expected = generate(model, rows, 4), naive_generate(model, policy, rows, 4)
    steering = steer(model, policy)
    for _ in range(1 + again):
        with steering:
            assert generate(model, rows, 4) == expected
            assert repr(steering).startswith("Steering(attached")
        assert is_clean(model)
        assert generate(model, rows, 4) == unsteered
    assert steering.summary().tokens_seen == (1 + again) * 2 * 4


class HeldOnThisStack:
    """Holds a call as the hooks do."""

    def __call__(self, action: Callable[[RunningCall], Any]) -> RunningCall:
        running = RunningCall()
        action(running)
        return running


def test_what_a_call_held_is_free_once_its_frame_is_gone() -> None:
    ownership, seen = Ownership(), []

    def inside(running: RunningCall) -> None:
        assert ownership.take(running)
        seen.append(ownership.holder is running)
        HeldOnThisStack()(lambda other: seen.append(ownership.take(other)))
        HeldOnThisStack()(lambda other: seen.append(ownership.take(other, shared_within_thread=True)))
        thread = threading.Thread(
            target=HeldOnThisStack(), args=(lambda o: seen.append(ownership.take(o, shared_within_thread=True)),)
        )
        thread.start()
        thread.join()

    left = HeldOnThisStack()(inside)
    assert seen == [True, False, True, False]
    assert not left.is_alive
    assert ownership.holder is None
    HeldOnThisStack()(lambda running: seen.append(ownership.take(running)))
    assert seen[-1]


def test_attaching_and_detaching_beside_a_generating_thread_disturbs_no_call() -> None:
    """Calls that begin while another steering comes and goes are refused for no other reason than what it steers."""
    model, (prompt,) = tiny_model("llama", dtype=torch.float32), prompts((6,))
    first = tiny_policy(model, dtype=torch.float32)
    second = tiny_policy(model, dtype=torch.float32, alpha=0.0)
    expected = naive_generate(model, first, [prompt], 2)
    stop, errors, results = threading.Event(), [], []

    def work() -> None:
        while not stop.is_set():
            try:
                results.append(generate(model, [prompt], 2))
            except Exception as error:
                errors.append(str(error))

    with warnings.catch_warnings(), steer(model, first):
        warnings.simplefilter("ignore")
        thread = threading.Thread(target=work)
        thread.start()
        for _ in range(40):
            steer(model, second, compose=True).remove()
        stop.set()
        thread.join(60)
    assert not errors
    assert results
    assert all(result == expected for result in results)
    assert is_clean(model)


def test_a_policy_attached_in_the_middle_of_a_call_begins_with_the_next() -> None:
    """Also if it is detached before the call ends."""
    model, (prompt,) = tiny_model("llama", dtype=torch.float32), prompts((6,))
    first, second = (tiny_policy(model, dtype=torch.float32, seed=seed) for seed in (0, 1))
    expected = naive_generate(model, first, [prompt], 4)
    attached: list[Any] = []

    def attach(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if ids.shape[1] == len(prompt) + 1:
            attached.append(steer(model, second, compose=True))
        if ids.shape[1] == len(prompt) + removed_after:
            attached.pop().remove()
        return scores

    with warnings.catch_warnings(), steer(model, first):
        warnings.simplefilter("ignore")
        for removed_after in (2, 9):  # noqa: B007
            found = generate(model, [prompt], 4, logits_processor=[attach])
            assert found == expected
        both = generate(model, [prompt], 4)
        attached.pop().remove()
        assert generate(model, [prompt], 4) == expected
        with steer(model, second, compose=True):
            assert generate(model, [prompt], 4) == both
    assert both != expected


@pytest.mark.parametrize(
    "make", [copy.deepcopy, copy.copy, lambda model: pickle.loads(pickle.dumps(model))], ids=["deep", "copy", "pickle"]
)
def test_nothing_of_a_steering_stands_in_a_copy(make: Callable[[nn.Module], nn.Module]) -> None:
    model = tiny_model("llama")
    with steer(model, tiny_policy(model)):
        twin = make(model)
        names = {"forward", "generate", "init_continuous_batching", "__reduce_ex__"}
        modules = [twin] if make is copy.copy else list(twin.modules())
        assert not any(names & vars(module).keys() for module in modules)
    assert not any("__reduce_ex__" in vars(module) for module in model.modules())


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("call", ["generate", "forward"])
def test_a_fault_in_the_output_layer_itself_is_warned_of(value: float, call: str) -> None:
    model, rows = tiny_model("llama", dtype=torch.float32), prompts((6,))
    policy = tiny_policy(model, dtype=torch.float32)
    with torch.no_grad():
        layer_of(model, policy.output_layer).get_submodule("mlp.down_proj").get_parameter("weight").fill_(value)
    with pytest.warns(UserWarning, match="tokens had NaN or Inf in the residual stream after layer 2"):  # noqa: PT031, SIM117
        with steer(model, policy):
            if call == "generate":
                generate(model, rows, 3)
            else:
                with torch.no_grad():
                    model(torch.tensor(rows))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", ["hook on the output layer", "later layer"])
def test_a_fault_behind_the_edit_is_warned_of_once(place: str, value: float) -> None:
    """A hook runs after the edit of its layer, and no editor sees what it does."""
    model, rows = tiny_model("llama", dtype=torch.float32), prompts((6, 3))
    policy = tiny_policy(model, dtype=torch.float32)
    layer = layer_of(model, policy.output_layer + (place == "later layer"))

    def spoil(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = (output if isinstance(output, torch.Tensor) else output[0]).clone()
        hidden[1, -1, 0] = value
        return hidden if isinstance(output, torch.Tensor) else (hidden, *output[1:])

    handle = layer.register_forward_hook(spoil)
    with warnings.catch_warnings(record=True) as caught, steer(model, policy):
        warnings.simplefilter("always")
        generate(model, rows, 3)
        generate(model, rows, 3)
        handle.remove()
        generate(model, rows, 3)
    faults = [str(warning.message) for warning in caught if "NaN or Inf" in str(warning.message)]
    assert len(faults) == 1, faults
    assert "came up behind layer 2" in faults[0]
    assert caught[[str(warning.message) for warning in caught].index(faults[0])].filename.endswith(
        "naive_generation.py"
    )
