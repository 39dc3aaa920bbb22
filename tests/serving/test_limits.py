"""The server against requests that are too large, malformed or abandoned, and against templates of a client's own."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

httpx = pytest.importorskip("httpx", reason="in dspa[test]")
openai = pytest.importorskip("openai", reason="the server needs dspa[serve]")
pytest.importorskip("uvicorn", reason="the server needs dspa[serve]")

from serving.served import COUNT, MESSAGES, Served  # noqa: E402

from dspa.serving.engine import ServerLimits  # noqa: E402

CHAT = "/v1/chat/completions"
CONTEXT = 40000  # longer than any test waits for
ANSWER = {"model": "tiny", "messages": MESSAGES, "max_tokens": COUNT, "temperature": 0}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(tmp_path_factory.mktemp("served"), ServerLimits(context_tokens=CONTEXT, request_bytes=100_000))
    yield server
    server.stop()


MALFORMED: list[tuple[bytes, str]] = [
    (b"", "no JSON"),
    (b"{", "no JSON"),
    (b"[]", "expected an object"),
    (b'"x"', "expected an object"),
    (b"null", "expected an object"),
    (b"\xff\xfe", "no JSON"),
    (b"[" * 40_000, "no JSON"),
    (b'{"a":' * 15_000, "no JSON"),
    (b'{"model": NaN}', "no JSON"),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "\\ud800"}]}', "no JSON"),
    (b'{"model": "tiny", "seed": ' + b"9" * 6000 + b"}", "no JSON"),
    (b"{}", "model"),
    (b'{"model": "tiny"}', "messages"),
    (b'{"model": 3, "messages": [{"role": "user", "content": "x"}]}', "model"),
    (b'{"model": "tiny", "messages": {}}', "messages"),
    (b'{"model": "tiny", "messages": [[]]}', "messages"),
    (b'{"model": "tiny", "messages": [null]}', "messages"),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": null}]}', "messages"),
    (b'{"model": "tiny", "messages": [{"role": null, "content": "x"}]}', "messages"),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": [{}]}]}', "messages"),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "": 1}', "unknown"),
    (b'{"model": "tiny", "messages": [{"role": "user", "content": "x"}], "temperature": 1e999}', "temperature"),
]


@pytest.mark.parametrize(("body", "reason"), MALFORMED, ids=[str(index) for index in range(len(MALFORMED))])
def test_malformed_requests_are_refused_with_one_line(served: Served, body: bytes, reason: str) -> None:
    answer = served.http.post(CHAT, content=body)
    error = answer.json()["error"]
    assert (answer.status_code, "\n" in error["message"]) == (400, False)
    assert reason in error["message"]


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_a_prompt_longer_than_the_context(served: Served, field: str) -> None:
    long = "w5 " * (CONTEXT // 2)
    limits, served.engine.limits = served.engine.limits, ServerLimits(context_tokens=100, request_bytes=100_000)
    try:
        path, value = ("/v1/completions", long) if field == "prompt" else (CHAT, [{"role": "user", "content": long}])
        answer = served.http.post(path, json={"model": "tiny", field: value})
    finally:
        served.engine.limits = limits
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "and the context 100" in answer.json()["error"]["message"]


def test_a_body_larger_than_the_limit(served: Served) -> None:
    answer = served.http.post(CHAT, content=b" " * 100_001)
    assert (answer.status_code, "more than 100000 bytes" in answer.json()["error"]["message"]) == (413, True)


def test_more_tokens_than_there_is_room_for(served: Served) -> None:
    answer = served.http.post(CHAT, json={**ANSWER, "max_tokens": CONTEXT})
    assert answer.status_code == 400
    assert f"has room for {CONTEXT - len(served.prompt)}" in answer.json()["error"]["message"]


def test_limits_come_from_the_model() -> None:
    limits = ServerLimits()
    model: Any = _WithConfig(max_position_embeddings=4096)
    assert limits.for_model(model).context_tokens == 4096
    assert limits.for_model(model).request_bytes == 32 * 4096
    with pytest.raises(Exception, match="pass --max-context"):
        limits.for_model(_WithConfig())


class _WithConfig:
    def __init__(self, **fields: Any) -> None:
        self.config = self
        vars(self).update(fields)

    def get_text_config(self, decoder: bool) -> Any:
        return self


def test_a_template_of_the_clients_is_refused(served: Served) -> None:
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    started = time.monotonic()
    answer = served.http.post(CHAT, json={**ANSWER, "chat_template_kwargs": {"chat_template": endless}})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "chat_template_kwargs")
    assert time.monotonic() - started < 5


def test_a_slow_template_holds_up_nobody(served: Served, monkeypatch: Any) -> None:
    """Rendering waits on an event here; the health check and another endpoint answer meanwhile."""
    released, entered = threading.Event(), threading.Event()
    render = served.engine._render

    def slow(request: Any) -> Any:
        if request.messages is not None:
            entered.set()
            released.wait(30)
        return render(request)

    monkeypatch.setattr(served.engine, "_render", slow)
    answers: list[str] = []
    waiting = threading.Thread(target=lambda: answers.append(served.ask("tiny")))
    waiting.start()
    assert entered.wait(30)
    assert served.http.get("/health").status_code == 200
    text = served.client.completions.create(model="tiny", prompt="w5", max_tokens=1).choices[0].text
    assert text
    assert not answers
    released.set()
    waiting.join(30)
    assert answers == [served.expected["tiny"]]


def test_rendering_has_a_limit(served: Served, monkeypatch: Any) -> None:
    released = threading.Event()
    monkeypatch.setattr(served.engine, "_render", lambda request: released.wait(30) and [])
    monkeypatch.setattr(
        served.engine, "limits", ServerLimits(context_tokens=CONTEXT, request_bytes=9999, render_seconds=0.05)
    )
    answer = served.http.post(CHAT, json=ANSWER)
    released.set()
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        400,
        "rendering the prompt took more than 0.05 s",
    )


def test_a_template_that_refuses_says_why(served: Served, monkeypatch: Any) -> None:
    template = "{{ raise_exception('no system role here') }}"
    monkeypatch.setattr(served.tokenizer, "chat_template", template)
    with pytest.raises(openai.BadRequestError, match="the chat template refused the messages: no system role here"):
        served.ask("tiny")
    monkeypatch.setattr(served.tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="no chat template; use /v1/completions"):
        served.ask("tiny")


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_generation(served: Served, stream: bool) -> None:
    """It asks for an answer of minutes and hangs up; the next client is served at once."""
    body = json.dumps({**ANSWER, "max_tokens": CONTEXT - 100, "stream": stream}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    seen = served.engine.steering.summary().prompts
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(head.encode() + body)
        _wait_for(lambda: served.engine._pending == 1)
        if stream:
            assert b"200 OK" in connection.recv(100)
    started = time.monotonic()
    assert served.ask("tiny") == served.expected["tiny"]
    assert time.monotonic() - started < 10
    _wait_for(lambda: served.engine._pending == 0)
    assert served.engine.steering.summary().prompts == seen


def test_a_client_that_leaves_while_it_waits_is_not_served(served: Served, monkeypatch: Any) -> None:
    released, entered = threading.Event(), threading.Event()
    run = served.engine._run
    ran: list[int] = []

    def waiting_run(prepared: Any, generation: Any) -> None:
        entered.set()
        released.wait(30)
        ran.append(prepared.max_tokens)
        run(prepared, generation)

    monkeypatch.setattr(served.engine, "_run", waiting_run)
    first = threading.Thread(target=lambda: served.ask("tiny"))
    first.start()
    assert entered.wait(30)

    async def leave() -> None:
        async with httpx.AsyncClient(base_url=str(served.http.base_url)) as client:
            with pytest.raises(httpx.ReadTimeout):
                await client.post(CHAT, json={**ANSWER, "max_tokens": 3}, timeout=0.3)

    asyncio.run(leave())
    _wait_for(lambda: served.engine._pending == 1)
    released.set()
    first.join(30)
    assert ran == [COUNT]


def test_too_many_waiting_requests(served: Served, monkeypatch: Any) -> None:
    monkeypatch.setattr(served.engine, "limits", ServerLimits(context_tokens=CONTEXT, request_bytes=9999, waiting=0))
    answer = served.http.post(CHAT, json=ANSWER)
    assert (answer.status_code, "waiting already" in answer.json()["error"]["message"]) == (503, True)


@pytest.mark.parametrize("stream", [False, True])
def test_our_own_refusals_keep_their_reason(served: Served, monkeypatch: Any, stream: bool) -> None:
    monkeypatch.setattr(served.model.generation_config, "guidance_scale", 3.0)
    answer = served.http.post(CHAT, json={**ANSWER, "stream": stream})
    if stream:
        event = answer.text.strip().splitlines()[-1].removeprefix("data: ")
        assert "guidance_scale is 3.0" in json.loads(event)["error"]["message"]
    else:
        assert (answer.status_code, "guidance_scale is 3.0" in answer.json()["error"]["message"]) == (400, True)
    monkeypatch.undo()
    assert served.ask("tiny") == served.expected["tiny"]


def test_a_failure_inside_generate_is_one_line(served: Served, monkeypatch: Any) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory\nwith a trace")

    monkeypatch.setattr(served.engine, "_run", fail)
    answer = served.http.post(CHAT, json=ANSWER)
    assert (answer.status_code, answer.json()["error"]["message"]) == (
        500,
        "generating failed: RuntimeError: out of memory",
    )


def _wait_for(condition: Any) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)
