"""Threads, copies, interruptions, many calls: what a steered model goes through beside generating."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_generation import generate, generate_from, is_clean, naive_generate
from tiny_models import layer_of, prompts, tiny_model, tiny_policy
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList, StaticCache

import dspa
import dspa.online.prompt_reader as prompt_reader
import dspa.online.steering as steering_module
from dspa.errors import InvalidInputError
from dspa.kernels.token_step.prepared import PreparedStep
from dspa.online.steering import steer

COUNT = 6


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The shapes here are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Pausing(LogitsProcessor):
    """Stops in the middle of generating until it may go on."""

    def __init__(self) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.calls += 1
        if self.calls == 3:
            self.reached.set()
            assert self.go_on.wait(60)
        return scores


class InThread:
    """A generate call in another thread, in the middle of which the block of a with statement runs."""

    def __init__(self, model: Any, prompt: list[int]) -> None:
        self.pausing = Pausing()
        self.result: list[list[int]] = []
        options = {"logits_processor": LogitsProcessorList([self.pausing])}
        self.thread = threading.Thread(target=lambda: self.result.extend(generate(model, [prompt], COUNT, **options)))

    def __enter__(self) -> InThread:
        self.thread.start()
        assert self.pausing.reached.wait(60)
        return self

    def __exit__(self, *exception: object) -> None:
        self.pausing.go_on.set()
        self.thread.join(60)
        assert not self.thread.is_alive()


@pytest.mark.parametrize(
    ("second", "line"),
    [
        (lambda model: generate(model, prompts((4,)), 2), "another generate call is running"),
        (lambda model: model(torch.tensor(prompts((4,)))), "a forward call came from another thread"),
    ],
    ids=["generate", "forward"],
)
def test_a_second_thread_is_refused_and_the_first_goes_on(second: Callable[[Any], Any], line: str) -> None:
    model, (prompt,) = tiny_model("llama"), prompts((6,))
    policy = tiny_policy(model)
    expected = naive_generate(model, policy, [prompt], COUNT)
    with steer(model, policy) as steering:
        with InThread(model, prompt) as first, pytest.raises(InvalidInputError, match=line):
            second(model)
        assert first.result == expected
        assert generate(model, [prompt], COUNT) == expected
        with InThread(model, prompt), pytest.raises(InvalidInputError, match="while a generate call is running"):
            steering.select("policy")


def test_a_forward_call_during_another_threads_forward_call_is_refused() -> None:
    """Each has lists and positions of its own; the first goes on undisturbed."""
    model, rows = tiny_model("llama"), prompts((6, 6))
    policy = tiny_policy(model)
    inside, go_on = threading.Event(), threading.Event()
    found: list[Tensor] = []

    def pause(*args: Any) -> None:
        if threading.current_thread() is first:
            inside.set()
            assert go_on.wait(60)

    def run() -> None:
        with torch.no_grad():
            found.append(model(torch.tensor(rows[:1])).logits)

    with steer(model, policy), torch.no_grad():
        expected = model(torch.tensor(rows[:1])).logits
        hook = layer_of(model, 1).register_forward_hook(pause)
        first = threading.Thread(target=run)
        first.start()
        assert inside.wait(60)
        with pytest.raises(InvalidInputError, match="two threads run this steered model at once"):
            model(torch.tensor(rows[1:]))
        go_on.set()
        first.join(60)
        hook.remove()
        assert torch.equal(found[0], expected)
        assert torch.equal(model(torch.tensor(rows[:1])).logits, expected)


def test_detaching_waits_for_the_generate_call_of_another_thread() -> None:
    model, (prompt,) = tiny_model("llama"), prompts((6,))
    policy = tiny_policy(model)
    expected, unsteered = naive_generate(model, policy, [prompt], COUNT), generate(model, [prompt], COUNT)
    steering = steer(model, policy)
    with InThread(model, prompt) as first:
        detaching = threading.Thread(target=steering.remove)
        detaching.start()
        detaching.join(0.05)
        assert detaching.is_alive()
    detaching.join(60)
    assert first.result == expected
    assert is_clean(model)
    assert generate(model, [prompt], COUNT) == unsteered


class Detaching(LogitsProcessor):
    """Detaches in the middle of its own generate call."""

    def __init__(self) -> None:
        self.steering: Any = None
        self.calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.calls += 1
        if self.calls == 3:
            self.steering.remove()
        return scores


def test_detaching_inside_its_own_generate_call_takes_effect_at_once() -> None:
    model, (prompt,) = tiny_model("llama"), prompts((6,))
    policy = tiny_policy(model)
    processor = Detaching()
    processor.steering = steering = steer(model, policy)
    generate(model, [prompt], COUNT, logits_processor=LogitsProcessorList([processor]))
    assert steering.summary().tokens_seen == 3
    assert is_clean(model)


class Interrupting(LogitsProcessor):
    """What Ctrl-C does."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        raise KeyboardInterrupt


