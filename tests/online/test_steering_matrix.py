"""Every way people generate, steered, against the naive loop that recomputes everything (`naive_generation.py`).

Rows of the table are ways to generate, columns are caches; every cell runs on a batch of one prompt and on a
left-padded batch. What cannot be steered is in the table as well, with the line that says why.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from fsrl_cases import tiny_fsrl_policy
from naive_generation import edited, generate, generate_from, naive_generate, naive_lists, naive_model
from quanto_on_cpu import quanto_without_compiling
from tiny_models import (
    ALL_FAMILIES,
    BOS,
    EOS,
    PAD,
    VOCAB,
    Family,
    layer_of,
    left_padded,
    prompts,
    tiny_model,
    tiny_policy,
    tiny_tokenizer,
)
from torch import Tensor
from transformers import (
    ContinuousBatchingConfig,
    DynamicCache,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
    pipeline,
)

from dspa.errors import InvalidInputError
from dspa.kernels import available
from dspa.kernels.token_step.prepared import PreparedStep
from dspa.methods.fsrl.policy import FsrlPolicy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.online.steering import steer

COUNT = 8
BACKEND = "cpu" if available()["cpu"] == "available" else "reference"
ONE, FOUR = (6,), (5, 9, 3, 7)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The shapes here are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class StopsAt(StoppingCriteria):
    """Ends every sequence at a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: Tensor, scores: Any, **options: Any) -> Tensor:  # type: ignore[override]
        return torch.full((len(input_ids),), input_ids.shape[1] >= self.length)


@dataclass(frozen=True)
class Way:
    """A way to generate.

    Attributes:
        options: of the generate call, steered and naive.
        steered: further options of the steered call, which promise not to change what is generated.
        sequences: per prompt.
        caches: in which it is offered.
        batches: on how many prompts.
        drafted: whether another model proposes tokens, of which some are accepted and some rejected.
    """

    options: dict[str, Any] = field(default_factory=dict)
    steered: Callable[[], dict[str, Any]] = dict
    sequences: int = 1
    caches: tuple[str, ...] = ("dynamic", "none", "static")
    batches: tuple[tuple[int, ...], ...] = (ONE, FOUR)
    drafted: bool = False


def draft(seed: int) -> dict[str, Any]:
    """A draft model that is sometimes right: other weights in one layer."""
    assistant = tiny_model("llama", dtype=torch.float32, seed=0)
    assistant.get_submodule("model.layers.3").load_state_dict(
        tiny_model("llama", dtype=torch.float32, seed=seed).get_submodule("model.layers.3").state_dict()
    )
    assistant.generation_config.num_assistant_tokens = 3
    assistant.generation_config.num_assistant_tokens_schedule = "constant"
    assistant.generation_config.assistant_confidence_threshold = 0.0
    return {"assistant_model": assistant}


SAMPLE: dict[str, Any] = {"do_sample": True, "top_k": 0}
DYNAMIC = ("dynamic",)
WAYS = {
    "greedy": Way(),
    "one new token": Way({"max_new_tokens": 1}),
    "sampling": Way(SAMPLE),
    "sampling, top-k, top-p, temperature": Way({"do_sample": True, "top_k": 9, "top_p": 0.8, "temperature": 1.7}),
    "three samples of a prompt": Way({**SAMPLE, "num_return_sequences": 3}, sequences=3),
    "beam search": Way({"num_beams": 3}),
    "beam search, all beams": Way({"num_beams": 3, "num_return_sequences": 3}, sequences=3),
    "beam sampling": Way({**SAMPLE, "num_beams": 3}),
    "repetition penalty": Way({"repetition_penalty": 1.7, "no_repeat_ngram_size": 2}, caches=DYNAMIC),
    "constrained to a set": Way({"prefix_allowed_tokens_fn": lambda row, ids: list(range(7, 30))}, caches=DYNAMIC),
    "constrained beam search": Way(
        {"num_beams": 2, "prefix_allowed_tokens_fn": lambda row, ids: list(range(7, 30))}, caches=DYNAMIC
    ),
    "stopping criterion": Way({"stopping_criteria": StoppingCriteriaList([StopsAt(14)])}, caches=DYNAMIC),
    "ends of sequences": Way({"eos_token_id": list(range(20, 30))}),
    "assisted by a draft model": Way(steered=lambda: draft(2), caches=DYNAMIC, batches=(ONE,), drafted=True),
    "assisted by the model unsteered": Way(steered=lambda: draft(0), caches=DYNAMIC, batches=(ONE,), drafted=True),
    "speculative sampling, which the likeliest token always wins": Way(
        {"do_sample": True, "top_k": 1}, steered=lambda: draft(2), caches=DYNAMIC, batches=(ONE,), drafted=True
    ),
    "assisted by itself, early exit": Way(steered=lambda: {"assistant_early_exit": 3}, caches=DYNAMIC, batches=(ONE,)),
    "prompt lookup": Way(steered=lambda: {"prompt_lookup_num_tokens": 3}, caches=DYNAMIC, batches=(ONE,)),
    "chunked prefill": Way(steered=lambda: {"prefill_chunk_size": 2}, caches=("dynamic", "static")),
    "chunked prefill, chunks of one": Way(steered=lambda: {"prefill_chunk_size": 1}, caches=DYNAMIC),
    "with everything returned": Way(
        steered=lambda: {"output_scores": True, "output_hidden_states": True, "output_attentions": True}, caches=DYNAMIC
    ),
}

CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static"},
}

METHODS: dict[str, Callable[[PreTrainedModel], SteeringPolicy | FsrlPolicy]] = {
    "dspa": lambda model: tiny_policy(model, dtype=torch.float32),
    "fsrl": lambda model: tiny_fsrl_policy(dtype=torch.float32),
}

CELLS = [
    pytest.param(way, cache, lengths, id=f"{way}-{cache}-batch {len(lengths)}")
    for way, row in WAYS.items()
    for cache in CACHES
    if cache in row.caches
    for lengths in row.batches
]


@pytest.mark.product
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("way", "cache", "lengths"), CELLS)
def test_way_by_cache(way: str, cache: str, lengths: tuple[int, ...], method: str) -> None:
    """In float32, by the C++ kernels where they are built; the loop computes its edits in float64."""
    row, rows = WAYS[way], prompts(lengths)
    if way == "prompt lookup":
        rows = [rows[0] + rows[0][1:]]  # a prompt that repeats itself
    model = tiny_model("llama", dtype=torch.float32)
    policy = METHODS[method](model)
    if row.drafted and isinstance(policy, FsrlPolicy):  # it edits everything; a draft has to be right sometimes
        policy = replace(policy, scale=0.3)
    naive = naive_model(model, [policy] * len(rows), rows)
    options = {"max_new_tokens": COUNT, **row.options}

    def run(model: Any, **more: Any) -> list[list[int]]:
        torch.manual_seed(5)
        return generate(model, rows, **options, **more)

    expected, unsteered = run(naive, use_cache=False), run(model)
    widths: list[int] = []
    hook = layer_of(model, 0).register_forward_pre_hook(lambda module, args: widths.append(args[0].shape[1]))
    with steer(model, policy, backend=BACKEND if method == "dspa" else "auto") as steering:
        steered = run(model, **CACHES[cache], **row.steered())
    hook.remove()
    if row.drafted:  # each pass reads what is known, and candidates; one more token than it accepts is chosen by it
        candidates, accepted = sum(widths) - len(rows[0]) - (len(widths) - 1), COUNT - len(widths)
        assert 0 < accepted < candidates
    assert steered == expected
    assert steered != unsteered
    assert len(steered) == len(rows) * row.sequences
    assert steering.summary().tokens_edited > 0


# ------------------------------------------------------------------------------------------------------------- models


@cache
def generated(family: Family) -> tuple[PreTrainedModel, SteeringPolicy, list[list[int]], list[list[int]]]:
    """A model, its policy, and what the naive loop and the unsteered model generate, whatever the cache."""
    model, rows = tiny_model(family), prompts((9, 4))
    policy = tiny_policy(model, dtype=model.dtype)
    return model, policy, naive_generate(model, policy, rows, COUNT), generate(model, rows, COUNT)


