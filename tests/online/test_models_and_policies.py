"""Which models and policies fit together, and what is counted. Against the naive loop (`naive_generation.py`)."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from naive_generation import (
    NEW_TOKENS,
    WAYS,
    generate,
    greedily,
    hidden_after,
    is_clean,
    latents,
    naive_generate,
    naive_lists,
    naive_logits,
)
from tiny_models import (
    BOS,
    D_MODEL,
    LAYERS,
    OUTPUT_LAYER,
    VOCAB,
    layer_of,
    prompts,
    tiny_model,
    tiny_policy,
    tiny_sae,
)
from torch import Tensor, nn

from dspa.errors import InvalidInputError, MismatchError
from dspa.kernels import EditList
from dspa.methods.policy import EditPositions, Intervention, PromptObservation
from dspa.methods.static_policy import StaticPolicy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.online.steering import Steering, steer
from dspa.transformers_model import ModelFingerprint

LENGTHS = (5, 9, 3, 7)
ONE, FOUR = LENGTHS[:1], LENGTHS


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The shapes here are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------ models and policies


class TupleLayer(nn.Module):
    """A decoder layer that returns a tuple, as those of older transformers releases do."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, str]:
        return self.layer(hidden, *args, **kwargs), "something else"


class FromTupleLayer(nn.Module):
    """The decoder layer after it, which takes the tuple apart."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden: tuple[Tensor, str], *args: Any, **kwargs: Any) -> Tensor:
        assert hidden[1] == "something else"
        return self.layer(hidden[0], *args, **kwargs)


@pytest.mark.parametrize("gradients", [False, True])
def test_layers_that_return_tuples(gradients: bool) -> None:
    model, rows = tiny_model("llama"), prompts((6,))
    policy = tiny_policy(model, input_layer=OUTPUT_LAYER)
    with steer(model, policy), torch.set_grad_enabled(gradients):
        expected = model(torch.tensor(rows)).logits
    layers: Any = model.get_submodule("model.layers")
    layers[OUTPUT_LAYER] = TupleLayer(layers[OUTPUT_LAYER])
    layers[OUTPUT_LAYER + 1] = FromTupleLayer(layers[OUTPUT_LAYER + 1])
    with steer(model, policy), torch.set_grad_enabled(gradients):
        assert torch.equal(model(torch.tensor(rows)).logits, expected)


@pytest.mark.parametrize("rows", [1, 2])
def test_static_lists(rows: int) -> None:
    """One list for all rows, or one each; no prompt is read, so that BOS alone is steered as well."""
    model, batch = tiny_model(), [*prompts((6,)), [BOS]]
    augment, ablate = [list(range(10)), list(range(20, 30))], [list(range(10, 20)), list(range(30, 40))]
    policy = StaticPolicy.with_edits(tiny_policy(model, alpha=0.8), EditList.from_lists(augment[:rows], ablate[:rows]))
    with steer(model, policy):
        steered = generate(model, batch, 8)
    lists = [(policy.edits.augmented(row % rows), policy.edits.ablated(row % rows)) for row in range(2)]
    new: list[list[int]] = [[], []]
    for _ in range(8):
        for prompt, more, each in zip(batch, new, lists, strict=True):
            more += greedily(naive_logits(model, policy, prompt, prompt + more, each)[-1:].float())
    assert steered == new
    assert all(more != old for more, old in zip(steered, generate(model, batch, 8), strict=True))


@pytest.mark.parametrize(
    ("options", "repeats"), [({"num_beams": 3}, 3), ({"num_return_sequences": 2, "do_sample": True}, 2)], ids=str
)
@pytest.mark.parametrize("select", [("a", "a"), ("a", None), (None, "a")], ids=str)
def test_static_lists_follow_their_prompts(select: tuple[Any, ...], options: dict[str, Any], repeats: int) -> None:
    """Beams and samples of a prompt have its list, also where the other prompt is not steered."""
    model, batch = tiny_model(), prompts((6, 4))
    lists = EditList.from_lists([[1, 2], [20, 21]], [[3], [22]])
    policy = StaticPolicy.with_edits(tiny_policy(model, alpha=0.8), lists)
    with steer(model, {"a": policy}, select=select) as steering:
        generate(model, batch, 2, **options)
        assert steering.edits is not None
        found = [(steering.edits.augmented(row), steering.edits.ablated(row)) for row in range(2 * repeats)]
    each = [(lists.augmented(row), lists.ablated(row)) if select[row] else ([], []) for row in range(2)]
    assert found == [each[0]] * repeats + [each[1]] * repeats


class KeptListPolicy:
    """A policy of one's own that returns a list it keeps."""

    def __init__(self, policy: SteeringPolicy, edits: EditList) -> None:
        self.model: ModelFingerprint | None = policy.model
        self.observation: PromptObservation | None = policy.observation
        self.intervention: Intervention = policy.intervention
        self.edit_positions: EditPositions = policy.edit_positions
        self.uncounted_token_ids = policy.uncounted_token_ids
        self.edits = {False: edits, True: EditList.from_lists([[]], [[30, 31]])}
        self.calls = 0

    def select(self, density: Tensor) -> EditList:
        self.calls += 1
        return self.edits[self.calls > 2]


