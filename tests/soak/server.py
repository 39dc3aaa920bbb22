"""Clients of `dspa serve` that ask, leave in the middle, and send nonsense: each answer is that of its lone run, no
request waits for one that is gone, and the server does not grow."""

from __future__ import annotations

import itertools
import random
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from serving.served import Served

from dspa.serving.engine import ServerLimits
from soak.deadline import Deadline
from soak.memory import ALLOWED, resident

CHAT = "/v1/chat/completions"
PATIENCE = 30.0  # seconds that an answer may take; one that waits for the gone would take longer
ENDLESS = 30_000  # tokens of a request whose client leaves: minutes, if it were not cancelled
PROMPTS = tuple(f"w{n} w{n + 7} w{2 * n + 1}" for n in range(3, 15))
TOKENS = (1, 4, 8)


def _request(model: str, prompt: str, tokens: int) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {"model": model, "messages": messages, "max_tokens": tokens, "temperature": 0}


def _malformed(rng: random.Random, models: list[str]) -> bytes | dict[str, Any]:
    good = _request(rng.choice(models), rng.choice(PROMPTS), 4)
    odd: Any = rng.choice((None, -1, 10**30, "x", [], [[]], {"a": 1}, 0.5, True))
    return rng.choice(
        (
            b"",
            b"{",
            b"[" * 5000,
            b"\xff\xfe",
            {},
            {**good, "model": "nobody"},
            {**good, "messages": odd},
            {**good, "messages": [{"role": "user", "content": rng.choice((None, -1, 0.5, True, {"a": 1}))}]},
            {**good, "chat_template_kwargs": {"chat_template": "{% for a in range(10**9) %}{% endfor %}"}},
            {**good, "max_tokens": 10**9},
            {**good, "temperature": "warm"},
            {**good, "surplus": 1 if odd is None else odd},  # null is as good as not there
            rng.randbytes(40),
        )
    )


class Client(threading.Thread):
    """Sends so many requests, one after the other, and counts how they ended."""

    def __init__(
        self,
        served: Served,
        number: int,
        requests: int,
        expected: dict[tuple[str, str, int], str],
        until: Deadline,
    ) -> None:
        super().__init__(daemon=True)
        self.until = until
        self.address = f"http://127.0.0.1:{served.port}"
        self.rng = random.Random(number)
        self.requests = requests
        self.expected = expected
        self.models = sorted({model for model, _, _ in expected})
        self.answers = self.left = self.refused = 0
        self.slowest = 0.0
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            with httpx.Client(base_url=self.address, timeout=PATIENCE) as http:
                for _ in range(self.requests):
                    if self.until.passed:
                        break
                    draw = self.rng.random()
                    if draw < 0.7:
                        self._ask(http)
                    elif draw < 0.85:
                        self._leave()
                    else:
                        self._bother(http)
        except BaseException as error:
            self.error = error

    def _ask(self, http: httpx.Client) -> None:
        key = self.rng.choice(sorted(self.expected))
        began = time.monotonic()
        answer = http.post(CHAT, json=_request(*key))
        self.slowest = max(self.slowest, time.monotonic() - began)
        assert answer.status_code == 200, answer.text
        found = answer.json()["choices"][0]["message"]["content"]
        assert found == self.expected[key], f"{key}: {found!r} is not what a lone request gets"
        self.answers += 1

    def _leave(self) -> None:
        """Asks for minutes of work and is gone after some milliseconds."""
        body = _request(self.rng.choice(self.models), self.rng.choice(PROMPTS), ENDLESS)
        body["stream"] = self.rng.random() < 0.5
        try:
            with httpx.Client(base_url=self.address, timeout=self.rng.uniform(0.005, 0.05)) as http:
                http.post(CHAT, json=body)
        except httpx.TransportError:
            self.left += 1
        else:
            raise AssertionError("a request for minutes of work was answered at once")

    def _bother(self, http: httpx.Client) -> None:
        body = _malformed(self.rng, self.models)
        answer = http.post(CHAT, content=body) if isinstance(body, bytes) else http.post(CHAT, json=body)
        assert 400 <= answer.status_code < 500, (answer.status_code, body)
        message = answer.json()["error"]["message"]
        assert message, body
        assert "\n" not in message, body
        self.refused += 1


def run(requests: int, root: Path, clients: int = 8, *, until: Deadline | None = None) -> dict[str, int]:
    """So many requests from each client."""
    until = until or Deadline()
    served = Served(root, ServerLimits(context_tokens=4 * ENDLESS, request_bytes=100_000))
    try:
        models = [served.name, f"{served.name}@a", f"{served.name}@b"]
        expected = {
            key: served.http.post(CHAT, json=_request(*key)).json()["choices"][0]["message"]["content"]
            for key in ((model, prompt, tokens) for model in models for prompt in PROMPTS for tokens in TOKENS)
        }
        _run_all([Client(served, 1000 + n, max(2, requests // 10), expected, until) for n in range(clients)])
        sizes, all_clients = [resident()], list[Client]()
        for half in range(2):
            now = [Client(served, 100 * half + n, -(-requests // 2), expected, until) for n in range(clients)]
            _run_all(now)
            all_clients += now
            sizes.append(resident())
        first, second = (after - before for before, after in itertools.pairwise(sizes))
        health = served.http.get("/health").status_code
    finally:
        served.stop()
    assert health == 200
    assert first < 4 * ALLOWED, f"the server grew by {first} bytes in the first half of the requests"
    assert second < ALLOWED, f"the server grew by {second} bytes in the second half of the requests"
    return {
        "requests answered as alone": sum(client.answers for client in all_clients),
        "clients that left": sum(client.left for client in all_clients),
        "malformed requests refused": sum(client.refused for client in all_clients),
        "slowest answer, ms": round(1000 * max(client.slowest for client in all_clients)),
        "growth in the first half, KiB": max(first, 0) // 1024,
        "growth in the second half, KiB": max(second, 0) // 1024,
    }


def _run_all(clients: list[Client]) -> None:
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    for client in clients:
        if client.error is not None:
            raise client.error
