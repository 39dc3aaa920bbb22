"""A continuous batch without vLLM: a scheduler that chunks prompts, preempts, aborts and reuses blocks at random.

A token's residual stream is a function of the tokens up to it, as in a model whose edits reach nothing. What is
expected of each token is computed from its whole prompt at once, with nothing of the room under test.
"""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from threading import Barrier

import pytest
import torch
from tiny_models import BOS, VOCAB, tiny_model, tiny_policy
from torch import Tensor

from dspa import SteeringPolicy, VectorPolicy
from dspa.errors import DspaError
from dspa.kernels import EditList, encode_density, token_step
from dspa.vllm_plugin import step_editor
from dspa.vllm_plugin.continuous import ContinuousSteering
from dspa.vllm_plugin.layer_op import observed_by
from dspa.vllm_plugin.prefix_keys import block_key
from dspa.vllm_plugin.settings import ServedPolicy
from dspa.vllm_plugin.step import Segment

D_MODEL, INPUT_LAYER, OUTPUT_LAYER = 24, 1, 2
BLOCK_TOKENS, BLOCKS = 4, 40
CPU = torch.device("cpu")


def stream(tokens: list[int], layer: int) -> Tensor:
    """The residual stream of the last of some tokens after a layer, `[d_model]`."""
    return stream_of((layer, *tokens))


@cache
def stream_of(layer_and_tokens: tuple[int, ...]) -> Tensor:
    return torch.randn(D_MODEL, generator=torch.Generator().manual_seed(hash(layer_and_tokens) % 2**31))


@pytest.fixture(scope="module")
def policies() -> dict[str, SteeringPolicy | VectorPolicy]:
    """Two that read alike and share a launch, one that counts other tokens, one with other SAEs, one of other positions
    that are edited, and a vector."""
    model = tiny_model("llama", dtype=torch.float32)
    first = tiny_policy(model, dtype=torch.float32)
    vector = torch.randn(D_MODEL, generator=torch.Generator().manual_seed(9))
    return {
        "first": first,
        "stronger": first.with_options(alpha=0.9, k_diff=3, edit="ablate"),
        "other": tiny_policy(model, dtype=torch.float32, seed=5),
        "counting": tiny_policy(model, dtype=torch.float32, uncounted_token_ids=(BOS, 5)),
        "generated": first.with_options(edit_positions="generated"),
        "vector": VectorPolicy(vector, layer=OUTPUT_LAYER, edit_positions="all", uncounted_token_ids=(BOS,)),
    }


def served(policies: dict[str, SteeringPolicy | VectorPolicy]) -> dict[str, ServedPolicy]:
    found = {}
    for name, policy in policies.items():
        sae = policy.input_sae.fingerprint() if isinstance(policy, SteeringPolicy) else None
        reading_layer = None if sae is None else INPUT_LAYER
        reading = sae and f"{sae} {policy.uncounted_token_ids}"
        found[name] = ServedPolicy(name, name, policy.edit_positions, OUTPUT_LAYER, reading_layer, reading)
    return found


def is_edited(policy: SteeringPolicy | VectorPolicy, prompt: list[int], position: int) -> bool:
    if position >= len(prompt):
        return True
    if policy.edit_positions == "all" and prompt[position] not in policy.uncounted_token_ids:
        return True
    return policy.edit_positions != "generated" and position == len(prompt) - 1


@cache
def lists_of(policy: SteeringPolicy, prompt: tuple[int, ...]) -> EditList | None:
    """What is edited after a prompt, read at once; None without a counted token."""
    counted = [t for t, token in enumerate(prompt) if token not in policy.uncounted_token_ids]
    if not counted:
        return None
    read = torch.stack([stream(list(prompt[: t + 1]), INPUT_LAYER) for t in counted])
    counts = encode_density(read, torch.tensor([0, len(counted)]), policy.input_sae)
    return policy.select(counts / len(counted))


def edited(policy: SteeringPolicy | VectorPolicy, prompt: list[int], hidden: Tensor) -> Tensor:
    """One edited token."""
    if isinstance(policy, VectorPolicy):
        return hidden + policy.vector
    lists = lists_of(policy, tuple(prompt))
    result = hidden[None].clone()
    if lists is not None:
        token_step(result, policy.output_sae, lists, policy.alpha)
    return result[0]


@dataclass(eq=False)
class Request:
    name: str
    policy: str | None
    prompt: list[int]
    response: list[int]
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    reached: int = 0  # the furthest it was computed

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.response


