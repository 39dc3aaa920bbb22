"""`dspa.tune`: the settings of a policy that gain most on held-out preferences without damage elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from dspa.errors import InvalidInputError
from dspa.methods.steering_policy import SteeringPolicy
from dspa.offline.density_store import DensityStore
from dspa.offline.triples import PreferenceTriple, PreferenceTriples
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.transformers_model import is_steered
from dspa.tuning.examples import distinct, neutral_rows, split_examples
from dspa.tuning.halving import Schedule, successive_halving
from dspa.tuning.identity import run_record
from dspa.tuning.journal import Journal
from dspa.tuning.objective import Guard, Objective, Reward
from dspa.tuning.ranking import AgreementRanking, settings_to_try
from dspa.tuning.report import TunedRow, TuningReport
from dspa.tuning.scoring import ResponseScorer, Row
from dspa.tuning.search import Search
from dspa.tuning.settings import PolicyMaker, TunedSetting, TuningGrid
from dspa.util.estimate import Estimate
from dspa.util.files import write_atomically
from dspa.util.scalars import check_integer, check_number, check_switch


@dataclass(frozen=True)
class TuningOptions:
    """How `dspa.tune` searches.

    Attributes:
        margin: whether the preference margin is part of the objective: the mean log-probability of the chosen minus
            that of the rejected response, steered minus unsteered, in nats per token.
        guard: what a setting may do to neutral text.
        report_share: the part of the preferences and texts that the choice does not see.
        first: on how many examples every setting is evaluated, at most.
        keep: which part of the settings goes on from one rung of the halving to the next.
        full_grid: evaluate every setting on all examples instead.
        rank: whether agreement over folds of the triples says which lists are tried, where densities are passed.
        folds: into how many parts the triples are divided for that.
        tries: how many settings are tried at most; None for as many as the grid has without the fields that are ranked
            only.
        max_new_tokens: of the responses that a reward is computed of.
        rows_at_once: rows of a batch.
        seed: of the split, the order of examples and the sampling noise.

    Raises:
        InvalidInputError: for a value out of range.
    """

    margin: bool = True
    guard: Guard = field(default_factory=Guard)
    report_share: float = 0.5
    first: int = 8
    keep: float = 0.25
    full_grid: bool = False
    rank: bool = True
    folds: int = 5
    tries: int | None = None
    max_new_tokens: int = 128
    rows_at_once: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("report_share", self.report_share, 0.05, 0.95)
        check_number("keep", self.keep, 0.01, 0.9)
        check_integer("first", self.first, 2)  # of one there is no interval
        check_integer("folds", self.folds, 2)
        check_switch("rank", self.rank)
        if self.tries is not None:
            check_integer("tries", self.tries, 1)
        for name in ("max_new_tokens", "rows_at_once"):
            check_integer(name, getattr(self, name), 1)
        check_integer("seed", self.seed, 0)


def tune(
    model: nn.Module,
    tokenizer: Any,
    policy: SteeringPolicy,
    preferences: PreferenceTriples | Sequence[PreferenceTriple],
    *,
    out: str | Path,
    grid: TuningGrid | None = None,
    densities: DensityStore | str | Path | None = None,
    output_sae: SparseAutoencoder | None = None,
    reward: Reward | None = None,
    neutral: Sequence[str] = (),
    options: TuningOptions | None = None,
    progress: bool = False,
) -> TuningReport:
    """Chooses the settings of a policy on one part of held-out preferences, and measures the choice on the other.

    With `densities`, lists come first: every way to make them (estimator, gates, `k_prompt`, `k_diff`) is ranked by its
    agreement with triples that the map was not fitted from, without the model, and strengths and edits are tried with
    the best. There are as many tries as the grid has without the fields that are ranked only.

    The gain of a setting is what it adds to the unsteered model's preference margin, to a user's reward, or to the sum
    of both. Settings that do more to neutral text than the guard allows are not chosen. Successive halving evaluates
    all settings on a few examples, the better part of them on more, and the last few on all, every setting on the same
    examples with the same sampling noise. Where the last ones break the guard, dropped ones are taken up again. Other
    gates are fitted again from stored densities, without the model.

    Writes to `out`: `policy/`, the chosen policy, whose card says how it was chosen; `tuning.json`; `pareto.png` where
    matplotlib is installed; `evaluations.jsonl`, by which an interrupted tuning goes on.

    Args:
        model: the model, not steered at the moment.
        tokenizer: its tokenizer.
        policy: where to start from.
        preferences: triples that the policy was not fitted from.
        out: the folder.
        grid: what to try; `TuningGrid()` if None.
        densities: what the policy's map was fitted from, or its folder; needed for other maps and for the ranking.
        output_sae: the whole output SAE, where the policy was saved with some decoder rows and others are needed.
        reward: a function of a prompt's text and a response's text.
        neutral: texts on which steering should change nothing; without them, the guard looks at the preferences'
            own responses.
        options: how to search; `TuningOptions()` if None.
        progress: whether to draw a progress bar.

    Raises:
        InvalidInputError: if there are too few examples, nothing to maximise, an option out of range, a reward that
            fails or is not finite, gates to fit again for a merged policy, tries without a ranking, or no setting that
            the guard allows.
        MismatchError: if parts do not belong together, or `out` holds another tuning.
    """
    options, grid = options or TuningOptions(), grid or TuningGrid()
    if not isinstance(policy, SteeringPolicy):
        raise InvalidInputError(
            f"the policy is a {type(policy).__name__}; expected a SteeringPolicy, which has settings"
        )
    if is_steered(model):
        raise InvalidInputError("the model is steered; call remove() on its steering before tuning")
    if not options.margin and reward is None:
        raise InvalidInputError("there is nothing to maximise; pass a reward, or leave the margin on")
    policy.model.check(model)
    given = PreferenceTriples.from_any(preferences if isinstance(preferences, PreferenceTriples) else [*preferences])
    triples = distinct(list(given))
    texts = neutral_rows(neutral, tokenizer)
    store = densities if isinstance(densities, DensityStore) or densities is None else DensityStore.open(densities)
    maker = PolicyMaker(policy, store, output_sae)
    settings, ranking, why_not = settings_to_try(
        grid, maker, rank=options.rank, folds=options.folds, tries=options.tries, seed=options.seed
    )
    choosing, reporting = split_examples(triples, texts, options.report_share, np.random.default_rng(options.seed))
    journal = Journal(out, run_record(model, maker.policy, triples, texts, reward, asdict(options)))
    scorer = ResponseScorer(model, options.rows_at_once)

    def objective(examples: list[PreferenceTriple], rows: Sequence[Row], noise: int) -> Objective:
        new_tokens, at_once = options.max_new_tokens, options.rows_at_once
        return Objective(model, tokenizer, scorer, examples, rows, options.margin, reward, new_tokens, noise, at_once)

    search = Search(objective(choosing.triples, choosing.texts, options.seed), maker, journal, "choose", options.guard)
    total = len(choosing.triples)
    schedule = Schedule.of(len(settings), total, first=options.first, keep=options.keep)
    if options.full_grid:
        schedule = Schedule((len(settings),), (total,))
    with _progress(schedule.cost, progress) as advance:

        def evaluate(setting: TunedSetting, start: int, stop: int) -> None:
            search.evaluate(setting, start, stop)
            advance(stop - start)

        rungs = successive_halving(settings, schedule, evaluate, search.ranked)
        best, dropped = rungs[-1].ranked[0], False
        if not search.row(best).allowed:
            found = search.take_up_again(rungs, evaluate)
            best, dropped = found or best, found is not None
    rows = [search.row(setting) for setting in settings]
    if not search.row(best).allowed:
        least = min(rows, key=lambda row: row.kl.mean)
        raise InvalidInputError(
            f"no setting keeps the guard (KL at most {options.guard.max_kl:g}, perplexity at most "
            f"{options.guard.max_perplexity:g} times); the least KL is {least.kl.mean:.3g}, of {least.setting}; allow "
            "more, or try smaller alphas"
        )
    judge = Search(
        objective(reporting.triples, reporting.texts, options.seed + 10**6), maker, journal, "report", options.guard
    )
    reported: list[TunedRow] = []
    for setting in dict.fromkeys((best, TunedSetting.of_policy(policy))):
        judge.evaluate(setting, 0, len(reporting.triples))
        reported.append(judge.row(setting))
    whole = [setting for setting in settings if search.examples[setting] == total]
    why = _reason(search, search.ranked(whole), best, len(settings), total, options) + _of_ranking(ranking)
    if dropped:
        why += (
            "; those that the halving kept broke the guard in the end, and it is the first of the others that does not"
        )
    report = TuningReport(
        chosen=best,
        why=why,
        guard=options.guard,
        choosing=tuple(rows),
        reported=tuple(reported),
        choosing_examples=total,
        reporting_examples=len(reporting.triples),
        cost=search.cost,
        full_grid_cost=len(settings) * total,
        ranking=ranking,
        why_not_ranked=why_not,
    )
    folder = Path(out)
    made = maker.policy_of(best)
    replace(made, changes=(*made.changes, f"chosen by tuning: {why}")).save_pretrained(folder / "policy")
    write_atomically(folder / "tuning.json", report.to_json().encode())
    report.draw(folder / "pareto.png")
    return report


def _reason(
    search: Search,
    finalists: Sequence[TunedSetting],
    best: TunedSetting,
    settings: int,
    examples: int,
    options: TuningOptions,
) -> str:
    row = search.row(best)
    text = (
        f"{best}: the largest gain, {row.gain.mean:+.4f} ± {row.gain.half_width:.4f} on {examples} examples, of "
        f"{settings} settings with KL at most {options.guard.max_kl:g} and perplexity at most "
        f"{options.guard.max_perplexity:g} times"
    )
    if row.gain.mean <= 0:
        text += "; that is no gain: leave the model unsteered, or try other settings"
    others = [setting for setting in finalists if setting != best]
    if others:
        ahead = Estimate.from_samples(search.difference(best, others[0]))
        text += f"; {ahead.mean:+.4f} ± {ahead.half_width:.4f} over the next, {others[0]}"
    return text


def _of_ranking(ranking: AgreementRanking | None) -> str:
    if ranking is None:
        return ""
    return (
        f"; lists were tried that agreement over {ranking.folds} folds of {ranking.triples} triples puts first, "
        f"{sum(row.tried for row in ranking.rows)} of {len(ranking.rows)}"
    )


class _progress:  # noqa: N801  a context manager
    """A bar over examples; calling it advances the bar."""

    def __init__(self, total: int, enabled: bool) -> None:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), disable=not enabled)
        self._task = self._bar.add_task("Tuning (examples)", total=total)

    def __enter__(self) -> Callable[[int], None]:
        self._bar.start()
        return lambda steps: self._bar.advance(self._task, steps)

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