def test_lists_that_a_policy_keeps_stay_as_they_are() -> None:
    model, rows = tiny_model(), prompts((6,))
    policy = KeptListPolicy(tiny_policy(model), EditList.from_lists([[1]], [[4]]))
    with steer(model, policy):
        for prompt in (rows, [[BOS]], rows):  # the second has no counted token, the third gets the other list
            generate(model, prompt, 2)
    assert (policy.edits[False].augmented(0), policy.edits[False].ablated(0)) == ([1], [4])
    assert policy.edits[True].ablated(0) == [30, 31]


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"vocab_size": VOCAB + 1}, "vocab_size 62 (expected 61)"),
        ({"num_hidden_layers": LAYERS + 1}, "num_hidden_layers 5 (expected 4)"),
        ({"hidden_size": 2 * D_MODEL}, "hidden_size 48 (expected 24)"),
        ({"intermediate_size": 44}, "intermediate_size 44 (expected 40)"),
    ],
)
def test_a_policy_for_another_model_is_refused(config: dict[str, Any], named: str) -> None:
    other = tiny_model("llama", **config)
    with pytest.raises(MismatchError) as error:
        steer(other, tiny_policy(tiny_model("llama")))
    assert named in str(error.value)
    assert is_clean(other)
    with pytest.raises(MismatchError, match="model_type llama"):
        steer(tiny_model("llama"), tiny_policy(tiny_model("mistral")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"output_layer": LAYERS}, "output layer is 4; this model's layers are 0 to 3"),
        ({"output_layer": -1}, "output layer is -1; this model's layers are 0 to 3"),
        ({"output_sae": tiny_sae(d_model=32)}, "the output SAE has d_model 32; expected the model's hidden size 24"),
    ],
)
def test_a_layer_or_sae_that_does_not_fit_is_refused(changes: dict[str, Any], message: str) -> None:
    model = tiny_model()
    policy = StaticPolicy.with_edits(tiny_policy(model), EditList.from_lists([[1]], [[2]]))
    with pytest.raises(MismatchError) as error:
        steer(model, replace(policy, **changes))
    assert message in str(error.value)
    assert is_clean(model)


def test_an_input_layer_or_input_sae_that_does_not_fit_is_refused() -> None:
    model = tiny_model()
    policy = KeptListPolicy(tiny_policy(model), EditList.from_lists([[1]], [[2]]))
    sae = tiny_policy(model).input_sae
    policy.observation = PromptObservation(LAYERS, sae)
    with pytest.raises(MismatchError, match="input layer is 4"):
        steer(model, policy)
    policy.observation = PromptObservation(0, tiny_sae(d_model=32))
    with pytest.raises(MismatchError, match="the input SAE has d_model 32"):
        steer(model, policy)
    policy.observation = PromptObservation(OUTPUT_LAYER + 1, sae)
    with pytest.raises(InvalidInputError, match="observes prompts after layer 3 and edits after layer 2"):
        steer(model, policy)