class Scheduler:
    """Blocks are reused by the tokens and the keys up to them, as vLLM does."""

    def __init__(self, policies: dict[str, SteeringPolicy | VectorPolicy], caching: bool, seed: int) -> None:
        self.policies, self.caching, self.random = policies, caching, random.Random(seed)
        self.served = served(policies)
        self.steering = ContinuousSteering(policies, CPU)
        if caching:
            self.steering.keep_by_block(BLOCKS, BLOCK_TOKENS)
        self.free = list(range(BLOCKS))
        self.cached: dict[object, int] = {}
        self.hits = 0
        self.edits = dict.fromkeys(policies, 0)

    def key(self, request: Request, index: int) -> object:
        """What a block's content is known by: its tokens and, of each block up to it, the key."""
        policy = None if request.policy is None else self.served[request.policy]
        ends = [(block + 1) * BLOCK_TOKENS for block in range(index + 1)]
        keys = tuple(None if policy is None else block_key(policy, len(request.prompt), end) for end in ends)
        return tuple(request.tokens[: ends[-1]]), keys

    def content(self, request: Request, index: int) -> object:
        """What the keys and values of a block depend on beside its tokens: which of the positions up to its end were
        edited, and how."""
        if request.policy is None:
            return ()
        policy = self.policies[request.policy]
        positions = range((index + 1) * BLOCK_TOKENS)
        found = [position for position in positions if is_edited(policy, request.prompt, position)]
        lists = () if isinstance(policy, VectorPolicy) else tuple(request.prompt)
        return (request.policy, lists, tuple(found)) if found else ()

    def start(self, request: Request, contents: dict[int, object]) -> None:
        """Reuses what there is; the last token is always computed."""
        while self.caching and (len(request.blocks) + 1) * BLOCK_TOKENS < len(request.prompt):
            found = self.cached.get(self.key(request, len(request.blocks)))
            if found is None:
                break
            assert contents[found] == self.content(request, len(request.blocks)), "another policy's keys and values"
            request.blocks.append(found)
            self.hits += 1
        request.computed = len(request.blocks) * BLOCK_TOKENS

    def new_block(self, in_use: set[int]) -> int:
        block = self.random.choice([block for block in self.free if block not in in_use])
        for known in [known for known, each in self.cached.items() if each == block]:
            del self.cached[known]
        return block


def check_selection(
    steering: ContinuousSteering, policies: dict[str, SteeringPolicy | VectorPolicy], request: Request
) -> None:
    """What was selected by pieces of a prompt is what the whole prompt selects, latent for latent."""
    policy = policies.get(request.policy or "")
    state = steering.requests.get(request.name)
    if state is None or not isinstance(policy, SteeringPolicy):
        return
    assert state.selected == (state.selected or request.computed >= len(request.prompt))
    if state.selected:
        found, expected = state.selection, lists_of(policy, tuple(request.prompt))
        assert found is not None
        if expected is None:
            assert not found.counts.any()
        else:
            for part in ("counts", "latents", "signs"):
                assert torch.equal(getattr(found, part), getattr(expected, part))


