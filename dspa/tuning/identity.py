"""What a tuning is known by: everything that decides the numbers of its journal."""

from __future__ import annotations

import hashlib
import inspect
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from dspa.methods.steering_policy import SteeringPolicy
from dspa.offline.triples import PreferenceTriple
from dspa.tuning.objective import Reward
from dspa.tuning.scoring import Row

SAMPLED = 1024  # values of each of the model's tensors that its digest is computed of
SEARCH_ONLY = (
    "guard",
    "first",
    "keep",
    "full_grid",
    "rank",
    "folds",
    "tries",
)  # which settings are evaluated, not what comes out
SIMPLE = (int, float, str, bool, type(None))


def run_record(
    model: nn.Module,
    policy: SteeringPolicy,
    triples: Sequence[PreferenceTriple],
    texts: Sequence[Row],
    reward: Reward | None,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Digests of the parts, by the names that a refusal to go on uses."""
    return {
        "preferences": _digest(repr([(t.prompt, t.chosen, t.rejected) for t in triples]).encode()),
        "neutral texts": _digest(repr([(list(prompt), list(rest)) for prompt, rest in texts]).encode()),
        "policy": policy_digest(policy),
        "model weights": model_digest(model),
        "reward": None if reward is None else reward_digest(reward),
        "options": {name: value for name, value in options.items() if name not in SEARCH_ONLY},
    }


def policy_digest(policy: SteeringPolicy) -> str:
    """Of everything that decides what a policy edits: options, map, both SAEs with the decoder, editable latents."""
    digest = hashlib.sha256(repr(policy).encode())
    digest.update(repr([*policy.changes, policy.conditional_map.run.digest()]).encode())
    digest.update(repr(asdict(policy.conditional_map.options)).encode())
    digest.update(f"{policy.input_sae.fingerprint()} {policy.output_sae.fingerprint()}".encode())
    tensors: dict[str, Tensor] = dict(policy.conditional_map.tensors())
    if policy.editable is not None:
        tensors["editable"] = policy.editable
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_digest(model: nn.Module) -> str:
    """Of evenly spaced values of every tensor of a model, so that it takes no time on a large one."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            continue
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        if not tensor.is_meta:
            flat = tensor.detach().flatten()
            digest.update(flat[:: max(1, len(flat) // SAMPLED)].cpu().double().numpy().data)
    return digest.hexdigest()


def reward_digest(reward: Reward) -> str:
    """Of a function's source, and of the functions of its module and the plain values that it names. Where no source
    can be read, a digest that is never met again, so that no journal is continued with what may be another function."""
    parts: list[str] = []
    try:
        _add_source(reward, parts, set())
    except (OSError, TypeError):
        return f"without a source that can be read, {uuid.uuid4()}"
    return _digest("\n".join(parts).encode())


def _add_source(function: Callable[..., Any], parts: list[str], seen: set[int]) -> None:
    if id(function) in seen:
        return
    seen.add(id(function))
    if not inspect.isfunction(function):
        raise TypeError("no plain function")
    parts += [inspect.getsource(function), repr(function.__defaults__)]
    captured = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    named = {name: cell.cell_contents for name, cell in captured.items()}
    named |= {name: function.__globals__.get(name) for name in function.__code__.co_names}
    for name, value in named.items():
        if inspect.isfunction(value) and value.__module__ == function.__module__:
            _add_source(value, parts, seen)
        elif isinstance(value, SIMPLE):
            parts.append(f"{name} = {value!r}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
