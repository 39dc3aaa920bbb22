"""Forward calls outside of `generate`: prompts, continued caches, scoring, gradients. Against the naive loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from naive_generation import (
    generate,
    generate_from,
    naive_generate,
    naive_lists,
    naive_logits,
)
from tiny_models import (
    OUTPUT_LAYER,
    layer_of,
    left_padded,
    prompts,
    tiny_model,
    tiny_policy,
)
from transformers import (
    DynamicCache,
    StaticCache,
)

from dspa.errors import InvalidInputError
from dspa.online.steering import steer

LENGTHS = (5, 9, 3, 7)
ONE, FOUR = LENGTHS[:1], LENGTHS


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The shapes here are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_forward_pass_takes_its_whole_input_for_the_prompt() -> None:
    model, rows = tiny_model(), prompts(FOUR)
    policy = tiny_policy(model)
    with steer(model, policy) as steering, torch.no_grad():
        logits = model(**left_padded(rows)).logits
        again = model(**left_padded(rows)).logits
    assert torch.equal(logits, again)
    for row, prompt in enumerate(rows):
        expected = naive_logits(model, policy, prompt, prompt, naive_lists(model, policy, prompt))
        if row == 1:  # the longest, which has no padding; elsewhere plain positions count the padding
            torch.testing.assert_close(logits[row], expected, rtol=1e-9, atol=1e-9)
    assert steering.summary().prompts == 8
    assert steering.summary().tokens_seen == 8


@pytest.mark.parametrize("positional", [True, False])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_forward_pass_with_a_cache_continues_the_prompt(cache: str, positional: bool) -> None:
    model, (prompt,) = tiny_model("llama"), prompts((6,))
    policy = tiny_policy(model)
    new = naive_generate(model, policy, [prompt], 8)[0]
    options: dict[str, Any] = {"use_cache": True}
    if cache == "static":
        options["past_key_values"] = StaticCache(config=model.config, max_cache_len=32)
    with steer(model, policy) as steering, torch.no_grad():
        ids = torch.tensor([prompt])
        out = model(ids, **options) if positional else model(input_ids=ids, **options)
        found = []
        for _ in range(8):
            token = out.logits[:, -1:].float().argmax(dim=-1)
            found.append(token.item())
            out = model(token, past_key_values=out.past_key_values, use_cache=True)
    assert found == new
    assert steering.summary().prompts == 1
    assert steering.summary().tokens_seen == 9


def test_a_forward_pass_continues_a_generate_call() -> None:
    model, (prompt,) = tiny_model("llama"), prompts((6,))
    policy = tiny_policy(model)
    with steer(model, policy), torch.no_grad():
        out = generate_from(model, {"input_ids": torch.tensor([prompt])}, 4, return_dict_in_generate=True)
        tokens = out.sequences[0].tolist()
        logits = model(out.sequences[:, -1:], past_key_values=out.past_key_values).logits[0, -1]
    expected = naive_logits(model, policy, prompt, tokens, naive_lists(model, policy, prompt))[-1]
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_a_cache_filled_before_the_policy_came_cannot_be_continued() -> None:
    model, (prompt,) = tiny_model("llama"), prompts((6,))
    policy, ids = tiny_policy(model), torch.tensor([prompt])
    with torch.no_grad():
        expected = model(ids).logits[:, -1:]
        cache = model(ids[:, :-1]).past_key_values
        with steer(model, {"a": policy}, select="a") as steering:
            with pytest.raises(InvalidInputError, match="no prompt was read since the policy was attached"):
                model(ids[:, -1:], past_key_values=cache)
            steering.select(None)
            torch.testing.assert_close(model(ids[:, -1:], past_key_values=cache).logits, expected)


@pytest.mark.parametrize("last", ["with a cache", "with a cache of its own making", "without a cache"])
def test_conversations_by_turns_are_refused(last: str) -> None:
    """The edit lists are those of the last prompt; they are not those of another conversation."""
    model, (first, second) = tiny_model("llama"), prompts((6, 6))
    policy, token = tiny_policy(model), torch.tensor([[9]])
    expected = naive_logits(model, policy, second, [*second, 9], naive_lists(model, policy, second))[-1]
    with steer(model, policy), torch.no_grad():
        earlier = model(torch.tensor([first])).past_key_values
        cache = DynamicCache(config=model.config) if last == "with a cache" else None
        out = model(torch.tensor([second]), past_key_values=cache, use_cache=last != "without a cache")
        with pytest.raises(InvalidInputError, match="continues another cache than that of the last prompt"):
            model(token, past_key_values=earlier)
        if last != "without a cache":
            logits = model(token, past_key_values=out.past_key_values).logits[0, -1]
            torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_a_cropped_cache_is_continued_and_what_follows_counts_again() -> None:
    model, (prompt,) = tiny_model("llama"), prompts((6,))
    policy = tiny_policy(model)
    lists = naive_lists(model, policy, prompt)
    answers = [[7, 8, 9], [10, 11, 12], [13, 14, 15]]
    expected = [naive_logits(model, policy, prompt, prompt + answer, lists)[6:] for answer in answers]
    with steer(model, policy) as steering, torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(torch.tensor([prompt]), past_key_values=cache)
        for answer, logits in zip(answers, expected, strict=True):
            found = model(torch.tensor([answer]), past_key_values=cache).logits[0]
            torch.testing.assert_close(found, logits, rtol=1e-9, atol=1e-9)
            cache.crop(-3)
    assert steering.summary().tokens_seen == 1 + 9


def test_gradients_flow_past_the_edit() -> None:
    """To autograd the edit is a constant; the values are those of the steered pass."""
    model, rows = tiny_model(), prompts((6, 6))
    policy = tiny_policy(model, edit_positions="all")
    with steer(model, policy) as steering:
        with torch.no_grad():
            expected = model(torch.tensor(rows)).logits
        logits = model(torch.tensor(rows)).logits
        assert logits.requires_grad
        logits.sum().backward()
        assert steering.summary().tokens_edited > 0
    assert torch.equal(logits, expected)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    assert layer_of(model, 0).get_parameter("mlp.down_proj.weight").grad.abs().sum() > 0  # type: ignore[union-attr]


def test_gradients_flow_past_the_edit_where_autograd_needs_what_was_edited() -> None:
    model, rows = tiny_model(), prompts((6,))
    layer_of(model, OUTPUT_LAYER).register_forward_hook(lambda module, args, output: output.tanh())  # keeps its result
    with steer(model, tiny_policy(model)) as steering:
        model(torch.tensor(rows)).logits.sum().backward()
    assert steering.summary().tokens_edited == 1


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_calls_in_and_outside_of_inference_mode(backend: str) -> None:
    model, rows = tiny_model("llama"), prompts((6, 4))
    policies = {"a": tiny_policy(model), "b": tiny_policy(model, alpha=0.1)}
    expected = naive_generate(model, policies["a"], rows, 4)
    for first, second in ((torch.inference_mode, torch.no_grad), (torch.no_grad, torch.inference_mode)):
        with steer(model, policies, select="a", backend=backend):
            for mode in (first, second, torch.enable_grad, first):
                with mode():
                    assert generate(model, rows, 4) == expected
                    assert model(**left_padded(rows)).logits.isfinite().all()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(mode: Callable[[], Any]) -> None:
    model, rows = tiny_model(), prompts((6,))
    policy = tiny_policy(model)
    with mode(), steer(model, policy):
        steered = generate(model, rows, 6)
    assert steered == naive_generate(model, policy, rows, 6)
