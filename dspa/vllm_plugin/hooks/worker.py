"""In a worker: the model tells what it computed, and steps are steered."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dspa.errors import InvalidInputError, MismatchError
from dspa.vllm_plugin.hooks.common import settings_of
from dspa.vllm_plugin.settings import REQUEST_KEY, EngineSettings

if TYPE_CHECKING:
    from dspa.vllm_plugin.continuous import ContinuousSteering
    from dspa.vllm_plugin.step import Segment


def init_worker(original: Callable[..., Any], worker: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
    original(worker, vllm_config, *args, **kwargs)
    settings = settings_of(vllm_config)
    if settings is None:
        return
    load, determine = worker.load_model, worker.determine_available_memory

    def load_model(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        attach(worker.model_runner, settings)

    def determine_available_memory() -> int:
        available = determine()
        if vllm_config.cache_config.kv_cache_memory_bytes:  # it is the user who determines it
            return available
        return memory_left(worker.model_runner, available)

    worker.load_model, worker.determine_available_memory = load_model, determine_available_memory


def confirmed_token(worker: Any) -> str | None:
    """In a worker, by order of its engine's core: the token of the policies that its model is steered by, if it is.
    From now on it runs steps with policies."""
    runner = getattr(worker, "model_runner", None)
    steering: ContinuousSteering | None = getattr(runner, "_dspa", None)
    if runner is None or steering is None:
        return None
    runner._dspa_confirmed = True
    return runner._dspa_token


def memory_left(runner: Any, available: int) -> int:
    """How many bytes keys and values may take, so that what steering keeps of their blocks, and takes during a step,
    has room as well."""
    config, steering = runner.vllm_config, runner._dspa
    specs = list(runner.get_kv_cache_spec().values())
    block_tokens = min(spec.block_size for spec in specs)
    scheduler = config.scheduler_config
    d_model = config.model_config.get_hidden_size()
    left = available - steering.step_bytes(
        scheduler.max_num_batched_tokens, scheduler.max_num_seqs, block_tokens, d_model
    )
    if not runner.cache_config.enable_prefix_caching:
        return max(0, left)
    alike = [sum(spec.page_size_bytes for spec in specs if spec == kind) for kind in specs]
    page = min(alike)  # a block belongs to one group of layers, of which vLLM makes as many as there are kinds, or more
    return max(0, left * page // (page + steering.bytes_per_block(block_tokens)))


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
    policies = settings.load(runner.device)
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
        segments = _segments(runner)
        if segments and not runner._dspa_confirmed:
            raise MismatchError("a request names a policy, and vLLM's engine core runs without dspa; install it there")
        if not steering.begin_step(segments):
            return forward(*args, **kwargs)
        with observed_by(steering):
            output = forward(*args, **kwargs)
        steering.end_step()
        return output

    def on_request_state_removed(request_id: str, state: Any) -> None:
        steering.forget(request_id)
        removed(request_id, state)

    def initialize_kv_cache(kv_cache_config: Any, *args: Any, **kwargs: Any) -> None:
        initialize(kv_cache_config, *args, **kwargs)
        if steering.reads and runner.cache_config.enable_prefix_caching and not kwargs.get("is_profiling", False):
            group, block_tokens = _whole_sequence_group(kv_cache_config)
            runner._dspa_group = group
            kept = steering.keep_by_block(kv_cache_config.num_blocks, block_tokens)
            logger.info("dspa: what is read of %d blocks takes %.1f MiB", kv_cache_config.num_blocks, kept / 2**20)

    folder, parallel = os.environ.get(FOLDER_VARIABLE), runner.parallel_config
    if folder is not None and parallel.rank == 0:
        publish(Path(folder), parallel.data_parallel_index, steering.counts)
    runner._dspa, runner._dspa_token, runner._dspa_confirmed = steering, settings.token, False
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
