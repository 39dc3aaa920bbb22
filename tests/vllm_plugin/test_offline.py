"""`vllm.LLM` under policies: requests of every form, blocks that are reused, what is refused, and what is kept."""

from __future__ import annotations

import os
import random
from types import SimpleNamespace
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # before vLLM is imported

import msgspec  # type: ignore[import-not-found]
import psutil
import pytest
import torch
from tiny_models import BOS
from vllm_plugin.engines import (
    Case,
    answers,
    check_answers,
    core_of,
    engine,
    mixed_requests,
    parameters,
    steering_of,
)

import dspa
from dspa.errors import DspaError, InvalidInputError, MismatchError
from dspa.vllm_plugin.hooks.starting import apply_ready_response, split_graphs
from dspa.vllm_plugin.layer_op import OPERATION
from dspa.vllm_plugin.settings import read_policies


def test_requests_of_every_form(llama: Case) -> None:
    """Several answers a prompt, stops in the middle, aborts, unknown policies, and nothing left of any of them."""
    requests = mixed_requests(llama, 24, seed=2)
    with engine(llama, max_num_batched_tokens=64) as llm:
        whole = answers(llm, requests)
        assert not check_answers(llama, requests, whole)

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
        assert not check_answers(llama, continued, again)


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
    refused("by priority", scheduling_policy="priority")
    refused("events of the KV cache", kv_events_config={"enable_kv_cache_events": True, "publisher": "null"})
    refused("pooling", runner="pooling", convert="embed")
    for variable in ("VLLM_USE_V2_MODEL_RUNNER", "VLLM_USE_RUST_FRONTEND"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1")
            refused(variable)
    deep = dspa.VectorPolicy(llama.policies["v"].vector, layer=50)  # type: ignore[attr-defined]
    refused("layers are 0 to 3", additional_config={"dspa": {"v": str(deep.save_pretrained(llama.folder / "deep"))}})
    monkeypatch.setattr(vllm, "__version__", "0.99.1")
    refused(r"steers in vLLM 0\.32; found 0\.99\.1")


@pytest.mark.parametrize(
    ("mode", "graphs", "splitting", "found"),
    [
        ("NONE", "NONE", [], "NONE"),
        ("DYNAMO_TRACE_ONCE", "NONE", [], "NONE"),
        ("VLLM_COMPILE", "NONE", ["vllm::attention"], "NONE"),
        ("VLLM_COMPILE", "PIECEWISE", ["vllm::attention"], "PIECEWISE"),
        ("VLLM_COMPILE", "FULL_AND_PIECEWISE", ["vllm::attention"], "PIECEWISE"),
        ("VLLM_COMPILE", "FULL", [], None),
        ("NONE", "PIECEWISE", [], None),  # as with VLLM_USE_BREAKABLE_CUDAGRAPH
        ("NONE", "FULL_AND_PIECEWISE", [], None),
        ("NONE", "FULL_DECODE_ONLY", [], None),
        ("STOCK_TORCH_COMPILE", "PIECEWISE", ["vllm::attention"], None),
    ],
)
def test_no_graph_is_captured_around_the_operation(
    mode: str, graphs: str, splitting: list[str], found: str | None
) -> None:
    from vllm.config import CompilationConfig, CompilationMode, CUDAGraphMode

    compilation = CompilationConfig(
        mode=CompilationMode[mode], cudagraph_mode=CUDAGraphMode[graphs], splitting_ops=[*splitting]
    )
    if found is None:
        with pytest.raises(InvalidInputError, match=rf"cudagraph_mode {graphs}\) of a model that is not split"):
            split_graphs(compilation)
    else:
        split_graphs(compilation)
        assert compilation.cudagraph_mode == CUDAGraphMode[found]
        assert compilation.splitting_ops == ([*splitting, OPERATION] if splitting else [])


def answer(llm: Any, name: str | None) -> list[int]:
    outputs = llm.generate([{"prompt_token_ids": [BOS, 7, 9]}], parameters(name), use_tqdm=False)
    return list(outputs[0].outputs[0].token_ids)


@pytest.mark.parametrize("missing", ["layer", "core"])
def test_what_would_not_be_steered_is_not_answered(llama: Case, missing: str) -> None:
    """A layer that tells nothing, as in a captured graph, and an engine core without the plugin."""
    with engine(llama) as llm:
        unsteered = answer(llm, None)
        assert answer(llm, "v") != unsteered
        runner = core_of(llm).model_executor.driver_worker.worker.model_runner
        if missing == "layer":
            layer = runner.get_model().model.layers[1]
            layer.__class__ = type(layer).__mro__[1]
            message = r"layers \[1\] told nothing: it was not steered"
        else:
            runner._dspa_confirmed = False
            message = "engine core runs without dspa"
        assert answer(llm, None) == unsteered
        with pytest.raises(DspaError, match=message):  # after which vLLM's engine is not used
            answer(llm, "v")


def test_requests_are_checked_where_they_are_computed(llama: Case) -> None:
    """Also those that came by another way than `process_inputs`, and without a prefix cache."""
    with engine(llama, enable_prefix_caching=False) as llm:
        request = llm.llm_engine.input_processor.process_inputs(
            "straight", {"prompt_token_ids": [BOS, 7, 9]}, parameters("a"), supported_tasks=("generate",)
        )
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"prompt_embeds": torch.zeros(3, 64)}, "prompt as embeddings"),
            ({"prompt_token_ids": None}, "prompt as embeddings"),
            ({"resumable": True}, "prompt that grows"),
            ({"sampling_params": parameters("nobody")}, "not served here"),
        ]
        for changes, message in wrong:
            with pytest.raises(InvalidInputError, match=message):
                core_of(llm).preprocess_add_request(msgspec.structs.replace(request, **changes))
        core_of(llm).preprocess_add_request(request)


