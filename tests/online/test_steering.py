"""A policy on a model: what it edits, when it comes and goes, and what it says about it. Against the naive loop
(`naive_generation.py`), or an invariant where there is no equation. Ways to generate: `test_steering_matrix.py`."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from naive_generation import (
    NEW_TOKENS,
    Choose,
    Lists,
    edited,
    generate,
    generate_from,
    greedily,
    hidden_after,
    is_clean,
    latents,
    logits_of,
    naive_beam_search,
    naive_generate,
    naive_lists,
    naive_logits,
)
from tiny_models import (
    BOS,
    FAMILIES,
    INPUT_LAYER,
    LAYERS,
    OUTPUT_LAYER,
    PAD,
    SAE_KINDS,
    Family,
    SaeKind,
    layer_of,
    left_padded,
    prompts,
    tiny_model,
    tiny_policy,
    tiny_tokenizer,
)
from torch import Tensor, nn
from transformers import (
    DynamicCache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
)
from transformers.generation.streamers import BaseStreamer

from dspa.errors import InvalidInputError
from dspa.methods.policy import EditPositions
from dspa.methods.steering_policy import SteeringPolicy
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


# ------------------------------------------------------------------------------------------- greedy, against the loop


@pytest.mark.parametrize("lengths", [ONE, FOUR], ids=["batch 1", "left-padded batch 4"])
@pytest.mark.parametrize(
    ("family", "kind"),
    [("qwen3", "jumprelu"), ("qwen3", "topk"), ("gemma2", "gated")],
)
def test_cached_greedy_generation_equals_the_naive_loop(
    family: Family, kind: SaeKind, lengths: tuple[int, ...]
) -> None:
    model, rows = tiny_model(family), prompts(lengths)
    policy = tiny_policy(model, kind)
    unsteered = generate(model, rows)
    expected = naive_generate(model, policy, rows)
    with steer(model, policy) as steering:
        assert generate(model, rows) == expected
    summary = steering.summary()
    assert all(new != old for new, old in zip(expected, unsteered, strict=True))
    assert summary.tokens_seen == NEW_TOKENS * len(rows)
    assert summary.tokens_edited > (NEW_TOKENS - 1) * len(rows) // 2  # most of them at decode


@pytest.mark.parametrize("kind", SAE_KINDS)
@pytest.mark.parametrize(
    ("dtype", "sae_dtype", "options"),
    [
        (torch.float32, torch.float32, {}),
        (torch.float64, torch.float32, {}),
        (torch.float32, torch.bfloat16, {}),
        # In bfloat16 the model itself gives other logits with a cache than without.
        (torch.bfloat16, torch.float32, {"use_cache": False}),
        (torch.float16, torch.float32, {"use_cache": False}),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_model_and_sae_of_different_dtypes(
    dtype: torch.dtype, sae_dtype: torch.dtype, options: dict[str, Any], kind: SaeKind
) -> None:
    model, rows = tiny_model("llama", dtype=dtype), prompts((6,))
    policy = tiny_policy(model, kind, dtype=sae_dtype)
    with steer(model, policy):
        steered = generate(model, rows, 8, **options)
    assert steered == naive_generate(model, policy, rows, 8)
    assert steered != generate(model, rows, 8, **options)


@pytest.mark.parametrize("edit", ["ablate", "augment", "both"])
@pytest.mark.parametrize(("input_layer", "output_layer"), [(0, LAYERS - 1), (1, 1), (0, 2)])
def test_layers_and_directions(edit: str, input_layer: int, output_layer: int) -> None:
    model, rows = tiny_model(), prompts((6, 4))
    policy = tiny_policy(model, input_layer=input_layer, output_layer=output_layer, edit=edit, alpha=0.7)
    with steer(model, policy):
        steered = generate(model, rows, 8)
    assert steered == naive_generate(model, policy, rows, 8)
    assert steered != generate(model, rows, 8)


def test_the_edit_lists_depend_on_the_row() -> None:
    """Without this the tests above would not see rows that take each other's lists."""
    model, rows = tiny_model(), prompts(FOUR)
    policy = tiny_policy(model)
    with steer(model, policy) as steering:
        generate(model, rows, 1)
        assert steering.edits is not None
        lists = [(steering.edits.augmented(row), steering.edits.ablated(row)) for row in range(4)]
    assert lists == [naive_lists(model, policy, row) for row in rows]
    assert len({str(each) for each in lists}) == 4