@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize(("seed", "at_once"), [(0, step_editor.ROWS), (1, 2)])
def test_every_token_follows_its_own_prompt(
    policies: dict[str, SteeringPolicy | VectorPolicy],
    caching: bool,
    seed: int,
    at_once: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In launches of many rows and of few."""
    monkeypatch.setattr(step_editor, "ROWS", at_once)
    scheduler = Scheduler(policies, caching, seed)
    rng, steering = scheduler.random, scheduler.steering
    begins = [[BOS, *rng.choices(range(5, VOCAB), k=10)] for _ in range(2)]
    waiting = []
    for number in range(30):
        prompt = rng.choice(begins)[: rng.randint(1, 11)] + rng.choices(range(5, 8), k=rng.randint(0, 9))
        response = rng.choices(range(5, 7), k=rng.randint(1, 6))
        waiting.append(Request(str(number), rng.choice([None, *policies]), prompt, response))
    running: list[Request] = []
    contents: dict[int, object] = {}
    seen = dict.fromkeys(policies, 0)
    while waiting or running:
        while waiting and len(running) < 4:
            running.append(waiting.pop())
        if rng.random() < 0.15:  # preempted: its blocks are left to others, and it begins again
            request = rng.choice(running)
            request.blocks, request.computed = [], 0
        if rng.random() < 0.05:
            request = running.pop(rng.randrange(len(running)))
            steering.forget(request.name)
            continue
        segments: list[Segment] = []
        rows: list[tuple[Request, int]] = []
        for request in running:
            if not request.blocks and request.computed == 0:
                scheduler.start(request, contents)
            end = min(len(request.tokens), request.computed + rng.randint(1, 7))
            in_use = {block for each in running for block in each.blocks}
            while len(request.blocks) * BLOCK_TOKENS < end:
                block = scheduler.new_block(in_use)
                in_use.add(block)
                request.blocks.append(block)
            if request.policy is not None:
                count = end - request.computed
                segment = (request.name, request.policy, len(rows), request.computed, count, request.prompt)
                segments.append(Segment(*segment, request.blocks if caching else ()))
            rows += [(request, position) for position in range(request.computed, end)]
            for index in range(request.computed // BLOCK_TOKENS, end // BLOCK_TOKENS):  # known as vLLM does: at once
                scheduler.cached.setdefault(scheduler.key(request, index), request.blocks[index])
                contents[request.blocks[index]] = scheduler.content(request, index)
            request.computed = end
        steering.begin_step(segments)
        for layer in (INPUT_LAYER, OUTPUT_LAYER):
            whole = torch.stack([stream(request.tokens[: position + 1], layer) for request, position in rows])
            residual = whole.bfloat16().float()
            hidden = whole - residual  # exactly, so that the sum is the same bits
            before = hidden + residual
            kept = hidden.clone(), residual.clone()
            steering.layer_computed(layer, hidden, residual)
            for row, (request, position) in enumerate(rows):
                policy = None if request.policy is None else policies[request.policy]
                if layer == INPUT_LAYER or policy is None or not is_edited(policy, request.prompt, position):
                    assert torch.equal(hidden[row], kept[0][row])
                    assert torch.equal(residual[row], kept[1][row])
                else:
                    torch.testing.assert_close(
                        hidden[row] + residual[row], edited(policy, request.prompt, before[row]), rtol=1e-5, atol=1e-5
                    )
                    if position >= request.reached:
                        seen[request.policy or ""] += 1
        if segments:
            steering.end_step()
        for request in running:
            check_selection(steering, policies, request)
            request.reached = max(request.reached, request.computed)
            if request.computed == len(request.tokens):
                steering.forget(request.name)
        running = [request for request in running if request.computed < len(request.tokens)]
    assert not steering.requests
    assert {name: counts.seen for name, counts in steering.counts().items()} == seen
    assert not caching or scheduler.hits > 10


def test_a_step_computes_each_layer_once(policies: dict[str, SteeringPolicy | VectorPolicy]) -> None:
    """Where a layer tells nothing, as in a captured graph, or twice, tokens would not be steered as they should be."""
    hidden = stream([BOS, 5], OUTPUT_LAYER)[None].repeat(2, 1)

    def begun() -> ContinuousSteering:
        steering = ContinuousSteering(policies, CPU)
        assert steering.begin_step([Segment("r", "first", 0, 0, 2, [BOS, 5])])
        return steering

    with pytest.raises(DspaError, match=r"layers \[1, 2\] told nothing"):
        begun().end_step()
    steering = begun()
    steering.layer_computed(INPUT_LAYER, hidden.clone(), None)
    with pytest.raises(DspaError, match=r"layers \[2\] told nothing"):
        steering.end_step()
    steering.layer_computed(OUTPUT_LAYER, hidden.clone(), None)
    steering.end_step()
    with pytest.raises(DspaError, match="computed layer 2 twice"):
        steering.layer_computed(OUTPUT_LAYER, hidden.clone(), None)
    assert not steering.begin_step([])
    steering.layer_computed(OUTPUT_LAYER, hidden.clone(), None)
    steering.end_step()


def test_threads_have_their_own_steps(policies: dict[str, SteeringPolicy | VectorPolicy]) -> None:
    """Engines of one process whose steps overlap."""
    both_run = Barrier(2, timeout=20)

    def step(policy: str | None) -> Tensor:
        steering = ContinuousSteering(policies, CPU)
        hidden = stream([BOS, 5], OUTPUT_LAYER)[None].clone()
        steering.begin_step([] if policy is None else [Segment("r", policy, 0, 0, 1, [5])])
        with observed_by(steering):
            both_run.wait()
            torch.ops.dspa.after_layer(hidden, None, OUTPUT_LAYER)
            both_run.wait()
        steering.end_step()
        return hidden

    with ThreadPoolExecutor(2) as threads:
        plain, steered = threads.map(step, [None, "vector"])
    assert torch.equal(plain, stream([BOS, 5], OUTPUT_LAYER)[None])
    assert torch.equal(steered, plain + policies["vector"].vector)  # type: ignore[union-attr]


def test_counters_are_read_without_the_device(policies: dict[str, SteeringPolicy | VectorPolicy]) -> None:
    """Another thread asks for them, also while a graph is captured, when nothing else may use the device."""
    steering = ContinuousSteering(policies, CPU)
    steering.begin_step([Segment("r", "vector", 0, 0, 1, [5])])
    steering.layer_computed(OUTPUT_LAYER, stream([5], OUTPUT_LAYER)[None], None)
    editor = next(editor for editor in steering._editors if "vector" in editor.names)
    counted = steering.counts()["vector"]
    assert (counted.seen, counted.edited) == (1, 1)
    for each in steering._editors:
        each.counters = each.counters.to("meta")
    assert steering.counts()["vector"] == counted
    assert editor.host_counters.device == CPU
