"""In a server: models under a policy have names of their own."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from dspa.errors import InvalidInputError
from dspa.vllm_plugin.hooks.common import wrap
from dspa.vllm_plugin.settings import REQUEST_KEY, EngineSettings

_serving = False
_asked_name: ContextVar[str | None] = ContextVar("dspa_asked_name", default=None)  # of the request that is served


def serve_under_policies(settings: EngineSettings) -> None:
    """Makes the server of this process answer as MODEL@POLICY as well, and report counters."""
    global _serving
    if _serving:
        return
    _serving = True
    from prometheus_client import REGISTRY
    from vllm.entrypoints.openai.models.protocol import BaseModelPath
    from vllm.entrypoints.openai.models.serving import OpenAIServingModels
    from vllm.entrypoints.serve.engine.serving import BaseServing

    from dspa.vllm_plugin.metrics import FOLDER_VARIABLE, PolicyCollector

    if FOLDER_VARIABLE not in os.environ:  # the servers of one engine have the same environment
        os.environ[FOLDER_VARIABLE] = folder = tempfile.mkdtemp(prefix="dspa-vllm-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
    collector: Any = PolicyCollector(Path(os.environ[FOLDER_VARIABLE]), list(settings.policies))
    REGISTRY.register(collector)

    policy_of: dict[str, str] = {}  # by the name of a steered model
    base_names: set[str] = set()

    def init_models(
        original: Callable[..., Any], models: Any, engine_client: Any, base_model_paths: Any, **kw: Any
    ) -> None:
        base_names.update(path.name for path in base_model_paths)
        steered = []
        for name in settings.policies:
            for path in base_model_paths:
                steered.append(BaseModelPath(name=f"{path.name}@{name}", model_path=path.model_path))
                policy_of[steered[-1].name] = name
        both = base_names & policy_of.keys()
        if both:
            raise InvalidInputError(
                f"the served model {both.pop()!r} has the name of a model under a policy; rename it"
            )
        original(models, engine_client, [*base_model_paths, *steered], **kw)

    def model_name(original: Callable[..., str], models: Any, lora_request: Any = None) -> str:
        return _asked_name.get() or original(models, lora_request)

    check_model = BaseServing._check_model

    async def checked(serving: Any, request: Any) -> Any:
        _asked_name.set(None)
        answer = await check_model(serving, request)
        problem = None if answer is not None else follow_name(request, policy_of, base_names)
        return answer if problem is None else serving.create_error_response(problem)

    wrap(OpenAIServingModels, "__init__", init_models)
    wrap(OpenAIServingModels, "model_name", model_name)
    BaseServing._check_model = checked


def follow_name(request: Any, policy_of: Mapping[str, str], base_names: Collection[str]) -> str | None:
    """Has a request follow the policy of the model's name that it asks for.

    Args:
        request: of the server's API.
        policy_of: the policy of each model that is served under one.
        base_names: those of models without one. Where vLLM checks no names, others are served like them.

    Returns:
        Why it cannot be served; None if it can.
    """
    asked = request.model or ""
    policy = policy_of.get(asked)
    named = (getattr(request, "vllm_xargs", None) or {}).get(REQUEST_KEY)
    model, _, after = asked.rpartition("@")
    if policy is None and asked not in base_names and (model in base_names or after in policy_of.values()):
        return f"{asked} is not served; served under a policy are {', '.join(policy_of)}"
    has_field = "vllm_xargs" in type(request).model_fields
    if not has_field and type(request).model_config.get("extra") != "allow":  # whether it was named is not known
        return "this endpoint is not served where there are policies: its requests cannot name one"
    if policy is None and named is None:
        return None
    if not has_field:  # other fields are let in, and have no effect
        return "policies are followed by chat completions, completions and responses; ask for the model without one"
    if policy is not None:
        if named not in (None, policy):
            return f"the request asks for {asked} and, in vllm_xargs, for policy {named!r}"
        request.vllm_xargs = {**(request.vllm_xargs or {}), REQUEST_KEY: policy}
        _asked_name.set(asked)
    if getattr(request, "use_beam_search", False):
        return (
            "beam search is not served under a policy: vLLM makes new prompts of the beams; leave use_beam_search out"
        )
    return None
