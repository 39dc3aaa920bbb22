"""Tuning on the organism: successive halving against the full grid, and what each choice is worth on other examples.

    python benchmarks/tuning.py --out benchmarks/results/organism/tuning.json [--examples 128] --full-grid
    python benchmarks/tuning.py --out benchmarks/results/organism/tuning.json --agreement

The policy of 250 triples; preferences drawn from held-out prompts; gates fitted again from the stored densities. A run
that was stopped goes on where it was. `--agreement` ranks the lists of the grid that was evaluated by agreement over
folds of the 250 triples, evaluates nothing, and sets the ranks beside those by gain.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

import dspa
from dspa.offline.preferences import PreferenceTriples, load_preferences
from dspa.organism.demo import DemoOptions, Organism, load_organism
from dspa.organism.language import Split, Triple, draw_prompt, draw_response, neutral_text, reward
from dspa.tuning.halving import Schedule, successive_halving
from dspa.tuning.journal import JOURNAL
from dspa.tuning.objective import Guard
from dspa.tuning.ranking import settings_to_try
from dspa.tuning.settings import PolicyMaker, TunedSetting
from dspa.util.estimate import Estimate
from dspa.util.files import write_atomically
from dspa.util.provenance import Provenance

GRID = dspa.TuningGrid(
    alpha=(0.1, 0.2, 0.4),
    edit=("ablate", "both"),
    k_prompt=(16, 32),
    k_diff=(8, 16),
    gate_percentile=(50.0, 90.0),
)


def heldout_preferences(count: int, seed: int, tokenizer: Any, split: Split = "heldout") -> PreferenceTriples:
    """As the organism's triples are drawn, with prompts of a split that it was not trained on."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    while len(rows) < count:
        prompt = draw_prompt(rng, split)
        wordings = draw_response(rng).wordings
        drawn = sorted((draw_response(rng, wordings) for _ in range(8)), key=lambda r: reward(prompt.kind, r.moves))
        if reward(prompt.kind, drawn[-1].moves) > reward(prompt.kind, drawn[0].moves):
            triple = Triple(prompt, chosen=drawn[-1], rejected=drawn[0])
            rows.append(
                {
                    "prompt": [{"role": "user", "content": triple.prompt.text}],
                    "chosen": [{"role": "assistant", "content": triple.chosen.text}],
                    "rejected": [{"role": "assistant", "content": triple.rejected.text}],
                }
            )
    return load_preferences(rows, tokenizer)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file")
    parser.add_argument("--examples", type=int, default=128, help="preferences, half of them to report on")
    parser.add_argument("--full-grid", action="store_true", help="evaluate the full grid as well")
    parser.add_argument("--first", type=int, default=2)
    parser.add_argument("--max-kl", type=float, default=0.1)
    parser.add_argument("--work", type=Path, default=Path("tuning"), help="folder of evaluations and policies")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--agreement", action="store_true", help="only rank the lists of the full grid in the file")
    options = parser.parse_args(arguments)
    record: dict[str, Any] = json.loads(options.out.read_text()) if options.out.exists() else {}
    options.work.mkdir(parents=True, exist_ok=True)
    organism = load_organism(DemoOptions(), options.work, progress=False)
    if options.agreement:
        record["agreement"] = agreement(organism, record["full grid"]["choosing"], options.seed)
        write_atomically(options.out, (json.dumps(record, indent=1) + "\n").encode())
        return
    preferences = heldout_preferences(options.examples, options.seed + 11, organism.tokenizer)
    rng = np.random.default_rng(options.seed + 12)
    texts = [neutral_text(rng, "heldout", sentences=8) for _ in range(options.examples)]
    for name in ("halving", *(("full grid",) if options.full_grid else ())):
        report = dspa.tune(
            organism.model,
            organism.tokenizer,
            organism.policy(90),
            preferences,
            out=options.work / name.replace(" ", "-"),
            grid=GRID,
            densities=organism.store,
            neutral=texts,
            options=dspa.TuningOptions(
                guard=Guard(max_kl=options.max_kl),
                first=options.first,
                full_grid=name == "full grid",
                rank=False,
                seed=options.seed,
            ),
        )
        print(f"{name}: {report.cost} of {report.full_grid_cost} evaluations; {report.why}", flush=True)
        for row in report.reported:
            print(f"  {row.setting}: {row.gain}, KL {row.kl}", flush=True)
        record[name] = asdict(report)
        record["provenance"] = asdict(Provenance.here())
        write_atomically(options.out, (json.dumps(record, indent=1) + "\n").encode())
    if options.full_grid:
        record["replayed"] = replayed(options.work, options.first)
        print(f"replayed in other orders: {record['replayed']}")
        record["difference"] = differences(options.work, record)
        for part, found in record["difference"].items():
            print(f"the halving's choice minus the full grid's, {part}: {found}")
        write_atomically(options.out, (json.dumps(record, indent=1) + "\n").encode())


