"""Several methods in one batch, and gradients through their edits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from fsrl_cases import tiny_fsrl_policy
from naive_generation import edited, fsrl_edited, generate, greedily, naive_generate, naive_logits
from tiny_models import D_MODEL, OUTPUT_LAYER, layer_of, prompts, tiny_model, tiny_policy
from torch import Tensor, nn

from dspa import FsrlPolicy, Policy, StaticPolicy, VectorPolicy
from dspa.errors import InvalidInputError
from dspa.kernels import EditList
from dspa.methods.latent_lists import LatentLists
from dspa.online.steering import steer

MODEL: Any = tiny_model()
ROWS = prompts((6, 4, 5, 3, 5))
VECTOR = torch.randn(D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
NEW = 6


def static_policy() -> StaticPolicy:
    return StaticPolicy.with_edits(
        tiny_policy(MODEL, alpha=0.8), EditList.from_lists([list(range(10))], [list(range(10, 20))])
    )


def naive_static(prompt: list[int]) -> list[int]:
    policy, new = static_policy(), list[int]()
    lists = (policy.edits.augmented(0), policy.edits.ablated(0))
    for _ in range(NEW):
        new += greedily(naive_logits(MODEL, policy, prompt, prompt + new, lists)[-1:].float())
    return new


def naive_vector(prompt: list[int], layer: int, scale: float) -> list[int]:
    """Greedy generation with `scale * VECTOR` added after a layer from the last prompt token on, without a cache."""
    new: list[int] = []

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = (output if isinstance(output, Tensor) else output[0]).clone()
        hidden[:, len(prompt) - 1 :] += scale * VECTOR
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    hook = layer_of(MODEL, layer).register_forward_hook(add)
    with torch.no_grad():
        for _ in range(NEW):
            logits = MODEL(torch.tensor([prompt + new]), use_cache=False).logits[0]
            new += greedily(logits[-1:].float())
    hook.remove()
    return new


@pytest.mark.parametrize("layer", [OUTPUT_LAYER, 0])
@pytest.mark.parametrize("order", [(0, 1, 2, 3, 4), (2, 4, 0, 3, 1), (3, 2, 1, 0, 4)], ids=str)
def test_each_row_follows_its_method(layer: int, order: Sequence[int]) -> None:
    dynamic = tiny_policy(MODEL)
    policies: dict[str, Policy] = {
        "dynamic": dynamic,
        "static": static_policy(),
        "vector": VectorPolicy(VECTOR, layer, 0.7),
        "fsrl": tiny_fsrl_policy(layer=layer),
    }
    names = ["dynamic", "static", "vector", None, "fsrl"]
    expected = [
        naive_generate(MODEL, dynamic, [ROWS[0]], NEW)[0],
        naive_static(ROWS[1]),
        naive_vector(ROWS[2], layer, 0.7),
        generate(MODEL, [ROWS[3]], NEW)[0],
        naive_generate(MODEL, tiny_fsrl_policy(layer=layer), [ROWS[4]], NEW)[0],
    ]
    plain = generate(MODEL, ROWS, NEW)
    with steer(MODEL, policies, select=[names[index] for index in order]) as steering:
        assert generate(MODEL, [ROWS[index] for index in order], NEW) == [expected[index] for index in order]
    assert all(expected[index] != plain[index] for index in (0, 1, 2, 4))
    summary = steering.summary()
    assert summary.prompts == 4
    assert summary.tokens_seen == 3 * NEW + len(ROWS[4]) + NEW - 1


def test_two_vectors_at_one_layer_share_an_editor() -> None:
    policies = {"plus": VectorPolicy(VECTOR, 1, 0.7), "minus": VectorPolicy(VECTOR, 1, -0.7)}
    with steer(MODEL, policies, select=["plus", "minus"]) as steering:
        steered = generate(MODEL, ROWS[:2], NEW)
        assert steering.counters(2).seen.tolist() == [NEW, NEW]
    assert steered == [naive_vector(ROWS[0], 1, 0.7), naive_vector(ROWS[1], 1, -0.7)]


def test_an_adapter_is_traced_latent_by_latent() -> None:
    policy = tiny_fsrl_policy(edit_positions="generated")
    with steer(MODEL, policy, trace=True) as steering:
        generate(MODEL, ROWS[:1], 3)
    (sequence,) = steering.trace().sequences
    assert [len(token.edits) > 5 for token in sequence.tokens] == [True] * len(sequence.tokens)
    assert {edit.latent for edit in steering.summary().latents} == {
        change.latent for token in sequence.tokens for change in token.edits
    }


def test_two_policies_of_one_adapter_share_an_editor_and_of_two_do_not() -> None:
    one, other = tiny_fsrl_policy(), tiny_fsrl_policy(seed=1)
    assert one.intervention.shares_launch_with(one.intervention)
    assert not one.intervention.shares_launch_with(other.intervention)
    assert not one.intervention.shares_launch_with(VectorPolicy(VECTOR, OUTPUT_LAYER).intervention)
    rows, names = ROWS[:4], ["one", "other", "one", None]
    with steer(MODEL, {"one": one, "other": other}, select=names):
        steered = generate(MODEL, rows, NEW)
    assert steered[:3] == [
        naive_generate(MODEL, policy, [row], NEW)[0] for policy, row in zip((one, other, one), rows, strict=False)
    ]


def test_an_adapter_edits_all_positions_of_a_prompt_in_chunks() -> None:
    """It depends on no other token, so that nothing of the prompt has to be read first."""
    policy = tiny_fsrl_policy()
    expected = naive_generate(MODEL, policy, ROWS[:2], NEW)
    for chunk in (1, 2):
        with steer(MODEL, policy):
            assert generate(MODEL, ROWS[:2], NEW, prefill_chunk_size=chunk) == expected


def test_trace_of_a_vector_names_no_latent() -> None:
    with steer(MODEL, VectorPolicy(VECTOR, 1, 0.7), trace=True) as steering:
        generate(MODEL, ROWS[:1], 3)
    (sequence,) = steering.trace().sequences
    assert [token.edits for token in sequence.tokens] == [()] * 3


def test_methods_at_one_layer_are_traced_side_by_side() -> None:
    policies: dict[str, Policy] = {"dynamic": tiny_policy(MODEL), "vector": VectorPolicy(VECTOR, OUTPUT_LAYER, 0.7)}
    with steer(MODEL, policies, select=["dynamic", "vector"], trace=True) as steering:
        generate(MODEL, ROWS[:2], 3)
    with steer(MODEL, policies, select=["dynamic", None], trace=True) as alone:
        generate(MODEL, ROWS[:2], 3)
    dynamic, vector = steering.trace().sequences
    assert [token.edits for token in dynamic.tokens] == [token.edits for token in alone.trace().sequences[0].tokens]
    assert any(token.edits for token in dynamic.tokens)
    assert [token.edits for token in vector.tokens] == [()] * 3


def test_lists_of_an_earlier_prompt_are_not_shown_for_one_without_lists() -> None:
    with steer(MODEL, {"dynamic": tiny_policy(MODEL)}, select="dynamic") as steering:
        generate(MODEL, ROWS[:3], 2)
        assert steering.edits is not None
        steering.select(None)
        generate(MODEL, ROWS[:2], 2)
        assert steering.edits is None


class Clamped(LatentLists):
    """A subclass, whose editor is its own."""


def test_a_subclass_does_not_share_a_launch() -> None:
    intervention = tiny_policy(MODEL).intervention
    own = Clamped(intervention.layer, intervention.sae, intervention.strength, intervention.longest_list)
    assert not intervention.shares_launch_with(own)
    assert not own.shares_launch_with(intervention)
    assert own.shares_launch_with(own)


def test_a_vector_too_small_to_change_anything_is_said_so() -> None:
    with steer(MODEL, VectorPolicy(1e-40 * VECTOR, 1)), pytest.warns(UserWarning, match="vector is too small"):
        generate(MODEL, ROWS[:1], 2)


# ------------------------------------------------------------------------------------------------------------ gradients


def test_a_vector_can_be_trained_step_after_step() -> None:
    """Every step computes with the vector as it is then, and has a graph of its own."""
    vector = torch.zeros(D_MODEL, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([vector], lr=5.0)
    tokens, losses = torch.tensor([ROWS[0]]), []
    with torch.no_grad():
        steering = steer(MODEL, VectorPolicy(vector, 1, 2.0), differentiable=True)
    for _ in range(4):
        loss = -MODEL(tokens).logits[0, -1].log_softmax(dim=-1)[7]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    steering.remove()
    MODEL.zero_grad(set_to_none=True)
    assert all(after < before for before, after in pairwise(losses)), losses


def test_a_vector_of_another_dtype_has_gradients_of_its_own() -> None:
    model = copy.deepcopy(MODEL).float()
    vector = VECTOR.clone().requires_grad_()
    with steer(model, VectorPolicy(vector, 1, 0.5), differentiable=True):
        model(torch.tensor([ROWS[0]])).logits[0, -1].square().mean().backward()
    assert vector.grad is not None
    assert vector.grad.dtype == torch.float64
    assert vector.grad.abs().max() > 0


@pytest.mark.parametrize("positions", ["from_last_prompt", "all"])
def test_gradients_reach_an_adapter_as_through_the_equations_written_out(positions: Any) -> None:
    """Also where the layers below are trained: their gradient passes through f and the adapter."""
    tokens, prompt_tokens = torch.tensor([ROWS[0]]), 3
    embedded = [MODEL.get_input_embeddings()(tokens).detach().requires_grad_() for _ in range(2)]
    weights = [tiny_fsrl_policy().adapter for _ in range(2)]
    policies = []
    for each in weights:
        adapter = replace(
            each, **{n: getattr(each, n).clone().requires_grad_() for n in ("weight", "bias", "threshold")}
        )
        policies.append(FsrlPolicy(adapter, tiny_fsrl_policy().sae, OUTPUT_LAYER, edit_positions=positions))

    def score(inputs: Tensor) -> Tensor:
        return MODEL(inputs_embeds=inputs).logits.log_softmax(dim=-1)[0, :-1].gather(1, tokens[0, 1:, None]).sum()

    with steer(MODEL, policies[0], differentiable=True) as steering, steering.scoring(prompt_tokens=prompt_tokens):
        steered = score(embedded[0])
    steered.backward()
    first = 0 if positions == "all" else prompt_tokens - 1

    def edit(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden = torch.cat([hidden[:, :first], fsrl_edited(hidden[0, first:], policies[1])[None]], dim=1)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    hook = layer_of(MODEL, OUTPUT_LAYER).register_forward_hook(edit)
    expected = score(embedded[1])
    expected.backward()
    hook.remove()
    MODEL.zero_grad(set_to_none=True)
    torch.testing.assert_close(steered, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(embedded[0].grad, embedded[1].grad, rtol=1e-8, atol=1e-10)
    for name in ("weight", "bias", "threshold"):
        found, wanted = (getattr(policy.adapter, name).grad for policy in policies)
        assert wanted.abs().max() > 0
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)


def test_two_passes_may_precede_one_backward_pass() -> None:
    policy = tiny_policy(MODEL, alpha=0.5)
    gradients = []
    with steer(MODEL, {"a": policy, "b": tiny_policy(MODEL, alpha=0.9)}, select="a", differentiable=True):
        for together in (True, False):
            inputs = [MODEL.get_input_embeddings()(torch.tensor([row[:3]])).detach() for row in ROWS[:2]]
            for each in inputs:
                each.requires_grad_()
            if together:
                torch.stack(
                    [MODEL(inputs_embeds=each).logits[0, -1].square().mean() for each in inputs]
                ).sum().backward()
            else:
                for each in inputs:
                    MODEL(inputs_embeds=each).logits[0, -1].square().mean().backward()
            gradients.append([each.grad for each in inputs])
    MODEL.zero_grad(set_to_none=True)
    for together, apart in zip(*gradients, strict=True):
        torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("positions", ["from_last_prompt", "all"])
def test_gradients_reach_a_vector_as_through_the_sum_written_out(positions: Any) -> None:
    tokens, prompt_tokens = torch.tensor([ROWS[0]]), 3
    on = torch.zeros(tokens.shape[1], 1, dtype=torch.float64)
    on[0 if positions == "all" else prompt_tokens - 1 :] = 1
    vectors = [VECTOR.clone().requires_grad_() for _ in range(2)]
    with steer(MODEL, VectorPolicy(vectors[0], 1, 0.5, edit_positions=positions), differentiable=True) as steering:
        with steering.scoring(prompt_tokens=prompt_tokens):
            steered = MODEL(tokens).logits.log_softmax(dim=-1)[0, :-1].gather(1, tokens[0, 1:, None]).sum()
        steered.backward()

    def add(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        hidden = hidden + 0.5 * on * vectors[1]
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    hook = layer_of(MODEL, 1).register_forward_hook(add)
    expected = MODEL(tokens).logits.log_softmax(dim=-1)[0, :-1].gather(1, tokens[0, 1:, None]).sum()
    expected.backward()
    hook.remove()
    torch.testing.assert_close(steered, expected, rtol=1e-10, atol=1e-10)
    found, wanted = vectors[0].grad, vectors[1].grad
    assert found is not None
    assert wanted is not None
    assert wanted.abs().max() > 0
    torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-10)
    MODEL.zero_grad(set_to_none=True)


def test_gradients_pass_through_an_edit_of_latents_as_through_the_equation_written_out() -> None:
    policy = tiny_policy(MODEL, alpha=0.5, edit="ablate")
    prompt = ROWS[0]
    embedded = MODEL.get_input_embeddings()(torch.tensor([prompt])).detach()

    def gradient() -> Tensor:
        inputs = embedded.clone().requires_grad_()
        MODEL(inputs_embeds=inputs).logits[0, -1].square().mean().backward()
        MODEL.zero_grad(set_to_none=True)
        assert inputs.grad is not None
        return inputs.grad

    def edit(module: nn.Module, args: Any, output: Any) -> Any:
        hidden = output if isinstance(output, Tensor) else output[0]
        last = edited(hidden[0, -1], policy.output_sae, lists, policy.alpha)
        hidden = torch.cat([hidden[:, :-1], last[None, None]], dim=1)
        return hidden if isinstance(output, Tensor) else (hidden, *output[1:])

    with steer(MODEL, policy, differentiable=True):
        through = gradient()
    with steer(MODEL, policy) as steering:
        constant = gradient()
        assert steering.edits is not None
        lists = (steering.edits.augmented(0), steering.edits.ablated(0))
    hook = layer_of(MODEL, OUTPUT_LAYER).register_forward_hook(edit)
    expected = gradient()
    hook.remove()
    torch.testing.assert_close(through, expected, rtol=1e-8, atol=1e-12)
    assert (constant - expected).abs().max() > 1e-3 * expected.abs().max()


def test_generation_is_the_same_with_differentiable_edits() -> None:
    policy = tiny_policy(MODEL)
    expected = naive_generate(MODEL, policy, ROWS, NEW)
    with steer(MODEL, policy, differentiable=True) as steering:
        assert generate(MODEL, ROWS, NEW) == expected
    assert steering.summary().tokens_seen == NEW * len(ROWS)


@pytest.mark.long
@pytest.mark.parametrize("frozen", [pytest.param(False, marks=pytest.mark.long), True])
def test_differentiable_edits_are_refused_in_a_compiled_model(frozen: bool) -> None:
    model = tiny_model().requires_grad_(not frozen)
    with steer(model, VectorPolicy(VECTOR.clone().requires_grad_(), 1), differentiable=True):
        compiled = torch.compile(model, backend="eager")
        with pytest.raises(InvalidInputError, match="differentiable edits do not work in a compiled model"):
            compiled(torch.tensor(ROWS[:1]), use_cache=False)
