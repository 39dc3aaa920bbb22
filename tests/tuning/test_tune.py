"""Tuning on a tiny model: gains and damage against a naive loop, the split, the guard, and going on."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_collection as tiny
import torch
from naive_generation import naive_lists, naive_logits
from tiny_models import BOS, VOCAB, prompts, tiny_model, tiny_policy, tiny_tokenizer
from torch import Tensor

import dspa
from dspa import ConditionalDifferenceMap, SteeringPolicy, TuningGrid, TuningOptions
from dspa.errors import InvalidInputError, MismatchError
from dspa.offline.density_store import DensityShard, DensityStore, SparseCounts
from dspa.offline.triples import PreferenceTriple, PreferenceTriples
from dspa.online.steering import steer
from dspa.tuning.examples import distinct, neutral_rows, split_examples
from dspa.tuning.identity import reward_digest, run_record
from dspa.tuning.journal import JOURNAL, Journal
from dspa.tuning.objective import Guard, Objective
from dspa.tuning.report import TuningReport, pareto_front
from dspa.tuning.scoring import ResponseScorer
from dspa.tuning.settings import TunedSetting

MODEL: Any = tiny_model("llama")
TOKENIZER: Any = tiny_tokenizer()
POLICY = tiny_policy(MODEL, k_diff=4)
GRID = TuningGrid(alpha=(0.0, 0.2, 0.9), edit=("ablate", "both"), k_diff=None)


def triples_of(count: int) -> PreferenceTriples:
    generator = torch.Generator().manual_seed(9)

    def response(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(5, VOCAB, (length,), generator=generator).tolist())

    rows = [
        PreferenceTriple(tuple(prompt), response(3 + index % 3), response(2 + index % 4), 2, 2, f"row {index}")
        for index, prompt in enumerate(prompts(tuple(3 + index % 4 for index in range(count))))
    ]
    return PreferenceTriples(tuple(rows), (BOS,))


TRIPLES = triples_of(16)


def naive_logprobs(policy: SteeringPolicy | None, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """`[response tokens, vocabulary]`, one sequence at a time."""
    ids = [*prompt, *response]
    if policy is None:
        with torch.no_grad():
            logits = MODEL(torch.tensor([ids]), use_cache=False).logits[0]
    else:
        logits = naive_logits(MODEL, policy, list(prompt), ids, naive_lists(MODEL, policy, list(prompt)))
    return logits[len(prompt) - 1 : -1].double().log_softmax(dim=-1)


def naive_mean(policy: SteeringPolicy | None, prompt: Sequence[int], response: Sequence[int]) -> float:
    return float(naive_logprobs(policy, prompt, response)[range(len(response)), list(response)].mean())


def objective(**changes: Any) -> Objective:
    options: dict[str, Any] = {"margin": True, "reward": None, "max_new_tokens": 5, "seed": 0, "rows_at_once": 4}
    options |= changes
    scorer = ResponseScorer(MODEL, options["rows_at_once"])
    return Objective(MODEL, TOKENIZER, scorer, list(TRIPLES), [(t.prompt, t.chosen) for t in TRIPLES], **options)


@pytest.mark.parametrize("rows_at_once", [1, 3, 32])
def test_margins_are_those_of_a_naive_loop(rows_at_once: int) -> None:
    found = objective(rows_at_once=rows_at_once).gains(POLICY, 2, 7)["margin"]
    for value, triple in zip(found, TRIPLES[2:7], strict=True):
        steered, plain = (
            naive_mean(policy, triple.prompt, triple.chosen) - naive_mean(policy, triple.prompt, triple.rejected)
            for policy in (POLICY, None)
        )
        assert value == pytest.approx(steered - plain, abs=1e-9)
    assert np.abs(found).max() > 1e-3


def test_damage_is_that_of_a_naive_loop() -> None:
    found = objective().damage(POLICY, 0, 6)
    for kl, loss, triple in zip(found["kl"], found["loss"], TRIPLES[:6], strict=True):
        before, after = (naive_logprobs(policy, triple.prompt, triple.chosen) for policy in (None, POLICY))
        assert kl == pytest.approx(float((before.exp() * (before - after)).sum(dim=-1).mean()), abs=1e-9)
        expected = naive_mean(None, triple.prompt, triple.chosen) - naive_mean(POLICY, triple.prompt, triple.chosen)
        assert loss == pytest.approx(expected, abs=1e-9)
    assert found["kl"].min() >= 0
    assert found["kl"].max() > 1e-3
    assert len(objective().damage(POLICY, 14, 40)["kl"]) == 2  # there are no more texts


def test_a_reward_is_computed_of_prompts_and_responses_with_the_same_noise() -> None:
    seen: list[tuple[str, str]] = []

    def reward(prompt: str, response: str) -> float:
        seen.append((prompt, response))
        return float(len(set(response)) + len(prompt))

    gains = objective(margin=False, reward=reward).gains(POLICY, 0, 8)["reward"]
    steered, unsteered = seen[:8], seen[8:]
    assert [prompt for prompt, _ in steered] == [TOKENIZER.decode(t.prompt[1:]) for t in TRIPLES[:8]]
    assert [prompt for prompt, _ in unsteered] == [prompt for prompt, _ in steered]
    assert gains.tolist() == [
        float(len(set(a)) - len(set(b))) for (_, a), (_, b) in zip(steered, unsteered, strict=True)
    ]
    assert steered != unsteered
    seen.clear()
    without_edit = objective(margin=False, reward=reward).gains(POLICY.with_options(alpha=0), 0, 8)["reward"]
    assert not without_edit.any()
    assert seen == [*unsteered, *unsteered]


def run_tuning(out: Path, **changes: Any) -> TuningReport:
    arguments: dict[str, Any] = {
        "grid": GRID,
        "options": TuningOptions(guard=Guard(max_kl=100, max_perplexity=100), first=2, rows_at_once=8),
    }
    return dspa.tune(MODEL, TOKENIZER, POLICY, TRIPLES, out=out, **(arguments | changes))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TuningReport]:
    out = tmp_path_factory.mktemp("tuned")
    return out, run_tuning(out)


@pytest.fixture(scope="module")
def gridded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TuningReport]:
    out = tmp_path_factory.mktemp("gridded")
    return out, run_tuning(out, options=TuningOptions(guard=Guard(100, 100), full_grid=True))


def halves(out: Path, part: str) -> dict[str, dict[str, list[float]]]:
    """By setting, everything that the journal has of a part, in the order of examples."""
    found: dict[str, dict[str, list[float]]] = {}
    for line in (out / JOURNAL).read_text().splitlines()[1:]:
        record = json.loads(line)
        if record["setting"].startswith(f"{part}: "):
            values = found.setdefault(record["setting"].removeprefix(f"{part}: "), {})
            for name, numbers in record["values"].items():
                values.setdefault(name, []).extend(numbers)
    return found


def test_the_full_grid_chooses_the_largest_mean(gridded: tuple[Path, TuningReport]) -> None:
    out, report = gridded
    values = halves(out, "choose")
    assert len(values) == len(report.choosing) == 6
    assert all(row.examples == report.choosing_examples == 8 for row in report.choosing)
    best = max(values, key=lambda name: float(np.mean(values[name]["margin"])))
    assert str(report.chosen) == best
    assert report.cost == report.full_grid_cost == 6 * 8


def test_what_is_reported_was_not_seen_by_the_choice(tuned: tuple[Path, TuningReport]) -> None:
    out, report = tuned
    margins = {
        (triple.prompt, triple.chosen): naive_mean(policy, triple.prompt, triple.chosen)
        - naive_mean(policy, triple.prompt, triple.rejected)
        - naive_mean(None, triple.prompt, triple.chosen)
        + naive_mean(None, triple.prompt, triple.rejected)
        for policy in [SteeringPolicy.from_pretrained(out / "policy")]
        for triple in TRIPLES
    }
    chosen, reported = (halves(out, part)[str(report.chosen)]["margin"] for part in ("choose", "report"))
    assert sorted([*chosen, *reported]) == pytest.approx(sorted(margins.values()), abs=1e-9)
    assert len(chosen) == len(reported) == 8
    assert report.reported[0].setting == report.chosen
    assert report.reported[0].gain.mean == pytest.approx(np.mean(reported))
    assert report.reported[1].setting == TunedSetting.of_policy(POLICY)


def test_the_chosen_policy_is_written_with_the_reason(tuned: tuple[Path, TuningReport]) -> None:
    out, report = tuned
    made = SteeringPolicy.from_pretrained(out / "policy")
    assert TunedSetting.of_policy(made) == report.chosen
    assert made.changes[-1] == f"chosen by tuning: {report.why}"
    assert str(report.chosen) in report.why
    assert "the largest gain" in (out / "policy" / "README.md").read_text()
    assert json.loads((out / "tuning.json").read_text())["why"] == report.why
    assert (out / "pareto.png").read_bytes().startswith(b"\x89PNG")
    assert report.cost < report.full_grid_cost


def test_it_goes_on_where_it_was_and_comes_to_the_same(
    tuned: tuple[Path, TuningReport], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the middle: what was evaluated is not evaluated again."""
    lines = (tuned[0] / JOURNAL).read_text().splitlines(keepends=True)
    (tmp_path / JOURNAL).write_text("".join(lines[:4]))
    calls: list[int] = []
    gains = Objective.gains
    monkeypatch.setattr(Objective, "gains", lambda self, *a: (calls.append(1), gains(self, *a))[1])
    assert run_tuning(tmp_path) == tuned[1]
    assert len(calls) == len(lines) - 4
    with pytest.raises(MismatchError, match="another tuning"):
        run_tuning(tmp_path, options=TuningOptions(seed=1))


