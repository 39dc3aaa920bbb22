"""Tokens per second of vLLM, unsteered, under one policy, under eight mixed, and with a Python hook per request.

    .venv-vllm/bin/python benchmarks/vllm_throughput.py --model organism --out runs/vllm.json
    .venv-vllm/bin/python benchmarks/vllm_throughput.py --model 200m --rounds 7 --out runs/vllm_200m.json

One engine serves all ways, in interleaved rounds that each begin with an empty prefix cache. vLLM without the plugin's
work is the unsteered way of an engine that was started without policies (`--bare`), in its own process. The hook per
request is how vllm-lens steers: a forward hook on the layer slices each request's rows and edits them in plain torch.
It needs the eager mode, so that its rows are compared with an eager engine (`--eager`). Answers are compared before
anything is timed: a policy that changes few of them, or a hook that says something else in float32, is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the hook reaches into the engine
os.environ["VLLM_NO_USAGE_STATS"] = "1"
os.environ["VLLM_CACHE_ROOT"] = os.environ.get("VLLM_CACHE_ROOT", str(Path(tempfile.gettempdir()) / "dspa-vllm-cache"))

import torch
from torch import Tensor

import dspa
from dspa.kernels import CsrMap, EditList
from dspa.kernels.token_step.equation import edited_activations
from dspa.methods.conditional_map import ConditionalDifferenceMap, FitOptions
from dspa.offline.density_store import CollectionRun
from dspa.sae.encode import encode
from dspa.transformers_model import ModelFingerprint

REQUESTS, PROMPT_TOKENS, NEW_TOKENS, POLICIES = 64, 48, 64, 8


def random_sae(d_model: int, d_sae: int, seed: int) -> dspa.SparseAutoencoder:
    """A JumpReLU SAE whose edits change what a model says."""
    generator = torch.Generator().manual_seed(seed)
    encoder = torch.randn(d_sae, d_model, generator=generator) / d_model**0.5
    decoder = torch.randn(d_sae, d_model, generator=generator) / d_model**0.5
    return dspa.SparseAutoencoder(
        W_enc=encoder,
        W_dec=decoder,
        b_enc=torch.zeros(d_sae),
        b_dec=torch.zeros(d_model),
        threshold=torch.full((d_sae,), 1.0),
        activation="jumprelu",
    )


def random_policies(model: Any, layers: tuple[int, int], d_sae: int) -> dict[str, dspa.SteeringPolicy]:
    """Policies of the published setting on one pair of SAEs, each with another strength and list length."""
    fingerprint = ModelFingerprint.from_model(model)
    saes = [random_sae(fingerprint.hidden_size, d_sae, seed) for seed in (0, 1)]
    run = CollectionRun(
        model=fingerprint,
        input_layer=layers[0],
        output_layer=layers[1],
        input_sae=saes[0].encoder_only().fingerprint(),
        output_sae=saes[1].encoder_only().fingerprint(),
        d_sae_in=d_sae,
        d_sae_out=d_sae,
        triples="none",
        triple_count=1,
        triples_per_shard=1,
        triples_per_batch=1,
        count_bos=True,
        count_template=True,
        count_eos=True,
        uncounted_token_ids=(),
        dtype="float32",
    )
    generator = torch.Generator().manual_seed(2)
    columns = torch.rand(d_sae, d_sae, generator=generator).topk(32, dim=1).indices.sort(dim=1).values
    matrix = CsrMap(
        row_offsets=torch.arange(0, 32 * d_sae + 1, 32),
        columns=columns.flatten().int(),
        values=torch.randn(32 * d_sae, generator=generator),
        d_sae_out=d_sae,
    )
    fitted = ConditionalDifferenceMap(
        matrix=matrix.check(),
        gate_counts=torch.ones(d_sae, dtype=torch.int64),
        gate_thresholds=torch.zeros(d_sae, dtype=torch.float64),
        mean_difference=torch.zeros(d_sae),
        run=run,
        options=FitOptions(),
    )
    first = dspa.SteeringPolicy(fitted, *saes, edit="both")
    return {f"p{n}": first.with_options(alpha=0.1 + 0.05 * n, k_diff=16 - n) for n in range(POLICIES)}


def prepared(name: str, dtype: str, folder: Path) -> tuple[Path, dict[str, dspa.SteeringPolicy]]:
    """The model's folder, and policies for it."""
    if name == "organism":
        from dspa.organism import DATA, load_model

        model, _ = load_model()
        return DATA / "model", random_policies(model, (2, 4), 1024)
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
    }
    config = LlamaConfig(vocab_size=32000, hidden_size=1024, intermediate_size=3072, **shape)
    model: Any = LlamaForCausalLM(config)
    model = model.to(getattr(torch, dtype))
    model.save_pretrained(folder / "model")
    return folder / "model", random_policies(model, (3, 8), 8192)


