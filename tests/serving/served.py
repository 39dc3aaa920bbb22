"""A server in a thread for tests, and what it has to answer."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import httpx
import openai
import torch
import uvicorn
from naive_generation import naive_generate
from tiny_models import tiny_model, tiny_policy, tiny_tokenizer

from dspa.serving.app import build_app
from dspa.serving.engine import Engine, ServerLimits
from dspa.serving.serve import listening_socket, named_policies

COUNT = 8
MESSAGES: list[Any] = [{"role": "user", "content": "w10 w20 w30"}]


class Served:
    """A server of a tiny model under two policies, `@a` and `@b`, and clients of it."""

    def __init__(self, folder: Path, limits: ServerLimits | None = None) -> None:
        self.model: Any = tiny_model("llama", dtype=torch.float32)
        self.tokenizer = tiny_tokenizer()
        self.policies = {
            "a": tiny_policy(self.model, dtype=torch.float32),
            "b": tiny_policy(self.model, dtype=torch.float32, seed=2),
        }
        self.sources = [f"{name}={policy.save_pretrained(folder / name)}" for name, policy in self.policies.items()]
        self.name = "tiny"
        inputs: Any = self.tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_dict=True)
        self.prompt: list[int] = inputs["input_ids"]
        self.expected = {
            f"{self.name}@{name}": self.text(naive_generate(self.model, policy, [self.prompt], COUNT)[0])
            for name, policy in self.policies.items()
        }
        unsteered = self.model.generate(torch.tensor([self.prompt]), max_new_tokens=COUNT, do_sample=False)
        self.expected[self.name] = self.text(unsteered[0, len(self.prompt) :].tolist())

        self.engine = Engine(self.name, self.model, self.tokenizer, named_policies(self.sources), limits)
        listener = listening_socket("127.0.0.1", 0)
        self.port = listener.getsockname()[1]
        self.server = uvicorn.Server(uvicorn.Config(build_app(self.engine), log_level="error"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        address = f"http://127.0.0.1:{self.port}"
        self.client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=60)
        self.http = httpx.Client(base_url=address, timeout=60)

    def text(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def stop(self) -> None:
        self.http.close()
        self.client.close()
        self.server.should_exit = True
        self.thread.join(30)
        self.engine.close()

    def chat(self, *, policy: str = "", **fields: Any) -> Any:
        """A chat completion of the usual messages, greedy and short unless `fields` say otherwise."""
        return self.client.chat.completions.create(
            **{
                "model": self.name + policy,
                "messages": MESSAGES,
                "max_tokens": COUNT,
                "temperature": 0,
                **fields,
            }
        )

    def ask(self, model: str, *, stream: bool = False) -> str:
        answer = self.chat(policy=model.removeprefix(self.name), stream=stream)
        if not stream:
            return answer.choices[0].message.content
        return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