def test_the_guard_keeps_what_damages_from_being_chosen(gridded: tuple[Path, TuningReport], tmp_path: Path) -> None:
    """The choice under a guard that refuses the best: the best of the others, from the same evaluations."""
    shutil.copy(gridded[0] / JOURNAL, tmp_path)
    best = next(row for row in gridded[1].choosing if row.setting == gridded[1].chosen)
    limit = best.kl.mean * 0.99
    report = run_tuning(tmp_path, options=TuningOptions(full_grid=True, guard=Guard(limit, 100)))
    assert report.chosen != best.setting
    allowed = [row for row in report.choosing if row.kl.mean <= limit]
    assert allowed == [row for row in report.choosing if row.allowed]
    assert max(allowed, key=lambda row: row.gain.mean).setting == report.chosen
    grid = replace(GRID, alpha=(0.9,))
    with pytest.raises(InvalidInputError, match="no setting keeps the guard"):
        run_tuning(tmp_path, grid=grid, options=TuningOptions(guard=Guard(max_kl=0.0)))


def test_the_front_is_what_no_other_beats_in_both(tuned: tuple[Path, TuningReport]) -> None:
    rows = tuned[1].choosing
    front = pareto_front(rows)
    for row in rows:
        beaten = any(o.kl.mean <= row.kl.mean and o.gain.mean > row.gain.mean for o in rows)
        assert not (beaten and row in front)
    assert max(rows, key=lambda row: row.gain.mean).gain.mean == front[-1].gain.mean


