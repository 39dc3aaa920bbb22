"""How much longer a generated token takes when it is steered, by way to generate: the organism under a policy fitted to
its own triples, and a random Llama of 200 million parameters under a policy that costs as much as one can.

    python benchmarks/steered_generate.py --json steered_generate.json

Steered and unsteered calls take turns; the ratio is of two neighbours. Whole calls are timed and divided by the tokens
of a sequence, so that reading the prompt and choosing the edits is in it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from decode_step import worst_case_policy
from organism_runs import Collection
from rich.console import Console
from rich.table import Table
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

import dspa
from dspa.organism import INPUT_LAYER, OUTPUT_LAYER
from dspa.policy import Policy

PROMPT_TOKENS = 24


@dataclass(frozen=True)
class Row:
    """One way to generate on one model. Times are milliseconds a generated token of a sequence, medians.

    Attributes:
        ratio_low, ratio_high: quartiles of the ratio.
        edited: share of the tokens at edited positions that the policy changed.
    """

    model: str
    group: str
    batch: int
    new_tokens: int
    unsteered: float
    steered: float
    ratio: float
    ratio_low: float
    ratio_high: float
    edited: float
    rounds: int


@dataclass(frozen=True)
class Case:
    """A model with its policy, and prompts for it."""

    name: str
    model: Any
    policy: Policy
    prompts: Callable[[int], dict[str, torch.Tensor]]


def groups(compiled: bool) -> dict[str, tuple[int, dict[str, Any]]]:
    """By name: how many prompts, and the options of the generate call. Groups are those of the matrix of tests."""
    ways: dict[str, tuple[int, dict[str, Any]]] = {
        "greedy, dynamic cache": (1, {}),
        "greedy, static cache": (1, {"cache_implementation": "static"}),
        "greedy, batch of 8, left-padded": (8, {}),
        "sampling": (1, {"do_sample": True}),
        "beam search, 4 beams": (1, {"num_beams": 4}),
        "4 samples of a prompt": (1, {"do_sample": True, "num_return_sequences": 4}),
        "prompt lookup, 4 candidates": (1, {"prompt_lookup_num_tokens": 4}),
        "chunked prefill": (1, {"prefill_chunk_size": 8}),
        "no cache": (1, {"use_cache": False}),
    }
    if compiled:
        configuration: Any = CompileConfig(fullgraph=True)
        configuration._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": configuration}
        ways["greedy, compiled decoding"] = (1, options)
    return ways


def organism_case() -> Case:
    """With the published setting, percentile 90, fitted to the triples that ship with it."""
    parts = Collection.load()
    with tempfile.TemporaryDirectory() as folder:
        store = dspa.collect(
            parts.model,
            parts.tokenizer,
            parts.triples,
            input_sae=parts.input_sae,
            output_sae=parts.output_sae,
            input_layer=INPUT_LAYER,
            output_layer=OUTPUT_LAYER,
            out=Path(folder) / "densities",
        )
        fitted = dspa.ConditionalDifferenceMap.fit(store, gate_percentile=90)
    policy = dspa.SteeringPolicy(fitted, parts.input_sae, parts.output_sae)
    rows = [triple.prompt for triple in parts.triples]

    def prompts(batch: int) -> dict[str, torch.Tensor]:
        encoded = parts.tokenizer.pad({"input_ids": [list(row) for row in rows[:batch]]}, return_tensors="pt")
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    return Case("organism, 1.25 M", parts.model, policy, prompts)


def random_case(dtype: torch.dtype) -> Case:
    """Nearly every token of it needs M_t."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=16,
        pad_token_id=0,
        eos_token_id=None,
    )
    model: Any = LlamaForCausalLM(config)
    model = model.to(dtype).eval()
    policy = worst_case_policy(model, layer=8, d_sae=16384)

    def prompts(batch: int) -> dict[str, torch.Tensor]:
        ids = torch.randint(3, 32000, (batch, PROMPT_TOKENS), generator=torch.Generator().manual_seed(batch))
        mask = torch.ones_like(ids)
        for row in range(1, batch):
            mask[row, :row] = 0
        return {"input_ids": ids, "attention_mask": mask}

    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    return Case(f"random Llama, {millions:.0f} M, {str(dtype).removeprefix('torch.')}", model, policy, prompts)


def measure(case: Case, group: str, batch: int, options: dict[str, Any], new_tokens: int, rounds: int) -> Row:
    """Checks that steering edits, then times neighbours."""
    inputs = case.prompts(batch)

    def seconds() -> float:
        torch.manual_seed(0)
        start = time.perf_counter()
        case.model.generate(
            **inputs, **{"do_sample": False, **options}, min_new_tokens=new_tokens, max_new_tokens=new_tokens
        )
        return time.perf_counter() - start

    def steered() -> float:
        with dspa.steer(case.model, case.policy) as steering:
            taken = seconds()
        summary = steering.summary()
        if not summary.tokens_edited:
            raise SystemExit(f"{case.name}, {group}: no token was edited")
        shares.append(summary.tokens_edited / summary.tokens_seen)
        return taken

    shares: list[float] = []
    seconds()  # compiles, and fills what is filled once
    steered()
    pairs = [(seconds(), steered()) for _ in range(rounds)]
    low, middle, high = statistics.quantiles([after / before for before, after in pairs], n=4)
    per_token = 1e3 / new_tokens
    return Row(
        model=case.name,
        group=group,
        batch=batch,
        new_tokens=new_tokens,
        unsteered=per_token * statistics.median(before for before, _ in pairs),
        steered=per_token * statistics.median(after for _, after in pairs),
        ratio=middle,
        ratio_low=low,
        ratio_high=high,
        edited=statistics.mean(shares),
        rounds=rounds,
    )


def print_rows(rows: list[Row]) -> None:
    table = Table(title="Steered against unsteered, milliseconds a token (whole calls)")
    for heading in ("model", "group", "batch", "unsteered", "steered", "ratio (quartiles)", "edited"):
        table.add_column(heading)
    for row in rows:
        ratio = f"{row.ratio:.3f} ({row.ratio_low:.3f} to {row.ratio_high:.3f})"
        times = (f"{row.unsteered:.3f}", f"{row.steered:.3f}")
        table.add_row(row.model, row.group, str(row.batch), *times, ratio, f"{row.edited:.0%}")
    Console(width=160).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--rounds", type=int, default=15, help="pairs of calls per row")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--only", choices=["organism", "random"], help="one of the models")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16", help="of the random model")
    parser.add_argument(
        "--compiled", action="store_true", help="also transformers' compiled decoding (needs a compiler)"
    )
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    cases: list[Callable[[], Case]] = []
    if chosen.only != "random":
        cases.append(organism_case)
    if chosen.only != "organism":
        cases.append(lambda: random_case(getattr(torch, chosen.dtype)))
    rows = []
    for make in cases:
        case = make()
        for group, (batch, options) in groups(chosen.compiled).items():
            rows.append(measure(case, group, batch, options, chosen.new_tokens, chosen.rounds))
    print_rows(rows)
    if chosen.json is not None:
        machine = {"torch": torch.__version__, "threads": torch.get_num_threads()}
        chosen.json.write_text(json.dumps({**machine, "rows": [asdict(row) for row in rows]}, indent=2) + "\n")


if __name__ == "__main__":
    main()
