"""Steered generation the naive way: no cache, no batch, everything recomputed from token ids at every step.

The loop is method.md's equations, sections 1, 3 and 4, written out below with nothing of the package but the weights it
is given. `naive_model` runs it under transformers' own ways to choose tokens.
"""

from __future__ import annotations

import copy
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tiny_models import layer_of, left_padded
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from dspa.kernels import SaeWeights
from dspa.methods.fsrl.policy import FsrlPolicy
from dspa.methods.static_policy import StaticPolicy
from dspa.methods.steering_policy import SteeringPolicy

NEW_TOKENS = 16

# Options of generate that change how tokens are computed, not which ones.
WAYS: dict[str, dict[str, Any]] = {
    "cached": {},
    "uncached": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
    "prefill in chunks": {"prefill_chunk_size": 2},
    "prefill in chunks of 1": {"prefill_chunk_size": 1},
    "drafts from the prompt": {"prompt_lookup_num_tokens": 3},
    "with scores": {"output_scores": True, "output_hidden_states": True},
}


Lists = tuple[list[int], list[int]]  # S_augment, S_ablate
Choose = Callable[[Tensor], list[int]]  # next tokens from logits [B, vocab]


def latents(h: Tensor, sae: SaeWeights) -> Tensor:
    """f(h) of section 1, `[T, d_sae]` float64."""
    h = h.double()
    if sae.subtract_b_dec:
        assert sae.b_dec is not None
        h = h - sae.b_dec.double()
    product = h @ sae.W_enc.double().T
    z = product + sae.b_enc.double()
    if sae.activation == "jumprelu":
        return z.relu() * (z > sae.threshold.double())
    if sae.activation == "gated":
        assert sae.magnitude_scale is not None
        assert sae.magnitude_bias is not None
        return (z > 0) * (product * sae.magnitude_scale.double() + sae.magnitude_bias.double()).relu()
    assert sae.k is not None
    rank = (z[:, None, :] > z[:, :, None]).sum(dim=2)
    return z.relu() * (rank < sae.k)


def edited(h: Tensor, sae: SaeWeights, lists: Lists, alpha: float) -> Tensor:
    """h_out after the edit of section 4, one token."""
    assert sae.W_dec is not None
    f = latents(h[None], sae)[0]
    maximum = f.max()
    after = f.clone()
    for j in lists[0]:
        if f[j] > 0:
            after[j] = f[j] + alpha * maximum
    for j in lists[1]:
        if f[j] > 0:
            after[j] = max(f[j] - alpha * maximum, torch.zeros_like(maximum))
    return (h.double() + sae.W_dec.double().T @ (after - f)).to(h.dtype)


@torch.no_grad()
def naive_lists(model: nn.Module, policy: SteeringPolicy | FsrlPolicy, prompt: list[int]) -> Lists:
    """S_augment and S_ablate of section 3, from the prompt alone; none for an adapter."""
    if isinstance(policy, FsrlPolicy):
        return [], []
    caught: list[Tensor] = []
    hook = layer_of(model, policy.input_layer).register_forward_hook(
        lambda module, args, output: caught.append(output if isinstance(output, Tensor) else output[0])
    )
    model(torch.tensor([prompt]), use_cache=False)
    hook.remove()
    counted = [t for t, token in enumerate(prompt) if token not in policy.uncounted_token_ids]
    if not counted:
        return [], []
    rho = (latents(caught[0][0, counted], policy.input_sae) > 0).double().mean(dim=0).tolist()
    S_prompt = sorted(range(len(rho)), key=lambda i: (-rho[i], i))[: policy.k_prompt]
    s = policy.conditional_map.to_dense().double()[S_prompt].sum(dim=0).tolist()
    S_augment = sorted(range(len(s)), key=lambda j: (-s[j], j))[: policy.k_diff]
    S_ablate = sorted(range(len(s)), key=lambda j: (s[j], j))[: policy.k_diff]
    assert not set(S_augment) & set(S_ablate)
    return S_augment if policy.edit != "ablate" else [], S_ablate if policy.edit != "augment" else []


