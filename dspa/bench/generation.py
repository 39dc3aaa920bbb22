"""What steering adds to a generated token: times of the steps of `generate` calls, steered and not in turn."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from dspa.bench.cases import normal_matrix
from dspa.bench.measurements import Interval
from dspa.errors import InvalidInputError
from dspa.kernels import EditList
from dspa.kernels.token_step import work_of
from dspa.methods.static_policy import StaticPolicy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.online.steering import steer
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.transformers_model import ModelFingerprint, device_of, text_config

LISTED = 16
PROMPT_TOKENS = 16


@dataclass(frozen=True)
class GenerationCost:
    """What a generated token of a model costs, in ms: medians over the steps of greedy calls at batch 1.

    Attributes:
        model: its name.
        steps: measured steps of each kind.
        unsteered, steered: a step of the model alone, and under the policy.
        added: measured, steered minus unsteered step by step of calls made in turn.
        bytes_per_token: of the encoder, as steering read them; counted in the kernel on a CPU, else the whole encoder.
        predicted: these bytes by the measured read bandwidth; None where that was not measured.
    """

    model: str
    steps: int
    unsteered: Interval
    steered: Interval
    added: Interval
    bytes_per_token: float
    predicted: float | None


class Stopwatch(StoppingCriteria):
    """The time after each token, everything waited for."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        if input_ids.is_cuda:
            torch.cuda.synchronize()
        self.times.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def step_milliseconds(model: Any, prompt: torch.Tensor, new_tokens: int, **options: Any) -> list[float]:
    """Times in ms of the steps of a greedy generation of so many tokens; the first, which reads the prompt, is left
    out."""
    watch = Stopwatch()
    model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        do_sample=False,
        stopping_criteria=StoppingCriteriaList([watch]),
        **options,
    )
    return [(later - earlier) * 1e3 for earlier, later in zip(watch.times, watch.times[1:], strict=False)]


def worst_case_policy(model: Any, layer: int, d_sae: int, device: str = "cpu") -> StaticPolicy:
    """Latents to ablate of a random SAE half of whose latents are active: nearly every token needs M_t."""
    d_model = model.config.hidden_size
    rng = torch.Generator(device).manual_seed(1)
    W_enc, W_dec = (normal_matrix((d_sae, d_model), d_model**-0.5, torch.bfloat16, rng) for _ in range(2))
    zeros = torch.zeros(d_sae, device=device)
    sae = SparseAutoencoder(W_enc=W_enc, W_dec=W_dec, b_enc=zeros, threshold=zeros, activation="jumprelu")
    return StaticPolicy(
        EditList.from_lists([[]], [list(range(LISTED))], device),
        model=ModelFingerprint.from_model(model),
        output_layer=layer,
        output_sae=sae,
    )


def load_model(name: str, dtype: str, device: str) -> Any:
    """A causal language model in evaluation mode.

    Raises:
        InvalidInputError: if it cannot be loaded.
    """
    from transformers import AutoModelForCausalLM

    try:
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        model.to(device)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()
        raise InvalidInputError(f"model {name!r} cannot be loaded: {reason[0] if reason else error!r}") from error
    return model.eval()


def measure_generation(
    model: Any,
    name: str,
    policy: SteeringPolicy | StaticPolicy,
    *,
    backend: str,
    bandwidth: float | None,
    new_tokens: int,
    rounds: int,
) -> GenerationCost:
    """Generates in turn with and without the policy, after a call of each that does not count.

    Args:
        model, name: a model with weights.
        policy: what steers it.
        backend: a kernel backend's name, or "auto".
        bandwidth: measured read bandwidth in GB/s, for the prediction.
        new_tokens: tokens of a call, at least 2.
        rounds: calls of each kind.

    Raises:
        AssertionError: if a generated token was not edited or seen by the editor.
        MismatchError: if the policy was made for another model.
    """
    sae = policy.output_sae
    prompt = torch.arange(PROMPT_TOKENS, device=device_of(model))[None] % text_config(model).vocab_size

    def steered() -> list[float]:
        with steer(model, policy, backend=backend) as steering:
            taken = step_milliseconds(model, prompt, new_tokens)
            seen = steering.summary().tokens_seen
        assert seen == new_tokens, f"{seen} of {new_tokens} tokens were seen by the editor"
        return taken

    step_milliseconds(model, prompt, new_tokens)
    steered()
    before, plain, ours = work_of(sae), [], []
    for _ in range(rounds):
        plain += step_milliseconds(model, prompt, new_tokens)
        ours += steered()
    after = work_of(sae)
    tokens = after.tokens - before.tokens
    read = (after.encoder_bytes - before.encoder_bytes) / tokens if tokens else float(sae.W_enc.nbytes)
    return GenerationCost(
        model=name,
        steps=len(plain),
        unsteered=Interval.around_median(plain),
        steered=Interval.around_median(ours),
        added=Interval.around_median([b - a for a, b in zip(plain, ours, strict=True)]),
        bytes_per_token=read,
        predicted=read / bandwidth / 1e6 if bandwidth else None,
    )
