"""What the hooks refuse and keep apart, with stand-ins for vLLM's objects."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict

from dspa.errors import DspaError, InvalidInputError, MismatchError
from dspa.vllm_plugin.hooks import core as core_hooks
from dspa.vllm_plugin.hooks import worker as worker_hooks
from dspa.vllm_plugin.hooks.server import follow_name
from dspa.vllm_plugin.settings import CONFIG_KEY, EngineSettings, ServedPolicy, check_request

SETTINGS = EngineSettings({"kind": ServedPolicy("folder", "fingerprint", "from_last_prompt", 2, 1, "reading")})
CONFIG: Any = SimpleNamespace(additional_config={CONFIG_KEY: SETTINGS.as_json()})


class Request(BaseModel):
    """As those of the server: what no field is named after is let in."""

    model_config = ConfigDict(extra="allow")
    model: str | None = None


class Strict(BaseModel):
    """As those of some endpoints, which drop what no field is named after."""

    model: str | None = None


class Completion(Request):
    vllm_xargs: dict[str, Any] | None = None
    use_beam_search: bool = False


@pytest.mark.parametrize(
    ("request_", "found"),
    [
        (Completion(), None),
        (Completion(model="m"), None),
        (Completion(model="m", use_beam_search=True), None),
        (Completion(model="m@kind"), "kind"),
        (Completion(model="m@kind", vllm_xargs={"dspa": "kind", "other": 1}), "kind"),
        (Completion(model="m", vllm_xargs={"dspa": "brief"}), "brief"),
        (Completion(vllm_xargs={"dspa": "kind"}), "kind"),
        (Completion(model="m@kind", vllm_xargs={"dspa": "brief"}), "for policy 'brief'"),
        (Completion(model="m@typo"), "m@typo is not served"),
        (Completion(model="other/name@kind"), "other/name@kind is not served"),  # where vLLM checks no names
        (Completion(model="other/name"), None),
        (Strict(model="m"), "cannot name one"),
        (Strict(model="m", vllm_xargs={"dspa": "kind"}), "cannot name one"),  # type: ignore[call-arg]
        (Completion(model="m@kind", use_beam_search=True), "beam search"),
        (Completion(model="m", vllm_xargs={"dspa": "kind"}, use_beam_search=True), "beam search"),
        (Completion(vllm_xargs={"dspa": "kind"}, use_beam_search=True), "beam search"),
        (Request(model="m"), None),
        (Request(model="m@kind"), "ask for the model without one"),
        (Request(model="m@kind", vllm_xargs={"dspa": "kind"}), "ask for the model without one"),  # type: ignore[call-arg]
        (Request(model="m", vllm_xargs={"dspa": "kind"}), "ask for the model without one"),  # type: ignore[call-arg]
        (Request(model="org@kind"), None),
        (Completion(model="org@kind"), None),
    ],
)
def test_a_request_follows_its_name_or_is_refused(request_: Any, found: str | None) -> None:
    policy_of = {"m@kind": "kind", "m@brief": "brief", "org@kind@kind": "kind", "org@kind@brief": "brief"}
    problem = follow_name(request_, policy_of, {"m", "org@kind"})
    if found in ("kind", "brief"):
        assert problem is None
        assert request_.vllm_xargs["dspa"] == found
    elif found is None:
        assert problem is None
        assert getattr(request_, "vllm_xargs", None) in (None, {})
    else:
        assert problem is not None
        assert found in problem


@pytest.mark.parametrize(
    ("settings", "extra_args", "prompt", "found"),
    [
        (SETTINGS, {"dspa": "kind"}, {}, "kind"),
        (SETTINGS, {}, {"has_embeddings": True, "grows": True}, None),
        (None, None, {"has_tokens": False}, None),
        (None, {"dspa": "kind"}, {}, InvalidInputError),
        (SETTINGS, {"dspa": "typo"}, {}, InvalidInputError),
        (SETTINGS, {"dspa": "kind"}, {"has_tokens": False}, InvalidInputError),
        (SETTINGS, {"dspa": "kind"}, {"has_embeddings": True}, InvalidInputError),
        (SETTINGS, {"dspa": "kind"}, {"grows": True}, InvalidInputError),
    ],
)
def test_a_request_can_be_steered_or_is_refused(settings: Any, extra_args: Any, prompt: Any, found: Any) -> None:
    prompt = {"has_tokens": True, "has_embeddings": False, "grows": False, **prompt}
    if found is InvalidInputError:
        with pytest.raises(InvalidInputError):
            check_request(settings, extra_args, **prompt)
    else:
        assert check_request(settings, extra_args, **prompt) == found


class Core:
    """An engine's core with workers of which some steer by other policies, or by none."""

    request_block_hasher = None

    def __init__(self, tokens: list[str | None]) -> None:
        self.runners = [SimpleNamespace(_dspa=token and object(), _dspa_token=token) for token in tokens]

    def collective_rpc(self, method: Any) -> list[Any]:
        return [method(SimpleNamespace(model_runner=runner)) for runner in self.runners]


