"""`vllm.LLM` under policies: every request's answer is the one that `dspa.steer` has for it."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported

import psutil
import pytest
from vllm_plugin.engines import (
    NEW_TOKENS,
    Case,
    answers,
    check_answers,
    core_of,
    engine,
    mixed_requests,
    parameters,
    steering_of,
    tiny_case,
)

import dspa
from dspa.errors import DspaError

MANY = 10_000


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return tiny_case("llama", tmp_path_factory.mktemp("llama"))


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


@pytest.mark.parametrize(("family", "count"), [("llama", 200), ("gemma2", 60), ("qwen3", 60)])
def test_answers_in_a_mixed_batch(family: Any, count: int, tmp_path: Path, preemptions: list[str]) -> None:
    """Prompts in chunks of 16 tokens, reused blocks, and too little room for all of the requests."""
    case = tiny_case(family, tmp_path)
    requests = mixed_requests(case, count)
    with engine(case) as llm:
        found = answers(llm, requests)
        assert preemptions
        steering = steering_of(llm)
        assert steering.requests.keys() <= set(core_of(llm).scheduler.finished_req_ids)
        counts = steering.counts()
    ties = check_answers(case, requests, found)
    assert ties <= count // 20
    edited = dict.fromkeys(case.policies, 0)
    for name, prompt in requests:
        if name is not None:
            edited[name] += NEW_TOKENS - 1 + in_prompt(name, prompt)  # the last token is not read
    seen = {name: counts[name].seen for name in counts}
    assert seen.pop("all") <= edited.pop("all")  # of a reused prompt nothing is computed
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
    assert check_answers(llama, requests, found) <= 3


def test_requests_of_every_form(llama: Case) -> None:
    """Several answers a prompt, stops in the middle, aborts, unknown policies, and nothing left of any of them."""
    requests = mixed_requests(llama, 24, seed=2)
    with engine(llama, max_num_batched_tokens=64) as llm:
        whole = answers(llm, requests)
        assert check_answers(llama, requests, whole) <= 1

        name, prompt = next((name, prompt) for name, prompt in requests if name == "a")
        several = llm.generate(
            [{"prompt_token_ids": prompt}], parameters(name, n=3, temperature=1.0, top_k=1), use_tqdm=False
        )[0].outputs
        expected = whole[requests.index((name, prompt))]
        assert [list(each.token_ids) for each in several] == [expected] * 3

        stopped = llm.generate(
            [{"prompt_token_ids": prompt}], parameters(name, stop_token_ids=[expected[4]]), use_tqdm=False
        )
        assert list(stopped[0].outputs[0].token_ids) == expected[: expected.index(expected[4]) + 1]

        for number, (policy, tokens) in enumerate(requests):
            llm.llm_engine.add_request(str(number), {"prompt_token_ids": tokens}, parameters(policy))
        for _ in range(3):
            llm.llm_engine.step()
        llm.llm_engine.abort_request([str(number) for number in range(0, 24, 2)])
        finished = {}
        while llm.llm_engine.has_unfinished_requests():
            finished |= {each.request_id: each for each in llm.llm_engine.step() if each.finished}
        for number in range(1, 24, 2):
            assert list(finished[str(number)].outputs[0].token_ids) == whole[number]

        wrong: Any
        for wrong in ("nobody", "/a/folder", 3):
            with pytest.raises(Exception, match="not served here; expected one of a, b, c, v, all"):
                llm.generate([{"prompt_token_ids": prompt}], parameters(wrong), use_tqdm=False)
        assert answers(llm, requests[:4]) == whole[:4]
        assert steering_of(llm).requests.keys() <= core_of(llm).scheduler.finished_req_ids


def test_prompts_are_reused_by_whom_they_fit(llama: Case) -> None:
    """Policies that read alike share a prompt's blocks; edited positions are nobody else's."""
    beginning = mixed_requests(llama, 1)[0][1][:1] + [7, 9, 11, 13] * 24
    with engine(llama, max_num_batched_tokens=64, kv_cache_memory_bytes=2**23) as llm:

        def reused(policy: str | None, prompt: list[int]) -> int:
            output = llm.generate([{"prompt_token_ids": prompt}], parameters(policy), use_tqdm=False)[0]
            longer = [*prompt, *output.outputs[0].token_ids]
            continued.append((policy, longer))
            return output.num_cached_tokens or 0

        continued: list[tuple[str | None, list[int]]] = []
        table = {
            (None, "first"): 0,
            (None, "again"): 96,
            ("a", "first"): 0,  # what nobody read cannot be read from the cache
            ("b", "shared with a"): 96,
            ("v", "shared with unsteered"): 96,
            ("c", "other SAEs"): 0,
            ("all", "first"): 0,
            ("all", "again"): 96,
        }
        assert {key: reused(key[0], beginning) for key in table} == table
        again = answers(llm, continued)
        check_answers(llama, continued, again)


def test_policies_that_cannot_be_served_are_refused(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    import vllm
    from vllm.engine.arg_utils import EngineArgs

    def refused(match: str, **options: Any) -> None:
        defaults = {"model": str(llama.folder / "model"), "additional_config": {"dspa": llama.sources}}
        arguments = EngineArgs(**{**defaults, **options})
        with pytest.raises(DspaError, match=match):
            arguments.create_engine_config()

    refused("is not a policy folder|no policy", additional_config={"dspa": {"a": str(llama.folder)}})
    refused("pipeline", pipeline_parallel_size=2)
    refused("speculative", speculative_config={"method": "ngram", "num_speculative_tokens": 2})
    refused("LoRA", enable_lora=True)
    deep = dspa.VectorPolicy(llama.policies["v"].vector, layer=50)  # type: ignore[attr-defined]
    refused("layers are 0 to 3", additional_config={"dspa": {"v": str(deep.save_pretrained(llama.folder / "deep"))}})
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    refused(r"steers in vLLM 0\.32; found 0\.99\.1")


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_ten_thousand_requests_with_random_aborts(llama: Case) -> None:
    """Memory stays flat, nothing is kept of requests that ended, and each answer is that of its own policy."""
    rng, requests = random.Random(4), mixed_requests(llama, 200, seed=3)
    live: dict[str, int] = {}
    resident: list[int] = []
    finished: list[tuple[int, list[int]]] = []
    added = ended = 0
    with engine(llama, max_num_batched_tokens=64) as llm:
        core, steering = llm.llm_engine, steering_of(llm)
        while added < MANY or live:
            while added < MANY and len(live) < 24:
                number = rng.randrange(len(requests))
                policy, prompt = requests[number]
                core.add_request(str(added), {"prompt_token_ids": prompt}, parameters(policy))
                live[str(added)] = number
                added += 1
                if added % (MANY // 10) == 0:
                    resident.append(psutil.Process().memory_info().rss)
            if rng.random() < 0.2:
                name = rng.choice([*live])
                core.abort_request([name])
                del live[name]
                ended += 1
            for output in core.step():
                if output.finished and output.request_id in live:
                    finished.append((live.pop(output.request_id), list(output.outputs[0].token_ids)))
            assert len(steering.requests) <= 48
        while core.has_unfinished_requests():
            core.step()
        assert steering.requests.keys() <= core_of(llm).scheduler.finished_req_ids
    assert ended > MANY // 20
    assert max(resident[2:]) - resident[2] < 16 * 2**20
    different = sorted({(number, *tokens) for number, tokens in finished})
    ties = check_answers(llama, [requests[number] for number, *_ in different], [tokens for _, *tokens in different])
    assert ties <= len(different) // 20