def test_an_interrupted_call_leaves_the_model_steered_and_free() -> None:
    model, rows = tiny_model("llama"), prompts((6, 4))
    policy = tiny_policy(model)
    with steer(model, policy):
        with pytest.raises(KeyboardInterrupt):
            generate(model, prompts((5,)), COUNT, logits_processor=LogitsProcessorList([Interrupting()]))
        steered = generate(model, rows, COUNT)
    assert steered == naive_generate(model, policy, rows, COUNT)


def by_pickle(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def by_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("make", [copy.deepcopy, by_pickle, by_torch])
@pytest.mark.parametrize("detached_before", [False, True])
def test_a_copy_is_not_steered_and_shares_nothing(make: Callable[[Any], Any], detached_before: bool) -> None:
    model, rows = tiny_model("llama"), prompts((6, 4))
    policy = tiny_policy(model)
    expected, unsteered = naive_generate(model, policy, rows, COUNT), generate(model, rows, COUNT)
    steering = steer(model, policy)
    if detached_before:
        steering.remove()
    twin = make(model)
    assert generate(twin, rows, COUNT) == unsteered
    with torch.no_grad():
        layer_of(twin, 0).get_submodule("mlp.down_proj").get_parameter("weight").zero_()
    assert generate(twin, rows, COUNT) != unsteered  # with weights of its own
    assert generate(model, rows, COUNT) == (unsteered if detached_before else expected)
    steering.remove()
    with steer(twin, policy) as its_own:
        assert generate(twin, rows, COUNT) == naive_generate_detached(twin, policy, rows)
    assert its_own.summary().tokens_seen == 2 * COUNT
    assert generate(model, rows, COUNT) == unsteered


def naive_generate_detached(model: Any, policy: Any, rows: list[list[int]]) -> list[list[int]]:
    """Of a copy, since the model itself is steered."""
    return naive_generate(copy.deepcopy(model), policy, rows, COUNT)


def test_a_steered_model_is_saved_as_it_is_without_a_policy(tmp_path: Path) -> None:
    model, rows = tiny_model("llama"), prompts((6, 4))
    unsteered = generate(model, rows, COUNT)
    with steer(model, tiny_policy(model)):
        model.save_pretrained(tmp_path)
        names = set(model.state_dict())
    assert names == set(model.state_dict())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64)
    assert generate(loaded, rows, COUNT) == unsteered


PACKAGE = tracemalloc.Filter(True, str(Path(dspa.__file__).parent / "*"))


def memory() -> tuple[int, int, int]:
    """What is alive: allocations by lines of the package, tensors, and bytes of tensors."""
    gc.collect()
    allocations = len(tracemalloc.take_snapshot().filter_traces([PACKAGE]).traces)
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]  # not a compiler's
    strided = [tensor for tensor in tensors if tensor.layout is torch.strided]  # a sparse tensor has no storage
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in strided}
    return allocations, len(tensors), sum(storages.values())


@pytest.mark.parametrize(
    "calls", [pytest.param(48, marks=pytest.mark.long), pytest.param(5_000, marks=pytest.mark.slow)]
)
def test_memory_stays_flat(calls: int) -> None:
    """Short calls with prompts of several lengths and batches of several sizes, and policies that come and go. A call
    that leaks adds an allocation each time; what the interpreter and torch keep for reuse is less than that."""
    model = tiny_model("llama", dtype=torch.float32)
    policies = {"a": tiny_policy(model, dtype=torch.float32), "b": tiny_policy(model, dtype=torch.float32, alpha=0.1)}
    batches = [prompts(lengths) for lengths in ((4,), (3, 5), (6,), (2, 2, 4))]

    def run(count: int) -> tuple[int, int, int]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with steer(model, policies, select="a") as steering:
                for call in range(count):
                    steering.select("ab"[call % 2])
                    generate(model, batches[call % 4], 2)
        return memory()

    tracemalloc.start()
    allocations, tensors, bytes_of_tensors = zip(*(run(calls) for _ in range(4)), strict=True)
    tracemalloc.stop()
    assert min(after - before for before, after in pairwise(allocations)) < calls, allocations
    for sizes in (tensors, bytes_of_tensors):
        assert min(after - before for before, after in pairwise(sizes)) <= 0, sizes