def test_neutral_texts_are_cut_into_prompt_and_rest() -> None:
    words = [" ".join(["w9"] * length) for length in (4, 40, 400)]
    with pytest.warns(UserWarning, match="2 of 4 neutral texts were left out: 1 have fewer than 8 tokens, 1 are there"):
        rows = neutral_rows([*words, words[1]], TOKENIZER)
    assert [(len(prompt), len(rest)) for prompt, rest in rows] == [(10, 30), (32, 224)]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"options": TuningOptions(margin=False)}, "nothing to maximise"),
        ({"preferences": TRIPLES[:5]}, "leave 3 to choose on and 2 to report on"),
        ({"grid": TuningGrid(gate_rule=("positive_ge",))}, "needs another map"),
        ({"grid": TuningGrid(alpha=(-1.0,))}, "alpha is -1.0"),
        ({"neutral": ["w9 w9"] * 3}, "all 3 neutral texts have fewer than 8 tokens"),
        ({"neutral": ["w9 " * 9, "w8 " * 9]}, "2 neutral texts leave 1 to choose on and 1 to report on"),
        ({"neutral": "w9 w9"}, "neutral is str"),
        ({"reward": lambda prompt, response: math.nan}, "is nan; expected a finite number"),
        ({"reward": lambda prompt, response: None}, "is None; expected a finite number"),
        ({"reward": lambda prompt, response: {}[response]}, "the reward failed on .* with KeyError"),
    ],
)
def test_what_cannot_be_tuned_is_refused(changes: Any, words: str, tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"preferences": TRIPLES, "grid": GRID} | changes
    with pytest.raises(InvalidInputError, match=words):
        dspa.tune(MODEL, TOKENIZER, POLICY, out=tmp_path, **arguments)
    assert not (tmp_path / "policy").exists()
    assert "reward" in changes or not (tmp_path / JOURNAL).exists()