def test_a_model_that_cannot_generate_is_refused() -> None:
    model = tiny_model()
    inner = model.get_submodule("model")
    with pytest.raises(InvalidInputError, match="no generate method"):
        steer(inner, tiny_policy(model))
    assert is_clean(model)


# -------------------------------------------------------------------------------------------- NaN, Inf, and the counts


def spoil(model: nn.Module, row: int, value: float) -> Any:
    """Puts a value into a row of the residual stream inside the output layer, at every column."""

    def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[row, :, 3] = value
        return output

    return layer_of(model, OUTPUT_LAYER).get_submodule("mlp").register_forward_hook(hook)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_a_row_that_is_not_finite_is_left_alone_counted_and_warned_of_once(value: float) -> None:
    model, rows = tiny_model(), prompts((5, 5))
    policy = tiny_policy(model)
    alone = naive_generate(model, policy, rows[:1], 6)
    spoiled = spoil(model, 1, value)
    before = hidden_after(model, OUTPUT_LAYER, lambda: generate(model, rows, 6))
    with steer(model, policy) as steering:
        with pytest.warns(UserWarning, match="6 tokens had NaN or Inf in the residual stream after layer 2"):
            after = hidden_after(model, OUTPUT_LAYER, lambda: generate(model, rows, 6))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert generate(model, rows, 6)[:1] == alone
    spoiled.remove()
    assert torch.equal(after[0][1].view(torch.int64), before[0][1].view(torch.int64))  # bit for bit, NaN included
    assert not torch.equal(after[0][0], before[0][0])
    assert steering.summary().tokens_nonfinite == 12
    assert "left alone because of NaN or Inf: 12" in str(steering.summary())


def test_the_warning_names_every_layer_and_the_line_that_called_generate() -> None:
    model, rows = tiny_model(), prompts((5,))
    policies = {"a": tiny_policy(model), "b": tiny_policy(model, output_layer=OUTPUT_LAYER + 1)}
    spoiled = spoil(model, 0, float("nan"))
    with steer(model, policies) as steering:
        for name in policies:
            steering.select(name)
            model(torch.tensor(rows))
        with pytest.warns(UserWarning, match="NaN or Inf") as caught:
            model.generate(torch.tensor(rows), max_new_tokens=2, pad_token_id=0)
    spoiled.remove()
    texts = [str(warning.message) for warning in caught]
    for layer in (OUTPUT_LAYER, OUTPUT_LAYER + 1):
        assert any(f"after layer {layer} " in text for text in texts)
    assert {warning.filename for warning in caught} == {__file__}


def test_nan_in_forward_passes_is_warned_of_when_the_policy_is_removed() -> None:
    model, rows = tiny_model(), prompts((5, 5))
    spoiled = spoil(model, 0, float("nan"))
    steering = steer(model, tiny_policy(model))
    model(torch.tensor(rows))
    with pytest.warns(UserWarning, match="1 tokens had NaN or Inf"):
        steering.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steering.remove()
    spoiled.remove()


