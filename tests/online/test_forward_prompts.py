"""What a plain forward call is taken for: recognised, said, warned of or refused, but never silently something else."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_generation import naive_lists, naive_logits
from tiny_models import EOS, PAD, prompts, tiny_model, tiny_policy

from dspa.errors import InvalidInputError
from dspa.methods.static_policy import StaticPolicy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.methods.vector_policy import VectorPolicy
from dspa.online.forward_prompt import PaddingTokens, prompt_lengths_of
from dspa.online.steering import steer

ROWS = prompts((9, 6, 7))
PROMPTS = (4, 3, 5)


def right_padded(rows: list[list[int]], fill: int = PAD) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def expected_logits(model: Any, policy: Any) -> list[torch.Tensor]:
    """Of each row, as prompt and response, by the naive loop."""
    return [
        naive_logits(model, policy, row[:count], row, naive_lists(model, policy, row[:count]))
        for row, count in zip(ROWS, PROMPTS, strict=True)
    ]


def assert_scored(model: Any, policy: Any, expected: list[torch.Tensor], logits: torch.Tensor) -> None:
    for row, wanted in enumerate(expected):
        torch.testing.assert_close(logits[row, : len(ROWS[row])], wanted, rtol=1e-9, atol=1e-9)


@pytest.fixture
def model() -> Any:
    return tiny_model("llama")


@pytest.fixture
def policy(model: Any) -> SteeringPolicy:
    return tiny_policy(model)


# ------------------------------------------------------------------------------------------------------ what is said


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("how", ["prompt_tokens", "completion_mask", "labels"])
def test_where_responses_begin_can_be_said(model: Any, policy: SteeringPolicy, how: str, masked: bool) -> None:
    expected = expected_logits(model, policy)
    ids = right_padded(ROWS)
    mask = (ids != PAD).long()
    completion = mask.clone()
    for row, count in enumerate(PROMPTS):
        completion[row, :count] = 0
    inputs: dict[str, Any] = {"input_ids": ids, **({"attention_mask": mask} if masked else {})}
    with steer(model, policy) as steering, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        if how == "labels":
            logits = model(**inputs, labels=torch.where(completion == 1, ids, -100)).logits
        else:
            said: Any = list(PROMPTS) if how == "prompt_tokens" else completion
            with steering.scoring(**{how: said}):
                logits = model(**inputs).logits
    assert_scored(model, policy, expected, logits)
    seen = sum(len(row) - count + 1 for row, count in zip(ROWS, PROMPTS, strict=True))
    assert steering.summary().tokens_seen == seen


def test_scoring_says_more_than_labels(model: Any, policy: SteeringPolicy) -> None:
    expected = expected_logits(model, policy)
    ids = right_padded(ROWS)
    with steer(model, policy) as steering, torch.no_grad(), steering.scoring(prompt_tokens=list(PROMPTS)):
        assert_scored(model, policy, expected, model(ids, labels=ids).logits)


def test_labels_are_forgotten_after_their_call(model: Any, policy: SteeringPolicy) -> None:
    ids = torch.tensor(ROWS[:1])
    with steer(model, policy), torch.no_grad():
        with pytest.warns(UserWarning, match="taken for prompts"):
            plain = model(ids).logits
        labelled = model(ids, labels=torch.tensor([[-100] * 4 + ROWS[0][4:]])).logits
        assert not torch.equal(plain, labelled)
        with pytest.raises(ValueError, match="batch_size"):
            model(ids, labels=torch.zeros(1, 3, dtype=torch.long))
        assert torch.equal(model(ids).logits, plain)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    ("said", "line"),
    [
        ({}, "either prompt_tokens or completion_mask"),
        ({"prompt_tokens": 3, "completion_mask": torch.ones(1, 9)}, "either prompt_tokens or completion_mask"),
        ({"completion_mask": torch.ones(2, 9)}, "expected the same shape"),
        ({"completion_mask": torch.zeros(1, 9)}, "marks no token"),
        ({"completion_mask": "no"}, "expected whole numbers"),
        ({"prompt_tokens": [3, 4]}, "2 prompt lengths for 1 rows"),
        ({"prompt_tokens": 3.5}, "expected a whole number for each row"),
        ({"prompt_tokens": None, "completion_mask": [[0, 1, 0, 1, 1, 0, 0, 0, 0]]}, "more than one response"),
        ({"prompt_tokens": "3"}, "expected whole numbers"),
        ({"prompt_tokens": 0}, "got 0 prompt tokens for row 0, which has 9 tokens"),
        ({"prompt_tokens": [10]}, "got 10 prompt tokens for row 0, which has 9 tokens"),
    ],
)
def test_what_contradicts_itself(model: Any, policy: SteeringPolicy, said: dict[str, Any], line: str) -> None:
    with (
        steer(model, policy) as steering,
        torch.no_grad(),
        pytest.raises(InvalidInputError, match=line),
        steering.scoring(**said),
    ):
        model(torch.tensor(ROWS[:1]))


@pytest.mark.parametrize("said", ["labels", "completion_mask"])
def test_rows_of_several_responses_are_refused(model: Any, policy: SteeringPolicy, said: str) -> None:
    """Packed sequences and conversations of several turns. The end of the sequence may be left out of the labels."""
    row = ROWS[0]
    turns = torch.tensor([[-100, -100, *row[2:4], -100, *row[5:]]])
    one = torch.tensor([[-100] * 4 + row[4:8] + [-100]])
    with steer(model, policy) as steering, torch.no_grad():

        def run(labels: torch.Tensor) -> None:
            if said == "labels":
                model(torch.tensor([row]), labels=labels)
                return
            with steering.scoring(completion_mask=labels != -100):
                model(torch.tensor([row]))

        run(one)
        with pytest.raises(InvalidInputError, match="row 0 of a forward call has more than one response"):
            run(turns)


def test_packed_rows_are_refused(model: Any, policy: SteeringPolicy) -> None:
    """Without a mask, transformers tells the sequences of a row by their positions."""
    ids, width = torch.tensor([ROWS[0] + ROWS[1]]), len(ROWS[0])
    positions = torch.tensor([[*range(width), *range(len(ROWS[1]))]])
    with steer(model, policy) as steering, torch.no_grad(), steering.scoring(prompt_tokens=3):
        model(ids, position_ids=torch.arange(ids.shape[1])[None])
        with pytest.raises(InvalidInputError, match="as packed rows have"):
            model(ids, position_ids=positions)


@pytest.mark.parametrize("form", ["bool", "added"])
def test_masks_of_what_each_position_attends_to(model: Any, policy: SteeringPolicy, form: str) -> None:
    """They are followed where nothing is hidden, and refused where something is: it may be padding."""
    expected = expected_logits(model, policy)[:1]
    ids, width = torch.tensor(ROWS[:1]), len(ROWS[0])

    def mask(seen: torch.Tensor) -> torch.Tensor:
        return seen if form == "bool" else torch.where(seen, 0.0, -1e9).double()

    causal = torch.ones(1, 1, width, width, dtype=torch.bool).tril()
    hiding = causal.clone()
    hiding[..., 0] = False
    with steer(model, policy) as steering, torch.no_grad(), steering.scoring(prompt_tokens=PROMPTS[0]):
        assert_scored(model, policy, expected, model(ids, attention_mask=mask(causal)).logits)
        with pytest.raises(InvalidInputError, match="does not say which tokens are padding"):
            model(ids, attention_mask=mask(hiding))


# ------------------------------------------------------------------------------------------------ what is warned of


def test_it_is_warned_once_with_what_was_assumed(model: Any, policy: SteeringPolicy) -> None:
    ids = torch.tensor(prompts((6, 6)))
    with steer(model, policy), torch.no_grad():
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always")
            model(ids)
            model(ids)
        assert [str(entry.message) for entry in record] == [
            "a forward call of 2 x 6 tokens was taken for prompts, as nothing says where a response begins: the policy "
            "read each row to its end and edited its last token; to score or train on responses, call it inside "
            "steering.scoring(prompt_tokens=...), or pass labels that are -100 on the prompt"
        ]


def test_labels_of_plain_language_modelling_mark_no_prompt(model: Any, policy: SteeringPolicy) -> None:
    ids = torch.tensor(prompts((6, 6)))
    with steer(model, policy) as steering, pytest.warns(UserWarning, match="as its labels mark no prompt"):
        model(ids, labels=ids)
    assert steering.summary().tokens_seen == 2


@pytest.mark.parametrize("case", ["one token", "a cache", "not steered", "the same everywhere"])
def test_where_nothing_is_assumed_nothing_is_said(model: Any, policy: SteeringPolicy, case: str) -> None:
    from transformers import DynamicCache

    steering_policy: Any = policy
    if case == "the same everywhere":
        steering_policy = VectorPolicy(torch.ones(24).double(), layer=2, edit_positions="all")
    ids = torch.tensor([ROWS[0][:1] if case == "one token" else ROWS[0]])
    cache = {"past_key_values": DynamicCache(config=model.config)} if case == "a cache" else {}
    selected = None if case == "not steered" else "a"
    with steer(model, {"a": steering_policy}, select=selected), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        model(ids, **cache)


@pytest.mark.parametrize("labelled", [True, False])
def test_inside_trainer(model: Any, tmp_path: Path, labelled: bool) -> None:
    """Eight sequences of 9 tokens, 4 of them prompt: 6 of each are at positions to be edited, or one and a warning."""
    from transformers import Trainer, TrainingArguments

    model = tiny_model("llama", dtype=torch.float32)
    policy = tiny_policy(model, dtype=torch.float32)
    rows = prompts((9,) * 8)
    data: Any = [
        {"input_ids": row, "labels": [-100] * 4 + row[4:] if labelled else row, "attention_mask": [1] * 9}
        for row in rows
    ]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=8, max_steps=1, report_to=[], use_cpu=True, save_strategy="no"
    )
    with steer(model, policy) as steering, warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        Trainer(model, arguments, train_dataset=data).train()
    assert steering.summary().tokens_seen == (8 * 6 if labelled else 8)
    assert any("labels mark no prompt" in str(entry.message) for entry in record) == (not labelled)


# ----------------------------------------------------------------------------------------------------------- padding


def test_padding_on_the_right_is_recognised(model: Any, policy: SteeringPolicy) -> None:
    rows = prompts((9, 5))
    with steer(model, policy) as steering, torch.no_grad(), pytest.warns(UserWarning, match="taken for prompts"):
        logits = model(right_padded(rows)).logits
    for row, prompt in enumerate(rows):
        expected = naive_logits(model, policy, prompt, prompt, naive_lists(model, policy, prompt))
        torch.testing.assert_close(logits[row, : len(prompt)], expected, rtol=1e-9, atol=1e-9)
    assert steering.summary().tokens_seen == 2


def test_padding_on_the_left_without_a_mask_is_refused(model: Any, policy: SteeringPolicy) -> None:
    ids = torch.tensor([[PAD, PAD, *ROWS[0][:4]], ROWS[1]])
    with steer(model, policy), torch.no_grad():
        with pytest.raises(InvalidInputError, match=r"padding \(token 0\) on the left and no attention mask"):
            model(ids)
        model(ids, attention_mask=(ids != PAD).long())
    model(ids)


def test_padding_that_may_be_an_end_is_refused(model: Any, policy: SteeringPolicy) -> None:
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = EOS
    one, two = torch.tensor([[*ROWS[0], EOS]]), torch.tensor([[*ROWS[0], EOS, EOS]])
    with steer(model, policy), torch.no_grad():
        model(one)
        with pytest.raises(InvalidInputError, match="may be padding or ends of sequence; pass attention_mask"):
            model(two)
        model(two, attention_mask=torch.ones_like(two))
        with pytest.raises(InvalidInputError, match=rf"padding \(token {EOS}\) on the left and no attention mask"):
            model(torch.tensor([[EOS, *ROWS[0]]]))


@pytest.mark.parametrize(
    ("tokens", "rows", "expected"),
    [
        (PaddingTokens(None, frozenset(), None), [[0, 5, 0]], [[1, 1, 1]]),
        (PaddingTokens(0, frozenset(), None), [[5, 0, 6, 0, 0]], [[1, 1, 1, 0, 0]]),
        (PaddingTokens(0, frozenset(), None), [[0, 0]], [[0, 0]]),
        (PaddingTokens(0, frozenset(), None), [[0]], [[1]]),
        (PaddingTokens(1, frozenset({2}), 1), [[1, 5, 6]], [[1, 1, 1]]),
        (PaddingTokens(1, frozenset({1}), 1), [[1, 5, 1]], [[1, 1, 1]]),
    ],
)
def test_presence(tokens: PaddingTokens, rows: list[list[int]], expected: list[list[int]]) -> None:
    assert tokens.presence(torch.tensor(rows)).tolist() == expected


@pytest.mark.parametrize(
    ("response", "present", "expected"),
    [
        ([[0, 0, 1, 1]], [[1, 1, 1, 1]], [2]),
        ([[0, 0, 1, 1]], [[0, 1, 1, 1]], [1]),
        ([[0, 1, 1, 0], [0, 0, 0, 0]], [[1, 1, 1, 1], [1, 1, 1, 0]], [1, 3]),
        ([[0, 1, 0, 1]], [[1, 1, 0, 1]], [1]),  # what is in between is padding
        ([[1, 1, 1, 1]], [[1, 1, 1, 1]], None),
        ([[0, 1, 1]], [[1, 1, 1, 1]], None),
    ],
)
def test_prompt_lengths(response: list[list[int]], present: list[list[int]], expected: list[int] | None) -> None:
    found = prompt_lengths_of(torch.tensor(response).bool(), torch.tensor(present))
    assert (None if found is None else found.tolist()) == expected


# ------------------------------------------------------------------------------------------------- steering it twice


def test_the_same_policy_twice_is_refused(model: Any, policy: SteeringPolicy, tmp_path: Path) -> None:
    """As the same object and, as when a cell of a notebook is run again, loaded again."""
    again = SteeringPolicy.from_pretrained(policy.save_pretrained(tmp_path / "policy"))
    loaded = SteeringPolicy.from_pretrained(tmp_path / "policy")
    first = steer(model, policy)
    for name, same in {"policy": policy, "other name": policy}.items():
        with pytest.raises(InvalidInputError, match=f"policy '{name}' is attached to this model already"):
            steer(model, {name: same})
    first.remove()
    with steer(model, again), pytest.raises(InvalidInputError, match="is attached to this model already"):
        steer(model, loaded)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steer(model, policy).remove()


def test_another_policy_comes_with_a_warning_or_on_purpose(model: Any, policy: SteeringPolicy) -> None:
    other = StaticPolicy.from_mean_difference(policy)
    ids = torch.tensor(ROWS[:1])
    with steer(model, {"first": policy}):
        with pytest.warns(UserWarning, match="steered already, by first: the edits follow one another"):
            steer(model, other).remove()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            both = steer(model, other, compose=True)
            doubled = steer(model, policy, compose=True)
        model.generate(ids, max_new_tokens=3)
        assert doubled.summary().tokens_seen == both.summary().tokens_seen == 3
        both.remove()
        doubled.remove()