@pytest.mark.parametrize(
    ("tokens", "others"), [([SETTINGS.token], 0), ([None], 1), ([SETTINGS.token, None], 1), (["a", "b"], 2)]
)
def test_a_core_starts_with_workers_that_steer(tokens: list[str | None], others: int) -> None:
    core: Any = Core(tokens)
    if others:
        with pytest.raises(MismatchError, match=f"{others} of {len(tokens)} workers do not steer"):
            core_hooks.initialize_kv_caches(lambda *arguments: "made", core, CONFIG)
    else:
        assert core_hooks.initialize_kv_caches(lambda *arguments: "made", core, CONFIG) == "made"
        assert all(runner._dspa_confirmed for runner in core.runners)


@dataclass
class ReadyResponse:
    blocks: int
    address: str | None = None


def test_a_core_says_which_policies_it_serves() -> None:
    core: Any = Core([SETTINGS.token])
    core_hooks.initialize_kv_caches(lambda *arguments: None, core, CONFIG)
    told = core_hooks.make_ready_response(lambda core: ReadyResponse(3), core)
    assert asdict(told) == {"blocks": 3, "address": None, CONFIG_KEY: SETTINGS.token}
    core_hooks.initialize_kv_caches(lambda *arguments: None, core, SimpleNamespace(additional_config={}))
    assert core_hooks.make_ready_response(lambda core: ReadyResponse(3), core) == ReadyResponse(3)


def test_a_layer_whose_forward_was_replaced_is_refused() -> None:
    """As by vLLM's offloading of weights; it would tell nothing."""
    from torch import nn

    from dspa.vllm_plugin.layer_op import observe_layer

    layer = nn.Linear(2, 2)
    vars(layer).update(forward=layer.forward)
    with pytest.raises(InvalidInputError, match="layer 3 was replaced"):
        observe_layer(layer, 3)


def hashed(extra_keys: Any, request: Any, blocks: int) -> list[Any]:
    """As vLLM hashes the blocks of 4 tokens of a request."""
    return [extra_keys(request, start, start + 4, 0)[0] for start in range(0, 4 * blocks, 4)]


@pytest.mark.parametrize("extra_args", [None, {"dspa": "kind"}])
@pytest.mark.parametrize("keyed", [True, False])
def test_blocks_are_hashed_with_their_keys(extra_args: Any, keyed: bool) -> None:
    """A version of vLLM whose hasher takes no keys is noticed."""

    def without_key(request: Any, *block: int) -> tuple[Any, int]:
        return ("salt",), 0

    def with_key(request: Any, *block: int) -> tuple[Any, int]:
        return core_hooks.extra_keys(without_key, request, *block)

    core: Any = Core([SETTINGS.token])
    core_hooks.initialize_kv_caches(lambda *arguments: None, core, CONFIG)
    core.request_block_hasher = lambda request: hashed(with_key if keyed else without_key, request, 3)
    request: Any = SimpleNamespace(
        sampling_params=SimpleNamespace(extra_args=extra_args),
        prompt_token_ids=[1] * 10,
        prompt_embeds=None,
        resumable=False,
        num_prompt_tokens=10,
    )

    def add(core: Any, request: Any) -> list[Any]:
        return core.request_block_hasher(request)

    if extra_args is not None and not keyed:
        with pytest.raises(DspaError, match="hashed 3 blocks of a request under a policy, 0 of them by its key"):
            core_hooks.preprocess_add_request(add, core, request)
        return
    unknown = SimpleNamespace(**{**vars(request), "sampling_params": SimpleNamespace(extra_args={"dspa": "typo"})})
    with pytest.raises(InvalidInputError, match="not served here"):
        core_hooks.preprocess_add_request(lambda core, request: pytest.fail("it was let in"), core, unknown)
    own = [] if extra_args is None else [(CONFIG_KEY, key) for key in ("reading", "reading", "fingerprint 10")]
    expected = [("salt", *own[block : block + 1]) for block in range(3)]
    assert core_hooks.preprocess_add_request(add, core, request) == expected


@dataclass(frozen=True)
class Spec:
    """What a layer keeps in the KV cache."""

    kind: str
    block_size: int = 16
    page_size_bytes: int = 4096


@pytest.mark.parametrize("layers", [["full"] * 4, ["full", "window"] * 2])
@pytest.mark.parametrize("caching", [True, False])
def test_memory_is_left_for_what_is_read_of_blocks(layers: list[str], caching: bool) -> None:
    available, step, per_block = 2**20, 50_000, 1000
    steering = SimpleNamespace(bytes_per_block=lambda tokens: per_block, step_bytes=lambda *arguments: step)
    runner: Any = SimpleNamespace(
        _dspa=steering,
        get_kv_cache_spec=lambda: {str(number): Spec(kind) for number, kind in enumerate(layers)},
        cache_config=SimpleNamespace(enable_prefix_caching=caching),
        vllm_config=SimpleNamespace(
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64, max_num_seqs=8),
            model_config=SimpleNamespace(get_hidden_size=lambda: 64),
        ),
    )
    left = worker_hooks.memory_left(runner, available)
    page = 4096 * layers.count("full")  # as vLLM makes groups of layers of one kind, of one size
    blocks = left // page
    kept = blocks * per_block if caching else 0
    assert left + kept + step <= available
    assert (blocks + 2) * (page + (per_block if caching else 0)) + step > available
    assert worker_hooks.memory_left(runner, 10_000) == 0