@pytest.mark.parametrize("positions", ["from_last_prompt", "generated", "all"])
def test_edit_positions(positions: EditPositions) -> None:
    model, rows = tiny_model("gemma3"), prompts(FOUR)
    policy = tiny_policy(model, edit_positions=positions)
    with steer(model, policy):
        steered = generate(model, rows, 10)
    assert steered == naive_generate(model, policy, rows, 10)
    assert steered != generate(model, rows, 10)


@pytest.mark.parametrize(
    ("positions", "edited_columns"),
    [
        ("from_last_prompt", [[4], [4]]),
        ("generated", [[], []]),
        ("all", [[1, 2, 3, 4], [3, 4]]),  # not BOS, not padding
    ],
)
def test_only_these_prompt_columns_change(positions: EditPositions, edited_columns: list[list[int]]) -> None:
    model, rows = tiny_model(), prompts((5, 3))
    policy = tiny_policy(model, edit_positions=positions)

    def run() -> object:
        return generate(model, rows, 1)

    (before,) = hidden_after(model, OUTPUT_LAYER, run)
    with steer(model, policy):
        (after,) = hidden_after(model, OUTPUT_LAYER, run)
    changed = (before != after).any(dim=-1)
    assert [row.nonzero().flatten().tolist() for row in changed] == edited_columns


# --------------------------------------------------------------------------------------------------- ways to generate


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("num_return_sequences", [3])
def test_beam_search_equals_naive_beam_search(num_return_sequences: int, use_cache: bool) -> None:
    model, rows = tiny_model("qwen3"), prompts((5, 7))
    policy = tiny_policy(model)
    options = {"num_beams": 3, "num_return_sequences": num_return_sequences, "use_cache": use_cache}
    with steer(model, policy):
        steered = generate(model, rows, 6, **options)
    expected = [naive_beam_search(model, policy, row, 6, 3)[:num_return_sequences] for row in rows]
    assert steered == [new for beams in expected for new in beams]
    assert steered != generate(model, rows, 6, **options)


def test_several_prompts_in_one_block_equal_a_block_each() -> None:
    model = tiny_model()
    policy = tiny_policy(model)
    batches = [prompts(lengths, seed=seed) for seed, lengths in enumerate([(5,), (9,), (3, 6), (6, 3), (5,)])]
    with steer(model, policy) as steering:
        together = [generate(model, rows, 6) for rows in batches]
    assert together == [naive_generate(model, policy, rows, 6) for rows in batches]
    assert steering.summary().prompts == 7
    assert steering.summary().tokens_seen == 7 * 6


@pytest.mark.parametrize("as_keyword", [True, False])
def test_chat_prompts(as_keyword: bool) -> None:
    model, tokenizer = tiny_model(), tiny_tokenizer()
    policy = tiny_policy(model)
    messages = [{"role": "user", "content": "w10 w20 w30"}]
    inputs: Any = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    prompt: list[int] = inputs["input_ids"][0].tolist()
    assert prompt[0] == BOS
    generating: Any = model
    with steer(model, policy):
        if as_keyword:
            out = generating.generate(**inputs, max_new_tokens=8, do_sample=False)
        else:
            config = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=PAD)
            out = generating.generate(inputs["input_ids"], config)
    assert out[:, len(prompt) :].tolist() == naive_generate(model, policy, [prompt], 8)