def test_workers_that_do_not_steer_are_noticed(llama: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    from dspa.vllm_plugin.hooks import worker

    monkeypatch.setattr(worker, "attach", lambda runner, settings: None)
    with pytest.raises(MismatchError, match="1 of 1 workers do not steer"), engine(llama):
        pass


@pytest.mark.parametrize("told", [b"", b"token", b"another token"])
def test_engine_cores_that_do_not_steer_are_noticed(llama: Case, told: bytes) -> None:
    """What a core of another process tells when it has started."""
    settings = read_policies(llama.sources)
    token = settings.token if told == b"token" else told.decode()
    client: Any = SimpleNamespace(vllm_config=SimpleNamespace(additional_config={"dspa": settings.as_json()}))
    payload = msgspec.msgpack.encode({"num_gpu_blocks": 3} | ({"dspa": token} if told else {}))
    heard: list[bytes] = []
    if told == b"token":
        apply_ready_response(lambda client, payload: heard.append(payload), client, payload)
        assert heard == [payload]
    else:
        for each in (payload, b""):
            with pytest.raises(MismatchError, match="engine core of vLLM does not serve the policies"):
                apply_ready_response(lambda client, payload: heard.append(payload), client, each)
        assert not heard


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("many", [1_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_many_requests_with_random_aborts(llama: Case, many: int) -> None:
    """Memory stays flat, nothing is kept of requests that ended, and each answer is that of its own policy."""
    rng, requests = random.Random(4), mixed_requests(llama, 200, seed=3)
    live: dict[str, int] = {}
    resident: list[int] = []
    finished: list[tuple[int, list[int]]] = []
    added = ended = 0
    with engine(llama, max_num_batched_tokens=64) as llm:
        core, steering = llm.llm_engine, steering_of(llm)
        while added < many or live:
            while added < many and len(live) < 24:
                number = rng.randrange(len(requests))
                policy, prompt = requests[number]
                core.add_request(str(added), {"prompt_token_ids": prompt}, parameters(policy))
                live[str(added)] = number
                added += 1
                if added % (many // 10) == 0:
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
    assert ended > many // 20
    assert max(resident[2:]) - resident[2] < 16 * 2**20
    different = sorted({(number, *tokens) for number, tokens in finished})
    ties = check_answers(llama, [requests[number] for number, *_ in different], [tokens for _, *tokens in different])
    assert len(ties) <= len(different) // 50
    print(f"{many} requests, {ended} aborted; MiB:", *(memory // 2**20 for memory in resident), f"; {len(ties)} ties")
