"""On the organism: what steering gains, what it reads, and what collecting costs beside the plain three passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch
from interleaved import Way, timed
from organism_runs import Collection
from peak_memory import STATUS, peak_column
from record import Record

import dspa
from dspa.bench.measurements import Column, Interval
from dspa.kernels import StepMode, available
from dspa.kernels.token_step import StepWork, work_of
from dspa.organism.demo import Organism
from dspa.organism.evaluation import Estimate, Setting, measure, prompt_batch
from dspa.organism.language import draw_prompts

GROUP = "organism"
GAIN_PROMPTS = 480
WORK_PROMPTS = 12
NEW_TOKENS = 48
PLAIN = "three whole passes, batched"


def test_preference_gain(loaded: Organism, record: Record) -> None:
    """Published setting, percentile 90, over unsteered; the seeds of `dspa demo`, which has more prompts."""

    def run() -> tuple[Column, ...]:
        prompts = draw_prompts(np.random.default_rng(0), "heldout", GAIN_PROMPTS)
        settings = [Setting("unsteered", None), Setting("steered", loaded.policy(90))]
        unsteered, steered = measure(loaded.model, loaded.tokenizer, prompts, settings, seed=0, neutral_texts=2)
        gain = Estimate.from_samples(steered.rewards - unsteered.rewards)
        slower = unsteered.tokens_per_second / steered.tokens_per_second
        interval = Interval(gain.mean, gain.mean - gain.half_width, gain.mean + gain.half_width)
        return (
            Column("gain over unsteered", "reward", interval, better="higher"),
            Column(
                "time of a batch, steered / unsteered", "x", Interval.around_median(slower.tolist()), rounds=len(slower)
            ),
        )

    record("preference gain, percentile 90", GROUP, run)


@pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}")
def test_what_a_steered_token_reads(loaded: Organism, record: Record) -> None:
    """Published setting, one prompt at a time, greedy. Counted in the kernel, so without noise."""
    policy, model = loaded.policy(90), cast(Any, loaded.model)
    sae = policy.output_sae
    dense_bytes = sae.W_enc.nbytes
    texts: dict[str, list[list[int]]] = {}
    work: dict[str, StepWork] = {}

    def steer(mode: StepMode) -> None:
        texts[mode], before = [], work_of(sae)
        with dspa.steer(model, policy, mode=mode, backend="cpu"):
            for prompt in draw_prompts(np.random.default_rng(1), "heldout", WORK_PROMPTS):
                inputs = prompt_batch(loaded.tokenizer, [prompt])
                out = model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
                texts[mode].append(out[0].tolist())
        after = work_of(sae)
        work[mode] = StepWork(*(b - a for a, b in zip(vars(before).values(), vars(after).values(), strict=True)))

    def check() -> None:
        for mode in ("dense", "lazy", "screened"):
            steer(mode)
        assert texts["dense"] == texts["lazy"] == texts["screened"], "the modes wrote different tokens"

    def run() -> tuple[Column, ...]:
        lazy, screened = work["lazy"], work["screened"]
        shares: dict[str, float] = {
            "tokens with an active selected latent": lazy.active / lazy.tokens,
            "tokens whose edit needed M_t": lazy.maximum_needed / lazy.tokens,
            "tokens for which a pass was begun, lazy": lazy.passes / lazy.tokens,
            "bytes of W_enc per token, lazy / dense": lazy.encoder_bytes / lazy.tokens / dense_bytes,
            "bytes of W_enc per token, screened / dense": screened.encoder_bytes / screened.tokens / dense_bytes,
            "screened latents computed again": screened.rescored_pairs / max(1, screened.screened_pairs),
        }
        return tuple(Column(name, "", Interval.exactly(share)) for name, share in shares.items())

    record(f"a steered token, {sae.d_model}x{sae.d_sae} {sae.dtype}".replace("torch.", ""), GROUP, run, check=check)


def test_collection(record: Record) -> None:
    collection = Collection.load()

    def check() -> None:
        """Counts may differ by gates within rounding of their threshold only: a few in a million."""
        plain, ours = collection.plain(), collection.collect()
        for part, counts in plain.items():
            assert (ours[part] - counts).abs().sum() <= 1e-4 * counts.sum(), f"{part} counts differ"

    def run() -> tuple[Column, ...]:
        ways = [Way(PLAIN, collection.plain), Way("dspa.collect", collection.collect)]
        forms = ((PLAIN, prepare_plain), ("dspa.collect", prepare_collect)) if STATUS.exists() else ()
        memory = [peak_column(f"peak memory, {name}", prepare) for name, prepare in forms]
        return (*timed(ways, PLAIN, seconds=5, at_least=3), *memory)

    record("collection of 250 triples", GROUP, run, check=check, reference=PLAIN)


def prepare_plain() -> Callable[[], object]:
    return _warm().plain


def prepare_collect() -> Callable[[], object]:
    return _warm().collect


def _warm() -> Collection:
    collection = Collection.load()
    with torch.no_grad():
        collection.model(torch.tensor([[1, 2, 3]]))
    return collection
