"""Steering of compiled models: one graph, no recompilation that the model would not need by itself, the same tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
import torch._dynamo.utils
from naive_generation import generate, naive_generate, naive_lists, naive_logits
from tiny_models import left_padded, prompts, tiny_model, tiny_policy
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import CompileConfig, DynamicCache, PreTrainedModel, StaticCache

from dspa.online.steering import steer

COUNT = 5


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
    torch.set_num_threads(threads)


def compiled(model: nn.Module, backend: str = "eager") -> tuple[Any, CompileCounterWithBackend]:
    """The model as one graph, or an error where the graph breaks; and the counter of compilations."""
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, fullgraph=True), counter


def decoded(model: Any, prompt: list[int], count: int, cache: Any) -> list[int]:
    """Greedy decoding by forward calls."""
    ids, new = torch.tensor([prompt]), []
    with torch.no_grad():
        for _ in range(count):
            ids = model(input_ids=ids, past_key_values=cache, use_cache=True).logits[:, -1:].float().argmax(dim=-1)
            new.append(ids.item())
    return new


CACHES: dict[str, Callable[[PreTrainedModel], Any]] = {
    "dynamic": lambda model: DynamicCache(config=model.config),
    "static": lambda model: StaticCache(config=model.config, max_cache_len=32),
}


@pytest.mark.long
@pytest.mark.parametrize("cache", ["static", pytest.param("dynamic", marks=pytest.mark.long)])
def test_one_graph_compiled_no_more_often_than_without_steering(cache: str) -> None:
    """Four prompts of different lengths and contents, decoded in turn by a compiled model."""
    rows = prompts((6, 9, 6, 5))
    frames = []
    for steered in (False, True):
        model = tiny_model("llama")
        policy = tiny_policy(model)
        expected = [naive_generate(model, policy, [row], COUNT)[0] for row in rows]
        torch._dynamo.reset()
        fast, counter = compiled(model)
        if steered:
            with steer(model, policy) as steering:
                warm = [decoded(fast, row, COUNT, CACHES[cache](model)) for row in rows[:2]]
                after_warming = counter.frame_count
                found = warm + [decoded(fast, row, COUNT, CACHES[cache](model)) for row in rows[2:]]
            assert found == expected
            assert counter.frame_count == after_warming
            assert steering.summary().tokens_seen == 4 * COUNT
        else:
            for row in rows:
                decoded(fast, row, COUNT, CACHES[cache](model))
        frames.append(counter.frame_count)
    assert frames[1] == frames[0]


@pytest.mark.long
@pytest.mark.parametrize("steered_first", [True, False])
def test_attaching_and_detaching_need_one_compilation_each(steered_first: bool) -> None:
    """A model that was compiled before it was steered is steered nevertheless."""
    model, (row,) = tiny_model("llama"), prompts((6,))
    policies = [tiny_policy(model), tiny_policy(model, seed=3)]
    fast, counter = compiled(model, "aot_eager")
    ids = torch.tensor([row])
    with torch.no_grad():
        unsteered = model(ids).logits
        expected = []
        for policy in policies:
            with steer(model, policy):
                expected.append(model(ids).logits)
        if not steered_first:
            torch.testing.assert_close(fast(ids).logits, unsteered)
        for _ in range(5):
            for policy, logits in zip(policies, expected, strict=True):
                with steer(model, policy):
                    torch.testing.assert_close(fast(ids).logits, logits)
                torch.testing.assert_close(fast(ids).logits, unsteered)
    assert not torch.equal(expected[0], unsteered)
    assert not torch.equal(expected[0], expected[1])
    assert counter.frame_count == 2


@pytest.mark.long
@pytest.mark.parametrize("lengths", [pytest.param((6,), marks=pytest.mark.long), (6, 4)], ids=str)
def test_the_compiled_decoding_of_generate(lengths: tuple[int, ...]) -> None:
    """Transformers compiles the decoding steps of a static cache by itself: on a GPU always, on a CPU when told to."""
    model = tiny_model("llama", dtype=torch.float32)
    batches = [prompts(lengths, seed=seed) for seed in range(3)]
    policy = tiny_policy(model, dtype=torch.float32)
    configuration: Any = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)  # type: ignore[arg-type]
    configuration._compile_all_devices = True
    frames: list[int] = []
    found = []
    torch._dynamo.utils.counters.clear()
    with steer(model, policy) as steering:
        for rows in batches:
            found.append(generate(model, rows, COUNT, cache_implementation="static", compile_config=configuration))
            frames.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert found == [naive_generate(model, policy, rows, COUNT) for rows in batches]
    assert steering.summary().tokens_seen == 3 * len(lengths) * COUNT
    assert frames[0] > 0
    assert frames[2] == frames[1]


@pytest.mark.long
def test_rows_under_policies_that_change_between_calls_need_no_recompilation() -> None:
    model, rows = tiny_model("llama"), prompts((6, 6))
    policies = {"a": tiny_policy(model), "b": tiny_policy(model, alpha=0.9)}
    batch = left_padded(rows)
    fast, counter = compiled(model)
    with steer(model, policies) as steering, torch.no_grad():
        for names in (("a", "b"), ("b", None), (None, None), ("b", "b")):
            steering.select(names)
            logits = fast(**batch).logits
            torch.testing.assert_close(logits, model(**batch).logits)
            for row, name in enumerate(names):
                if name is not None:
                    lists = naive_lists_unsteered(rows[row], policies[name])
                    expected = naive_logits(tiny_model("llama"), policies[name], rows[row], rows[row], lists)
                    torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-9)
    assert counter.frame_count == 1


def naive_lists_unsteered(prompt: list[int], policy: Any) -> tuple[list[int], list[int]]:
    return naive_lists(tiny_model("llama"), policy, prompt)


@pytest.mark.long
def test_gradients_flow_past_the_edit_in_a_compiled_model() -> None:
    model, rows = tiny_model("llama", dtype=torch.float32), prompts((6, 6))
    policy = tiny_policy(model, dtype=torch.float32)
    fast, _ = compiled(model, "aot_eager")
    gradients: list[Tensor] = []
    with steer(model, policy) as steering:
        for forward in (model, fast):
            model.zero_grad()
            forward(torch.tensor(rows)).logits.sum().backward()
            weight = model.get_submodule("model.layers.0.mlp.down_proj").get_parameter("weight")
            assert weight.grad is not None
            gradients.append(weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-5)
    assert steering.summary().tokens_edited > 0


@pytest.mark.long
@pytest.mark.parametrize("part", ["decoder layers", pytest.param("forward", marks=pytest.mark.long)])
def test_parts_that_are_compiled(part: str) -> None:
    """Layer by layer, as regional compilation does, and by replacing the model's forward method."""
    model, rows = tiny_model("llama"), prompts((6, 4))
    policy = tiny_policy(model)
    expected = naive_generate(model, policy, rows, COUNT)
    unsteered = generate(model, rows, COUNT)
    if part == "forward":
        model.forward = torch.compile(model.forward, backend="eager")  # type: ignore[method-assign]
    else:
        for layer in model.get_submodule("model.layers").children():
            layer.compile(backend="eager")
    assert generate(model, rows, COUNT) == unsteered
    with steer(model, policy):
        assert generate(model, rows, COUNT) == expected
    assert generate(model, rows, COUNT) == unsteered