def test_a_policy_without_settings_is_refused(tmp_path: Path) -> None:
    policy: Any = object()
    with pytest.raises(InvalidInputError, match="expected a SteeringPolicy"):
        dspa.tune(MODEL, TOKENIZER, policy, TRIPLES, out=tmp_path)


def other_weights() -> Any:
    model: Any = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(1.01)
    return model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"policy": POLICY.only([*range(29), 40])}, "policy differ"),
        ({"policy": POLICY.scaled({3: 2.0})}, "policy differ"),
        ({"model": other_weights()}, "model weights differ"),
        ({"triples": TRIPLES[:15]}, "preferences differ"),
        ({"texts": [((1, 2), (3, 4))]}, "neutral texts differ"),
        ({"reward": lambda prompt, response: -1.0}, "reward differ"),
        ({"options": {"seed": 1}}, "options differ"),
    ],
)
def test_a_journal_is_not_continued_with_other_input(changes: dict[str, Any], words: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": MODEL, "policy": POLICY.only(range(30)), "triples": TRIPLES}
    given |= {"texts": [], "reward": lambda prompt, response: 1.0, "options": {"seed": 0}}
    Journal(tmp_path, run_record(**given))
    Journal(tmp_path, run_record(**{**given, "model": tiny_model("llama")}))
    with pytest.raises(MismatchError, match=words):
        Journal(tmp_path, run_record(**{**given, **changes}))


def test_a_reward_is_known_by_its_source_and_what_that_names() -> None:
    def reward_of(factor: float) -> Any:
        return lambda prompt, response: factor * len(response)

    assert reward_digest(reward_of(1.0)) == reward_digest(reward_of(1.0)) != reward_digest(reward_of(2.0))
    unreadable: Any = max
    assert reward_digest(unreadable) != reward_digest(unreadable)


def test_every_neutral_text_is_looked_at() -> None:
    texts = [((1, 2), (index + 5,)) for index in range(30)]
    made = Objective(MODEL, TOKENIZER, ResponseScorer(MODEL, 32), list(TRIPLES)[:8], texts, True, None, 5, 0, 4)
    ranges = [(0, 2), (2, 5), (5, 8)]
    parts = [made.damage(POLICY, *each)["kl"] for each in ranges]
    assert [len(part) for part in parts] == [8, 11, 11]
    assert np.concatenate(parts).tolist() == pytest.approx(ResponseScorer(MODEL, 32).damage(texts, POLICY).kl.tolist())
    made.texts = texts[:3]
    assert [len(made.damage(POLICY, *each)["kl"]) for each in ranges] == [2, 0, 1]


@pytest.mark.parametrize("seed", range(5))
def test_preferences_of_one_prompt_stay_together(seed: int) -> None:
    rows = [replace(triple, prompt=TRIPLES[index % 5].prompt) for index, triple in enumerate(TRIPLES)]
    choosing, reporting = split_examples(rows, [], 0.5, np.random.default_rng(seed))
    assert not {triple.prompt for triple in choosing.triples} & {triple.prompt for triple in reporting.triples}
    assert len(choosing.triples) + len(reporting.triples) == 16
    with pytest.warns(UserWarning, match="16 of 32 preferences repeat an earlier one"):
        assert distinct([*TRIPLES, *TRIPLES]) == list(TRIPLES)


def test_a_choice_that_gains_nothing_says_so(tmp_path: Path) -> None:
    report = run_tuning(tmp_path, grid=replace(GRID, alpha=(0.0,), edit=("both",)))
    assert "that is no gain" in report.why


def test_a_steered_model_is_refused(tmp_path: Path) -> None:
    with steer(MODEL, POLICY), pytest.raises(InvalidInputError, match="the model is steered"):
        run_tuning(tmp_path)


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> tuple[DensityStore, SteeringPolicy]:
    """Densities of 12 triples, and a policy from them."""
    like = POLICY.conditional_map.run
    densities = tiny.random_densities(12, like.d_sae_in, like.d_sae_out, 5, (3, 5, 7))
    parts = (densities.prompt, densities.chosen, densities.rejected)
    run = replace(like, triple_count=12, triples_per_shard=12)
    store = DensityStore.create_or_resume(tmp_path_factory.mktemp("densities"), run)
    counts = [SparseCounts.from_dense(torch.from_numpy(p.counts), torch.from_numpy(p.tokens)) for p in parts]
    store = store.append(DensityShard(*counts), 0)
    fitted = ConditionalDifferenceMap.fit(store, entries_per_side=4)
    return store, replace(POLICY, conditional_map=fitted)


def test_lists_that_agree_are_tried_and_the_report_says_so(
    ranked: tuple[DensityStore, SteeringPolicy], tmp_path: Path
) -> None:
    store, policy = ranked
    grid = replace(GRID, k_diff=(2, 4), gate_rule=("ge", "positive_ge"), entries_per_side=(3, 8))
    options: dict[str, Any] = {"guard": Guard(100, 100), "first": 2, "rows_at_once": 8, "folds": 3}

    def run(out: str, **changes: Any) -> TuningReport:
        made = TuningOptions(**options | changes)
        return dspa.tune(
            MODEL, TOKENIZER, policy, TRIPLES, out=tmp_path / out, grid=grid, densities=store, options=made
        )

    report = run("tuned", tries=7)
    assert report.ranking is not None
    assert report.why_not_ranked == ""
    assert len(report.choosing) == 6
    kept = {row.lists for row in report.ranking.rows if row.tried}
    assert {row.setting.lists for row in report.choosing} == kept
    assert len(kept) == 2
    for edit in ("ablate", "both"):
        of_edit = [row for row in report.ranking.rows if row.lists.edit == edit]
        assert len(of_edit) == 2 * (2 * 2 + 2)  # k_diff, and rules with entries, or entries
        assert of_edit[0].tried
        assert of_edit[0].agreement is not None
        assert all(row.agreement.mean <= of_edit[0].agreement.mean for row in of_edit if row.agreement)
    record = json.loads((tmp_path / "tuned" / "tuning.json").read_text())["ranking"]
    assert (record["folds"], record["triples"], len(record["rows"])) == (3, 12, 24)
    assert all(len(row["by_fold"]) == 3 and row["agreement"] and row["behind"] for row in record["rows"])
    assert "agreement over 3 folds of 12 triples puts first, 2 of 24" in report.why
    made = SteeringPolicy.from_pretrained(tmp_path / "tuned" / "policy")
    assert TunedSetting.of_policy(made) == report.chosen
    assert made.conditional_map.options.estimator == report.chosen.estimator
    assert run("tuned", tries=7) == report
    titles = [table.title for table in report.tables()]
    assert titles[-1] == "Agreement over 3 folds of the 12 triples that the policy was fitted from"


def test_without_a_ranking_the_report_says_why(tuned: tuple[Path, TuningReport]) -> None:
    report = tuned[1]
    assert (report.ranking, report.why_not_ranked) == (None, "no densities were passed")
    assert "agreement" not in report.why


@pytest.mark.parametrize(
    "changes",
    [{"folds": 1}, {"tries": 0}, {"rank": 1}, {"keep": 0.0}, {"report_share": 1.0}, {"first": 0}, {"rows_at_once": 0}],
)
def test_options_are_checked(changes: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(changes))):
        TuningOptions(**changes)
