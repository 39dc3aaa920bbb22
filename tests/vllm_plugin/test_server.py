"""`vllm serve` under policies, and the `openai` client."""

from __future__ import annotations

import json
import os
import random
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
from tiny_models import BOS
from vllm_plugin.engines import BLOCK_TOKENS, NEW_TOKENS, check_answers, mixed_requests, tiny_case

POLICIES = (None, "a", "b", "c", "v", "all")


class Server:
    """A server in a process of its own."""

    def __init__(self, folder: Path) -> None:
        self.case = case = tiny_case("llama", folder)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        options = {
            "--served-model-name": "tiny",
            "--host": "127.0.0.1",
            "--port": self.port,
            "--dtype": "float32",
            "--max-model-len": 128,
            "--max-num-seqs": 16,
            "--max-num-batched-tokens": 32,
            "--block-size": BLOCK_TOKENS,
            "--kv-cache-memory-bytes": 2**21,
        }
        arguments = [str(part) for option in options.items() for part in option]
        # `vllm serve` of the build for CPUs asks for the metadata of a package with another name than its own.
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(case.folder / "model")]
        self.log = folder / "log"
        named = ",".join(f"{name}={source}" for name, source in case.sources.items())
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, "--enforce-eager", *arguments],
                env={**os.environ, "DSPA_VLLM_POLICIES": named},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=120)

    def wait(self) -> None:
        while self.process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        raise AssertionError(self.log.read_text()[-3000:])

    def stop(self) -> None:
        self.client.close()
        self.process.terminate()
        self.process.wait(60)

    def complete(self, policy: str | None, prompt: list[int], *, stream: bool = False, **more: Any) -> list[int]:
        """The tokens that follow on a prompt."""
        body = {"ignore_eos": True, "return_token_ids": True, **more}
        options: dict[str, Any] = {"max_tokens": NEW_TOKENS, "temperature": 0, "extra_body": body}
        model = name_of(policy)
        answer: Any = self.client.completions.create(model=model, prompt=prompt, stream=stream, **options)
        chunks = answer if stream else [answer]
        found: list[int] = []
        for chunk in chunks:
            assert chunk.model == model
            for choice in chunk.choices:
                found += choice.token_ids
        return found

    def counters(self) -> dict[str, float]:
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=10) as response:
            lines = response.read().decode()
        return {
            f"{kind} {policy}": float(value)
            for kind, policy, value in re.findall(r'^dspa_tokens_(\w+)_total{policy="(\w+)"} (\S+)$', lines, re.M)
        }


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    started = Server(tmp_path_factory.mktemp("server"))
    try:
        started.wait()
        yield started
    finally:
        started.stop()


def name_of(policy: str | None) -> str:
    return "tiny" if policy is None else f"tiny@{policy}"


def test_every_answer_is_the_one_it_has_alone(server: Server) -> None:
    """Sixteen threads, streaming and not, under random policies; then one after the other, from another part of the
    prefix cache; and `dspa.steer` says the same."""
    rng = random.Random(0)
    requests = mixed_requests(server.case, 96)

    def complete(number: int, salt: str, stream: bool) -> list[int]:
        policy, prompt = requests[number]
        return server.complete(policy, prompt, stream=stream, cache_salt=salt)

    with ThreadPoolExecutor(16) as threads:
        streams = [rng.random() < 0.7 for _ in requests]
        together = list(threads.map(lambda number: complete(number, "together", streams[number]), range(len(requests))))
    assert len(check_answers(server.case, requests, together)) <= 1
    alone = [complete(number, "alone", False) for number in range(0, len(requests), 3)]
    assert len(check_answers(server.case, requests[::3], alone)) <= 1
    assert sum(one != other for one, other in zip(alone, together[::3], strict=True)) <= 1  # at a tie


def test_names_and_arguments(server: Server) -> None:
    assert {model.id for model in server.client.models.list()} == {name_of(policy) for policy in POLICIES}
    prompt = [BOS, 7, 9, 11]
    assert server.complete(None, prompt, vllm_xargs={"dspa": "a"}) == server.complete("a", prompt)
    chat: Any = {"messages": [{"role": "user", "content": "w7 w9 w11"}], "max_tokens": NEW_TOKENS, "temperature": 0}
    chat["extra_body"] = {"ignore_eos": True}
    answers = {
        policy: server.client.chat.completions.create(model=name_of(policy), **chat).choices[0].message.content
        for policy in POLICIES
    }
    assert len(set(answers.values())) == len(POLICIES)


@pytest.mark.parametrize(
    ("model", "extra_body", "message"),
    [
        ("tiny@nobody", {}, "does not exist"),
        ("tiny", {"vllm_xargs": {"dspa": "/a/folder"}}, "not served here; expected one of a, b"),
        ("tiny@a", {"vllm_xargs": {"dspa": "b"}}, "asks for tiny@a and, in vllm_xargs, for policy 'b'"),
        ("tiny@a", {"use_beam_search": True, "n": 2}, "beam search is not served"),
        ("tiny", {"vllm_xargs": {"dspa": "a"}, "use_beam_search": True, "n": 2}, "beam search is not served"),
        ("", {"vllm_xargs": {"dspa": "a"}, "use_beam_search": True, "n": 2}, "beam search is not served"),
    ],
)
def test_refusals(server: Server, model: str, extra_body: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        server.client.completions.create(model=model, prompt="w7", max_tokens=2, extra_body=extra_body)
    assert refused.value.status_code in (400, 404)
    assert message in json.dumps(refused.value.response.json(), ensure_ascii=False)


def test_counters(server: Server) -> None:
    def settled() -> dict[str, float]:
        time.sleep(2.5)  # they are written every second
        return server.counters()

    before = settled()
    server.complete("v", [BOS, 7, 9, 11])
    after = settled()
    changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert changed == {"seen v": NEW_TOKENS, "edited v": NEW_TOKENS}
