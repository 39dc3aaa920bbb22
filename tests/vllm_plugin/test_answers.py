"""Requests in one batch, under policies and none: every answer is the one that `dspa.steer` has for it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported

import pytest
from vllm_plugin.engines import (
    NEW_TOKENS,
    Case,
    answers,
    check_answers,
    core_of,
    engine,
    expected_answers,
    mixed_requests,
    organism_case,
    organism_requests,
    steering_of,
    tiny_case,
)


@pytest.fixture
def preemptions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The requests that were preempted while a test ran."""
    from vllm.v1.core.sched.scheduler import Scheduler

    found: list[str] = []
    preempt = Scheduler._preempt_request

    def noted(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        found.append(request.request_id)
        return preempt(self, request, *args, **kwargs)

    monkeypatch.setattr(Scheduler, "_preempt_request", noted)
    return found


@pytest.mark.parametrize("family", ["organism", "llama", "gemma2", "qwen3"])
def test_answers_in_a_mixed_batch(family: Any, tmp_path: Path, preemptions: list[str]) -> None:
    """Prompts in chunks of 16 tokens, reused blocks, and too little room for all of the requests."""
    count = 200
    is_organism = family == "organism"
    case = organism_case(tmp_path) if is_organism else tiny_case(family, tmp_path)
    requests = organism_requests(case, count) if is_organism else mixed_requests(case, count)
    with engine(case) as llm:
        found = answers(llm, requests)
        assert preemptions
        steering = steering_of(llm)
        assert steering.requests.keys() <= set(core_of(llm).scheduler.finished_req_ids)
        counts = steering.counts()
    ties = check_answers(case, requests, found)
    print(f"{family}: {len(ties)} ties", *ties, sep="\n")
    assert len(ties) <= count // 50
    unsteered = expected_answers(case, [(None, prompt) for _, prompt in requests])
    steered = [number for number, (name, _) in enumerate(requests) if name is not None]
    assert sum(found[number] != unsteered[number] for number in steered) > len(steered) / 2
    edited = dict.fromkeys(case.policies, 0)
    for name, prompt in requests:
        if name is not None:
            edited[name] += NEW_TOKENS - 1 + in_prompt(name, prompt)  # the last token is not read
    seen = {name: counts[name].seen for name in counts}
    assert seen.pop("all", 0) <= edited.pop("all", 0)  # of a reused prompt nothing is computed
    assert seen == edited


def in_prompt(policy: str, prompt: list[int]) -> int:
    """How many of its positions are edited."""
    return {"c": 0, "all": max(1, len(prompt) - 1)}.get(policy, 1)


def test_compiled_and_eager_models_answer_alike(llama: Case) -> None:
    """The operation is in the model before it is traced."""
    requests = mixed_requests(llama, 60, seed=1)
    with engine(llama, enforce_eager=False, max_num_batched_tokens=64) as llm:
        found = answers(llm, requests)
        assert all(counts.edited for counts in steering_of(llm).counts().values())
    assert len(check_answers(llama, requests, found)) <= 2


def test_tensor_parallel_ranks_compute_the_same_bits(llama: Case) -> None:
    """Two processes, each with a part of every layer; after it both hold the whole stream, and edit it alike."""
    requests = mixed_requests(llama, 40, seed=5)
    parallel: Any = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"}
    with engine(llama, max_num_batched_tokens=64, **parallel) as llm:
        llm.collective_rpc(hash_streams)
        found = answers(llm, requests)
        digests = llm.collective_rpc(digest_of_streams)
    assert not check_answers(llama, requests, found)
    assert len(digests) == 2
    assert len(set(digests)) == 1
    assert digests[0] != hashlib.sha256().hexdigest()


def hash_streams(worker: Any) -> None:
    """In a worker: from now on, the stream after every layer that is read or edited goes into a digest."""
    steering, digest = worker.model_runner._dspa, hashlib.sha256()
    computed = steering.layer_computed

    def layer_computed(layer: int, hidden: Any, residual: Any) -> None:
        computed(layer, hidden, residual)
        digest.update((hidden + residual).numpy().tobytes())

    steering.layer_computed, steering.digest = layer_computed, digest


def digest_of_streams(worker: Any) -> str:
    return worker.model_runner._dspa.digest.hexdigest()