@pytest.mark.parametrize("cache", ["dynamic", "none", "static"])
@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_model_by_cache(family: Family, cache: str) -> None:
    """Left-padded, longer than the sliding windows of those that have one."""
    model, policy, expected, unsteered = generated(family)
    if cache == "static" and not model._can_compile_fullgraph:  # type: ignore[attr-defined]
        pytest.skip(f"transformers offers no static cache for {family}")
    with steer(model, policy) as steering:
        steered = generate(model, prompts((9, 4)), COUNT, **CACHES[cache])
    assert steered == expected
    assert steered != unsteered
    assert steering.summary().tokens_seen == 2 * COUNT


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_model_with_an_adapter(family: Family) -> None:
    """Every position of a left-padded batch but its padding, in every family."""
    model, rows = tiny_model(family), prompts((9, 4))
    policy = tiny_fsrl_policy(dtype=model.dtype)
    expected, unsteered = naive_generate(model, policy, rows, COUNT), generate(model, rows, COUNT)
    with steer(model, policy) as steering:
        steered = generate(model, rows, COUNT)
    assert steered == expected
    assert steered != unsteered
    assert steering.summary().tokens_seen == 9 + 4 + 2 * (COUNT - 1)


QUANTIZED = {"backend": "quanto", "nbits": 4, "q_group_size": 16, "residual_length": 4}


@pytest.mark.parametrize("lengths", [ONE, (6, 6)], ids=str)
def test_quantized_cache(lengths: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """What such a cache remembers is not what was computed, so that no recomputation equals it. Every single edit does:
    what the output layer computed, edited by the equations, is what the next layer reads."""
    quanto_without_compiling(monkeypatch)
    model, rows = tiny_model("llama", dtype=torch.float32), prompts(lengths)
    policy = tiny_policy(model, dtype=torch.float32)
    lists = [naive_lists(model, policy, row) for row in rows]
    options = {"cache_implementation": "quantized", "cache_config": QUANTIZED}
    unsteered = generate(model, rows, COUNT, **options)
    computed: list[Tensor] = []
    read: list[Tensor] = []
    layer: Any = layer_of(model, policy.output_layer)
    original = layer.forward

    def keeping(*args: Any, **kwargs: Any) -> Tensor:
        output = original(*args, **kwargs)
        computed.append(output[:, -1].clone())
        return output

    layer.forward = keeping
    hook = layer_of(model, policy.output_layer + 1).register_forward_pre_hook(
        lambda module, args: read.append(args[0][:, -1].clone())
    )
    with steer(model, policy):
        steered = generate(model, rows, COUNT, **options)
    hook.remove()
    for before, after in zip(computed, read, strict=True):
        expected = torch.stack(
            [edited(h, policy.output_sae, each, policy.alpha) for h, each in zip(before, lists, strict=True)]
        )
        torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-5)
    assert len(computed) == COUNT
    assert steered != unsteered


@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
def test_offloaded_caches_need_an_accelerator_as_without_steering(cache: str) -> None:
    model: Any = tiny_model("llama")
    rows = prompts(ONE)
    if torch.cuda.is_available():
        model = model.to("cuda")
        with steer(model, tiny_policy(model)):
            assert generate(model, rows, COUNT, cache_implementation=cache) == generate(model, rows, COUNT)
        return
    messages = []
    for steered in (False, True):
        with steer(model, tiny_policy(model)) if steered else nullcontext(), pytest.raises(Exception) as error:  # noqa: PT011
            generate(model, rows, COUNT, cache_implementation=cache)
        messages.append((error.type, str(error.value)))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_model_dtype(dtype: torch.dtype) -> None:
    """Without a cache: in half precision, transformers itself computes other logits with one."""
    model, rows = tiny_model("llama", dtype=dtype), prompts((6,))
    policy = tiny_policy(model, dtype=torch.float32)
    with steer(model, policy):
        steered = generate(model, rows, COUNT, use_cache=False)
    assert steered == naive_generate(model, policy, rows, COUNT)
    assert steered != generate(model, rows, COUNT, use_cache=False)


# ------------------------------------------------------------------------------------------------- rows and positions

SELECTIONS: dict[str, tuple[str | None, ...]] = {
    "all the same": ("a", "a", "a", "a"),
    "two policies": ("a", "b", "b", "a"),
    "some not steered": ("a", None, "b", None),
    "nobody": (None, None, None, None),
}


