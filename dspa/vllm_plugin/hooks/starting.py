"""In the process that starts an engine: its policies are read once, and what would not be steered right is refused."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from dspa.errors import DspaError, InvalidInputError, MismatchError
from dspa.vllm_plugin.hooks.common import ARCHITECTURES, check_engine_request, settings_of, version_problem
from dspa.vllm_plugin.hooks.server import serve_under_policies
from dspa.vllm_plugin.settings import (
    CONFIG_KEY,
    ENVIRONMENT_VARIABLE,
    REQUEST_KEY,
    EngineSettings,
    named_sources,
    read_policies,
)

RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
_chose_runner = False  # whether it is set by this module


def create_engine_config(original: Callable[..., Any], args: Any, *rest: Any, **more: Any) -> Any:
    global _chose_runner
    configured = args.additional_config or {}
    named = configured.get(CONFIG_KEY) if isinstance(configured, Mapping) else None
    sources = named_sources(os.environ.get(ENVIRONMENT_VARIABLE), named)
    if not sources:
        if _chose_runner:  # for an engine that this process started before
            os.environ.pop(RUNNER_VARIABLE, None)
            _chose_runner = False
        return original(args, *rest, **more)
    problem = version_problem()
    if problem is not None:
        raise InvalidInputError(problem)
    if not isinstance(configured, Mapping):
        raise InvalidInputError(f"additional_config is a {type(configured).__name__}; with policies, pass a dictionary")
    settings = read_policies(sources)
    _chose_runner = _chose_runner or RUNNER_VARIABLE not in os.environ
    if os.environ.setdefault(RUNNER_VARIABLE, "0") not in ("0", "false", "False"):
        raise InvalidInputError(f"{RUNNER_VARIABLE} is set; policies are served by vLLM's first model runner: unset it")
    config = original(args, *rest, **more)
    check_config(config, settings)
    split_graphs(config.compilation_config)
    config.additional_config = {**config.additional_config, CONFIG_KEY: settings.as_json()}
    usage_context = rest[0] if rest else more.get("usage_context")
    if getattr(usage_context, "name", None) in ("OPENAI_API_SERVER", "OPENAI_BATCH_RUNNER"):
        serve_under_policies(settings)
    return config


def check_config(config: Any, settings: EngineSettings) -> None:
    """Refuses what would not be steered right."""
    parallel, cache, events = config.parallel_config, config.cache_config, config.kv_events_config
    refused = {
        "vLLM's second model runner": config.use_v2_model_runner,
        "vLLM's frontend in Rust (VLLM_USE_RUST_FRONTEND)": os.environ.get("VLLM_USE_RUST_FRONTEND", "0") != "0",
        "pooling": config.model_config.runner_type != "generate",
        "speculative decoding": config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "steps in several micro-batches": parallel.use_ubatching,
        "a KV connector": config.kv_transfer_config is not None,
        "events of the KV cache, which name blocks without their policies": bool(
            events is not None and events.enable_kv_cache_events
        ),
        "fast prefill by KV sharing": cache.kv_sharing_fast_prefill,
        "scheduling by priority, which may preempt a request before its blocks were computed": (
            config.scheduler_config.policy != "fcfs"
        ),
        "the Cohere API (VLLM_ENABLE_COHERE_API), whose requests cannot name a policy": (
            os.environ.get("VLLM_ENABLE_COHERE_API", "0") != "0"
        ),
        "LoRA": config.lora_config is not None,
    }
    for what, present in refused.items():
        if present:
            raise InvalidInputError(f"policies were named together with {what}, which is not served; start without it")
    architecture = config.model_config.architecture
    if architecture not in ARCHITECTURES:
        raise InvalidInputError(f"{architecture} cannot be steered in vLLM; expected one of {', '.join(ARCHITECTURES)}")
    depth = config.model_config.hf_text_config.num_hidden_layers
    if settings.layers[-1] >= depth:
        raise MismatchError(f"a policy needs layer {settings.layers[-1]}; this model's layers are 0 to {depth - 1}")


def split_graphs(compilation: Any) -> None:
    """Lets the operation run between pieces of a captured graph, with the step's own tokens, and not inside of one:
    inside, it would run when the graph is captured and never again.

    Raises:
        InvalidInputError: if graphs are captured that are not split.
    """
    from vllm.config import CompilationMode, CUDAGraphMode

    from dspa.vllm_plugin.layer_op import OPERATION

    is_split = compilation.mode == CompilationMode.VLLM_COMPILE and bool(compilation.splitting_ops)
    if is_split and OPERATION not in compilation.splitting_ops:
        compilation.splitting_ops.append(OPERATION)
    if compilation.cudagraph_mode in (None, CUDAGraphMode.NONE):
        return
    if not is_split:
        raise InvalidInputError(
            f"CUDA graphs are captured (cudagraph_mode {compilation.cudagraph_mode.name}) of a model that is not split "
            "where it is steered; leave the compilation mode and splitting_ops as they are, with "
            "VLLM_USE_BREAKABLE_CUDAGRAPH=0, or pass enforce_eager=True"
        )
    compilation.cudagraph_mode = CUDAGraphMode.PIECEWISE


def process_inputs(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    from vllm.exceptions import VLLMValidationError

    request = original(processor, *args, **kwargs)
    try:
        check_engine_request(request, settings_of(processor.vllm_config))
    except DspaError as error:
        raise VLLMValidationError(str(error), parameter=REQUEST_KEY) from error
    return request


def apply_ready_response(original: Callable[..., Any], client: Any, payload: bytes) -> None:
    import msgspec

    settings = settings_of(client.vllm_config)
    if settings is not None:
        found = msgspec.msgpack.decode(payload) if payload else {}
        if found.get(CONFIG_KEY) != settings.token:
            raise MismatchError(
                "an engine core of vLLM does not serve the policies that were named, so that nothing would be steered; "
                "install the same dspa on every node, and see that VLLM_PLUGINS, if set, names dspa"
            )
    original(client, payload)
