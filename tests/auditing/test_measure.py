"""What an audit measures on prompts, against steering written out (naive_generation.py)."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from fsrl_cases import tiny_fsrl_policy
from naive_generation import (
    edited,
    is_clean,
    latents,
    naive_generate,
    naive_lists,
    naive_logits,
    naive_positions,
)
from tiny_models import D_MODEL, OUTPUT_LAYER, layer_of, prompts, tiny_model, tiny_policy, tiny_tokenizer

from dspa import InvalidInputError, MismatchError, StaticPolicy, VectorPolicy, audit, steer
from dspa.auditing.forward import Decoding, kl_divergence
from dspa.auditing.measure import Measurement, measure, token_texts
from dspa.auditing.prompts import ReadPrompt
from dspa.kernels import EditList
from dspa.methods.personal import Overlay, PersonalPolicy

ROWS = prompts((5, 9, 7, 6, 8))
DECODING = Decoding(max_new_tokens=6, batch_size=2)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("llama")


def measured_on(policy: Any, model: Any, rows: list[list[int]] = ROWS) -> Measurement:
    read = [ReadPrompt(f"prompt {number}", tuple(row)) for number, row in enumerate(rows)]
    return measure(policy, model, tiny_tokenizer(), read, DECODING)


@torch.no_grad()
def stream(model: Any, tokens: list[int]) -> torch.Tensor:
    """The residual stream after the output layer, unsteered."""
    caught: list[Any] = []
    hook = layer_of(model, OUTPUT_LAYER).register_forward_hook(lambda module, args, output: caught.append(output))
    model(torch.tensor([tokens]), use_cache=False)
    hook.remove()
    return (caught[0] if isinstance(caught[0], torch.Tensor) else caught[0][0])[0]


@pytest.mark.parametrize("positions", ["from_last_prompt", "generated", "all"])
def test_counts_are_those_of_the_equations(model: Any, positions: Any) -> None:
    policy = tiny_policy(model, edit_positions=positions, edit="both")
    found = measured_on(policy, model)
    assert is_clean(model)
    lists_of: dict[int, list[int]] = defaultdict(lambda: [0, 0])
    edits: dict[int, list[tuple[int, int, float, float]]] = defaultdict(list)
    seen, maxima, moves, divergences, on_edited = 0, [], [], [], []
    for number, row in enumerate(ROWS):
        (new,) = naive_generate(model, policy, [row], DECODING.max_new_tokens)
        told = found.measured.prompts[number]
        assert told.response == tiny_tokenizer().decode(new, skip_special_tokens=True)
        tokens = row + new[:-1]  # the last one is never read
        lists = naive_lists(model, policy, row)
        assert (told.augment, told.ablate) == (tuple(lists[0]), tuple(lists[1]))
        for side, listed in enumerate(lists):
            for latent in listed:
                lists_of[latent][side] += 1
        h = stream(model, tokens)
        steered = naive_logits(model, policy, row, tokens, lists)[len(row) - 1 :].double().log_softmax(-1)
        with torch.no_grad():
            plain = model(torch.tensor([tokens])).logits[0, len(row) - 1 :].double().log_softmax(-1)
        kl = (steered.exp() * (steered - plain)).sum(-1)
        divergences += kl.tolist()
        assert told.mean_kl == pytest.approx(float(kl.mean()), rel=1e-6)
        places = naive_positions(policy, row, len(tokens))
        assert told.tokens_seen == len(places)
        seen += len(places)
        for place in places:
            f = latents(h[None, place], policy.output_sae)[0]
            maxima.append(float(f.max()))
            after = edited(h[place], policy.output_sae, lists, policy.alpha)
            change = float((after - h[place]).norm() / h[place].norm())
            if change:
                moves.append(change)
                on_edited += kl[[place - len(row) + 1]].tolist() if place >= len(row) - 1 else []
            for sign, listed in zip((1, -1), lists, strict=True):
                for latent in listed:
                    was = float(f[latent])
                    if was > 0:
                        edits[latent].append((number, place, was, max(0.0, was + sign * policy.alpha * maxima[-1])))
    measured = found.measured
    assert (measured.tokens_seen, measured.tokens_edited) == (seen, len(moves))
    assert measured.edits == sum(map(len, edits.values()))
    for distribution, values in (
        (measured.maximum, maxima),
        (measured.move, moves),
        (measured.kl, divergences),
        (measured.kl_edited, on_edited),
    ):
        tensor = torch.tensor(values, dtype=torch.float64)
        expected = [float(tensor.mean()), *(float(tensor.quantile(q)) for q in (0.5, 0.9, 1))]
        assert [distribution.mean, distribution.median, distribution.p90, distribution.maximum] == pytest.approx(
            expected, rel=1e-5
        )
    assert set(found.uses) == set(lists_of) | set(edits)
    for latent, use in found.uses.items():
        mine = edits[latent]
        assert (use.augment_lists, use.ablate_lists) == tuple(lists_of[latent])
        assert use.tokens_edited == len(mine)
        assert use.prompts_edited == len({number for number, *_ in mine})
        assert use.edit_share == pytest.approx(len(mine) / measured.edits)
        if mine:
            assert use.mean_before == pytest.approx(sum(was for _, _, was, _ in mine) / len(mine), rel=1e-5)
            assert use.mean_change == pytest.approx(sum(b - a for _, _, a, b in mine) / len(mine), rel=1e-5)


def test_examples_are_the_most_active_tokens_in_their_contexts(model: Any) -> None:
    policy, tokenizer = tiny_policy(model, edit="ablate"), tiny_tokenizer()
    found = measured_on(policy, model)
    sequences, streams = [], []
    for row in ROWS:
        (new,) = naive_generate(model, policy, [row], DECODING.max_new_tokens)
        sequences.append(row + new[:-1])
        streams.append(latents(stream(model, sequences[-1]), policy.output_sae))
    several = 0
    for latent, examples in found.examples.items():
        on = [
            (float(f[place, latent]), number, place)
            for number, f in enumerate(streams)
            for place in range(len(ROWS[number]) - 1, len(f))
            if float(f[place, latent]) > 0 and latent in found.measured.prompts[number].ablate
        ]
        best = {number: max(x for x in on if x[1] == number) for number in {number for _, number, _ in on}}
        expected = sorted(best.values(), key=lambda x: (-x[0], x[1]))[:4]
        several += len(expected) > 1
        assert len(examples) == min(4, len(on))
        for example, (activation, number, place) in zip(examples, expected, strict=False):
            assert (example.prompt, example.before) == (number, pytest.approx(activation, rel=1e-5))
            focus = example.tokens[example.focus]
            assert focus.edited
            assert focus.text.strip() == tokenizer.decode([sequences[number][place]])
            shown = range(place - example.focus, place - example.focus + len(example.tokens))
            assert [token.activation for token in example.tokens] == pytest.approx(
                [float(streams[number][at, latent]) for at in shown], rel=1e-4, abs=1e-6
            )
            assert [token.in_prompt for token in example.tokens] == [at < len(ROWS[number]) for at in shown]
    assert several


def test_picked_rows_are_those_that_explain_names(model: Any) -> None:
    policy = tiny_policy(model)
    found = measured_on(policy, model)
    counted: dict[tuple[int, int], int] = defaultdict(int)
    for row in ROWS:
        explained = policy.explain(row, model)
        for picked in explained.rows:
            for edit in explained.edits:
                counted[picked.latent, edit.latent] += 1  # this map has every entry
    assert found.picks == counted


def test_a_response_ends_where_the_model_ends_it(model: Any) -> None:
    policy = tiny_policy(model)
    (first,) = naive_generate(model, policy, [ROWS[1]], 6)
    stopping = tiny_model("llama")
    stopping.generation_config.eos_token_id = [first[2]]  # type: ignore[union-attr]
    found = measured_on(policy, stopping, [ROWS[0], ROWS[1]])
    cut = first.index(first[2]) + 1
    assert found.measured.prompts[1].tokens_seen == cut
    assert found.measured.prompts[0].tokens_seen >= found.measured.prompts[1].tokens_seen


def test_divergence_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]]), torch.tensor([[0.25, 0.25, 0.5], [0.5, 0.25, 0.25]])
    expected = [0.5 * torch.log(torch.tensor(2.0)) - 0.25 * torch.log(torch.tensor(2.0)), torch.log(torch.tensor(2.0))]
    assert kl_divergence(p.log(), q.log()).tolist() == pytest.approx([float(x) for x in expected])


def test_other_policies(model: Any) -> None:
    """A list for all prompts, an adapter, and a vector, whose edits have no latents."""
    tokenizer, texts = tiny_tokenizer(), ["w10 w20 w30", "w11 w12"]
    steering = tiny_policy(model)
    static = StaticPolicy.with_edits(steering, EditList.from_lists([[]], [[1, 2, 3]]))
    alone = audit(static)
    assert [latent.latent for latent in alone.latents] == [1, 2, 3]
    assert (alone.map, alone.measured) == (None, None)
    on_prompts = audit(static, model, tokenizer, prompts=texts, decoding=DECODING)
    assert on_prompts.measured is not None
    assert [prompt.ablate for prompt in on_prompts.measured.prompts] == [(1, 2, 3), (1, 2, 3)]
    assert on_prompts.measured.overlap is not None
    assert on_prompts.measured.overlap.mean == 1

    fsrl = audit(tiny_fsrl_policy(), model, tokenizer, prompts=texts, decoding=DECODING)
    assert fsrl.measured is not None
    assert fsrl.measured.overlap is None
    assert fsrl.latents[0].examples
    assert fsrl.latents[0].lens is not None

    vector = audit(
        VectorPolicy(torch.ones(D_MODEL), layer=OUTPUT_LAYER, scale=0.5),
        model,
        tokenizer,
        prompts=texts,
        decoding=DECODING,
    )
    assert vector.measured is not None
    assert (vector.latents, vector.measured.edits) == ((), 0)
    assert vector.measured.tokens_edited == vector.measured.tokens_seen > 0
    assert vector.measured.kl.mean > 0


def test_logit_lens(model: Any) -> None:
    """The norm and the unembedding of Llama, written out."""
    policy, tokenizer = tiny_policy(model), tiny_tokenizer()
    found = audit(policy, model, tokenizer)
    assert found.lens == "decoder rows through the final norm and the unembedding"
    for latent in found.latents[:5]:
        row = policy.output_sae.W_dec[latent.latent].double()  # type: ignore[index]
        normed = row / (row.square().mean() + model.model.norm.variance_epsilon).sqrt() * model.model.norm.weight
        logits = model.lm_head.weight.double() @ normed
        order = logits.argsort(descending=True).tolist()
        assert latent.lens is not None
        assert [token for token, _ in latent.lens.promoted] == [tokenizer.decode([t]) for t in order[:10]]
        assert [token for token, _ in latent.lens.suppressed] == [tokenizer.decode([t]) for t in order[:-11:-1]]
        assert [value for _, value in latent.lens.promoted] == pytest.approx(logits[order[:10]].tolist(), rel=1e-5)


def test_a_layer_norm_adds_no_bias_to_the_lens() -> None:
    model = tiny_model("gpt2")
    policy = tiny_policy(model)
    found = audit(policy, model, tiny_tokenizer()).latents[0]
    row = policy.output_sae.W_dec[found.latent].double()  # type: ignore[index]
    norm: Any = model.transformer.ln_f  # type: ignore[union-attr]
    normed = (row - row.mean()) / (row.var(correction=0) + norm.eps).sqrt() * norm.weight
    logits = (model.lm_head.weight.double() @ normed).detach()  # type: ignore[union-attr, operator]
    assert found.lens is not None
    assert found.lens.promoted[0][1] == pytest.approx(float(logits.max()), rel=1e-5)


def test_texts_of_tokens_in_their_places() -> None:
    tokenizer = tiny_tokenizer()
    ids = [1, 10, 11, 12]
    assert "".join(token_texts(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("policy", "arguments", "line"),
    [
        ("vector", {}, "a VectorPolicy names no latents by itself; audit it with a model and prompts"),
        ("fsrl", {"model": True, "tokenizer": True}, "names no latents by itself"),
        ("static", {"densities": "nowhere"}, "a StaticPolicy has no map, so no triple supports"),
        (
            "vector",
            {"model": True, "tokenizer": True, "prompts": ["w5"], "labels": "nowhere"},
            "a VectorPolicy edits no latents; audit it without labels",
        ),
        ("dspa", {"model": True}, "comes without its tokenizer"),
        ("dspa", {"prompts": ["w5"]}, "prompts need a model"),
        ("dspa", {"model": True, "tokenizer": True, "prompts": []}, "there is no prompt"),
        ("dspa", {"triples": object()}, "triples come without their densities"),
        ("dspa", {"model": True, "tokenizer": True, "prompts": [None]}, "a prompt is None; expected a text or a list"),
        ("dspa", {"model": True, "tokenizer": True, "prompts": [5]}, "a prompt is 5; expected"),
        ("name", {}, "a str is no policy"),
    ],
)
def test_what_cannot_be_audited(model: Any, policy: str, arguments: dict[str, Any], line: str) -> None:
    steering = tiny_policy(model)
    policies: dict[str, Any] = {
        "dspa": steering,
        "static": StaticPolicy.with_edits(steering, EditList.from_lists([[]], [[1]])),
        "fsrl": tiny_fsrl_policy(),
        "vector": VectorPolicy(torch.ones(D_MODEL), layer=OUTPUT_LAYER),
        "name": "policy/",
    }
    real = {"model": model, "tokenizer": tiny_tokenizer()}
    passed = {name: real[name] if value is True else value for name, value in arguments.items()}
    with pytest.raises(InvalidInputError, match=line):
        audit(policies[policy], **passed)


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0; expected at least 1"),
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"seed": 0.5}, "seed is 0.5; expected an integer"),
        ({"sample": 1}, "sample is 1; expected True or False"),
    ],
)
def test_decoding_out_of_range(options: dict[str, Any], line: str) -> None:
    with pytest.raises(InvalidInputError, match=line):
        Decoding(**options)


def test_a_personal_policy_on_prompts(model: Any) -> None:
    """The rows that its shared policy picked lead to the latents that are not the overlay's."""
    shared = tiny_policy(model)
    run = shared.conditional_map.run
    own = shared.selectable_latents()[:2].int()
    overlay = Overlay(
        own, torch.tensor([1, -1], dtype=torch.int8), torch.zeros(2), 0.5, run.output_layer, run.output_sae, 3
    )
    found = audit(PersonalPolicy(shared, overlay), model, tiny_tokenizer(), prompts=["w5 w6 w7"], decoding=DECODING)
    assert found.measured is not None
    assert found.latent(int(own[0])).use is not None
    assert {int(own[0])} <= set(found.measured.prompts[0].augment)
    leads = [lead for x in found.latents if x.map is not None and x.use is not None for lead in x.map.leads]
    assert leads
    assert all(lead.prompts == 1 for lead in leads)


def test_another_model_or_a_steered_one(model: Any) -> None:
    policy, tokenizer = tiny_policy(model), tiny_tokenizer()
    with pytest.raises(MismatchError, match="made for another model"):
        audit(policy, tiny_model("qwen3"), tokenizer)
    with steer(model, policy), pytest.raises(InvalidInputError, match="the model is steered"):
        audit(replace(policy, alpha=0.1), model, tokenizer, prompts=["w5"], decoding=DECODING)