@pytest.mark.product
@pytest.mark.parametrize("way", ["greedy", "sampling", "three samples of a prompt", "beam search, all beams"])
@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("shared", [True, False], ids=["shared SAE and layer", "an SAE and layer each"])
def test_rows_under_different_policies(way: str, selection: str, shared: bool) -> None:
    model, rows, names = tiny_model("llama"), prompts(FOUR), SELECTIONS[selection]
    policies = {"a": tiny_policy(model, alpha=0.5), "b": tiny_policy(model, alpha=0.9, k_diff=7, edit_positions="all")}
    if not shared:
        policies["b"] = tiny_policy(model, seed=1, input_layer=0, output_layer=3, alpha=0.9, uncounted_token_ids=())
    naive = naive_model(model, [None if name is None else policies[name] for name in names], rows)

    def run(model: Any, **more: Any) -> list[list[int]]:
        torch.manual_seed(5)
        return generate(model, rows, COUNT, **WAYS[way].options, **more)

    unsteered, expected = run(model), run(naive, use_cache=False)
    with steer(model, policies, select=names) as steering:
        assert run(model) == expected
    sequences = WAYS[way].sequences if way != "beam search, all beams" else 3
    for row, name in enumerate(name for name in names for _ in range(sequences)):
        if name is None:
            assert expected[row] == unsteered[row]
        elif way == "greedy":  # elsewhere a steered row may come out as it was
            assert expected[row] != unsteered[row]
    assert steering.summary().prompts == sequences * sum(name is not None for name in names)


