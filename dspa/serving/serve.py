"""`dspa serve`: transformers' own OpenAI-compatible server, with policies attached to the model it serves.

The server, its endpoints and its handlers are those of `transformers serve`. What is added are the names it
serves: `MODEL` is the model as it is, `MODEL@POLICY` the model under a policy. All of them are one model in memory;
requests take turns.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspa.errors import InvalidInputError
from dspa.methods.policy import Policy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.online.steering import Steering, steer

if TYPE_CHECKING:
    from fastapi import FastAPI

try:
    from fastapi import HTTPException
    from transformers.cli.serving.chat_completion import ChatCompletionHandler
    from transformers.cli.serving.completion import CompletionHandler
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.response import ResponseHandler
    from transformers.cli.serving.server import build_server
    from transformers.cli.serving.utils import GenerationState
except (ImportError, NameError) as error:  # without its packages, transformers' modules lack names they use
    raise InvalidInputError(
        f"the server needs packages that are not installed ({error}); install them with: pip install 'dspa[serve]'"
    ) from error


class ServedModel:
    """The model under one of its names: everything is the model's, except that `generate` waits for its turn and
    follows the policy of that name."""

    def __init__(self, steering: Steering, policy: str | None, turn: threading.Lock) -> None:
        self._model: Any = steering.model
        self._steering = steering
        self._policy = policy
        self._turn = turn

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's own."""
        with self._turn:
            self._steering.select(self._policy)
            return self._model.generate(*args, **kwargs)


class SteeredModelManager(ModelManager):
    """Answers to a model's names with that model under the policies.

    Attributes:
        steering: the policies on the model; its summary says what was edited so far.
        names: the names that are served, in the order of the policies.
    """

    def __init__(self, model: str, policies: Mapping[str, Policy], **options: Any) -> None:
        super().__init__(**options)
        loaded, self._processor = super().load_model_and_processor(super().process_model_name(model))
        self.steering = steer(loaded.eval(), policies, select=None)
        turn = threading.Lock()
        self._served: dict[str, Any] = {model: ServedModel(self.steering, None, turn)}
        self._served |= {f"{model}@{name}": ServedModel(self.steering, name, turn) for name in policies}
        self.names = list(self._served)

    @staticmethod
    def process_model_name(model_id: str) -> str:
        """The name as it is: what follows the @ is a policy here, not a revision."""
        return model_id

    def load_model_and_processor(self, model_id_and_revision: str, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        """The model under that name. Raises HTTPException 404 for another."""
        if model_id_and_revision not in self._served:
            raise HTTPException(
                status_code=404,
                detail=f"model {model_id_and_revision!r} is not served here; expected one of {', '.join(self.names)}",
            )
        return self._served[model_id_and_revision], self._processor

    def get_gen_models(self, cache_dir: str | None = None) -> list[dict[str, Any]]:  # type: ignore[override]
        """The names, as `GET /v1/models` lists them."""
        return [{"id": name, "object": "model", "created": 0, "owned_by": "dspa"} for name in self.names]

    def shutdown(self) -> None:
        """Nothing: the model was loaded for good, and is not served without its policies."""


class NotServed:
    """An endpoint of transformers' server that does not go through `generate`, so that no policy would be followed."""

    async def handle_request(self, *args: Any) -> None:
        raise HTTPException(
            status_code=501, detail="this endpoint is not steered, and so not served; use chat completions"
        )


def steered_app(manager: SteeredModelManager) -> FastAPI:
    """Transformers' server for a steered model."""
    state = GenerationState()
    other: Any = NotServed()
    return build_server(
        manager,
        ChatCompletionHandler(model_manager=manager, generation_state=state),
        completion_handler=CompletionHandler(model_manager=manager, generation_state=state),
        response_handler=ResponseHandler(model_manager=manager, generation_state=state),
        transcription_handler=other,
        systemone_handler=other,
        generation_state=state,
    )


def named_policies(sources: list[str]) -> dict[str, Policy]:
    """Policies from `NAME=FOLDER`, or from `FOLDER` alone, which then is the name.

    Raises:
        InvalidInputError: if there is none, two have one name, or one cannot be loaded.
    """
    policies: dict[str, Policy] = {}
    for source in sources:
        name, separator, folder = source.partition("=")
        if not separator or Path(source).is_dir():
            name, folder = Path(source).name, source
        if not name or name in policies:
            raise InvalidInputError(f"policy {source!r} has the name {name!r}, as another one has; pass NAME=FOLDER")
        policies[name] = SteeringPolicy.from_pretrained(folder)
    if not policies:
        raise InvalidInputError("no policy was given; pass --policy FOLDER or --policy NAME=FOLDER")
    return policies


def run_server(model: str, policies: list[str], *, host: str, port: int, dtype: str, device: str) -> None:
    """Loads everything and serves until interrupted.

    Raises:
        InvalidInputError: if the model or a policy cannot be loaded.
        MismatchError: if a policy belongs to another model.
    """
    import uvicorn

    loaded = named_policies(policies)
    try:
        manager = SteeredModelManager(model, loaded, device=device, dtype=dtype, model_timeout=-1)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()
        raise InvalidInputError(f"model {model!r} cannot be loaded: {reason[0] if reason else error!r}") from error
    print(f"serving {', '.join(manager.names)} on http://{host}:{port}/v1", flush=True)
    uvicorn.run(steered_app(manager), host=host, port=port, log_level="warning")
