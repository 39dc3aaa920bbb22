"""The served model, asked by the real openai client over HTTP on this machine: names, policies, turns, the command."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from fsrl_cases import tiny_fsrl_policy
from naive_generation import naive_generate
from tiny_models import D_MODEL, prompts, tiny_model
from typer.testing import CliRunner

from dspa import FsrlPolicy, SteeringPolicy, VectorPolicy
from dspa.cli import app
from dspa.errors import InvalidInputError
from dspa.serving.serve import listening_socket, named_policies

openai = pytest.importorskip("openai", reason="the server needs dspa[serve]")
pytest.importorskip("uvicorn", reason="the server needs dspa[serve]")

from serving.served import COUNT, Served  # noqa: E402


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(tmp_path_factory.mktemp("served"))
    yield server
    server.stop()


def test_the_names_are_listed(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == ["tiny", "tiny@a", "tiny@b"]
    assert served.http.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize("policy", ["", "@a", "@b"])
@pytest.mark.parametrize("stream", [False, True])
def test_each_name_has_its_policy(served: Served, policy: str, stream: bool) -> None:
    assert served.ask(served.name + policy, stream=stream) == served.expected[served.name + policy]
    assert len(set(served.expected.values())) == 3


def test_concurrent_requests_under_different_policies(served: Served) -> None:
    before = served.engine.steering.summary().prompts
    names = [served.name + policy for policy in ("", "@a", "@b") for _ in range(4)]
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda index: served.ask(names[index], stream=index % 2 == 0), range(len(names))))
    assert answers == [served.expected[name] for name in names]
    assert served.engine.steering.summary().prompts == before + 8


@pytest.mark.parametrize("stream", [False, True])
def test_text_completions(served: Served, stream: bool) -> None:
    prompt = prompts((6,))[0]
    text = str(served.tokenizer.decode(prompt))
    answer: Any = served.client.completions.create(
        model="tiny@a", prompt=text, max_tokens=COUNT, temperature=0, stream=stream
    )
    pieces = list(answer) if stream else [answer]
    model = tiny_model("llama", dtype=torch.float32)  # not the one that is served, which is steered already
    expected = served.text(naive_generate(model, served.policies["a"], [prompt], COUNT)[0])
    assert "".join(piece.choices[0].text for piece in pieces) == expected


@pytest.mark.parametrize("asked", ["w10 w20 w30", [{"role": "user", "content": "w10 w20 w30"}]])
@pytest.mark.parametrize("stream", [False, True])
def test_responses(served: Served, asked: Any, stream: bool) -> None:
    answer: Any = served.client.responses.create(
        model="tiny@b", input=asked, max_output_tokens=COUNT, temperature=0, stream=stream
    )
    if stream:
        events = list(answer)
        assert [event.sequence_number for event in events] == list(range(len(events)))
        deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
        answer = events[-1].response
        assert deltas == answer.output_text
    assert answer.object == "response"
    assert answer.output_text == served.expected["tiny@b"]
    assert (answer.status, answer.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    assert (answer.usage.input_tokens, answer.usage.output_tokens) == (len(served.prompt), COUNT)


@pytest.mark.parametrize("name", ["other", "@c"])
def test_a_name_that_is_not_served_is_refused(served: Served, name: str) -> None:
    with pytest.raises(openai.NotFoundError, match="is not served here; expected one of tiny, tiny@a, tiny@b"):
        served.chat(model=served.name + name)


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/audio/transcriptions", "/reset", "/load_model"])
def test_an_endpoint_that_cannot_be_steered_is_refused(served: Served, path: str) -> None:
    answer = served.http.post(path, json={"model": served.name})
    assert answer.status_code == 404
    assert f"POST {path} is not served here" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("sources", "line"), [([], "no policy was given"), (["a=x", "a=y"], "no policy at x"), (["=x"], "pass NAME=FOLDER")]
)
def test_policies_that_cannot_be_named_or_loaded(sources: list[str], line: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInputError, match=line):
        named_policies(sources)


def test_policies_of_every_kind_are_loaded(tmp_path: Path, served: Served) -> None:
    vector = VectorPolicy(torch.ones(D_MODEL), 1, 0.5).save_pretrained(tmp_path / "vector")
    adapter = tiny_fsrl_policy().save_pretrained(tmp_path / "adapter")
    loaded = named_policies([served.sources[0], f"v={vector}", str(adapter)])
    assert {name: type(policy) for name, policy in loaded.items()} == {
        "a": SteeringPolicy,
        "v": VectorPolicy,
        "adapter": FsrlPolicy,
    }


def test_two_policies_of_one_name(served: Served) -> None:
    with pytest.raises(InvalidInputError, match="has the name 'a', as another one has"):
        named_policies([served.sources[0], served.sources[0]])


def test_the_command_says_what_is_wrong(tmp_path: Path, served: Served) -> None:
    folder = served.sources[0].removeprefix("a=")
    model = str(tmp_path / "none")
    result = CliRunner().invoke(app, ["serve", "--model", model, "--policy", folder, "--port", "0"])
    assert isinstance(result.exception, InvalidInputError)
    assert "cannot be loaded" in str(result.exception)


@pytest.mark.long
def test_a_busy_port_is_one_line_before_anything_is_loaded() -> None:
    with listening_socket("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        arguments = ["serve", "--model", "none", "--policy", "none", "--host", "127.0.0.1", "--port", port]
        command = [sys.executable, "-c", "from dspa.cli import main; main()", *arguments]
        finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 2
    assert not finished.stdout
    assert finished.stderr.splitlines() == [
        f"error: cannot listen on 127.0.0.1:{port}: Address already in use; pass another --port or --host"
    ]


@pytest.mark.parametrize(("host", "port"), [("no.such.host.invalid", 1), ("127.0.0.1", 700000), ("192.0.2.1", 1)])
def test_an_address_that_cannot_be_had(host: str, port: int) -> None:
    with pytest.raises(InvalidInputError, match="cannot listen on"):
        listening_socket(host, port)