@pytest.mark.parametrize(("shared", "launches"), [(True, 1), (False, 2)])
def test_launches_per_token(shared: bool, launches: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny_model("llama"), prompts(FOUR)
    policies = {"a": tiny_policy(model), "b": tiny_policy(model, alpha=0.9, output_layer=2 if shared else 3)}
    calls: list[int] = []
    step = PreparedStep.__call__

    def counting(self: PreparedStep, hidden: Tensor, *args: Any) -> None:
        calls.append(len(hidden))
        step(self, hidden, *args)

    monkeypatch.setattr(PreparedStep, "__call__", counting)
    with steer(model, policies, select=("a", "b", None, "b")):
        generate(model, rows, COUNT)
        calls.clear()  # the first prompt of a batch of this size makes its buffers
        generate(model, rows, COUNT)
    assert calls == [4] * launches * COUNT


@pytest.mark.parametrize("positions", ["from_last_prompt", "generated", "all"])
@pytest.mark.parametrize("lengths", [ONE, FOUR, (1,), (1, 4)], ids=str)
def test_edited_positions(positions: Any, lengths: tuple[int, ...]) -> None:
    """Prompts of one token included; where BOS counts, also one of BOS alone."""
    model, rows = tiny_model("gemma3"), prompts(lengths)
    policy = tiny_policy(model, edit_positions=positions, uncounted_token_ids=())
    expected, unsteered = naive_generate(model, policy, rows, COUNT), generate(model, rows, COUNT)
    with steer(model, policy):
        assert generate(model, rows, COUNT) == expected
    assert expected != unsteered


@pytest.mark.parametrize("uncounted", [(), (BOS,)], ids=["with BOS", "without BOS"])
@pytest.mark.parametrize("positions", ["from_last_prompt", "generated", "all"])
@pytest.mark.parametrize("lengths", [ONE, FOUR, (1, 4)], ids=str)
def test_positions_edited_by_an_adapter(positions: Any, lengths: tuple[int, ...], uncounted: tuple[int, ...]) -> None:
    model, rows = tiny_model("gemma3"), prompts(lengths)
    policy = tiny_fsrl_policy(edit_positions=positions, uncounted_token_ids=uncounted)
    expected, unsteered = naive_generate(model, policy, rows, COUNT), generate(model, rows, COUNT)
    with steer(model, policy):
        assert generate(model, rows, COUNT) == expected
    assert expected != unsteered


@pytest.mark.parametrize("chunk", [None, 2, 3, 8])
def test_right_padding(chunk: int | None) -> None:
    """Rows end in different chunks of the prefill, and each is edited at its own last token. What transformers answers
    to right padding is of no use; that the edit is the right one is seen in what the output layer returns."""
    model, rows = tiny_model("llama"), prompts(FOUR)
    width = max(FOUR)
    batch = {
        "input_ids": torch.tensor([row + [PAD] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows]),
    }
    policy = tiny_policy(model)
    with steer(model, policy, trace=True) as steering:
        generate_from(model, batch, 1, prefill_chunk_size=chunk)
        assert steering.edits is not None
        found = [(steering.edits.augmented(row), steering.edits.ablated(row)) for row in range(4)]
    with steer(model, policy) as alone:
        for row, prompt in enumerate(rows):
            generate(model, [prompt], 1)
            assert alone.edits is not None
            assert found[row] == (alone.edits.augmented(0), alone.edits.ablated(0))
    assert [[token.token_id for token in row.tokens] for row in steering.trace().sequences] == [[r[-1]] for r in rows]


CONVERSATION = [
    {"role": "system", "content": "w7 w8"},
    {"role": "user", "content": "w10 w20 w30"},
    {"role": "assistant", "content": "w11 w12"},
    {"role": "user", "content": "w40"},
]


@pytest.mark.parametrize("turns", [1, 2, 4])
def test_conversations(turns: int) -> None:
    """Everything before the response is its prompt: system prompt, earlier turns and the template."""
    model, tokenizer = tiny_model(), tiny_tokenizer()
    policy = tiny_policy(model)
    chat = CONVERSATION[:turns]
    inputs: Any = tokenizer.apply_chat_template(
        chat,
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,  # type: ignore[arg-type]
    )
    prompt = inputs["input_ids"][0].tolist()
    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    with steer(model, policy):
        steered = generate_from(model, inputs, COUNT)[0, len(prompt) :].tolist()
        answer: Any = generator(chat, max_new_tokens=COUNT, do_sample=False)
    (expected,) = naive_generate(model, policy, [prompt], COUNT)
    assert steered == expected
    assert answer[0]["generated_text"][-1]["content"].split() == words(expected)
    assert prompt[0] == BOS


# -------------------------------------------------------------------------------------------------- streams, pipelines


def words(tokens: list[int]) -> list[str]:
    text: str = tiny_tokenizer().decode(tokens, skip_special_tokens=True)  # type: ignore[assignment]
    return [str(word) for word in text.split()]


def by_text_streamer(model: PreTrainedModel, prompt: list[int], capsys: pytest.CaptureFixture[str]) -> list[str]:
    streamer = TextStreamer(tiny_tokenizer(), skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    generate(model, [prompt], COUNT, streamer=streamer)
    return [str(word) for word in capsys.readouterr().out.split()]


def by_iterator_in_a_thread(model: PreTrainedModel, prompt: list[int], _: Any) -> list[str]:
    streamer = TextIteratorStreamer(
        tiny_tokenizer(),  # type: ignore[arg-type]
        skip_prompt=True,
        timeout=60,
        skip_special_tokens=True,
    )
    thread = threading.Thread(target=generate, args=(model, [prompt], COUNT), kwargs={"streamer": streamer})
    thread.start()
    text = "".join(streamer)
    thread.join()
    return [str(word) for word in text.split()]


def by_pipeline(model: PreTrainedModel, prompt: list[int], _: Any) -> list[str]:
    generator = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
    text = str(tiny_tokenizer().decode(prompt))
    answer: Any = generator(text, max_new_tokens=COUNT, do_sample=False, return_full_text=False)
    return answer[0]["generated_text"].split()


def by_pipeline_in_batches(model: PreTrainedModel, prompt: list[int], _: Any) -> list[str]:
    generator = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
    texts = [str(tiny_tokenizer().decode(prompt)), "w9", "w10 w11"]
    answers: Any = generator(texts, batch_size=3, max_new_tokens=COUNT, do_sample=False, return_full_text=False)
    return answers[0][0]["generated_text"].split()


@pytest.mark.parametrize("way", [by_text_streamer, by_iterator_in_a_thread, by_pipeline, by_pipeline_in_batches])
def test_text(way: Callable[..., list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    model, (prompt,) = tiny_model(), prompts((6,))
    policy = tiny_policy(model)
    expected = words(naive_generate(model, policy, [prompt], COUNT)[0])
    with steer(model, policy):
        assert way(model, prompt, capsys) == expected
    assert way(model, prompt, capsys) != expected


# ------------------------------------------------------------------------------------------------------------- refused


def repeating(model: Any, input_ids: Tensor, **options: Any) -> Any:
    """A loop like that of contrastive search: it tries four tokens at once."""
    cache = DynamicCache(config=model.config)
    candidates = model(input_ids, past_key_values=cache).logits[0, -1].topk(4).indices[:, None]
    cache.batch_repeat_interleave(4)
    return model(candidates, past_key_values=cache)


REFUSED: dict[str, tuple[Callable[[Any, list[list[int]]], Any], str]] = {
    "generate_batch": (
        lambda model, rows: model.generate_batch(rows, generation_config=GenerationConfig(max_new_tokens=2)),
        "continuous batching packs the tokens of many requests into one row",
    ),
    "continuous batching manager": (
        lambda model, rows: model.init_continuous_batching(continuous_batching_config=ContinuousBatchingConfig()),
        "continuous batching packs",
    ),
    "paged cache": (
        lambda model, rows: model.generate(torch.tensor(rows[:1]), cache_implementation="paged", max_new_tokens=2),
        "continuous batching packs",
    ),
    "classifier-free guidance": (
        lambda model, rows: generate(model, rows[:1], 2, guidance_scale=1.5),
        "guidance_scale is 1.5",
    ),
    "classifier-free guidance by a logits processor": (
        lambda model, rows: generate(
            model,
            rows[:1],
            4,
            logits_processor=LogitsProcessorList([UnbatchedClassifierFreeGuidanceLogitsProcessor(1.5, model)]),
        ),
        "a forward call came from inside a generate call",
    ),
    "custom loop that generates": (
        lambda model, rows: model.generate(
            torch.tensor(rows[:1]), custom_generate=lambda model, input_ids, **options: model.generate(input_ids)
        ),
        "run one at a time, and none inside another",
    ),
    "custom loop that repeats its cache": (
        lambda model, rows: model.generate(torch.tensor(rows[:1]), custom_generate=repeating),
        "a pass has 4 rows, its prompt 1",
    ),
    "token healing": (
        lambda model, rows: generate(model, rows[:1], 2, token_healing=True, tokenizer=tiny_tokenizer()),
        "token_healing is on: it replaces the prompt inside generate",
    ),
    "all positions by chunks": (
        lambda model, rows: generate(model, rows[:1], 2, prefill_chunk_size=2),
        "before the whole prompt of 6 tokens was read; pass the prompt in one piece",
    ),
}


@pytest.mark.parametrize("way", REFUSED)
def test_refused_with_one_line(way: str) -> None:
    call, line = REFUSED[way]
    model, rows = tiny_model("llama"), prompts((6, 4))
    with steer(model, tiny_policy(model, edit_positions="all")) as steering:
        with pytest.raises(InvalidInputError) as error:
            call(model, rows)
        assert line in str(error.value)
        assert "\n" not in str(error.value)
        assert len(generate(model, rows, 2)) == 2  # and goes on
    assert steering.summary().tokens_edited > 0


@pytest.mark.parametrize(
    "options",
    [
        {"penalty_alpha": 0.6, "top_k": 4},
        {"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.5},
        {"num_beams": 2, "force_words_ids": [[9]]},
        {"dola_layers": "low"},
    ],
    ids=["contrastive search", "group beam search", "constrained beam search", "DoLa"],
)
def test_what_transformers_does_not_offer_is_refused_by_it_as_without_steering(options: dict[str, Any]) -> None:
    """This release has moved these to repositories on the hub, which are run with trust_remote_code."""
    model, rows = tiny_model("llama"), prompts((4,))
    messages = []
    with pytest.raises(ValueError, match="trust_remote_code") as error:
        generate(model, rows, 2, **options)
    messages.append(str(error.value))
    with steer(model, tiny_policy(model)), pytest.raises(ValueError, match="trust_remote_code") as error:
        generate(model, rows, 2, **options)
    messages.append(str(error.value))
    assert messages[0] == messages[1]


def test_a_model_with_several_residual_streams_is_refused() -> None:
    """Gemma 3n keeps four, and predicts three of them from the first."""
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers, "Gemma3nForCausalLM"):
        pytest.skip("this transformers has no Gemma 3n")
    config = transformers.Gemma3nTextConfig(
        vocab_size=VOCAB,
        vocab_size_per_layer_input=VOCAB,
        hidden_size=24,
        hidden_size_per_layer_input=4,
        intermediate_size=40,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        laurel_rank=4,
        num_kv_shared_layers=0,
        activation_sparsity_pattern=[0.0] * 4,
        layer_types=["full_attention"] * 4,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = transformers.Gemma3nForCausalLM(config).eval()
    with (
        steer(model, tiny_policy(model, dtype=torch.float32)),
        pytest.raises(
            InvalidInputError, match=r"returns hidden states of shape \(4, 1, 5, 24\); expected one residual"
        ),
    ):
        model.generate(torch.tensor([[BOS, 9, 8, 7, 6]]), max_new_tokens=2)
    assert left_padded([[BOS]])["input_ids"].tolist() == [[BOS]]
