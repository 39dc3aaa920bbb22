"""The whole method on the organism: collect, fit, steer, and measure on held-out prompts (`dspa demo`)."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dspa.errors import InvalidInputError
from dspa.kernels import EditKind
from dspa.methods.conditional_map import ConditionalDifferenceMap, GateRule
from dspa.methods.controls import lists_of_other_prompts
from dspa.methods.list_overlap import Overlap, list_sets
from dspa.methods.static_policy import StaticPolicy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.offline.collection import collect
from dspa.offline.density_store import DensityStore
from dspa.offline.preferences import load_preferences
from dspa.organism import DATA, INPUT_LAYER, OUTPUT_LAYER, load_model, sae_folder, triples_file
from dspa.organism.evaluation import (
    Estimate,
    Setting,
    measure,
    prompt_densities,
    prompt_sets,
    true_kind_lists,
)
from dspa.organism.examples import print_examples
from dspa.organism.language import KINDS, Prompt, draw_prompts
from dspa.organism.report import (
    CEILING,
    CHOSEN,
    CONTROL,
    PUBLISHED_50,
    PUBLISHED_90,
    STATIC,
    UNSTEERED,
    DemoReport,
    KindGain,
    OverlapRow,
    Row,
    draw_gains,
    print_report,
)
from dspa.sae.autoencoder import SparseAutoencoder

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

MALFORMED_ALLOWANCE = 0.05  # a setting is chosen only if it breaks at most so many more responses than unsteered


@dataclass(frozen=True)
class Candidate:
    """A setting that validation may choose."""

    gate_rule: GateRule
    edit: EditKind
    alpha: float

    def __str__(self) -> str:
        return f"{self.gate_rule}, {self.edit}, alpha {self.alpha}"


CANDIDATES = (
    Candidate("ge", "ablate", 0.2),
    Candidate("ge", "both", 0.3),
    Candidate("positive_ge", "ablate", 0.5),
    Candidate("positive_ge", "both", 0.3),
)


@dataclass(frozen=True)
class DemoOptions:
    """What the demo runs on.

    Attributes:
        data: the organism's folder.
        triples: how many of its triples are collected.
        prompts: how many held-out prompts the table is measured on.
        validation_prompts: how many validation prompts the setting is chosen on.
        seed: of prompts, sampling noise and neutral texts.
    """

    data: Path = DATA
    triples: int = 250
    prompts: int = 1080
    validation_prompts: int = 240
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Organism:
    """The organism with the densities of its triples.

    Attributes:
        model, tokenizer, input_sae, output_sae: as shipped.
        store: densities of the triples.
        triple_kinds: the kind of prompt of each triple.
    """

    model: Gemma2ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    store: DensityStore
    triple_kinds: tuple[str, ...]
    input_sae: SparseAutoencoder
    output_sae: SparseAutoencoder

    def policy(self, percentile: float, candidate: Candidate = CANDIDATES[0]) -> SteeringPolicy:
        """The published k_prompt and k_diff, with a map fitted at a gate percentile."""
        fitted = ConditionalDifferenceMap.fit(self.store, gate_percentile=percentile, gate_rule=candidate.gate_rule)
        return SteeringPolicy(fitted, self.input_sae, self.output_sae, alpha=candidate.alpha, edit=candidate.edit)


def run_demo(options: DemoOptions, console: Console, *, png: Path | None, progress: bool = True) -> DemoReport:
    """Collects, fits, steers and measures; prints examples and tables.

    Args:
        options: what to run on.
        console: where to print.
        png: where the chart of gains by kind goes; None for no chart.
        progress: whether to draw progress bars.

    Raises:
        InvalidInputError: if the organism's folder is not there, or has too few triples.
    """
    with tempfile.TemporaryDirectory() as folder:
        console.print(f"Collecting activation densities of {options.triples} preference triples and fitting the map.")
        organism = load_organism(options, Path(folder), progress)
        published = organism.policy(90)
        prompts = draw_prompts(np.random.default_rng(options.seed), "heldout", options.prompts)
        print_examples(console, organism.model, organism.tokenizer, published, prompts, options.seed)
        chosen, candidate = _choose(organism, options, progress)
        console.print(f"Chosen on {options.validation_prompts} validation prompts: {candidate}.")
        report = _measure(organism, published, chosen, str(candidate), prompts, options, progress)
    print_report(console, report)
    if png is not None:
        draw_gains(report, png)
        console.print(f"Gains by kind of prompt: {png}")
    return report


def load_organism(options: DemoOptions, folder: Path, progress: bool) -> Organism:
    """Loads the organism and collects the densities of its triples into `folder`.

    Raises:
        InvalidInputError: if the organism's folder is not there, or has too few triples.
    """
    try:
        model, tokenizer = load_model(options.data)
        saes = [SparseAutoencoder.from_sae_lens(sae_folder(which, options.data)) for which in ("input", "output")]
        file = triples_file(options.data)
    except FileNotFoundError as error:
        raise InvalidInputError(str(error)) from error
    triples = load_preferences(file, tokenizer, limit=options.triples)
    if len(triples) < options.triples:
        raise InvalidInputError(
            f"{file} has {len(triples)} triples; expected at least {options.triples}, use --triples {len(triples)}"
        )
    with file.open() as lines:
        kinds = tuple(json.loads(line)["kind"] for line, _ in zip(lines, range(options.triples), strict=False))
    store = collect(
        model,
        tokenizer,
        triples,
        input_sae=saes[0],
        output_sae=saes[1],
        input_layer=INPUT_LAYER,
        output_layer=OUTPUT_LAYER,
        out=folder / "densities",
        triples_per_shard=25,
        progress=progress,
    )
    return Organism(model, tokenizer, store, kinds, saes[0], saes[1])


def _choose(organism: Organism, options: DemoOptions, progress: bool) -> tuple[SteeringPolicy, Candidate]:
    """The candidate with the highest reward on validation prompts, among those that keep responses well-formed."""
    prompts = draw_prompts(np.random.default_rng(options.seed + 1), "validation", options.validation_prompts)
    policies = {candidate: organism.policy(90, candidate) for candidate in CANDIDATES}
    settings = [Setting(UNSTEERED, None), *(Setting(str(name), policy) for name, policy in policies.items())]
    unsteered, *measured = measure(
        organism.model,
        organism.tokenizer,
        prompts,
        settings,
        seed=options.seed + 10**6,
        neutral_texts=2,
        progress=progress,
    )
    allowed = unsteered.malformed.mean() + MALFORMED_ALLOWANCE
    pairs = list(zip(CANDIDATES, measured, strict=True))
    sound = [pair for pair in pairs if pair[1].malformed.mean() <= allowed] or pairs[:1]
    best = max(sound, key=lambda pair: pair[1].rewards.mean())[0]
    return policies[best], best


def _measure(
    organism: Organism,
    published: SteeringPolicy,
    chosen: SteeringPolicy,
    chosen_name: str,
    prompts: Sequence[Prompt],
    options: DemoOptions,
    progress: bool,
) -> DemoReport:
    median = organism.policy(50)
    densities = prompt_densities(organism.model, organism.tokenizer, prompts, published)
    lists = {PUBLISHED_50: median.select(densities), PUBLISHED_90: published.select(densities)}
    ceiling = true_kind_lists(organism.store, organism.triple_kinds, prompts, published)
    kinds = [prompt.kind for prompt in prompts]
    others = lists_of_other_prompts(lists[PUBLISHED_90], kinds, options.seed)
    settings = [
        Setting(UNSTEERED, None),
        Setting(STATIC, StaticPolicy.from_mean_difference(published)),
        Setting(PUBLISHED_50, median),
        Setting(PUBLISHED_90, published),
        Setting(CHOSEN, chosen),
        Setting(CONTROL, StaticPolicy.with_edits(published, others)),
        Setting(CEILING, StaticPolicy.with_edits(published, ceiling)),
    ]
    measured = measure(organism.model, organism.tokenizer, prompts, settings, seed=options.seed, progress=progress)
    by_name = {measurement.setting: measurement for measurement in measured}
    unsteered = by_name[UNSTEERED]
    gains = {name: by_name[name].rewards - unsteered.rewards for name in by_name}
    kind_of = np.array(kinds)
    d_sae = organism.output_sae.d_sae
    return DemoReport(
        triples=options.triples,
        prompts=len(prompts),
        chosen=chosen_name,
        rows=tuple(Row.from_measurement(measurement, unsteered) for measurement in measured),
        overlaps=(
            OverlapRow("S_prompt", Overlap.from_sets(prompt_sets(densities, published.k_prompt), kinds)),
            *(
                OverlapRow(f"edit lists, {name}", Overlap.from_sets(list_sets(edits, d_sae), kinds))
                for name, edits in lists.items()
            ),
        ),
        kinds=tuple(
            KindGain(name, kind, Estimate.from_samples(gains[name][kind_of == kind]))
            for name in (STATIC, PUBLISHED_90, CEILING)
            for kind in KINDS
        ),
        published_over_static=Estimate.from_samples(gains[PUBLISHED_90] - gains[STATIC]),
        share_of_ceiling=float(gains[PUBLISHED_90].mean() / gains[CEILING].mean()),
    )
