"""The versions of vLLM that the hooks know, and what several of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dspa.vllm_plugin.settings import CONFIG_KEY, EngineSettings, check_request

SUPPORTED = ("0.32",)  # major.minor
ARCHITECTURES = (
    "Gemma2ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""Models whose decoder layers return a pair that sums to the residual stream."""


def wrap(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """`owner.name(...)` becomes `replacement(original, ...)`."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    wrapped.__name__, wrapped.__doc__ = name, original.__doc__
    setattr(owner, name, wrapped)


def version_problem() -> str | None:
    import vllm

    found = vllm.__version__
    if ".".join(found.split("+")[0].split(".")[:2]) in SUPPORTED:
        return None
    return f"dspa steers in vLLM {', '.join(SUPPORTED)}; found {found}, so install another or name no policy"


def settings_of(vllm_config: Any) -> EngineSettings | None:
    """The policies of an engine, as the process that started it recorded them."""
    recorded = vllm_config.additional_config
    return EngineSettings.from_json(recorded.get(CONFIG_KEY) if isinstance(recorded, Mapping) else None)


def check_engine_request(request: Any, settings: EngineSettings | None) -> None:
    """Raises InvalidInputError for an `EngineCoreRequest` that names a policy and would not be steered right."""
    check_request(
        settings,
        getattr(request.sampling_params, "extra_args", None),
        has_tokens=request.prompt_token_ids is not None,
        has_embeddings=request.prompt_embeds is not None,
        grows=request.resumable,
    )
