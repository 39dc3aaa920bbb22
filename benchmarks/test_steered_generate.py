"""How much longer a generated token takes when it is steered, by way to generate: on the organism under a policy fitted
to its own triples, and on a random Llama of 200 million parameters under a policy that costs as much as one can.

Whole calls are timed, steered and unsteered in turn, and divided by the tokens of a sequence: reading the prompt and
choosing the edits is in it.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import pytest
import torch
from interleaved import time_column
from random_model import model_dtype
from record import Record
from transformers import LlamaConfig, LlamaForCausalLM

import dspa
from dspa.bench.generation import worst_case_policy
from dspa.bench.measurements import Column
from dspa.bench.operations import name_of
from dspa.methods.policy import Policy
from dspa.organism import triples_file
from dspa.organism.demo import Organism

PROMPT_TOKENS = 24
UNSTEERED = "unsteered"
WAYS: dict[str, tuple[int, dict[str, Any]]] = {  # prompts, and options of generate
    "greedy, dynamic cache": (1, {}),
    "greedy, static cache": (1, {"cache_implementation": "static"}),
    "greedy, batch of 8, left-padded": (8, {}),
    "sampling": (1, {"do_sample": True}),
    "beam search, 4 beams": (1, {"num_beams": 4}),
    "4 samples of a prompt": (1, {"do_sample": True, "num_return_sequences": 4}),
    "prompt lookup, 4 candidates": (1, {"prompt_lookup_num_tokens": 4}),
    "chunked prefill": (1, {"prefill_chunk_size": 8}),
    "no cache": (1, {"use_cache": False}),
}

LARGE_WAYS = (
    "greedy, dynamic cache",
    "greedy, static cache",
    "greedy, batch of 8, left-padded",
    "prompt lookup, 4 candidates",
)
"""Those of the large model; the others differ from them in what the model does, not in what an edit does."""


@dataclass(frozen=True)
class Case:
    """A model with its policy, prompts for it, and how much to generate."""

    name: str
    model: Any
    policy: Policy
    prompts: Callable[[int], dict[str, torch.Tensor]]
    new_tokens: int
    rounds: int


def organism_case(loaded: Organism) -> Case:
    """With the published setting, percentile 90."""
    rows = [triple.prompt for triple in dspa.load_preferences(triples_file(), loaded.tokenizer, limit=8)]

    def prompts(batch: int) -> dict[str, torch.Tensor]:
        encoded = loaded.tokenizer.pad({"input_ids": [list(row) for row in rows[:batch]]}, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    return Case("organism, 1.25 M", loaded.model, loaded.policy(90), prompts, new_tokens=32, rounds=6)


def random_case(_: Organism) -> Case:
    """Nearly every token of it needs M_t."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=16,
        pad_token_id=0,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    model = model.to(model_dtype()).eval()

    def prompts(batch: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 32000, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(batch))
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            mask[row, :row] = 0
        return {"input_ids": ids, "attention_mask": mask}

    policy = worst_case_policy(model, layer=8, d_sae=16384)
    return Case(f"random Llama, 200 M, {name_of(model_dtype())}", model, policy, prompts, new_tokens=8, rounds=3)


CASES: dict[str, Callable[[Organism], Case]] = {"organism": organism_case, "random": random_case}


@pytest.fixture(scope="module")
def case_named(loaded: Organism) -> Callable[[str], Case]:
    """Makes each case once."""
    return lru_cache(maxsize=None)(lambda name: CASES[name](loaded))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "way"), [*(("organism", way) for way in WAYS), *(("random", way) for way in LARGE_WAYS)]
)
def test_steered_generate(name: str, way: str, case_named: Callable[[str], Case], record: Record) -> None:
    case = case_named(name)
    batch, options = WAYS[way]
    inputs = case.prompts(batch)

    def milliseconds() -> float:
        torch.manual_seed(0)
        start = time.perf_counter()
        length = {"min_new_tokens": case.new_tokens, "max_new_tokens": case.new_tokens}
        case.model.generate(**inputs, **{"do_sample": False, **options}, **length)
        return (time.perf_counter() - start) / case.new_tokens * 1e3

    def steered() -> float:
        with dspa.steer(case.model, case.policy):
            return milliseconds()

    def check() -> None:
        """Also fills what is filled once."""
        milliseconds()
        with dspa.steer(case.model, case.policy) as steering:
            milliseconds()
        assert steering.summary().tokens_edited, "no token was edited"

    def measure() -> tuple[Column, ...]:
        before, after = zip(*((milliseconds(), steered()) for _ in range(case.rounds)), strict=True)
        return (time_column(UNSTEERED, before, before), time_column("steered", after, before))

    record(f"{case.name}, {way}", "a generated token, CPU", measure, check=check, reference=UNSTEERED)
