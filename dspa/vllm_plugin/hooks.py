"""Everything that touches vLLM's insides, for the versions that `SUPPORTED` names.

A spawned process loads the plugin while it makes its engine core or its worker, so that nothing earlier can be hooked.

Written against vLLM's V1 engine and its first model runner. What is relied on, by process:

    the one that starts it   `EngineArgs.create_engine_config` makes the configuration that all processes get;
                             `InputProcessor.process_inputs` makes a request of what a user passed.
    the server               `OpenAIServingModels` lists names; `BaseServing._check_model` sees each request first.
    the engine's core        `EngineCore.preprocess_add_request` makes the core's request of it; `request_block_hasher`
                             hashes its blocks for the prefix cache, by `kv_cache_utils.generate_block_hash_extra_keys`.
    a worker                 `WorkerBase.__init__` is called for every worker, whose `load_model` loads a model, which
                             is traced later; `GPUModelRunner._model_forward` runs it for one step, whose requests are
                             in `input_batch`, `requests` and `query_start_loc`; `_on_request_state_removed` tells which
                             have ended; `initialize_kv_cache` which blocks there are.
"""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspa.errors import DspaError, InvalidInputError, MismatchError
from dspa.vllm_plugin.prefix_keys import block_key
from dspa.vllm_plugin.settings import (
    CONFIG_KEY,
    ENVIRONMENT_VARIABLE,
    REQUEST_KEY,
    EngineSettings,
    named_sources,
    read_policies,
    requested_policy,
)

if TYPE_CHECKING:
    from dspa.vllm_plugin.continuous import ContinuousSteering
    from dspa.vllm_plugin.step import Segment

SUPPORTED = ("0.32",)  # major.minor
ARCHITECTURES = (
    "Gemma2ForCausalLM",
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
)
"""Models whose decoder layers return a pair that sums to the residual stream."""

_RUNNER_VARIABLE = "VLLM_USE_V2_MODEL_RUNNER"
_KEYS = "_dspa_block_key"  # of a vLLM request: from a block's end to its key
_SETTINGS = "_dspa_settings"  # of a vLLM engine core, once a request has come
_installed = False
_serving = False


def install() -> None:
    """Places the hooks. Each of them does nothing as long as no policy is named."""
    global _installed
    if _installed:
        return
    _installed = True
    from vllm.engine.arg_utils import EngineArgs

    _wrap(EngineArgs, "create_engine_config", _create_engine_config)
    if _version_problem() is not None:
        return  # the hook above refuses policies
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerBase

    _wrap(InputProcessor, "process_inputs", _process_inputs)
    _wrap(EngineCore, "preprocess_add_request", _preprocess_add_request)
    _wrap(kv_cache_utils, "generate_block_hash_extra_keys", _extra_keys)
    _wrap(WorkerBase, "__init__", _init_worker)


