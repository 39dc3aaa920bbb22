"""Everything that touches vLLM's insides, for the versions that `common.SUPPORTED` names.

A spawned process loads the plugin while it makes its engine core or its worker, so that nothing earlier can be hooked.

Written against vLLM's V1 engine and its first model runner. What is relied on, by process:

    the one that starts it   `EngineArgs.create_engine_config` makes the configuration that all processes get;
                             `InputProcessor.process_inputs` makes a request of what a user passed;
                             `MPClient._apply_ready_response` hears from each engine core that it has started.
    the server               `OpenAIServingModels` lists names; `BaseServing._check_model` sees each request first.
    the engine's core        `EngineCore._initialize_kv_caches` follows the loading of the model, `_make_ready_response`
                             all of the start; `EngineCore.preprocess_add_request` makes the core's request of each
                             request that comes; `request_block_hasher` hashes its blocks for the prefix cache, by
                             `kv_cache_utils.generate_block_hash_extra_keys`.
    a worker                 `WorkerBase.__init__` is called for every worker, whose `load_model` loads a model, which
                             is traced later; `determine_available_memory` says what is left for keys and values;
                             `GPUModelRunner._model_forward` runs the model for one step, whose requests are in
                             `input_batch`, `requests` and `query_start_loc`; `_on_request_state_removed` tells which
                             have ended; `initialize_kv_cache` which blocks there are.

Where these hooks are missing, nothing would be steered. So a core asks its workers for the token of its policies, the
process that starts it asks the core, and a worker steers for no core that has not asked: `EngineSettings.token`.
"""

from __future__ import annotations

from dspa.vllm_plugin.hooks.common import version_problem, wrap

_installed = False


def install() -> None:
    """Places the hooks. Each of them does nothing as long as no policy is named."""
    global _installed
    if _installed:
        return
    _installed = True
    from vllm.engine.arg_utils import EngineArgs

    from dspa.vllm_plugin.hooks import core, starting, worker

    wrap(EngineArgs, "create_engine_config", starting.create_engine_config)
    if version_problem() is not None:
        return  # the hook above refuses policies
    from vllm.v1.core import kv_cache_utils
    from vllm.v1.engine.core import EngineCore, EngineCoreProc
    from vllm.v1.engine.core_client import MPClient
    from vllm.v1.engine.input_processor import InputProcessor
    from vllm.v1.worker.worker_base import WorkerBase

    wrap(InputProcessor, "process_inputs", starting.process_inputs)
    wrap(MPClient, "_apply_ready_response", starting.apply_ready_response)
    wrap(EngineCore, "_initialize_kv_caches", core.initialize_kv_caches)
    wrap(EngineCoreProc, "_make_ready_response", core.make_ready_response)
    wrap(EngineCore, "preprocess_add_request", core.preprocess_add_request)
    wrap(kv_cache_utils, "generate_block_hash_extra_keys", core.extra_keys)
    wrap(WorkerBase, "__init__", worker.init_worker)
