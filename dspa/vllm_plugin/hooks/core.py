"""In the engine's core: workers are asked, requests checked, and blocks of the prefix cache kept apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, make_dataclass
from typing import Any

from dspa.errors import DspaError, MismatchError
from dspa.vllm_plugin.hooks.common import check_engine_request, settings_of
from dspa.vllm_plugin.hooks.worker import confirmed_token
from dspa.vllm_plugin.prefix_keys import block_key
from dspa.vllm_plugin.settings import CONFIG_KEY, REQUEST_KEY, EngineSettings, ServedPolicy

_SETTINGS = "_dspa_settings"  # of a vLLM engine core, once its workers have answered
_KEYS = "_dspa_block_keys"  # of a vLLM request with a policy, and of a core whose hasher uses them


def initialize_kv_caches(original: Callable[..., Any], core: Any, vllm_config: Any) -> Any:
    settings = settings_of(vllm_config)
    if settings is not None:
        found = core.collective_rpc(confirmed_token)
        if set(found) != {settings.token}:
            missing = sum(token != settings.token for token in found)
            raise MismatchError(
                f"{missing} of {len(found)} workers do not steer by the policies that were named; install the same "
                "dspa on every node, and see that VLLM_PLUGINS, if set, names dspa"
            )
    setattr(core, _SETTINGS, settings)
    return original(core, vllm_config)


def make_ready_response(original: Callable[..., Any], core: Any) -> Any:
    """What the core tells the process that started it, with the token if there are policies. Others skip that field."""
    response = original(core)
    settings: EngineSettings | None = getattr(core, _SETTINGS)
    if settings is None:
        return response
    extended = make_dataclass("EngineCoreReadyResponse", [(CONFIG_KEY, str)], bases=(type(response),), kw_only=True)
    known = {field.name: getattr(response, field.name) for field in fields(response)}
    return extended(**known, **{CONFIG_KEY: settings.token})


def preprocess_add_request(original: Callable[..., Any], core: Any, request: Any) -> Any:
    settings: EngineSettings | None = getattr(core, _SETTINGS)
    check_engine_request(request, settings)  # also of requests that did not come by `process_inputs`
    if settings is not None and not hasattr(core, _KEYS):  # the first request
        setattr(core, _KEYS, True)
        if core.request_block_hasher is not None:
            core.request_block_hasher = _keyed_hasher(core.request_block_hasher, settings)
    return original(core, request)


@dataclass(eq=False)
class _BlockKeys:
    """Of a request with a policy.

    Attributes:
        policy: that it follows.
        prompt_tokens: P.
        asked: how many blocks were hashed with a key, or would have been if they had one.
    """

    policy: ServedPolicy
    prompt_tokens: int
    asked: int = 0


def _keyed_hasher(hasher: Callable[[Any], Any], settings: EngineSettings) -> Callable[[Any], Any]:
    def hash_blocks(request: Any) -> Any:
        extra_args = getattr(request.sampling_params, "extra_args", None)
        name = (extra_args or {}).get(REQUEST_KEY)
        if name is None:
            return hasher(request)
        keys: _BlockKeys | None = getattr(request, _KEYS, None)
        if keys is None:
            keys = _BlockKeys(settings.policies[name], request.num_prompt_tokens)
            setattr(request, _KEYS, keys)
        before = keys.asked
        hashes = hasher(request)
        if keys.asked - before != len(hashes):
            raise DspaError(
                f"vLLM hashed {len(hashes)} blocks of a request under a policy, {keys.asked - before} of them by its "
                "key, so that other requests would reuse them; pass enable_prefix_caching=False"
            )
        return hashes

    return hash_blocks


def extra_keys(
    original: Callable[..., Any], request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int
) -> Any:
    found, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx)
    keys: _BlockKeys | None = getattr(request, _KEYS, None)
    if keys is None:
        return found, next_mm_idx
    keys.asked += 1
    key = block_key(keys.policy, keys.prompt_tokens, end_token_idx)
    return found if key is None else (*(found or ()), (CONFIG_KEY, key)), next_mm_idx
