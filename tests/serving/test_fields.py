"""Every field of a request has its effect or is refused by name, as the real openai client sees it."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import EOS, tiny_model

openai = pytest.importorskip("openai", reason="the server needs dspa[serve]")
pytest.importorskip("uvicorn", reason="the server needs dspa[serve]")

from serving.served import COUNT, MESSAGES, Served  # noqa: E402


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(tmp_path_factory.mktemp("served"))
    yield server
    server.stop()


def text(answer: Any, index: int = 0) -> str:
    return answer.choices[index].message.content


@pytest.fixture(scope="module")
def greedy(served: Served) -> list[str]:
    """The words of the greedy answer under policy a."""
    return served.expected["tiny@a"].split()


# -------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize("policy", ["", "@a"])
def test_sampling_follows_temperature_and_repeats_with_its_seed(served: Served, policy: str) -> None:
    sampled = [text(served.chat(policy=policy, temperature=1.5, seed=seed)) for seed in (1, 2, 3, 1)]
    assert sampled[0] == sampled[3]
    assert len(set(sampled)) == 3
    assert served.expected[served.name + policy] not in sampled
    assert len({text(served.chat(policy=policy, temperature=1.5)) for _ in range(4)}) > 1


def test_a_temperature_close_to_zero_is_greedy(served: Served) -> None:
    assert text(served.chat(policy="@a", temperature=1e-4, seed=3)) == served.expected["tiny@a"]


@pytest.mark.long
def test_what_is_sampled_has_the_models_probabilities(served: Served) -> None:
    """Temperature 1 and no top_k of 50 behind the request's back: the first token's frequencies over 960 choices."""
    model = tiny_model("llama", dtype=torch.float32)
    logits: Any = model(torch.tensor([served.prompt])).logits[0, -1]
    temperature = 2.0
    expected = (logits / temperature).softmax(dim=0)
    counts = torch.zeros(len(expected))
    for seed in range(60):
        answer = served.chat(temperature=temperature, n=16, max_tokens=1, seed=seed, logprobs=True)
        for choice in answer.choices:
            counts[served.tokenizer.convert_tokens_to_ids(choice.logprobs.content[0].token)] += 1
    share = counts / counts.sum()
    # Each share is within five standard deviations of its probability; the 50 likeliest would be 3 % too frequent.
    deviation = (expected * (1 - expected) / counts.sum()).sqrt()
    assert ((share - expected).abs() <= 5 * deviation + 1e-9).all()
    assert counts.count_nonzero() > 50


def test_top_p_keeps_the_likeliest(served: Served) -> None:
    assert text(served.chat(policy="@a", temperature=1.9, top_p=1e-6, seed=5)) == served.expected["tiny@a"]


def test_n_choices_of_one_prompt(served: Served) -> None:
    answer = served.chat(policy="@a", temperature=1.5, n=3, seed=7)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert len({text(answer, index) for index in range(3)}) == 3
    assert answer.usage.completion_tokens == 3 * COUNT
    streamed = ["", "", ""]
    for chunk in served.chat(policy="@a", temperature=1.5, n=3, seed=7, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == [text(answer, index) for index in range(3)]
    assert [text(served.chat(policy="@a", n=2), index) for index in range(2)] == [served.expected["tiny@a"]] * 2


# ---------------------------------------------------------------------------------------------------- log-probabilities


@pytest.mark.parametrize("stream", [False, True])
def test_logprobs_are_those_of_a_scored_forward_call(served: Served, stream: bool) -> None:
    answer = served.chat(policy="@a", logprobs=True, top_logprobs=3, temperature=1.5, seed=11, stream=stream)
    if stream:
        entries = [entry for chunk in answer for entry in (chunk.choices[0].logprobs or _NONE).content]
    else:
        entries = answer.choices[0].logprobs.content
    tokens: Any = served.tokenizer.convert_tokens_to_ids([entry.token for entry in entries])
    served.engine.steering.select("a")
    row = torch.tensor([served.prompt + tokens])
    with torch.no_grad(), served.engine.steering.scoring(prompt_tokens=len(served.prompt)):
        expected = served.model(row).logits[0, len(served.prompt) - 1 : -1].log_softmax(dim=-1)
    assert len(entries) == COUNT
    for entry, row_logprobs, token in zip(entries, expected, tokens, strict=True):
        assert entry.logprob == pytest.approx(row_logprobs[token].item(), abs=1e-5)
        best = row_logprobs.topk(3)
        assert [other.token for other in entry.top_logprobs] == served.tokenizer.convert_ids_to_tokens(best.indices)
        assert [other.logprob for other in entry.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-5)


class _NONE:
    content: tuple[Any, ...] = ()


def test_logprobs_of_text_completions(served: Served) -> None:
    answer = served.client.completions.create(model="tiny", prompt="w7 w8", max_tokens=4, temperature=0, logprobs=2)
    logprobs: Any = answer.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 4
    assert [max(top, key=top.get) for top in logprobs.top_logprobs] == logprobs.tokens


# ------------------------------------------------------------------------------------------------ what ends an answer


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("as_list", [False, True])
def test_stop_ends_before_the_string(served: Served, greedy: list[str], stream: bool, as_list: bool) -> None:
    stop = " ".join(greedy[2:4])
    answer = served.chat(policy="@a", stop=[stop, "never"] if as_list else stop, stream=stream)
    if stream:
        chunks = list(answer)
        found = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        reason = chunks[-1].choices[0].finish_reason
    else:
        found, reason = text(answer), answer.choices[0].finish_reason
        assert answer.usage.completion_tokens == 4
    assert found == " ".join(greedy[:2]) + " "
    assert reason == "stop"


def test_what_only_begins_like_a_stop_string_is_sent(served: Served, greedy: list[str]) -> None:
    chunks = list(served.chat(policy="@a", stop=greedy[-1] + " more", stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == " ".join(greedy)


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
def test_most_tokens(served: Served, greedy: list[str], field: str) -> None:
    answer = served.chat(**{"policy": "@a", "max_tokens": openai.NOT_GIVEN, field: 3})
    assert text(answer).split() == greedy[:3]
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", 3)


def test_an_end_token_ends_an_answer(served: Served, greedy: list[str], monkeypatch: Any) -> None:
    place = max(index for index, word in enumerate(greedy) if word not in greedy[:index])
    end = served.tokenizer.convert_tokens_to_ids(greedy[place])
    monkeypatch.setattr(served.model.generation_config, "eos_token_id", [EOS, end])
    answer = served.chat(policy="@a", n=2, logprobs=True)
    for index in range(2):
        assert text(answer, index).split() == greedy[:place]
        assert answer.choices[index].finish_reason == "stop"
        assert len(answer.choices[index].logprobs.content) == place


# ------------------------------------------------------------------------------------------------- biases and penalties


def test_logit_bias(served: Served, greedy: list[str]) -> None:
    token = served.tokenizer.convert_tokens_to_ids("w33")
    assert text(served.chat(policy="@a", logit_bias={str(token): 100})).split() == ["w33"] * COUNT
    first = served.tokenizer.convert_tokens_to_ids(greedy[0])
    assert text(served.chat(policy="@a", logit_bias={str(first): -100})).split()[0] != greedy[0]


@pytest.mark.parametrize("field", ["frequency_penalty", "presence_penalty"])
def test_penalties_are_subtracted(served: Served, field: str) -> None:
    """Under a bias towards one token, as a loop of forward calls has it; for some bias the penalty decides."""
    model = tiny_model("llama", dtype=torch.float32)
    token, changed = served.tokenizer.convert_tokens_to_ids("w33"), 0
    for bias in (2, 3, 4, 5):
        row, counts = list(served.prompt), torch.zeros(model.config.vocab_size)
        for _ in range(COUNT):
            logits: Any = model(torch.tensor([row])).logits[0, -1]
            logits = logits - 2 * (counts if field == "frequency_penalty" else (counts > 0))
            logits[token] += bias
            row.append(int(logits.argmax()))
            counts[row[-1]] += 1
        fields: dict[str, Any] = {"logit_bias": {str(token): bias}, field: 2}
        answer = text(served.chat(**fields))
        assert answer == served.text(row[len(served.prompt) :])
        changed += answer != text(served.chat(logit_bias={str(token): bias}))
    assert changed


# -------------------------------------------------------------------------------------------------------- other fields


def test_usage_at_the_end_of_a_stream(served: Served) -> None:
    chunks = list(served.chat(stream=True, stream_options={"include_usage": True}))
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], COUNT)
    assert chunks[-1].usage.prompt_tokens == len(served.prompt)
    assert all(chunk.usage is None for chunk in served.chat(stream=True))


def test_content_in_parts_and_answers_sent_back(served: Served) -> None:
    parts = [{"type": "text", "text": "w10 w20"}, {"type": "text", "text": " w30"}]
    assert text(served.chat(policy="@a", messages=[{"role": "user", "content": parts}])) == served.expected["tiny@a"]
    answer = served.chat().choices[0].message.model_dump()
    again = served.chat(messages=[*MESSAGES, answer, *MESSAGES])
    assert again.usage.prompt_tokens > 2 * len(served.prompt)


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "text"}},
        {"user": "me"},
        {"n": None},
        {"store": False, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True, "modalities": ["text"]},
    ],
    ids=str,
)
def test_values_that_change_nothing(served: Served, fields: dict[str, Any]) -> None:
    assert text(served.chat(policy="@a", extra_body=fields)) == served.expected["tiny@a"]


TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [TOOL]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("response_format", {"type": "json_schema", "json_schema": {"name": "s", "schema": {}}}),
        ("audio", {"voice": "alloy", "format": "wav"}),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"),
        ("store", True),
        ("metadata", {"a": "b"}),
        ("prediction", {"type": "content", "content": "x"}),
        ("service_tier", "flex"),
        ("web_search_options", {}),
        ("generation_config", '{"do_sample": true}'),
        ("min_p", 0.1),
        ("top_k", 5),
        ("temperature", -0.1),
        ("temperature", 2.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.01),
        ("seed", 1.5),
        ("seed", 2**64),
        ("n", 0),
        ("n", 17),
        ("n", True),
        ("logprobs", 3),
        ("top_logprobs", 2),
        ("stop", ["a"] * 5),
        ("stop", ""),
        ("stop", 3),
        ("logit_bias", {"word": 1}),
        ("logit_bias", {"61": 1}),
        ("logit_bias", {"5": 101}),
        ("frequency_penalty", 3),
        ("presence_penalty", -3),
        ("max_tokens", 0),
        ("max_tokens", -1),
        ("max_tokens", 10**9),
        ("max_tokens", 2.5),
        ("max_completion_tokens", 5),
        ("stream_options", {"include_usage": True}),
        ("stream", "yes"),
        ("messages", []),
        ("messages", "hello"),
        ("messages", [{"role": "user"}]),
        ("messages", [{"role": "king", "content": "w5"}]),
        ("messages", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]),
        ("messages", [{"role": "user", "content": "w5", "name": "me"}]),
        ("messages", [{"role": "assistant", "content": "w5", "tool_calls": [{"id": "1"}]}]),
        ("chat_template_kwargs", {"chat_template": "{{ 1 }}"}),
        ("chat_template_kwargs", {"tokenize": False}),
        ("chat_template_kwargs", {"steps": 10**9}),
    ],
    ids=str,
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_is_refused_names_its_field(served: Served, field: str, value: Any, stream: bool) -> None:
    if stream and field in ("stream", "stream_options"):
        return
    with pytest.raises(openai.BadRequestError) as refused:
        served.chat(stream=stream, extra_body={field: value})
    error = refused.value.response.json()["error"]
    assert error["param"] in (field, "max_tokens" if field == "max_completion_tokens" else field)
    assert field in error["message"] or "messages" in field or "max_tokens" in error["message"]
    assert "\n" not in error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("field", "value"), [("echo", True), ("best_of", 2), ("suffix", "end"), ("logprobs", 6), ("prompt", ["w5", "w6"])]
)
def test_what_text_completions_refuse(served: Served, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=field):
        served.client.completions.create(**{"model": "tiny", "prompt": "w5", "max_tokens": 2, field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("tools", [TOOL]),
        ("previous_response_id", "resp_1"),
        ("background", True),
        ("store", True),
        ("reasoning", {"effort": "low"}),
        ("text", {"format": {"type": "json_object"}}),
        ("truncation", "auto"),
        ("input", [{"type": "function_call_output", "call_id": "1", "output": "2"}]),
        ("max_output_tokens", 10**7),
    ],
    ids=str,
)
def test_what_responses_refuse(served: Served, field: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError, match=field):
        served.client.responses.create(**{"model": "tiny", "input": "w5", "max_output_tokens": 2, field: value})


def test_instructions_come_first(served: Served) -> None:
    plain = served.client.responses.create(model="tiny", input="w5", max_output_tokens=2)
    longer = served.client.responses.create(model="tiny", input="w5", instructions="w6 w7", max_output_tokens=2)
    assert longer.usage is not None
    assert plain.usage is not None
    assert longer.usage.input_tokens > plain.usage.input_tokens


def test_logprobs_of_what_cannot_be_are_numbers(served: Served) -> None:
    answer = served.chat(logprobs=True, logit_bias={"7": 100}, max_tokens=1)
    assert math.isfinite(answer.choices[0].logprobs.content[0].logprob)