def agreement(organism: Organism, evaluated: Sequence[dict[str, Any]], seed: int) -> dict[str, Any]:
    """The ranking of the grid's lists, of ridge's beside them, the gains of those that were evaluated, and Spearman's
    correlation of agreement and gain for each strength and edit."""
    started = time.perf_counter()
    maker = PolicyMaker(organism.policy(90), organism.store)
    _, ranking, why = settings_to_try(GRID, maker, rank=True, folds=5, tries=None, seed=seed)
    if ranking is None:
        raise SystemExit(why)
    seconds = time.perf_counter() - started
    gains = {TunedSetting(**row["setting"]): row["gain"]["mean"] for row in evaluated}
    correlations: dict[str, float] = {}
    for alpha in GRID.alpha or ():
        for edit in GRID.edit or ():
            pairs = [
                (row.agreement.mean, gain)
                for row in ranking.rows
                for setting, gain in gains.items()
                if row.agreement is not None and setting.lists == row.lists
                if (setting.alpha, setting.edit) == (alpha, edit)
            ]
            first, second = (np.argsort(np.argsort(values)) for values in zip(*pairs, strict=True))
            correlations[f"{edit}, alpha {alpha}"] = float(np.corrcoef(first, second)[0, 1])
    for row in ranking.rows:
        own = [f"{gain:+.4f}" for setting, gain in gains.items() if setting.lists == row.lists]
        print(f"{row.lists}: {row.agreement}, folds {row.spread:.4f}, gains {' '.join(own)}")
    print(f"{seconds:.1f} s; correlation of ranks: {correlations}")
    return {"ranking": asdict(ranking), "seconds": seconds, "correlation of ranks": correlations}


def replayed(work: Path, first: int, orders: int = 200) -> dict[str, float]:
    """The halving on the full grid's evaluations, with the examples in other orders: how often its choice lies within
    the 95 % interval of the best of the grid (paired, on all examples), and how much gain it gives away on average."""
    lines = (work / "full-grid" / JOURNAL).read_text().splitlines()[1:]
    rows = [line["values"] for line in map(json.loads, lines) if line["setting"].startswith("choose: ")]
    gains = np.array([row["margin"] for row in rows])
    best = int(gains.mean(axis=1).argmax())
    schedule = Schedule.of(len(gains), gains.shape[1], first=first, keep=0.25)
    within, lost = 0, 0.0
    for seed in range(orders):
        order = np.random.default_rng(seed).permutation(gains.shape[1])
        reached: dict[int, int] = {}

        def evaluate(arm: int, start: int, stop: int, reached: dict[int, int] = reached) -> None:
            reached[arm] = stop

        def rank(arms: Sequence[int], order: Any = order, reached: dict[int, int] = reached) -> list[int]:
            return sorted(arms, key=lambda arm: -float(gains[arm, order[: reached[arm]]].mean()))

        chosen = successive_halving(range(len(gains)), schedule, evaluate, rank)[-1].ranked[0]
        shortfall = Estimate.from_samples(gains[best] - gains[chosen])
        within += not shortfall.excludes(0)
        lost += shortfall.mean / orders
    return {"orders": orders, "within": within / orders, "lost": lost, "best": float(gains[best].mean())}


def differences(work: Path, record: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Gain of the halving's choice minus that of the full grid's, example by example: on the examples of the choice,
    and on those of the report."""
    found = {}
    for part in ("choose", "report"):
        gains = []
        for name in ("halving", "full grid"):
            setting = TunedSetting(**record[name]["chosen"])
            lines = (work / name.replace(" ", "-") / JOURNAL).read_text().splitlines()[1:]
            own = [line for line in map(json.loads, lines) if line["setting"] == f"{part}: {setting}"]
            gains.append(
                np.concatenate([line["values"]["margin"] for line in sorted(own, key=lambda line: line["start"])])
            )
        found[part] = asdict(Estimate.from_samples(gains[0] - gains[1]))
    return found


if __name__ == "__main__":
    main()