def test_a_detached_policy_can_be_collected() -> None:
    import weakref

    model = tiny_model("llama")
    steering = steer(model, tiny_policy(model))
    generate(model, prompts((4,)), 2)
    steering.remove()
    gone = weakref.ref(steering)
    del steering
    gc.collect()
    assert gone() is None


def test_nested_and_repeated_attaching() -> None:
    model, rows = tiny_model("llama"), prompts((6, 4))
    first, second = tiny_policy(model), tiny_policy(model, seed=1, output_layer=3)
    unsteered, alone = generate(model, rows, COUNT), naive_generate(model, first, rows, COUNT)
    for _ in range(3):
        with steer(model, first):
            assert generate(model, rows, COUNT) == alone
            with steer(model, second):
                assert generate(model, rows, COUNT) not in (alone, unsteered)
            assert generate(model, rows, COUNT) == alone
        assert is_clean(model)
        assert generate(model, rows, COUNT) == unsteered


def test_a_forward_method_that_somebody_replaced_meanwhile_stays() -> None:
    model, rows = tiny_model("llama"), prompts((6,))
    policy = tiny_policy(model)
    unsteered = generate(model, rows, COUNT)
    steering = steer(model, policy)
    layer: Any = layer_of(model, policy.output_layer)
    ours = layer.forward
    layer.forward = lambda *args, **kwargs: ours(*args, **kwargs)
    assert generate(model, rows, COUNT) == naive_generate_detached_of(policy, rows)
    steering.remove()
    assert "forward" in vars(layer)
    assert generate(model, rows, COUNT) == unsteered


def naive_generate_detached_of(policy: Any, rows: list[list[int]]) -> list[list[int]]:
    return naive_generate(tiny_model("llama"), policy, rows, COUNT)


def test_a_static_cache_of_ones_own_over_several_calls() -> None:
    """The length of a static cache is a tensor; a second call continues it, and its prompt is what it is given."""
    model, (prompt,) = tiny_model("llama"), prompts((6,))
    policy = tiny_policy(model)
    with steer(model, policy):
        cache = StaticCache(config=model.config, max_cache_len=32)
        out = generate_from(model, {"input_ids": torch.tensor([prompt]), "past_key_values": cache}, 4)
    assert out[0, 6:].tolist() == naive_generate(model, policy, [prompt], 4)[0]


def test_what_has_to_be_compiled_is_compiled_when_a_policy_is_attached(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: reading and editing are tried once, on the dtype of the model, and generating binds no step."""
    model = tiny_model("llama", dtype=torch.bfloat16)
    bound: list[torch.dtype] = []
    densities: list[tuple[int, ...]] = []
    bind, encode = PreparedStep._bind, prompt_reader.encode_density  # pyright: ignore[reportPrivateUsage]

    def binding(step: PreparedStep, dtype: torch.dtype) -> Any:
        bound.append(dtype)
        return bind(step, dtype)

    def encoding(hidden: torch.Tensor, *arguments: Any, **options: Any) -> torch.Tensor:
        densities.append((*hidden.shape, hidden.dtype == torch.bfloat16))
        return encode(hidden, *arguments, **options)

    monkeypatch.setattr(PreparedStep, "_bind", binding)
    monkeypatch.setattr(prompt_reader, "encode_density", encoding)
    monkeypatch.setattr(steering_module, "is_compiled_for", lambda device: True)
    policy = tiny_policy(model, dtype=torch.float32)  # another one than that of the hidden states
    (prompt,) = prompts((6,))
    with steer(model, policy):
        assert bound == [torch.bfloat16]
        assert densities == [(1, model.config.hidden_size, True)]
        generate(model, [prompt], 4)
        assert bound == [torch.bfloat16]
