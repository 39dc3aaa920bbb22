"""vLLM engines of small models for tests, and what their answers have to be: those of `dspa.steer`."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_models import BOS, VOCAB, Family, left_padded, tiny_model, tiny_policy, tiny_tokenizer

import dspa
from dspa.methods.policy import Policy

NEW_TOKENS = 20
TIE = 1e-3  # logits: what float32 sums in another order may differ by, of logits around 10
BLOCK_TOKENS = 32  # the least that vLLM's attention on CPUs takes


@dataclass(frozen=True)
class Case:
    """A model, its policies, and where they are saved."""

    model: Any
    folder: Path
    policies: Mapping[str, Policy]

    @property
    def sources(self) -> dict[str, str]:
        return {name: str(self.folder / name) for name in self.policies}


def tiny_case(family: Family, folder: Path) -> Case:
    """A random model of a size that vLLM's attention takes, with policies that share a launch, others, and a vector."""
    shape: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "max_position_embeddings": 512}
    if family == "gemma2":  # vLLM's has one matrix for both embeddings
        shape |= {"sliding_window": 64, "tie_word_embeddings": True}
    model: Any = tiny_model(family, dtype=torch.float32, **shape)
    first = tiny_policy(model, dtype=torch.float32)
    vector = torch.randn(64, generator=torch.Generator().manual_seed(3))
    policies: dict[str, Any] = {
        "a": first,
        "b": first.with_options(alpha=0.2, k_diff=5, edit="ablate"),
        "c": tiny_policy(model, dtype=torch.float32, seed=2, edit_positions="generated"),
        "v": dspa.VectorPolicy(vector, layer=1),
        "all": dspa.VectorPolicy(vector, layer=1, scale=0.5, edit_positions="all", uncounted_token_ids=(BOS,)),
    }
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, policy in policies.items():
        policy.save_pretrained(folder / name)
    return Case(model, folder, policies)


def mixed_requests(case: Case, count: int, seed: int = 0) -> list[tuple[str | None, list[int]]]:
    """Prompts of 1 to 100 tokens, many with a beginning that others have too, each with a policy or none."""
    rng = random.Random(seed)
    beginnings = [[BOS, *rng.choices(range(5, VOCAB), k=70)] for _ in range(3)]
    requests = []
    for _ in range(count):
        end = rng.choices(range(5, VOCAB), k=rng.randint(0, 29))
        begin = rng.choice(beginnings)[: rng.choice((1, 33, 64, 70))]
        requests.append((rng.choice([None, *case.policies]), begin + end))
    return requests


@contextmanager
def engine(case: Case, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` in this process, with room for few requests at once unless `options` say otherwise."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 16,
        "kv_cache_memory_bytes": 2**20,
        "block_size": BLOCK_TOKENS,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "additional_config": {"dspa": case.sources},
    }
    llm = LLM(model=str(case.folder / "model"), **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def core_of(llm: Any) -> Any:
    """The engine's core, which runs in this process."""
    return llm.llm_engine.engine_core.engine_core


def steering_of(llm: Any) -> Any:
    """The `ContinuousSteering` of an engine."""
    return core_of(llm).model_executor.driver_worker.worker.model_runner._dspa


def parameters(policy: str | None, **options: Any) -> Any:
    """Greedy and of a fixed length unless `options` say otherwise."""
    from vllm import SamplingParams

    extra_args = None if policy is None else {"dspa": policy}
    return SamplingParams(
        **{"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "extra_args": extra_args, **options}
    )


def answers(llm: Any, requests: Sequence[tuple[str | None, list[int]]]) -> list[list[int]]:
    """What vLLM generates for all of them at once."""
    prompts = [{"prompt_token_ids": prompt} for _, prompt in requests]
    outputs = llm.generate(prompts, [parameters(name) for name, _ in requests], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


def check_answers(case: Case, requests: Sequence[tuple[str | None, list[int]]], found: Sequence[list[int]]) -> int:
    """Compares answers with those of `dspa.steer`, token for token up to the first tie.

    Returns:
        How many of them part at a tie.
    """
    ties = 0
    with dspa.steer(case.model, dict(case.policies), select=None) as steering:
        for first in range(0, len(requests), 50):
            some = requests[first : first + 50]
            steering.select([name for name, _ in some])
            inputs = left_padded([prompt for _, prompt in some])
            options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
            result = case.model.generate(**inputs, **options, output_scores=True, return_dict_in_generate=True)
            width = inputs["input_ids"].shape[1]
            expected = result.sequences[:, width:].tolist()
            for row, (want, got) in enumerate(zip(expected, found[first : first + 50], strict=True)):
                if want != got:
                    step = next(step for step in range(NEW_TOKENS) if want[step] != got[step])
                    scores = result.scores[step][row]
                    gap = float(scores[want[step]] - scores[got[step]])
                    assert gap < TIE, f"{some[row]}: token {step} is {got[step]}, expected {want[step]}, by {gap}"
                    ties += 1
    return ties
