"""vLLM engines of small models for tests, and what their answers have to be: those of `dspa.steer`."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from safetensors.torch import load_file
from tiny_models import BOS, VOCAB, Family, left_padded, tiny_model, tiny_policy, tiny_tokenizer
from torch import Tensor
from transformers import LogitsProcessorList

import dspa
from dspa.methods.policy import Policy
from dspa.organism import DATA, INPUT_LAYER, OUTPUT_LAYER, load_model, sae_folder, triples_file

NEW_TOKENS = 20
TIE = 1e-4  # of logits around 10: ten times what float32 sums in another order were seen to differ by
GREEDY: Any = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
BLOCK_TOKENS = 32  # the least that vLLM's attention on CPUs takes


@dataclass(frozen=True)
class Case:
    """A model, its policies, and where they are saved."""

    model: Any
    folder: Path
    policies: Mapping[str, Policy]

    @property
    def sources(self) -> dict[str, str]:
        return {name: str(self.folder / name) for name in self.policies}


def tiny_case(family: Family, folder: Path) -> Case:
    """A random model of a size that vLLM's attention takes, with policies that share a launch, others, and a vector."""
    shape: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "max_position_embeddings": 512}
    if family == "gemma2":  # vLLM's has one matrix for both embeddings
        shape |= {"sliding_window": 64, "tie_word_embeddings": True}
    model: Any = tiny_model(family, dtype=torch.float32, **shape)
    if family == "gemma2":  # its embeddings are multiplied by 8, so that what layers add would change no answer
        model.get_input_embeddings().weight.data /= 32
    first = tiny_policy(model, dtype=torch.float32)
    vector = torch.randn(64, generator=torch.Generator().manual_seed(3))
    policies: dict[str, Any] = {
        "a": first,
        "b": first.with_options(alpha=0.2, k_diff=5, edit="ablate"),
        "c": tiny_policy(model, dtype=torch.float32, seed=2, edit_positions="generated"),
        "v": dspa.VectorPolicy(vector, layer=1),
        "all": dspa.VectorPolicy(vector, layer=1, scale=0.5, edit_positions="all", uncounted_token_ids=(BOS,)),
    }
    model.save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name, policy in policies.items():
        policy.save_pretrained(folder / name)
    return Case(model, folder, policies)


def organism_case(folder: Path) -> Case:
    """The model that ships with the package, with policies of a map that was fitted on some of its triples."""
    model, tokenizer = load_model()
    model.generation_config.eos_token_id = None  # answers have one length
    saes = [organism_sae(which) for which in ("input", "output")]
    triples = dspa.load_preferences(triples_file(), tokenizer, limit=40)
    layers: dict[str, Any] = {"input_layer": INPUT_LAYER, "output_layer": OUTPUT_LAYER}
    store = dspa.collect(
        model,
        tokenizer,
        triples,
        input_sae=saes[0],
        output_sae=saes[1],
        **layers,
        out=folder / "densities",
        progress=False,
    )
    ablating = dspa.SteeringPolicy(dspa.ConditionalDifferenceMap.fit(store), *saes)
    W_dec = saes[1].W_dec
    assert W_dec is not None
    policies: dict[str, Any] = {
        "published": ablating,
        "both": ablating.with_options(alpha=0.8, k_diff=32, edit="both"),
        "vector": dspa.VectorPolicy(6 * W_dec[7] / W_dec[7].norm(), layer=OUTPUT_LAYER),
    }
    for name, policy in policies.items():
        policy.save_pretrained(folder / name)
    (folder / "model").symlink_to(DATA / "model")
    return Case(model, folder, policies)


def organism_sae(which: Literal["input", "output"]) -> dspa.SparseAutoencoder:
    """As `SparseAutoencoder.from_sae_lens` reads it, without sae-lens, which depends on other versions than vLLM."""
    tensors = load_file(sae_folder(which) / "sae_weights.safetensors")
    tensors["W_enc"] = tensors["W_enc"].T.contiguous()
    return dspa.SparseAutoencoder(activation="jumprelu", subtract_b_dec=True, **tensors)  # type: ignore[arg-type]