class KeepingStreamer(BaseStreamer):
    """Keeps the tokens as they come."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        pass


def test_streaming_of_tokens() -> None:
    model, (prompt,) = tiny_model(), prompts((6,))
    policy = tiny_policy(model)
    streamer = KeepingStreamer()
    with steer(model, policy):
        generate(model, [prompt], 8, streamer=streamer)
    assert streamer.tokens == prompt + naive_generate(model, policy, [prompt], 8)[0]


def test_embeddings_in_the_place_of_ids() -> None:
    """Without ids nothing is known to be BOS: every token that is not padding counts."""
    model, rows = tiny_model(), prompts((6, 4))
    policy = tiny_policy(model, uncounted_token_ids=())
    batch = left_padded(rows)
    embeddings = model.get_input_embeddings()(batch["input_ids"]).detach()
    inputs = {"inputs_embeds": embeddings, "attention_mask": batch["attention_mask"]}
    with steer(model, policy):
        padded = generate_from(model, inputs, 8).tolist()
        unmasked = generate_from(model, {"inputs_embeds": embeddings[:1]}, 8).tolist()
    expected = naive_generate(model, policy, rows, 8)
    assert padded == expected
    assert unmasked == expected[:1]


@pytest.mark.parametrize("eos", [None, PAD], ids=["padding is padding", "padding also ends sequences"])
def test_no_attention_mask(eos: int | None) -> None:
    """As generate does: the padding id is padding, unless it ends sequences as well."""
    model, rows = tiny_model(), prompts((6, 4))
    policy = tiny_policy(model)
    batch = left_padded(rows)
    if eos is not None:
        rows = batch["input_ids"].tolist()
    with steer(model, policy):
        generated = generate_from(model, {"input_ids": batch["input_ids"]}, 8, eos_token_id=eos, min_new_tokens=8)
    expected = naive_generate(model, policy, rows, 8, without(PAD) if eos is not None else greedily)
    assert generated[:, 6:].tolist() == expected


def without(token: int) -> Choose:
    """Greedy choice among the other tokens: what min_new_tokens makes of the end of a sequence."""

    def choose(logits: Tensor) -> list[int]:
        logits = logits.clone()
        logits[:, token] = -torch.inf
        return greedily(logits)

    return choose


def test_a_conversation_continued_from_its_cache() -> None:
    """Only what comes by is counted; what it answers is read on the tokens since."""
    model, (prompt, more) = tiny_model("llama"), prompts((6, 5))
    policy = tiny_policy(model, uncounted_token_ids=())
    first = generate_from(model, {"input_ids": torch.tensor([prompt])}, 4, return_dict_in_generate=True)
    known = first.sequences[0].tolist()[:-1]  # the last token was chosen, but not read
    everything = known + more
    with steer(model, policy) as steering:
        inputs = {"input_ids": torch.tensor([everything]), "past_key_values": first.past_key_values}
        with pytest.warns(UserWarning, match="9 of 14 prompt tokens are in the cache .* follow the other 5") as warned:
            steered = generate_from(model, inputs, 8)[0, len(everything) :].tolist()
        assert len(warned) == 1
        assert steering.edits is not None
        found = (steering.edits.augmented(0), steering.edits.ablated(0))
    caught = hidden_after(model, INPUT_LAYER, lambda: model(torch.tensor([everything])))
    density = (latents(caught[0][0, len(known) :], policy.input_sae) > 0).double().mean(dim=0)[None]
    selected = policy.select(density)
    assert found == (selected.augmented(0), selected.ablated(0))
    new: list[int] = []
    while len(new) < 8:
        new += greedily(naive_logits(model, policy, everything, everything + new, found)[-1:].float())
    assert steered == new


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({"input_ids": torch.zeros(1, 0, dtype=torch.int64)}, r"\(1, 0\)"),
        ({"input_ids": torch.zeros(2, 0, dtype=torch.int64), "attention_mask": torch.zeros(2, 0)}, r"\(2, 0\)"),
        ({"input_ids": torch.ones(1, 3, dtype=torch.int64), "attention_mask": torch.ones(1, 1, 3, 3)}, "1, 1, 3, 3"),
    ],
)
def test_an_empty_prompt_or_a_mask_of_another_shape_is_refused(inputs: dict[str, Tensor], message: str) -> None:
    model = tiny_model()
    with steer(model, tiny_policy(model)), pytest.raises(InvalidInputError, match=message):
        generate_from(model, inputs)
    assert is_clean(model)


@pytest.mark.parametrize("prompt", [None, [BOS]], ids=["no prompt", "only BOS"])
def test_a_prompt_without_a_counted_token_is_not_edited(prompt: list[int] | None) -> None:
    model: Any = tiny_model()
    inputs = {} if prompt is None else {"input_ids": torch.tensor([prompt])}
    with steer(model, tiny_policy(model)) as steering:
        steered = generate_from(model, inputs)
    assert torch.equal(steered, generate_from(model, inputs))
    assert (steering.summary().tokens_seen, steering.summary().tokens_edited) == (NEW_TOKENS, 0)


# ------------------------------------------------------------------------------------------------ what changes nothing


@pytest.mark.product
@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"k_diff": 0}, {"k_prompt": 0, "alpha": 0.0}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_edit_of_nothing_keeps_every_bit(family: Family, options: dict[str, Any], use_cache: bool) -> None:
    model, rows = tiny_model(family, dtype=torch.float32), prompts((5, 3))
    policy = tiny_policy(model, dtype=torch.float32, **options)
    expected = logits_of(model, rows, use_cache=use_cache)
    with steer(model, policy) as steering:
        assert torch.equal(logits_of(model, rows, use_cache=use_cache), expected)
    assert steering.summary().tokens_seen == 2 * NEW_TOKENS
    assert steering.summary().tokens_edited == 0


def test_a_removed_policy_leaves_no_trace() -> None:
    model, rows = tiny_model(), prompts(FOUR)
    before = logits_of(model, rows)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    steering = steer(model, tiny_policy(model))
    assert not is_clean(model)
    assert not torch.equal(logits_of(model, rows), before)
    steering.remove()
    steering.remove()
    assert is_clean(model)
    assert torch.equal(logits_of(model, rows), before)
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_a_generate_attribute_of_ones_own_is_put_back() -> None:
    model: Any = tiny_model()
    rows = prompts(ONE)
    own = model.generate
    model.generate = own
    policy = tiny_policy(model)
    with steer(model, policy):
        assert model.generate is not own
        assert inspect.signature(model.generate) == inspect.signature(own)
        steered = generate(model, rows, 6)
    assert model.generate is own
    assert steered == naive_generate(model, policy, rows, 6)


@pytest.mark.parametrize("first_removed", [0, 1])
@pytest.mark.parametrize("output_layers", [(2, 3), (3, 2), (2, 2)])
def test_two_policies_at_once(output_layers: tuple[int, int], first_removed: int) -> None:
    model, rows = tiny_model(), prompts((6, 4))
    unsteered = generate(model, rows, 8)
    policies = [tiny_policy(model, seed=seed, output_layer=layer) for seed, layer in enumerate(output_layers)]
    alone = [naive_generate(model, policy, rows, 8) for policy in policies]
    steerings = [steer(model, policy) for policy in policies]
    both = generate(model, rows, 8)
    assert both not in (unsteered, *alone)
    assert [steering.summary().tokens_seen for steering in steerings] == [2 * 8] * 2
    steerings[first_removed].remove()
    assert generate(model, rows, 8) == alone[1 - first_removed]
    steerings[1 - first_removed].remove()
    assert is_clean(model)
    assert generate(model, rows, 8) == unsteered


def test_two_policies_edit_one_after_the_other() -> None:
    """On different layers, each reads the prompt as it is; the later layer sees what the earlier edit left of it."""
    model, (prompt,) = tiny_model(), prompts((6,))
    early, late = tiny_policy(model, seed=0, output_layer=2), tiny_policy(model, seed=1, output_layer=3)
    with steer(model, late), steer(model, early):
        steered = logits_of(model, [prompt], max_new_tokens=1)[0, 0]

    def edit(policy: SteeringPolicy, lists: Lists) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[0, -1] = edited(output[0, -1], policy.output_sae, lists, policy.alpha)
            return output

        return hook

    lists = [naive_lists(model, policy, prompt) for policy in (early, late)]
    for policy, each in zip((early, late), lists, strict=True):
        layer_of(model, policy.output_layer).register_forward_hook(edit(policy, each))
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].float()
    torch.testing.assert_close(steered, expected, rtol=1e-6, atol=1e-6)


# ---------------------------------------------------------------------------------------------------------- exceptions


class FailingProcessor(LogitsProcessor):
    """Fails at its third call."""

    calls = 0

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        self.calls += 1
        if self.calls == 3:
            raise RuntimeError("on purpose")
        return scores


def test_an_exception_inside_generate_spoils_nothing() -> None:
    model, rows = tiny_model(), prompts((6, 4))
    policy = tiny_policy(model)
    unsteered = generate(model, rows)
    with steer(model, policy):
        with pytest.raises(RuntimeError, match="on purpose"):
            generate(model, prompts((5, 8), seed=9), logits_processor=LogitsProcessorList([FailingProcessor()]))
        steered = generate(model, rows)
    assert steered == naive_generate(model, policy, rows)
    with pytest.raises(RuntimeError, match="on purpose"), steer(model, policy):
        generate(model, rows, logits_processor=LogitsProcessorList([FailingProcessor()]))
    assert is_clean(model)
    assert generate(model, rows) == unsteered


def test_a_warning_that_is_an_error_leaves_every_policy_free_for_the_next_call() -> None:
    model, rows = tiny_model(), prompts((6,))
    nothing, policy = tiny_policy(model, alpha=0.0), tiny_policy(model, seed=1)
    expected = naive_generate(model, policy, rows, 3)
    with steer(model, nothing), steer(model, policy):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="alpha is 0"):
                generate(model, rows, 3)
        with pytest.warns(UserWarning, match="alpha is 0"):
            assert generate(model, rows, 3) == expected


class NestedProcessor(LogitsProcessor):
    """Calls the model while it generates."""

    def __init__(self, model: nn.Module, call: Callable[[Any, Tensor], Any], line: str) -> None:
        self.model, self.call, self.line = model, call, line

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        with pytest.raises(InvalidInputError, match=self.line):
            self.call(self.model, input_ids)
        return scores


NESTED: dict[str, tuple[Callable[[Any, Tensor], Any], str]] = {
    "generate": (lambda model, ids: generate(model, prompts((3,))), "one at a time, and none inside another"),
    "last token": (lambda model, ids: model(ids[:, -1:]), "from inside a generate call"),
    "everything": (lambda model, ids: model(ids, use_cache=False), "from inside a generate call"),
    "a cache of its own": (
        lambda model, ids: model(ids, past_key_values=DynamicCache(config=model.config)),
        "from inside a generate call",
    ),
}


@pytest.mark.parametrize(
    "options", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2}], ids=str
)
@pytest.mark.parametrize("nested", NESTED)
def test_a_call_inside_generate_is_refused_and_the_outer_one_goes_on(nested: str, options: dict[str, Any]) -> None:
    model, rows = tiny_model(), prompts((6, 4))
    policy = tiny_policy(model)
    with steer(model, policy) as alone:
        expected = generate(model, rows, 4, **options)
    with steer(model, policy) as steering:
        processors = LogitsProcessorList([NestedProcessor(model, *NESTED[nested])])
        assert generate(model, rows, 4, logits_processor=processors, **options) == expected
    assert steering.summary() == alone.summary()