def fsrl_edited(h: Tensor, policy: FsrlPolicy) -> Tensor:
    """h after the edit of section 6, `[T, d_model]`: decode(u) plus the error term of the clean path."""
    sae, adapter = policy.sae, policy.adapter
    assert sae.W_dec is not None
    assert sae.b_dec is not None
    assert adapter.activation == "soft_threshold"
    x = h.double() - sae.b_dec.double() if sae.subtract_b_dec else h.double()
    y = x @ adapter.weight.double().T + adapter.bias.double()
    v = policy.scale * y.sign() * (y.abs() - adapter.threshold.double()).relu()
    f = latents(h, sae)
    u = (f + v).relu() if adapter.clip else f + v
    reconstructed = u @ sae.W_dec.double() + sae.b_dec.double()
    error = h.double() - (f @ sae.W_dec.double() + sae.b_dec.double())
    return (reconstructed + error).to(h.dtype)


@torch.no_grad()
def naive_fsrl_logits(model: nn.Module, policy: FsrlPolicy, prompt: list[int], tokens: list[int]) -> Tensor:
    """Logits `[T, vocab]` of the whole sequence `tokens`, which begins with the prompt."""
    positions = naive_positions(policy, prompt, len(tokens))

    def edit(module: nn.Module, args: Any, output: Any) -> Any:
        h = (output if isinstance(output, Tensor) else output[0]).clone()
        h[0, positions] = fsrl_edited(h[0, positions], policy)
        return h if isinstance(output, Tensor) else (h, *output[1:])

    hook = layer_of(model, policy.layer).register_forward_hook(edit)
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    hook.remove()
    return logits


def lists_if_any(model: nn.Module, policy: SteeringPolicy | FsrlPolicy, prompt: list[int]) -> Lists:
    """The lists of a method that has lists, else empty ones."""
    return ([], []) if isinstance(policy, FsrlPolicy) else naive_lists(model, policy, prompt)


def naive_positions(policy: SteeringPolicy | StaticPolicy | FsrlPolicy, prompt: list[int], length: int) -> list[int]:
    """Which of the tokens 0 to `length` are edited (section 4)."""
    generated = list(range(len(prompt), length))
    if policy.edit_positions == "generated":
        return generated
    in_prompt = range(len(prompt)) if policy.edit_positions == "all" else []
    counted = [t for t in in_prompt if prompt[t] not in policy.uncounted_token_ids]
    return sorted({*counted, len(prompt) - 1, *generated})


@torch.no_grad()
def naive_logits(
    model: nn.Module, policy: SteeringPolicy | StaticPolicy, prompt: list[int], tokens: list[int], lists: Lists
) -> Tensor:
    """Logits `[T, vocab]` of the whole sequence `tokens`, which begins with the prompt."""

    def edit(module: nn.Module, args: Any, output: Any) -> Any:
        h = (output if isinstance(output, Tensor) else output[0]).clone()
        for t in naive_positions(policy, prompt, len(tokens)):
            h[0, t] = edited(h[0, t], policy.output_sae, lists, policy.alpha)
        return h if isinstance(output, Tensor) else (h, *output[1:])

    hook = layer_of(model, policy.output_layer).register_forward_hook(edit)
    logits = model(torch.tensor([tokens]), use_cache=False).logits[0]
    hook.remove()
    return logits


def naive_next(
    model: nn.Module, policy: SteeringPolicy | FsrlPolicy, prompt: list[int], new: list[int], lists: Lists
) -> Tensor:
    """Logits `[vocab]` of the token after prompt + new, computed without a cache; float32 as `generate` takes them."""
    if isinstance(policy, FsrlPolicy):
        return naive_fsrl_logits(model, policy, prompt, prompt + new)[-1].float()
    return naive_logits(model, policy, prompt, prompt + new, lists)[-1].float()


def greedily(logits: Tensor) -> list[int]:
    return logits.argmax(dim=-1).tolist()


def at_random(logits: Tensor) -> list[int]:
    return torch.multinomial(logits.softmax(dim=-1), 1).flatten().tolist()


def naive_generate(
    model: nn.Module,
    policy: SteeringPolicy | FsrlPolicy,
    rows: list[list[int]],
    count: int = NEW_TOKENS,
    choose: Choose = greedily,
) -> list[list[int]]:
    """New tokens of each row."""
    lists = [lists_if_any(model, policy, row) for row in rows]
    new: list[list[int]] = [[] for _ in rows]
    for _ in range(count):
        logits = torch.stack(
            [naive_next(model, policy, row, more, each) for row, more, each in zip(rows, new, lists, strict=True)]
        )
        for more, token in zip(new, choose(logits), strict=True):
            more.append(token)
    return new