def organism_requests(case: Case, count: int) -> list[tuple[str | None, list[int]]]:
    """Prompts of the triples, under each policy and none."""
    _, tokenizer = load_model()
    names = [None, *case.policies]
    lines = triples_file().read_text().splitlines()
    requests: list[tuple[str | None, list[int]]] = []
    for number in range(count):
        messages = json.loads(lines[number // len(names)])["prompt"]
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        requests.append((names[number % len(names)], tokenizer(text, add_special_tokens=False)["input_ids"]))
    return requests


def mixed_requests(case: Case, count: int, seed: int = 0) -> list[tuple[str | None, list[int]]]:
    """Prompts of 1 to 100 tokens, many with a beginning that others have too, each with a policy or none."""
    rng = random.Random(seed)
    beginnings = [[BOS, *rng.choices(range(5, VOCAB), k=70)] for _ in range(3)]
    requests = []
    for _ in range(count):
        end = rng.choices(range(5, VOCAB), k=rng.randint(0, 29))
        begin = rng.choice(beginnings)[: rng.choice((1, 33, 64, 70))]
        requests.append((rng.choice([None, *case.policies]), begin + end))
    return requests


@contextmanager
def engine(case: Case, **options: Any) -> Iterator[Any]:
    """A `vllm.LLM` in this process, with room for few requests at once unless `options` say otherwise."""
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    defaults: dict[str, Any] = {
        "dtype": "float32",
        "enforce_eager": True,
        "max_model_len": 256,
        "max_num_seqs": 16,
        "max_num_batched_tokens": 16,
        "kv_cache_memory_bytes": 2**20,
        "block_size": BLOCK_TOKENS,
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "additional_config": {"dspa": case.sources},
    }
    llm = LLM(model=str(case.folder / "model"), **{**defaults, **options})
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()


def core_of(llm: Any) -> Any:
    """The engine's core, which runs in this process."""
    return llm.llm_engine.engine_core.engine_core


def steering_of(llm: Any) -> Any:
    """The `ContinuousSteering` of an engine."""
    return core_of(llm).model_executor.driver_worker.worker.model_runner._dspa


def parameters(policy: str | None, **options: Any) -> Any:
    """Greedy and of a fixed length unless `options` say otherwise."""
    from vllm import SamplingParams

    extra_args = None if policy is None else {"dspa": policy}
    return SamplingParams(
        **{"temperature": 0, "max_tokens": NEW_TOKENS, "ignore_eos": True, "extra_args": extra_args, **options}
    )


def answers(llm: Any, requests: Sequence[tuple[str | None, list[int]]]) -> list[list[int]]:
    """What vLLM generates for all of them at once."""
    prompts = [{"prompt_token_ids": prompt} for _, prompt in requests]
    outputs = llm.generate(prompts, [parameters(name) for name, _ in requests], use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]


@dataclass(frozen=True)
class Tie:
    """Where an answer parts from the expected one: the logits of the two tokens differ by `gap` there."""

    request: int
    step: int
    expected: int
    found: int
    gap: float


def check_answers(
    case: Case, requests: Sequence[tuple[str | None, list[int]]], found: Sequence[list[int]]
) -> list[Tie]:
    """Compares answers with those of `dspa.steer`, token for token. Where one parts at a tie, what follows is compared
    with what `dspa.steer` says after the same tokens.

    Returns:
        The ties.
    """
    ties = []
    expected = expected_answers(case, requests)
    for number, (request, want, got) in enumerate(zip(requests, expected, found, strict=True)):
        assert len(got) == NEW_TOKENS
        forced, scores = want, None
        while forced != got:
            step = next(step for step in range(NEW_TOKENS) if forced[step] != got[step])
            if scores is None:
                forced, scores = continued(case, request, got[:step])
            gap = float(scores[step][forced[step]] - scores[step][got[step]])
            assert gap < TIE, f"{request}: token {step} is {got[step]}, expected {forced[step]}, by {gap}"
            ties.append(Tie(number, step, forced[step], got[step], gap))
            forced, scores = continued(case, request, got[: step + 1])
    return ties


def expected_answers(case: Case, requests: Sequence[tuple[str | None, list[int]]]) -> list[list[int]]:
    """What `dspa.steer` generates with transformers, greedily."""
    found: list[list[int]] = []
    with dspa.steer(case.model, dict(case.policies), select=None) as steering:
        for first in range(0, len(requests), 50):
            some = requests[first : first + 50]
            steering.select([name for name, _ in some])
            inputs = left_padded([prompt for _, prompt in some])
            result = case.model.generate(**inputs, **GREEDY)
            found += result[:, inputs["input_ids"].shape[1] :].tolist()
    return found


def continued(case: Case, request: tuple[str | None, list[int]], begin: list[int]) -> tuple[list[int], list[Tensor]]:
    """What `dspa.steer` generates if the answer begins with some tokens, and the logits of every step."""
    name, prompt = request
    logits: list[Tensor] = []

    def force(input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - len(prompt)
        logits.append(scores[0].clone())
        if step < len(begin):
            scores = torch.full_like(scores, -torch.inf)
            scores[0, begin[step]] = 0
        return scores

    with dspa.steer(case.model, dict(case.policies), select=[name]):
        result = case.model.generate(
            **left_padded([prompt]), **GREEDY, logits_processor=LogitsProcessorList([cast(Any, force)])
        )
    return result[0, len(prompt) :].tolist(), logits
