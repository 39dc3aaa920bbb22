"""What `policy.explain` says is what the policy does, and why, by the equations of docs/method.md, section 3."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
from naive_generation import latents, naive_lists
from tiny_models import BOS, INPUT_LAYER, layer_of, prompts, tiny_model, tiny_policy, tiny_tokenizer

from dspa.errors import InvalidInputError, MismatchError
from dspa.online.steering import steer

(PROMPT,) = prompts((9,))


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def density_of(model: Any, policy: Any, prompt: list[int]) -> torch.Tensor:
    """rho_i(x) of every latent, written out."""
    caught: list[Any] = []
    hook = layer_of(model, INPUT_LAYER).register_forward_hook(lambda module, args, output: caught.append(output))
    with torch.no_grad():
        model(torch.tensor([prompt]))
    hook.remove()
    hidden = caught[0] if isinstance(caught[0], torch.Tensor) else caught[0][0]
    counted = [t for t, token in enumerate(prompt) if token != BOS]
    return (latents(hidden[0, counted], policy.input_sae) > 0).double().mean(dim=0)


@pytest.mark.parametrize("edit", ["ablate", "augment", "both"])
def test_it_is_what_the_equations_say(model: Any, edit: Any) -> None:
    policy = tiny_policy(model, edit=edit)
    explained = policy.explain(PROMPT, model)
    density = density_of(model, policy, PROMPT)
    picked = sorted(range(len(density)), key=lambda i: (-float(density[i]), i))[: policy.k_prompt]
    assert [row.latent for row in explained.rows] == picked
    assert [row.density for row in explained.rows] == pytest.approx([float(density[i]) for i in picked])
    assert (explained.prompt_tokens, explained.counted_tokens) == (9, 8)
    assert explained.active_latents == int((density > 0).sum())

    rows = policy.conditional_map.to_dense().double()[picked]
    score = rows.sum(dim=0)
    augment, ablate = naive_lists(model, policy, PROMPT)
    assert {e.latent for e in explained.edits if e.direction == "augment"} == set(augment)
    assert {e.latent for e in explained.edits if e.direction == "ablate"} == set(ablate)
    for entry in explained.edits:
        assert entry.score == pytest.approx(float(score[entry.latent]), abs=1e-6)
        parts = sorted(zip(picked, rows[:, entry.latent].tolist(), strict=True), key=lambda p: (-abs(p[1]), p[0]))
        assert [latent for latent, _ in entry.reasons] == [latent for latent, _ in parts[:3]]
        assert [value for _, value in entry.reasons] == pytest.approx([value for _, value in parts[:3]])


def test_it_is_what_steering_does(model: Any) -> None:
    policy = tiny_policy(model)
    explained = policy.explain(torch.tensor([PROMPT]), model)
    with steer(model, policy) as steering:
        model.generate(torch.tensor([PROMPT]), max_new_tokens=1)
        edits = steering.edits
    assert edits is not None
    assert [edit.latent for edit in explained.edits] == edits.latents[0, : int(edits.counts[0])].tolist()


@pytest.mark.parametrize("chat", [True, False])
def test_a_text_is_read_as_dspa_generate_reads_it(model: Any, chat: bool) -> None:
    policy, tokenizer = tiny_policy(model), tiny_tokenizer()
    ids: Any = tokenizer("w10 w20 w30")["input_ids"]
    if chat:
        messages = [{"role": "user", "content": "w10 w20 w30"}]
        rendered: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
        ids = rendered["input_ids"]
    assert policy.explain("w10 w20 w30", model, tokenizer, chat=chat) == policy.explain(ids, model)


def test_it_is_shown_short(model: Any) -> None:
    policy = tiny_policy(model, k_prompt=12)
    metadata = replace(policy.output_sae.metadata, neuronpedia_id="tiny/2-res")
    policy = replace(policy, output_sae=replace(policy.output_sae, metadata=metadata))
    explained = policy.explain(PROMPT, model)
    assert re.fullmatch(
        r"PolicyExplanation\(8 of 9 tokens counted, \d+ latents active, 12 rows picked, 24 latents to be edited\)",
        repr(explained),
    )
    text, page = str(explained), explained._repr_html_()
    assert "Latents to be edited" in text
    assert "and 2 more" in text
    assert max(map(len, text.splitlines())) <= 100
    assert len(page) < 8000
    assert f'<a href="https://www.neuronpedia.org/tiny/2-res/{explained.edits[0].latent}">' in page


def test_a_prompt_without_a_token_that_counts(model: Any) -> None:
    explained = tiny_policy(model).explain([BOS], model)
    assert (explained.counted_tokens, explained.rows, explained.edits) == (0, (), ())
    assert str(explained)


@pytest.mark.parametrize(
    ("prompt", "line"),
    [("w5", "needs its tokenizer"), ([], "expected those of one prompt"), (torch.ones(2, 3).long(), "one prompt")],
)
def test_what_cannot_be_explained(model: Any, prompt: Any, line: str) -> None:
    with pytest.raises(InvalidInputError, match=line):
        tiny_policy(model).explain(prompt, model)


def test_a_steered_or_another_model(model: Any) -> None:
    policy = tiny_policy(model)
    with steer(model, policy), pytest.raises(InvalidInputError, match="the model is steered; explain a prompt before"):
        policy.explain(PROMPT, model)
    policy.explain(PROMPT, model)
    with pytest.raises(MismatchError, match="made for another model"):
        policy.explain(PROMPT, tiny_model("qwen3"))