def _wrap(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """`owner.name(...)` becomes `replacement(original, ...)`."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        return replacement(original, *args, **kwargs)

    wrapped.__name__, wrapped.__doc__ = name, original.__doc__
    setattr(owner, name, wrapped)


def _version_problem() -> str | None:
    import vllm

    found = vllm.__version__
    if ".".join(found.split("+")[0].split(".")[:2]) in SUPPORTED:
        return None
    return f"dspa steers in vLLM {', '.join(SUPPORTED)}; found {found}, so install another or name no policy"


# ------------------------------------------------------------------------------------------- the process that starts it


def _create_engine_config(original: Callable[..., Any], args: Any, *rest: Any, **more: Any) -> Any:
    sources = named_sources(os.environ.get(ENVIRONMENT_VARIABLE), (args.additional_config or {}).get(CONFIG_KEY))
    if not sources:
        return original(args, *rest, **more)
    problem = _version_problem()
    if problem is not None:
        raise InvalidInputError(problem)
    settings = read_policies(sources)
    if os.environ.setdefault(_RUNNER_VARIABLE, "0") not in ("0", "false", "False"):
        raise InvalidInputError(
            f"{_RUNNER_VARIABLE} is set; policies are served by vLLM's first model runner, so unset it"
        )
    config = original(args, *rest, **more)
    _check_config(config, settings)
    _split_graphs(config)
    config.additional_config = {**config.additional_config, CONFIG_KEY: settings.as_json()}
    usage_context = rest[0] if rest else more.get("usage_context")
    if getattr(usage_context, "name", None) == "OPENAI_API_SERVER":
        _serve(settings)
    return config


def _check_config(config: Any, settings: EngineSettings) -> None:
    """Refuses what would not be steered right."""
    parallel, cache = config.parallel_config, config.cache_config
    refused = {
        "speculative decoding": config.speculative_config is not None,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "context parallelism": parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
        "steps in several micro-batches": parallel.use_ubatching,
        "a KV connector": config.kv_transfer_config is not None,
        "fast prefill by KV sharing": cache.kv_sharing_fast_prefill,
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


def _split_graphs(config: Any) -> None:
    """Lets the operation run between pieces of a captured graph, with the step's own tokens, and not inside of one."""
    from dspa.vllm_plugin.layer_op import OPERATION

    compilation = config.compilation_config
    if compilation.splitting_ops and OPERATION not in compilation.splitting_ops:
        compilation.splitting_ops.append(OPERATION)
    if compilation.cudagraph_mode is not None and compilation.cudagraph_mode.has_full_cudagraphs():
        if not compilation.splitting_ops:
            raise InvalidInputError("the whole model would be one CUDA graph; leave splitting_ops as they are")
        compilation.cudagraph_mode = type(compilation.cudagraph_mode).PIECEWISE


def _process_inputs(original: Callable[..., Any], processor: Any, *args: Any, **kwargs: Any) -> Any:
    request = original(processor, *args, **kwargs)
    extra_args = getattr(request.sampling_params, "extra_args", None)
    if not extra_args or extra_args.get(REQUEST_KEY) is None:
        return request
    from vllm.exceptions import VLLMValidationError

    settings = EngineSettings.from_json(processor.vllm_config.additional_config.get(CONFIG_KEY))
    try:
        if settings is None:
            raise InvalidInputError("a request names a policy; this engine was started without any")
        requested_policy(extra_args, settings.policies)
        if request.prompt_token_ids is None or request.prompt_embeds is not None:
            raise InvalidInputError("a request with a policy has its prompt as embeddings; pass text or tokens")
        if request.resumable:
            raise InvalidInputError("a request with a policy has a prompt that grows; pass it whole")
    except DspaError as error:
        raise VLLMValidationError(str(error), parameter=REQUEST_KEY) from error
    return request


# ---------------------------------------------------------------------------------------------------------- the server


_asked_name: ContextVar[str | None] = ContextVar("dspa_asked_name", default=None)  # of the request that is served


def _serve(settings: EngineSettings) -> None:
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

    def init_models(
        original: Callable[..., Any], models: Any, engine_client: Any, base_model_paths: Any, **kw: Any
    ) -> None:
        steered = [
            BaseModelPath(name=f"{path.name}@{name}", model_path=path.model_path)
            for name in settings.policies
            for path in base_model_paths
        ]
        original(models, engine_client, [*base_model_paths, *steered], **kw)

    def model_name(original: Callable[..., str], models: Any, lora_request: Any = None) -> str:
        return _asked_name.get() or original(models, lora_request)

    check_model = BaseServing._check_model

    async def checked(serving: Any, request: Any) -> Any:
        _asked_name.set(None)
        problem = _follow_name(request, settings) if serving.models.is_base_model(request.model) else None
        return serving.create_error_response(problem) if problem else await check_model(serving, request)

    _wrap(OpenAIServingModels, "__init__", init_models)
    _wrap(OpenAIServingModels, "model_name", model_name)
    BaseServing._check_model = checked


def _follow_name(request: Any, settings: EngineSettings) -> str | None:
    """Gives a request the policy of the model's name that it asks for.

    Returns:
        Why it cannot be served; None if it can.
    """
    _, separator, policy = (request.model or "").rpartition("@")
    steered = bool(separator) and policy in settings.policies
    if steered:
        if not hasattr(request, "vllm_xargs"):
            return f"{request.model} is served by chat completions, completions and responses"
        xargs = request.vllm_xargs or {}
        if xargs.get(REQUEST_KEY, policy) != policy:
            return f"the request asks for {request.model} and, in vllm_xargs, for policy {xargs[REQUEST_KEY]!r}"
        request.vllm_xargs = {**xargs, REQUEST_KEY: policy}
        _asked_name.set(request.model)
    named = (getattr(request, "vllm_xargs", None) or {}).get(REQUEST_KEY)
    if named is not None and getattr(request, "use_beam_search", False):
        return (
            "beam search is not served under a policy: vLLM makes new prompts of the beams; leave use_beam_search out"
        )
    return None


# ---------------------------------------------------------------------------------------------------- the engine's core


def _preprocess_add_request(original: Callable[..., Any], core: Any, request: Any) -> Any:
    if not hasattr(core, _SETTINGS):  # the first request
        settings = EngineSettings.from_json(core.vllm_config.additional_config.get(CONFIG_KEY))
        if settings is not None and core.request_block_hasher is not None:
            core.request_block_hasher = _keyed_hasher(core.request_block_hasher, settings)
        setattr(core, _SETTINGS, settings)
    return original(core, request)


def _keyed_hasher(hasher: Callable[[Any], Any], settings: EngineSettings) -> Callable[[Any], Any]:
    def hash_blocks(request: Any) -> Any:
        if not hasattr(request, _KEYS):
            params = request.sampling_params
            name = requested_policy(None if params is None else params.extra_args, settings.policies)
            policy = None if name is None else settings.policies[name]
            setattr(request, _KEYS, policy and (lambda end: block_key(policy, request.num_prompt_tokens, end)))
        return hasher(request)

    return hash_blocks


def _extra_keys(
    original: Callable[..., Any], request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
) -> Any:
    keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
    key_of = getattr(request, _KEYS, None)
    key = None if key_of is None else key_of(end_token_idx)
    return keys if key is None else (*(keys or ()), (CONFIG_KEY, key)), next_mm_idx


# ------------------------------------------------------------------------------------------------------------- a worker


def _init_worker(original: Callable[..., Any], worker: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    original(worker, vllm_config, *args, **kwargs)
    settings = EngineSettings.from_json(vllm_config.additional_config.get(CONFIG_KEY))
    if settings is not None:
        load = worker.load_model

        def load_model(*args: Any, **kwargs: Any) -> None:
            load(*args, **kwargs)
            attach(worker.model_runner, settings)

        worker.load_model = load_model


def attach(runner: Any, settings: EngineSettings) -> ContinuousSteering:
    """Steers the requests of a model runner, whose model was loaded and not traced yet.

    Raises:
        MismatchError: if a policy was made for another model.
    """
    from vllm.logger import init_logger

    from dspa.online.steering import check_policies
    from dspa.transformers_model import ModelFingerprint
    from dspa.vllm_plugin.continuous import ContinuousSteering
    from dspa.vllm_plugin.layer_op import observe_layer, observed_by
    from dspa.vllm_plugin.metrics import FOLDER_VARIABLE, publish

    logger = init_logger("vllm.dspa")
    policies = settings.load()
    check_policies(policies, ModelFingerprint.from_config(runner.model_config.hf_text_config))
    steering = ContinuousSteering(policies, runner.device)
    layers = runner.get_model().model.layers
    for layer in settings.layers:
        observe_layer(layers[layer], layer)
    for name, policy in settings.policies.items():
        reading = "" if policy.reading_layer is None else f"reads prompts after layer {policy.reading_layer}, "
        logger.info("dspa: %s %sedits %s after layer %d", name, reading, policy.edit_positions, policy.layer)

    forward, removed, initialize = (
        runner._model_forward,
        runner._on_request_state_removed,
        runner.initialize_kv_cache,
    )

    def model_forward(*args: Any, **kwargs: Any) -> Any:
        if not steering.begin_step(_segments(runner)):
            return forward(*args, **kwargs)
        with observed_by(steering):
            return forward(*args, **kwargs)

    def on_request_state_removed(request_id: str, state: Any) -> None:
        steering.forget(request_id)
        removed(request_id, state)

    def initialize_kv_cache(kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        initialize(kv_cache_config, *args, **kwargs)
        if runner.cache_config.enable_prefix_caching and not kwargs.get("is_profiling", False):
            group, block_tokens = _whole_sequence_group(kv_cache_config)
            runner._dspa_group = group
            kept = steering.keep_by_block(kv_cache_config.num_blocks, block_tokens)
            logger.info("dspa: what is read of %d blocks takes %.1f MiB", kv_cache_config.num_blocks, kept / 2**20)

    folder, parallel = os.environ.get(FOLDER_VARIABLE), runner.parallel_config
    if folder is not None and parallel.rank == 0:
        publish(Path(folder), parallel.data_parallel_index, steering.counts)
    runner._dspa = steering
    runner._dspa_group = None
    runner._model_forward = model_forward
    runner._on_request_state_removed = on_request_state_removed
    runner.initialize_kv_cache = initialize_kv_cache
    return steering


def _whole_sequence_group(kv_cache_config: Any) -> tuple[int, int]:
    """The group of the KV cache that keeps every block of a sequence, and how many tokens a block has."""
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    for index, group in enumerate(kv_cache_config.kv_cache_groups):
        spec = group.kv_cache_spec
        members = list(getattr(spec, "kv_cache_specs", {"": spec}).values())
        if all(isinstance(member, FullAttentionSpec) for member in members):
            return index, spec.block_size
    raise InvalidInputError(
        "every attention layer of this model has a window, so prompts cannot be read from the prefix cache; pass "
        "enable_prefix_caching=False"
    )


def _segments(runner: Any) -> list[Segment]:
    """The tokens of the step, of requests that have a policy."""
    from dspa.vllm_plugin.step import Segment

    batch, requests, group = runner.input_batch, runner.requests, runner._dspa_group
    bounds = runner.query_start_loc.np
    found = []
    for index, request_id in enumerate(batch.req_ids):
        request = requests[request_id]
        params = request.sampling_params
        name = None if params is None or not params.extra_args else params.extra_args.get(REQUEST_KEY)
        if name is not None:
            first = int(bounds[index])
            found.append(
                Segment(
                    request_id,
                    name,
                    first,
                    int(batch.num_computed_tokens_cpu[index]),
                    int(bounds[index + 1]) - first,
                    request.prompt_token_ids,
                    () if group is None else request.block_ids[group],
                )
            )
    return found