def naive_beam_search(
    model: nn.Module, policy: SteeringPolicy, prompt: list[int], count: int, num_beams: int
) -> list[list[int]]:
    """New tokens of the beams, best first, where nothing ends a sequence."""
    lists = naive_lists(model, policy, prompt)
    beams: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(count):
        grown = []
        for score, new in beams:
            log_probabilities = naive_next(model, policy, prompt, new, lists).log_softmax(dim=-1).tolist()
            grown += [(score + value, [*new, token]) for token, value in enumerate(log_probabilities)]
        beams = sorted(grown, key=lambda beam: -beam[0])[:num_beams]
    return [new for _, new in beams]


class NaiveForward:
    """A forward method by the naive loop, whatever it is asked to keep or to continue."""

    def __init__(
        self, model: nn.Module, policies: Sequence[SteeringPolicy | FsrlPolicy | None], prompts: list[list[int]]
    ) -> None:
        self.model, self.policies, self.prompts = model, policies, prompts
        self.lists = [
            None
            if policy is None
            else ([], [])
            if isinstance(policy, FsrlPolicy)
            else naive_lists(model, policy, prompt)
            for policy, prompt in zip(policies, prompts, strict=True)
        ]

    def logits(self, row: int, rows: int, tokens: list[int]) -> Tensor:
        index = row * len(self.prompts) // rows
        policy, prompt, lists = self.policies[index], self.prompts[index], self.lists[index]
        if policy is None or lists is None:
            return self.model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
        return naive_next(self.model, policy, prompt, tokens[len(prompt) :], lists)


def naive_model(
    model: nn.Module, policies: Sequence[SteeringPolicy | FsrlPolicy | None], prompts: list[list[int]]
) -> Any:
    """A model whose `generate`, called with a left-padded batch of these prompts, is the naive loop, each prompt under
    its own policy. Every forward call starts from token ids."""
    naive = NaiveForward(model, policies, prompts)
    width = max(map(len, prompts))

    def forward(
        self: nn.Module,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        rows = len(input_ids)
        padding = [width - len(prompt) for prompt in prompts for _ in range(rows // len(prompts))]
        tokens = [ids[padding[row] :].tolist() for row, ids in enumerate(input_ids)]
        logits = torch.stack([naive.logits(row, rows, each) for row, each in enumerate(tokens)])
        return CausalLMOutputWithPast(logits=logits[:, None])  # type: ignore[arg-type]

    result: Any = copy.deepcopy(model)
    result.forward = types.MethodType(forward, result)
    return result


# --------------------------------------------------------------------------------------------------------- the tools


def generate(model: nn.Module, rows: list[list[int]], count: int = NEW_TOKENS, **options: Any) -> list[list[int]]:
    """New tokens of each row of a left-padded batch."""
    batch = left_padded(rows)
    return generate_from(model, batch, count, **options)[:, batch["input_ids"].shape[1] :].tolist()


def generate_from(model: Any, inputs: dict[str, Any], count: int = NEW_TOKENS, **options: Any) -> Any:
    return model.generate(**inputs, **{"max_new_tokens": count, "do_sample": False, **options})


def hidden_after(model: nn.Module, layer: int, run: Callable[[], object]) -> list[Tensor]:
    """What a layer returned in each pass of `run`, after the hooks that are there already."""
    caught: list[Tensor] = []
    hook = layer_of(model, layer).register_forward_hook(lambda module, args, output: caught.append(output.clone()))
    run()
    hook.remove()
    return caught


def logits_of(model: nn.Module, rows: list[list[int]], **options: Any) -> Tensor:
    """The logits by which `generate` chose, `[steps, B, vocab]`."""
    result = generate_from(model, left_padded(rows), output_logits=True, return_dict_in_generate=True, **options)
    return torch.stack(result.logits)


def is_clean(model: nn.Module) -> bool:
    """Whether nothing is left on a model that could change what it does."""
    hooked = any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    replaced = {"forward", "generate", "init_continuous_batching", "__reduce_ex__"}
    return not hooked and not any(replaced & set(vars(module)) for module in model.modules())
