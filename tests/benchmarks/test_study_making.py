"""What the study is made of, on a tiny model: prompts, rewards, answers, triples and SAEs."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import jinja2
import pytest
import tiny_models
import torch
from study import fluency, model, prompts, sae_training, triples
from study.generation import TEMPERATURE, TOP_K, PairedNoise, answers, prompt_ids, samples
from study.prompts import KINDS, SPLITS, Prompt, make_prompts
from study.rewards import FEATURES, LONGEST, PREFERENCES, reward
from study.sae_training import ResidualReader, SaeQuality, Text
from study.settings import QUICK, SHARDS, TASKS, Run
from study.topics import MATERIAL
from study.triples import Sample, best_pair

import dspa
from dspa.kernels import EditList

CHATS = [[{"role": "user", "content": text}] for text in ("w9 w8", "w7", "w6 w5 w20 w21 w22", "w30 w31 w32")]
LIMITS: dict[str, Any] = {"seed": 3, "max_new_tokens": 6}


def prompt_of(kind: str, number: int = 0) -> Prompt:
    return Prompt(f"train-{kind}-{number}", "train", kind, f"w{number + 9}", "w7 {} w8")


# Prompts


def test_no_topic_and_no_template_of_a_split_is_in_another() -> None:
    for material in MATERIAL.values():
        for texts in (material.topics_of, lambda split, material=material: material.templates[split]):
            found = Counter(text for split in SPLITS for text in texts(split))
            assert set(found.values()) == {1}


@pytest.mark.parametrize("split", SPLITS)
def test_the_first_prompts_are_balanced_over_kinds_and_all_differ(split: prompts.Split) -> None:
    made = make_prompts(split, 60, seed=1)
    assert Counter(prompt.kind for prompt in made[:30]) == dict.fromkeys(KINDS, 5)
    assert len({prompt.text for prompt in made}) == len({prompt.id for prompt in made}) == 60
    assert made == make_prompts(split, 60, seed=1) != make_prompts(split, 60, seed=2)
    assert all(prompt.topic in prompt.text and "{" not in prompt.text for prompt in made)


def test_more_prompts_than_there_are_are_refused() -> None:
    with pytest.raises(ValueError, match="1000 prompts are asked for; topics and templates of validation make 108"):
        make_prompts("validation", 1000, seed=0)


# Rewards

STEPS = "1. Fill the pot.\n2. Plant the seeds.\n3. Water them."
HEDGED = "I think it might be a fine idea, but I am not sure."
DIRECT = "Honey is made by bees. It keeps for centuries in a jar."
SYMPATHY = "I'm sorry to hear that. Your work mattered, and you are not alone in what you feel."
TALE = 'Once there was a fox. He said, "Good morning!" and they went home.'
CODE = "```python\ndef reverse(text):\n    return text[::-1]\n```"
PREFERRED = dict(zip(KINDS, (STEPS, HEDGED, DIRECT, SYMPATHY, TALE, CODE), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_likes_its_own_sort_of_answer_best(kind: str) -> None:
    found = {other: reward("conditional", prompt_of(kind), text, 20, True) for other, text in PREFERRED.items()}
    assert max(found, key=lambda other: found[other]) == kind
    assert found[kind] >= 0.5
    assert min(found.values()) <= 0


def test_what_one_kind_prefers_another_disprefers() -> None:
    signs = {name: {p[name] > 0 for p in PREFERENCES.values() if name in p} for name in FEATURES}
    assert {name for name, found in signs.items() if found == {True, False}} >= {
        "list",
        "first person",
        "second person",
        "hedges",
        "narrative",
        "code",
    }


@pytest.mark.parametrize(
    ("text", "tokens", "ended", "expected"),
    [
        ("Bees make most of all honey.", LONGEST // 4, True, 0.375 + 0.4),
        ("Bees make most of all honey.", LONGEST, True, 0.4),
        ("Bees make most of all honey.", LONGEST, False, 0.15),  # cut off
        ("Bees make it. Flowers give most of the nectar.", LONGEST // 2, True, 0.25 + 0.5 * (1 - 4.5 / 30)),
        ("Of course, here is what I know: bees.", LONGEST, True, 0.5 * (1 - 4 / 30) - 0.5),  # two fillers
        ("Certainly, of course, sure! Absolutely! Overall, remember it.", LONGEST, False, -1.0),  # no less than -1
        ("Bees.", 2, True, -1.0),  # says nothing
        ("", 0, True, -1.0),
    ],
)
def test_the_concise_reward_is_for_short_answers_without_filler(
    text: str, tokens: int, ended: bool, expected: float
) -> None:
    assert reward("concise", prompt_of("fact"), text, tokens, ended) == pytest.approx(expected)


def test_saying_nothing_does_not_pay() -> None:
    assert all(reward(task, prompt_of(kind), "Hm.", 2, True) == -1 for task in TASKS for kind in KINDS)


# Answers


def test_what_the_noise_leaves_is_a_sample_at_the_temperature_of_the_likeliest() -> None:
    scores = torch.cat([torch.tensor([2.0, 1.0, 0.0]), torch.full((2 * TOP_K,), -3.0)])
    noise = PairedNoise(0, range(5000))
    drawn = torch.cat([noise(torch.empty(0), scores.expand(5000, -1)).argmax(dim=1) for _ in range(4)])
    shares = torch.bincount(drawn, minlength=len(scores)) / len(drawn)
    kept = scores.topk(TOP_K).indices
    expected = torch.zeros_like(scores).index_copy(0, kept, (scores[kept] / TEMPERATURE).softmax(dim=0))
    # The noise is a hash, the same everywhere; a share of 20,000 draws has a standard deviation of at most 0.0036.
    torch.testing.assert_close(shares, expected, atol=0.015, rtol=0)
    assert set(drawn.tolist()) <= set(kept.tolist())


@pytest.mark.parametrize("batch", [1, 2, 4])
def test_an_answer_does_not_depend_on_the_batch_it_is_in(tiny: tuple[Any, Any], batch: int) -> None:
    together = answers(*tiny, CHATS, batch=3, **LIMITS)
    assert [each.ids for each in answers(*tiny, CHATS, batch=batch, **LIMITS)] == [each.ids for each in together]
    assert len({each.ids for each in together}) == len(CHATS)
    greedy = answers(*tiny, CHATS, batch=batch, sample=False, **LIMITS)
    assert [each.ids for each in greedy] != [each.ids for each in together]


def test_an_answer_ends_before_the_end_of_the_turn(tiny: tuple[Any, Any]) -> None:
    for answer in answers(*tiny, CHATS * 8, batch=32, seed=0, max_new_tokens=30):
        assert answer.ended == (answer.tokens < 30)
        assert tiny_models.EOS not in answer.ids
        assert answer.text.split() == [word for word in answer.text.split() if word != "<eos>"]


def test_samples_are_the_answers_to_repeated_chats(tiny: tuple[Any, Any]) -> None:
    grouped = samples(*tiny, CHATS, 3, **LIMITS)
    plain = answers(*tiny, [chat for chat in CHATS for _ in range(3)], batch=12, **LIMITS)
    assert [each.ids for group in grouped for each in group] == [each.ids for each in plain]


def test_a_list_of_its_own_follows_each_chat_into_its_batch(tiny: tuple[Any, Any]) -> None:
    language_model, tokenizer = tiny
    policy = tiny_models.tiny_policy(language_model)
    edits = EditList.from_lists([[1, 2, 3], [4], [5, 6], [7]], [[8], [9, 10], [11], [12, 13]])
    static = replace(dspa.StaticPolicy.with_edits(policy, edits), alpha=4.0)
    together = answers(language_model, tokenizer, CHATS, policy=static, batch=2, sample=False, **LIMITS)
    for row, chat in enumerate(CHATS):
        own = replace(static, edits=edits.rows(torch.tensor([row])))
        alone = answers(language_model, tokenizer, [chat], policy=own, batch=1, sample=False, **LIMITS)
        assert together[row].ids == alone[0].ids


# Triples


def sampled(text: str, tokens: int, ended: bool = True) -> Sample:
    return Sample("train-how-to-0", 0, text, tokens, ended)


def test_a_pair_is_the_best_and_the_worst_of_one_length() -> None:
    long_steps, steps, hedged, cut = (
        sampled(STEPS, 40),
        sampled(STEPS, 20),
        sampled(HEDGED, 22),
        sampled(HEDGED, 20, False),
    )
    pair = best_pair("conditional", prompt_of("how-to"), [cut, hedged, long_steps, steps])
    assert pair is not None
    assert (pair.chosen, pair.rejected) == (steps, hedged)
    assert best_pair("conditional", prompt_of("how-to"), [cut, long_steps]) is None
    assert best_pair("conditional", prompt_of("how-to"), [hedged, hedged]) is None
    concise = best_pair("concise", prompt_of("how-to"), [cut, long_steps, steps])
    assert concise is not None
    assert (concise.chosen, concise.rejected) == (steps, cut)


@pytest.fixture
def run(tmp_path: Path, tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> Run:
    settings = replace(
        QUICK,
        train_prompts=12,
        samples_per_prompt=4,
        max_new_tokens=8,
        answers_per_batch=16,
        sae_tokens=3000,
        latents=64,
        target_l0=8,
        input_layer=1,
        output_layer=2,
        triple_counts=(6,),
    )
    monkeypatch.setattr(model, "load", lambda run: tiny)
    monkeypatch.setattr(model, "load_tokenizer", lambda run: tiny[1])
    made = [prompt_of(kind, number) for number in range(2) for kind in KINDS]
    monkeypatch.setattr(prompts, "make_prompts", lambda split, count, seed: made if split == "train" else [])
    run = Run(settings, tmp_path / "run")
    prompts.write(run)
    return run


def sample(run: Run) -> None:
    for shard in range(SHARDS):
        triples.sample(run, str(shard))


def collect(run: Run) -> None:
    for shard in range(SHARDS):
        sae_training.collect_activations(run, str(shard))


def test_sampling_goes_on_where_it_was_stopped(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Run(run.settings, run.folder.parent / "whole")
    prompts.write(whole)
    sample(whole)
    appended: list[int] = []

    def append_twice(path: Path, records: list[dict[str, Any]]) -> None:
        appended.append(len(records))
        if len(appended) == 3:
            raise KeyboardInterrupt
        append(path, records)

    append = triples.append_lines
    monkeypatch.setattr(triples, "append_lines", append_twice)
    with pytest.raises(KeyboardInterrupt):
        sample(run)
    sample(run)
    assert appended == [16, 8, 16, 16, 8]
    for shard in range(SHARDS):
        assert run.samples(shard).read_bytes() == whole.samples(shard).read_bytes()
    made = triples.load_samples(run)
    assert list(dict.fromkeys(each.prompt_id for each in made)) == [each.id for each in prompts.load(run, "train")]
    assert len({each.seed for each in made}) == 4


def test_triples_are_what_load_preferences_reads(
    run: Run, tiny: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sample(run)
    monkeypatch.setattr(triples, "reward", lambda task, prompt, text, tokens, ended: float(len(set(text))))
    triples.write(run)
    for task in TASKS:
        rows = [json.loads(line) for line in run.triples(task).read_text().splitlines()]
        assert [row["kind"] for row in rows] == list(KINDS)
        assert len(dspa.load_preferences(run.triples(task), tiny[1])) == 6
    monkeypatch.setattr(triples, "reward", lambda *_: 0.0)
    with pytest.raises(dspa.InvalidInputError, match=r"0 triples of 6 for conditional.*sample more prompts"):
        triples.write(run)


# Fluency


def test_the_chat_template_does_not_close_an_answer_that_was_cut_off() -> None:
    written = "{% for message in messages %}" + model.CLOSED + "{% endfor %}"
    question, answer = {"role": "user", "content": "Hi."}, {"role": "assistant", "content": "Hello, I"}
    render = jinja2.Template(model.with_open_messages(written)).render
    closed = jinja2.Template(written).render(messages=[question, answer])
    assert render(messages=[question, answer, question], add_generation_prompt=True).startswith(closed)
    assert render(messages=[question, {**answer, "cut_off": False}]) + "\n" == closed
    assert render(messages=[question, {**answer, "cut_off": True}]) + "<|im_end|>\n" == closed
    with pytest.raises(dspa.DspaError, match="0 times"):
        model.with_open_messages("{{ messages }}")


def test_a_loss_is_that_of_an_answer_alone(tiny: tuple[Any, Any]) -> None:
    texts, answered = ("w9 w8", "w7", "w6 w5 w20 w21 w22"), ((9, 8, 7, 30), (), (12,))
    found = fluency.losses(*tiny, texts, answered)
    assert found[1] == 0
    for place in (0, 2):
        before = prompt_ids(tiny[1], [{"role": "user", "content": texts[place]}])
        logits = tiny[0](torch.tensor([[*before, *answered[place]]])).logits[0, len(before) - 1 : -1]
        expected = torch.nn.functional.cross_entropy(logits, torch.tensor(answered[place]))
        assert found[place] == pytest.approx(float(expected), rel=1e-4)


# SAEs


def test_the_residual_stream_is_that_of_the_kept_tokens(tiny: tuple[Any, Any]) -> None:
    texts = [Text("manuals", (1, 9, 8, 7), 1), Text("answers", (1, 6, 5, 20, 21, 22), 4)]
    found = ResidualReader(tiny[0], (0, 2)).read(texts)
    for layer, states in zip((0, 2), found, strict=True):
        rows = [
            tiny[0](torch.tensor([text.ids]), output_hidden_states=True).hidden_states[layer + 1][0, text.skipped :]
            for text in texts
        ]
        torch.testing.assert_close(states, torch.cat(rows))
    assert len(tiny[0].model.layers) == tiny_models.LAYERS


def test_a_prompt_is_trained_on_once(run: Run, tiny: tuple[Any, Any]) -> None:
    sample(run)
    texts = list(sae_training._answers(run, tiny[1]))
    by_skipped = Counter(text.skipped for text in texts)
    assert by_skipped[1] == 12
    assert sum(by_skipped.values()) == 48


@pytest.mark.long
def test_saes_are_trained_stored_and_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sae_training,
        "_manuals",
        lambda: [" ".join(f"w{5 + (7 * i * i + n) % 55}" for i in range(900)) for n in range(9)],
    )
    monkeypatch.setattr(sae_training, "TOKENS_PER_PART", 1000)
    monkeypatch.setattr(sae_training, "EPOCHS", 40)
    sample(run)
    sae_training.write_texts(run)
    collect(run)
    first = next(iter(sorted(run.activations.iterdir())))
    stamp = first.stat().st_mtime_ns
    collect(run)
    assert first.stat().st_mtime_ns == stamp
    for which in ("input", "output"):
        sae_training.train(run, which)
    sae_training.write_report(run)
    report = json.loads(run.sae_report.read_text())
    assert sum(report["tokens"].values()) >= run.settings.sae_tokens
    for folder, layer in ((run.input_sae, 1), (run.output_sae, 2)):
        sae = dspa.SparseAutoencoder.from_sae_lens(folder)
        assert (sae.d_sae, report[folder.name]["layer"]) == (64, layer)
        assert report[folder.name]["l0"] == pytest.approx(8, rel=0.5)
        assert report[folder.name]["explained_variance"] > 0.3


def test_cross_entropy_is_recovered_whole_by_a_splice_that_changes_nothing(tiny: tuple[Any, Any]) -> None:
    texts = [Text("manuals", (1, 9, 8, 7), 1), Text("answers", (1, 6, 5, 20, 21, 22), 4)]
    plain, same, zeroed = (
        sae_training._cross_entropy(tiny[0], 1, change, texts) for change in (None, torch.clone, torch.zeros_like)
    )
    assert same == plain != zeroed
    assert SaeQuality(1, 8, 0.9, 0, 2.0, 2.5, 4.0, 100, 1.0).cross_entropy_recovered == pytest.approx(0.75)
