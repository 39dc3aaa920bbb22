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
from tiny_models import VOCAB
from vllm_plugin.engines import BLOCK_TOKENS, tiny_case

TOKENS = 12
NAMES = ("tiny", "tiny@a", "tiny@b", "tiny@v")


class Server:
    """A server in a process of its own."""

    def __init__(self, folder: Path) -> None:
        case = tiny_case("llama", folder)
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

    def complete(self, model: str, prompt: str, *, stream: bool = False, **more: Any) -> str:
        options: dict[str, Any] = {"max_tokens": TOKENS, "temperature": 0, "extra_body": {"ignore_eos": True}, **more}
        answer: Any = self.client.completions.create(model=model, prompt=prompt, stream=stream, **options)
        if not stream:
            assert answer.model == model
            return answer.choices[0].text
        return "".join(chunk.choices[0].text for chunk in answer if chunk.choices)

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


def prompt_of(rng: random.Random) -> str:
    return " ".join(f"w{rng.randint(5, VOCAB - 1)}" for _ in range(rng.randint(1, 60)))


def test_every_answer_is_the_one_it_has_alone(server: Server) -> None:
    """Sixteen threads, streaming and not, under random policies."""
    rng = random.Random(0)
    requests = [(rng.choice(NAMES), prompt_of(rng), rng.random() < 0.7) for _ in range(96)]
    alone = [server.complete(name, prompt) for name, prompt, _ in requests]
    assert len({server.complete(name, requests[0][1]) for name in NAMES}) == len(NAMES)
    with ThreadPoolExecutor(16) as threads:
        together = list(threads.map(lambda each: server.complete(each[0], each[1], stream=each[2]), requests))
    assert together == alone


def test_names_and_arguments(server: Server) -> None:
    assert {model.id for model in server.client.models.list()} == {*NAMES, "tiny@c", "tiny@all"}
    prompt = "w7 w9 w11"
    xargs: dict[str, Any] = {"extra_body": {"ignore_eos": True, "vllm_xargs": {"dspa": "a"}}}
    assert server.complete("tiny", prompt, **xargs) == server.complete("tiny@a", prompt)
    chat: Any = {"messages": [{"role": "user", "content": prompt}], "max_tokens": TOKENS, "temperature": 0}
    chat["extra_body"] = {"ignore_eos": True}
    answers = {
        name: server.client.chat.completions.create(model=name, **chat).choices[0].message.content for name in NAMES
    }
    assert len(set(answers.values())) == len(NAMES)


@pytest.mark.parametrize(
    ("model", "extra_body", "message"),
    [
        ("tiny@nobody", {}, "does not exist"),
        ("tiny", {"vllm_xargs": {"dspa": "/a/folder"}}, "not served here; expected one of a, b"),
        ("tiny@a", {"vllm_xargs": {"dspa": "b"}}, "asks for tiny@a and, in vllm_xargs, for policy 'b'"),
        ("tiny@a", {"use_beam_search": True, "n": 2}, "beam search is not served"),
        ("tiny", {"vllm_xargs": {"dspa": "a"}, "use_beam_search": True, "n": 2}, "beam search is not served"),
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
    server.complete("tiny@v", "w7 w9 w11")
    after = settled()
    changed = {name: after[name] - before[name] for name in after if after[name] != before[name]}
    assert changed == {"seen v": TOKENS, "edited v": TOKENS}
