"""The served model, asked by the real openai client over HTTP on this machine."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_generation import naive_generate
from tiny_models import prompts, tiny_model, tiny_policy, tiny_tokenizer
from typer.testing import CliRunner

from dspa.cli import app
from dspa.errors import InvalidInputError
from dspa.methods.steering_policy import SteeringPolicy

openai = pytest.importorskip("openai", reason="the server needs dspa[serve]")
uvicorn = pytest.importorskip("uvicorn", reason="the server needs dspa[serve]")

from dspa.serving.serve import SteeredModelManager, named_policies, steered_app  # noqa: E402

COUNT = 8
MESSAGES: list[Any] = [{"role": "user", "content": "w10 w20 w30"}]


class Served:
    """A server in a thread, its client, and what it has to answer."""

    def __init__(self, folder: Path) -> None:
        model: Any = tiny_model("llama", dtype=torch.float32)
        model.generation_config.do_sample = False
        model.save_pretrained(folder / "model")
        tiny_tokenizer().save_pretrained(folder / "model")
        policies = {"a": tiny_policy(model, dtype=torch.float32), "b": tiny_policy(model, dtype=torch.float32, seed=2)}
        self.sources = [f"{name}={policy.save_pretrained(folder / name)}" for name, policy in policies.items()]
        self.name = str(folder / "model")
        inputs: Any = tiny_tokenizer().apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)
        self.prompt: list[int] = inputs["input_ids"]
        self.expected = {
            f"{self.name}@{name}": self.text(naive_generate(model, policy, [self.prompt], COUNT)[0])
            for name, policy in policies.items()
        }
        unsteered = model.generate(torch.tensor([self.prompt]), max_new_tokens=COUNT)[0, len(self.prompt) :]
        self.expected[self.name] = self.text(unsteered.tolist())

        self.manager = SteeredModelManager(
            self.name, named_policies(self.sources), device="cpu", dtype="float32", model_timeout=-1
        )
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.server = uvicorn.Server(
            uvicorn.Config(steered_app(self.manager), host="127.0.0.1", port=port, log_level="error")
        )
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.02)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def text(self, tokens: list[int]) -> str:
        return str(tiny_tokenizer().decode(tokens, skip_special_tokens=True))

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(30)
        self.manager.steering.remove()

    def ask(self, model: str, *, stream: bool = False) -> str:
        answer = self.client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=COUNT, temperature=0, stream=stream
        )
        if not stream:
            return answer.choices[0].message.content or ""
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    server = Served(tmp_path_factory.mktemp("served"))
    yield server
    server.stop()


def test_the_names_are_listed(served: Served) -> None:
    assert [model.id for model in served.client.models.list()] == [
        served.name,
        f"{served.name}@a",
        f"{served.name}@b",
    ]


@pytest.mark.parametrize("policy", ["", "@a", "@b"])
@pytest.mark.parametrize("stream", [False, True])
def test_each_name_has_its_policy(served: Served, policy: str, stream: bool) -> None:
    assert served.ask(served.name + policy, stream=stream).split() == served.expected[served.name + policy].split()
    assert len(set(served.expected.values())) == 3


def test_concurrent_requests_under_different_policies(served: Served) -> None:
    before = served.manager.steering.summary().prompts
    names = [served.name + policy for policy in ("", "@a", "@b") for _ in range(4)]
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda index: served.ask(names[index], stream=index % 2 == 0), range(len(names))))
    assert [answer.split() for answer in answers] == [served.expected[name].split() for name in names]
    assert served.manager.steering.summary().prompts == before + 8


def test_legacy_completions(served: Served) -> None:
    prompt = prompts((6,))[0]
    model = tiny_model("llama", dtype=torch.float32)
    policy = SteeringPolicy.from_pretrained(served.sources[0].removeprefix("a="))
    answer = served.client.completions.create(
        model=f"{served.name}@a", prompt=str(tiny_tokenizer().decode(prompt)), max_tokens=COUNT, temperature=0
    )
    assert answer.choices[0].text.split() == served.text(naive_generate(model, policy, [prompt], COUNT)[0]).split()


@pytest.mark.parametrize("name", ["other", "@c"])
def test_a_name_that_is_not_served_is_refused(served: Served, name: str) -> None:
    with pytest.raises(openai.NotFoundError) as error:
        served.ask(served.name + name)
    assert "is not served here; expected one of" in error.value.response.json()["detail"]


def test_an_endpoint_that_cannot_be_steered_is_refused(served: Served) -> None:
    with pytest.raises(openai.APIStatusError) as error:
        served.client.post("/systemone", body={"model": served.name}, cast_to=object)
    assert error.value.status_code == 501


@pytest.mark.parametrize(
    ("sources", "line"), [([], "no policy was given"), (["a=x", "a=y"], "no policy at x"), (["=x"], "pass NAME=FOLDER")]
)
def test_policies_that_cannot_be_named_or_loaded(sources: list[str], line: str, monkeypatch: Any) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInputError, match=line):
        named_policies(sources)


def test_two_policies_of_one_name(served: Served) -> None:
    with pytest.raises(InvalidInputError, match="has the name 'a', as another one has"):
        named_policies([served.sources[0], served.sources[0]])


def test_the_command_says_what_is_wrong(tmp_path: Path, served: Served) -> None:
    folder = served.sources[0].removeprefix("a=")
    result = CliRunner().invoke(app, ["serve", "--model", str(tmp_path / "none"), "--policy", folder])
    assert isinstance(result.exception, InvalidInputError)
    assert "cannot be loaded" in str(result.exception)
