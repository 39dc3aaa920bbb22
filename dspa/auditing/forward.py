"""Running a model for an audit: steered responses, and the same tokens read again with and without the policy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dspa.kernels import EditList
from dspa.methods.policy import Policy
from dspa.online.steering import steer
from dspa.online.trace import TracedToken
from dspa.transformers_model import decoder_stack, device_of, hidden_of
from dspa.util.scalars import check_integer, check_switch

TOKENS_AT_ONCE = 64  # whose distributions over the vocabulary are compared


@dataclass(frozen=True)
class Decoding:
    """How responses are chosen.

    Attributes:
        max_new_tokens: the longest response in tokens.
        sample: whether tokens are sampled, by the model's generation configuration, instead of the likeliest taken.
        seed: of the sampling.
        batch_size: prompts run at once.

    Raises:
        InvalidInputError: for an option out of range.
    """

    max_new_tokens: int = 64
    sample: bool = False
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        check_integer("max_new_tokens", self.max_new_tokens, 1)
        check_switch("sample", self.sample)
        check_integer("seed", self.seed, -(2**63), 2**63 - 1)
        check_integer("batch_size", self.batch_size, 1)

    def __str__(self) -> str:
        how = f"sampled with seed {self.seed}" if self.sample else "greedy"
        return f"{how}, at most {self.max_new_tokens} tokens"


@dataclass(frozen=True, eq=False)
class Reading:
    """One prompt with its steered response, as the model read it with and without the policy.

    Attributes:
        ids: of the prompt and of the response.
        prompt_tokens: how many of them are the prompt.
        before: `[T, d_model]` float32, the residual stream after the edited layer without the policy, for all ids but
            the last, which no pass reads. The policy's edits reach no earlier layer, so it is also the stream that the
            policy met.
        moved: `[T]` float64, the length of its change under the policy, relative to its own.
        kl: `[R]` float64, for each token of the response the KL divergence in nats of the distribution that chose it
            from the unsteered one.
        tokens: those at positions that the policy edits.
        listed: the edit list as latents and signs; None for a policy without lists.
    """

    ids: tuple[int, ...]
    prompt_tokens: int
    before: Tensor
    moved: Tensor
    kl: Tensor
    tokens: tuple[TracedToken, ...]
    listed: tuple[tuple[int, int], ...] | None

    @property
    def response(self) -> tuple[int, ...]:
        return self.ids[self.prompt_tokens :]


@torch.no_grad()
def read_batch(
    model: nn.Module, policy: Policy, prompts: Sequence[Sequence[int]], decoding: Decoding, pad: int
) -> list[Reading]:
    """Steered responses to prompts, each read with and without the policy.

    Args:
        model: not steered at the moment.
        policy: what steers.
        prompts: their token ids.
        decoding: how responses are chosen.
        pad: a token id that fills shorter rows.
    """
    device, layer = device_of(decoder_stack(model).module), policy.intervention.layer
    ids = [(*prompt, *response) for prompt, response in _responses(model, policy, prompts, decoding, pad, device)]
    lengths = [len(row) - 1 for row in ids]
    read = torch.full((len(ids), max(lengths)), pad, dtype=torch.int64)
    mask = torch.zeros_like(read)
    for row, tokens in enumerate(ids):
        read[row, : lengths[row]] = torch.tensor(tokens[:-1])
        mask[row, : lengths[row]] = 1
    batch: dict[str, Any] = {"input_ids": read.to(device), "attention_mask": mask.to(device), "use_cache": False}
    with _residual_stream(model, layer) as unsteered:
        logits = model(**batch).logits
    with steer(model, policy, trace=True) as steering, _residual_stream(model, layer) as steered:
        with steering.scoring(prompt_tokens=[len(prompt) for prompt in prompts]):
            steered_logits = model(**batch).logits
        traced = {sequence.row: sequence.tokens for sequence in steering.trace().sequences}
        edits = steering.edits
    readings = []
    for row, prompt in enumerate(prompts):
        span, answers = slice(0, lengths[row]), slice(len(prompt) - 1, lengths[row])
        before = unsteered[0][row, span].float()
        change = (steered[0][row, span].double() - unsteered[0][row, span].double()).norm(dim=1)
        readings.append(
            Reading(
                ids=ids[row],
                prompt_tokens=len(prompt),
                before=before,
                moved=(change / before.double().norm(dim=1).clamp(min=torch.finfo(torch.float64).tiny)).cpu(),
                kl=kl_divergence(steered_logits[row, answers], logits[row, answers]).cpu(),
                tokens=traced[row],
                listed=None if edits is None else _listed(edits, row),
            )
        )
    return readings


def kl_divergence(steered: Tensor, unsteered: Tensor) -> Tensor:
    """`[T]` float64, sum p_steered (log p_steered - log p_unsteered) in nats, of logits `[T, vocabulary]`."""
    parts = [steered.new_zeros(0, dtype=torch.float64)]
    for one, other in zip(steered.split(TOKENS_AT_ONCE), unsteered.split(TOKENS_AT_ONCE), strict=True):
        p, q = one.double().log_softmax(dim=1), other.double().log_softmax(dim=1)
        parts.append((p.exp() * (p - q)).nan_to_num().sum(dim=1).clamp(min=0))  # a token that is ruled out adds 0
    return torch.cat(parts)


def _responses(
    model: Any, policy: Policy, prompts: Sequence[Sequence[int]], decoding: Decoding, pad: int, device: torch.device
) -> Iterator[tuple[Sequence[int], tuple[int, ...]]]:
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    torch.manual_seed(decoding.seed)
    with steer(model, policy):
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            do_sample=decoding.sample,
            max_new_tokens=decoding.max_new_tokens,
            pad_token_id=pad,
        )
    ends = getattr(model.generation_config, "eos_token_id", None)
    ending = set(ends) if isinstance(ends, list) else {ends}
    for prompt, row in zip(prompts, output[:, width:].tolist(), strict=True):
        last = next((place for place, token in enumerate(row) if token in ending), len(row) - 1)
        yield prompt, tuple(row[: last + 1])


def _listed(edits: EditList, row: int) -> tuple[tuple[int, int], ...]:
    count = int(edits.counts[row])
    return tuple(zip(edits.latents[row, :count].tolist(), edits.signs[row, :count].tolist(), strict=True))


@contextmanager
def _residual_stream(model: nn.Module, layer: int) -> Iterator[list[Tensor]]:
    """What a layer returns in the passes inside; under a policy, after its edit."""
    kept: list[Tensor] = []

    def keep(module: nn.Module, args: object, output: Any) -> None:
        kept.append(hidden_of(output).detach().clone())

    handle = decoder_stack(model).layers[layer].register_forward_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()