class HookPerRequest:
    """A forward hook on each of the two layers that reads and edits one request after the other, in plain torch."""

    def __init__(self, runner: Any, policies: Mapping[str, dspa.SteeringPolicy]) -> None:
        self._runner, self._policies = runner, policies
        self.of_prompt: dict[tuple[int, ...], str] = {}
        self._counts: dict[str, Tensor] = {}
        self._edits: dict[str, EditList] = {}
        first = next(iter(policies.values()))
        layers = runner.get_model().model.layers
        self._handles = [
            layers[first.input_layer].register_forward_hook(lambda module, args, output: self._read(output)),
            layers[first.output_layer].register_forward_hook(lambda module, args, output: self._edit(output)),
        ]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _requests(self) -> list[tuple[str, dspa.SteeringPolicy, int, int, int, int]]:
        """Of each request: id, policy, its rows from and to, the position of the first, and its prompt's length."""
        runner, found = self._runner, []
        for index, request_id in enumerate(runner.input_batch.req_ids):
            prompt = runner.requests[request_id].prompt_token_ids
            first, end = runner.query_start_loc.np[index : index + 2].tolist()
            start = int(runner.input_batch.num_computed_tokens_cpu[index])
            found.append((request_id, self._policies[self.of_prompt[tuple(prompt)]], first, end, start, len(prompt)))
        return found

    def _read(self, output: tuple[Tensor, Tensor]) -> None:
        for request_id, policy, first, end, start, length in self._requests():
            last = min(end, first + length - start)
            if first < last:
                stream = output[0][first:last] + output[1][first:last]
                active = (encode(stream, policy.input_sae) > 0).sum(dim=0)
                self._counts[request_id] = active + (self._counts[request_id] if start else 0)

    def _edit(self, output: tuple[Tensor, Tensor]) -> None:
        for request_id, policy, first, end, start, length in self._requests():
            first += max(0, length - 1 - start)
            if first < end:
                if request_id not in self._edits:
                    self._edits[request_id] = policy.select(self._counts.pop(request_id)[None] / length)
                edits = self._edits[request_id]
                stream = output[0][first:end] + output[1][first:end]
                f = encode(stream, policy.output_sae)
                latents = edits.latents.long().expand(len(stream), -1)
                before = f.gather(1, latents)
                after = edited_activations(before, edits.signs.expand(len(stream), -1), policy.alpha, f.amax(dim=1))
                change = torch.where(edits.valid(), after - before, 0)
                assert policy.output_sae.W_dec is not None
                output[0][first:end] += (change @ policy.output_sae.W_dec[latents[0]].to(f.dtype)).to(stream.dtype)


def measure(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from vllm import LLM, SamplingParams

    model_folder, policies = prepared(arguments.model, arguments.dtype, folder)
    sources = {name: str(policy.save_pretrained(folder / name)) for name, policy in policies.items()}
    llm = LLM(
        model=str(model_folder),
        dtype=arguments.dtype,
        enforce_eager=arguments.eager,
        skip_tokenizer_init=True,
        max_model_len=256,
        max_num_seqs=arguments.requests,
        kv_cache_memory_bytes=2**30,
        enable_prefix_caching=True,
        additional_config={} if arguments.bare else {"dspa": sources},
    )
    core: Any = llm.llm_engine.engine_core
    runner = core.engine_core.model_executor.driver_worker.worker.model_runner
    generator = torch.Generator().manual_seed(5)
    vocabulary = runner.model_config.get_vocab_size()
    prompts = torch.randint(5, vocabulary, (arguments.requests, PROMPT_TOKENS), generator=generator).tolist()
    eight = [f"p{number % POLICIES}" for number in range(arguments.requests)]

    def generate(names: list[str | None]) -> list[list[int]]:
        parameters = [
            SamplingParams(
                temperature=0,
                max_tokens=arguments.new_tokens,
                ignore_eos=True,
                detokenize=False,
                extra_args=None if name is None else {"dspa": name},
            )
            for name in names
        ]
        llm.reset_prefix_cache()
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], parameters, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def hooked() -> list[list[int]]:
        hook = HookPerRequest(runner, policies)
        hook.of_prompt = {tuple(prompt): name for prompt, name in zip(prompts, eight, strict=True)}
        try:
            return generate([None] * len(prompts))
        finally:
            hook.remove()

    ways: dict[str, Callable[[], list[list[int]]]] = {"unsteered": lambda: generate([None] * len(prompts))}
    if not arguments.bare:
        ways["one policy"] = lambda: generate(["p0"] * len(prompts))
        ways["eight policies"] = lambda: generate(list(eight))
        if arguments.eager:
            ways["hook per request, eight policies"] = hooked
    answers = {name: way() for name, way in ways.items()}
    checks = {}
    if "one policy" in answers:
        for way in ("one policy", "eight policies"):
            changed = checks[f"answers that {way} changed"] = differing(answers["unsteered"], answers[way])
            if changed < arguments.requests / 2:
                raise SystemExit(
                    f"{way} changed {changed} of {arguments.requests} answers, so that nothing is measured"
                )
    if "hook per request, eight policies" in answers:
        hook_answers = answers["hook per request, eight policies"]
        differ = checks["answers in which the hook differs"] = differing(answers["eight policies"], hook_answers)
        if arguments.dtype == "float32" and differ > arguments.requests / 20:  # in bfloat16 roundings part them
            raise SystemExit(f"the hook says something else in {differ} of {arguments.requests} answers")
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begin)
    tokens = arguments.requests * arguments.new_tokens
    rows = {
        name: {
            "tokens_per_second": tokens / statistics.median(each),
            "of_unsteered": statistics.median(
                base / this for base, this in zip(seconds["unsteered"], each, strict=True)
            ),
            "seconds": each,
        }
        for name, each in seconds.items()
    }
    return {
        "model": arguments.model,
        "dtype": arguments.dtype,
        "eager": arguments.eager,
        "bare": arguments.bare,
        "checks": checks,
        "rows": rows,
    }


def differing(one: list[list[int]], other: list[list[int]]) -> int:
    return sum(first != second for first, second in zip(one, other, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=("organism", "200m"), default="organism")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--eager", action="store_true", help="without torch.compile, and with the hook per request")
    parser.add_argument("--bare", action="store_true", help="without policies")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=REQUESTS)
    parser.add_argument("--new-tokens", type=int, default=NEW_TOKENS)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(arguments, Path(folder))
    for name, row in found["rows"].items():
        print(f"{name:34} {row['tokens_per_second']:9.1f} tokens/s  {row['of_unsteered']:6.3f} of unsteered")
    print(*(f"{name}: {count}" for name, count in found["checks"].items()), sep="\n")
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