@pytest.mark.parametrize(
    ("way", "rows", "positions", "seen"),
    [
        # one row: the last prompt position, and every new token but the last, which is never read
        ("cached", 1, "from_last_prompt", NEW_TOKENS),
        ("uncached", 1, "from_last_prompt", NEW_TOKENS),
        ("static cache", 1, "from_last_prompt", NEW_TOKENS),
        ("prefill in chunks", 1, "from_last_prompt", NEW_TOKENS),
        ("cached", 1, "generated", NEW_TOKENS - 1),
        ("uncached", 1, "generated", NEW_TOKENS - 1),
        ("cached", 1, "all", LENGTHS[0] - 1 + NEW_TOKENS - 1),
        ("uncached", 1, "all", LENGTHS[0] - 1 + NEW_TOKENS - 1),
        ("cached", 4, "from_last_prompt", 4 * NEW_TOKENS),
        ("uncached", 4, "from_last_prompt", 4 * NEW_TOKENS),
        ("cached", 4, "all", sum(LENGTHS) - 4 + 4 * (NEW_TOKENS - 1)),
        ("uncached", 4, "all", sum(LENGTHS) - 4 + 4 * (NEW_TOKENS - 1)),
    ],
)
def test_every_edited_position_is_counted_once(way: str, rows: int, positions: EditPositions, seen: int) -> None:
    model = tiny_model()
    with steer(model, tiny_policy(model, edit_positions=positions)) as steering:
        generate(model, prompts(LENGTHS[:rows]), **WAYS[way])
    summary = steering.summary()
    assert (summary.prompts, summary.tokens_seen, summary.tokens_nonfinite) == (rows, seen, 0)


@pytest.mark.parametrize("use_cache", [True, False])
def test_the_counts_are_those_of_the_naive_loop(use_cache: bool) -> None:
    model, (prompt,) = tiny_model(dtype=torch.float64), prompts((6,))
    policy = tiny_policy(model)
    with steer(model, policy, backend="reference") as steering:
        (new,) = generate(model, [prompt], use_cache=use_cache)
    lists = naive_lists(model, policy, prompt)
    caught: list[Tensor] = []
    hook = layer_of(model, OUTPUT_LAYER).register_forward_hook(lambda m, a, output: caught.append(output[0].clone()))
    naive_logits(model, policy, prompt, prompt + new[:-1], lists)
    hook.remove()
    f = latents(caught[0][len(prompt) - 1 :], policy.output_sae)  # before the edit: this hook came first
    edits = {j: int((f[:, j] > 0).sum()) for j in (*lists[0], *lists[1]) if (f[:, j] > 0).any()}
    summary = steering.summary()
    assert {edit.latent: edit.tokens for edit in summary.latents} == edits
    assert [edit.tokens for edit in summary.latents] == sorted(edits.values(), reverse=True)
    assert summary.tokens_edited == int((f[:, [*lists[0], *lists[1]]] > 0).any(dim=1).sum())
    assert summary.mean_maximum == pytest.approx(f.amax(dim=1).mean().item(), rel=1e-9)


def test_attributes_before_and_after_a_prompt() -> None:
    model = tiny_model()
    policy = tiny_policy(model)
    steering = steer(model, policy)
    assert isinstance(steering, Steering)
    assert (steering.model, steering.policy, steering.edits) == (model, policy, None)
    generate(model, prompts((5, 3)), 2)
    assert steering.edits is not None
    address = steering.edits.latents.data_ptr()
    generate(model, prompts((4, 6), seed=3), 2)
    assert steering.edits.latents.data_ptr() == address  # captured graphs rely on it
    assert steering.counters(2).seen.tolist() == [4, 4]
    steering.remove()
    assert steering.edits is not None  # still there to look at
    assert steering.policy is policy
    assert ModelFingerprint.from_model(model) == policy.model


def test_a_steered_model_that_drafts_for_another_is_not_steered() -> None:
    model, assistant = tiny_model("llama", dtype=torch.float32), tiny_model("llama", dtype=torch.float32)
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    expected = generate(model, prompts((6,)), 8)
    policy = tiny_policy(assistant, dtype=torch.float32, alpha=0.9)
    with steer(assistant, {"a": policy, "b": policy}) as steering:  # none is selected, nor has to be
        assert generate(model, prompts((6,)), 8, assistant_model=assistant) == expected
    assert steering.summary().tokens_seen == 0
