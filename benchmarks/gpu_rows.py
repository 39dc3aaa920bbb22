"""The rows of the GPU report. Each checks its results before it is timed."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from gpu_read import check_reading, reading
from gpu_timing import Sampler
from launch_shapes import LaunchShape, of_token_step
from random_model import random_model

import dspa
from dspa.bench.adapter import EAGER_ADAPTER, AdapterCase, eager_way
from dspa.bench.cases import NEEDS_MAXIMUM, Case, Shape
from dspa.bench.density_check import check_counts
from dspa.bench.eager import PlainSae, as_delta, with_error_term
from dspa.bench.generation import step_milliseconds, worst_case_policy
from dspa.bench.measurements import Column, Interval, Row
from dspa.bench.operations import READ
from dspa.bench.timing import Way, time_column
from dspa.kernels import SaeWeights, StepMode, encode_density
from dspa.kernels.token_step.prepared import PreparedStep

EAGER = "eager with error term"
DELTA = "eager delta"
COMPILED = "torch.compile of the delta"
PRODUCT = "matrix product alone"
UNSTEERED = "unsteered"
OURS: tuple[tuple[str, StepMode, str], ...] = (
    ("dense", "dense", NEEDS_MAXIMUM),
    ("lazy, none active", "lazy", "none active"),
    ("lazy, all certainly zero", "lazy", "all certainly zero"),
    ("lazy, needs M_t", "lazy", NEEDS_MAXIMUM),
    ("screened, all certainly zero", "screened", "all certainly zero"),
    ("screened", "screened", NEEDS_MAXIMUM),
)
SCREENS = "triton"
"""The backend in which "screened" is a mode of its own."""


@dataclass(frozen=True)
class Scale:
    """How large everything is: the real shapes, or toy ones for a dry run."""

    widths: tuple[tuple[str, int], ...]
    d_sae: tuple[int, ...]
    batches: tuple[int, ...]
    top_k: int
    launched: tuple[tuple[str, int, int], ...]
    """Model, width and d_sae for which shapes of launches are compared."""
    tokens: tuple[int, ...]
    models: tuple[tuple[str, int, dict[str, Any]], ...]
    """Configuration, output layer, and changes to the configuration."""
    new_tokens: int
    generate_rounds: int


REAL = Scale(
    widths=(("Gemma-2-2B", 2304), ("Gemma-2-9B", 3584), ("Qwen3-8B", 4096)),
    d_sae=(16384, 65536, 131072),
    batches=(1, 4, 16, 64),
    top_k=64,
    launched=(("Gemma-2-2B", 2304, 16384), ("Qwen3-8B", 4096, 65536)),
    tokens=(128, 1024, 8192),
    models=(("gemma-2-2b", 24, {}), ("qwen3-8b", 18, {}), ("gemma-2-9b", 39, {})),
    new_tokens=33,
    generate_rounds=4,
)
TOY_MODEL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 64,
}
TOY = Scale(
    widths=(("toy", 48),),
    d_sae=(256,),
    batches=(1, 2),
    top_k=8,
    launched=(("toy", 48, 256),),
    tokens=(16,),
    models=(("gemma-2-2b", 1, TOY_MODEL),),
    new_tokens=4,
    generate_rounds=2,
)


@dataclass(frozen=True)
class Rows:
    """Makes the rows, one after the other.

    Attributes:
        sampler: how times are taken.
        scale: how large everything is.
        backends: the kernel backends to measure, each a set of columns.
        cuda: the one of them whose launches have other shapes too.
        library: where the operations of that one are.
    """

    sampler: Sampler
    scale: Scale
    backends: tuple[str, ...]
    cuda: str = "cuda"
    library: Any = torch.ops.dspa

    def first(self) -> Row:
        """The most important figures alone: dense and lazy at batch 1, with and without edits. Nothing is compiled but
        our kernels."""
        model, width = self.scale.widths[0]
        shape = Shape(width, self.scale.d_sae[0], torch.bfloat16, 1)
        return self.token_step(model, shape, compiled=False)

    def all(self) -> Iterator[Callable[[], Row]]:
        """The most telling rows first: what time runs out for comes last."""
        shapes = [
            (model, Shape(width, d_sae, torch.bfloat16, batch))
            for batch in self.scale.batches
            for d_sae in self.scale.d_sae
            for model, width in self.scale.widths
        ]
        first = [(model, shape) for model, shape in shapes if self._is_telling(shape)]
        for model, shape in first:
            yield lambda model=model, shape=shape: self.token_step(model, shape)
        yield from self._other_rows()
        for model, shape in shapes:
            if (model, shape) not in first:
                yield lambda model=model, shape=shape: self.token_step(model, shape)
        for model in self.scale.models[1:2]:
            yield lambda model=model: self.generate(*model, "static")

    def _is_telling(self, shape: Shape) -> bool:
        """All SAEs at batch 1, and all batches at the first SAE."""
        first = (self.scale.widths[0][1], self.scale.d_sae[0])
        return shape.batch == self.scale.batches[0] or (shape.d_model, shape.d_sae) == first

    def _other_rows(self) -> Iterator[Callable[[], Row]]:
        first, width = self.scale.widths[0]
        for d_sae in self.scale.d_sae[:2]:
            shape = Shape(width, d_sae, torch.bfloat16, 1, self.scale.top_k)
            yield lambda shape=shape: self.token_step(first, shape)
        for d_sae, batch in itertools.product(self.scale.d_sae[:2], self.scale.batches[:3:2]):
            shape = Shape(width, d_sae, torch.bfloat16, batch)
            yield lambda shape=shape: self.adapter_step(first, shape)
        for name, other in self.scale.widths:
            for tokens in self.scale.tokens:
                yield lambda name=name, other=other, tokens=tokens: self.encode_density(name, other, tokens)
        for model in self.scale.models:
            yield lambda model=model: self.generate(*model, None)
        yield lambda: self.generate(*self.scale.models[0], "static")
        if self.cuda in self.backends:
            for name, width, d_sae in self.scale.launched:
                shape = Shape(width, d_sae, torch.bfloat16, 1)
                yield lambda name=name, shape=shape: self.step_launches(name, shape)

    # ---- token_step --------------------------------------------------------------------------------------------------

    def token_step(self, model: str, shape: Shape, *, compiled: bool = True) -> Row:
        """Graph replays, L2 emptied before each; and with a warm L2 at batch 1. `compiled`: beside torch.compile."""
        row, group = f"{model}, {shape}", "token_step, GPU"
        cases = {backend: Case(shape, backend, self.sampler.device) for backend in self.backends[:1]}
        first = cases[self.backends[0]]
        for backend in self.backends[1:]:
            cases[backend] = first.on(backend)
        lists = tuple(name for name in first.lists if shape.k is None or name != "all certainly zero")
        try:
            check_reading(first.sae.W_enc)
            for case in cases.values():
                case.check(("dense", "lazy", "screened"), lists)
        except AssertionError as failure:
            return Row(row, group, (), EAGER, failed=_first_line(failure))
        ways = self._plain_ways(first, compiled)
        for backend, case in cases.items():
            for label, mode, wanted in OURS:
                if wanted in lists and (mode != "screened" or (backend == SCREENS and shape.k is None)):
                    run, restore = case.in_place(wanted, mode)
                    reads_all = wanted == NEEDS_MAXIMUM and mode != "screened"
                    read = first.sae.W_enc.nbytes if reads_all else None
                    ways.append(Way(f"{backend}, {label}", run, read, restore))
        columns = self.sampler.columns(ways, EAGER, cold=True)
        if shape.batch == 1:
            ours = [way for way in ways if way.name == EAGER or way.name.endswith(", dense")]
            warm = self.sampler.columns(ours, EAGER, cold=False)
            columns += tuple(replace(column, name=f"{column.name}, warm L2") for column in warm)
            columns += tuple(column for name, case in cases.items() for column in self._call_columns(name, case))
        return Row(row, group, columns, EAGER)

    def adapter_step(self, model: str, shape: Shape) -> Row:
        """FSRL's step with a trained adapter: graph replays, L2 emptied before each."""
        row, group = f"{model}, {shape}", "adapter_step, GPU"
        first = AdapterCase(Case(shape, self.backends[0], self.sampler.device))
        adapters = {backend: first.on(backend) for backend in self.backends}
        try:
            for adapter in adapters.values():
                adapter.check()
        except AssertionError as failure:
            return Row(row, group, (), EAGER_ADAPTER, failed=_first_line(failure))
        ways = [eager_way(PlainSae.from_weights(first.case.sae), first, shape.dtype)]
        for backend, adapter in adapters.items():
            run, restore = adapter.in_place("dense")
            ways.append(Way(backend, run, first.adapter.weight.nbytes, restore))
        return Row(row, group, self.sampler.columns(ways, EAGER_ADAPTER, cold=True), EAGER_ADAPTER)

    def step_launches(self, model: str, shape: Shape) -> Row:
        """One pass over all of W_enc, launched in every way that this GPU has; none may change a bit."""
        row = f"{model}, {shape.d_model}x{shape.d_sae}-bfloat16, one token"
        group = "token_step by shapes of the CUDA backend's launch, GPU"
        case, shapes = Case(shape, self.cuda, self.sampler.device), of_token_step(self.library)
        ways = []
        try:
            case.check(("dense", "lazy"), (NEEDS_MAXIMUM,))
            expected = case.step(NEEDS_MAXIMUM, "dense")
            for launch in shapes:
                found = launch.around(self.library, partial(case.step, NEEDS_MAXIMUM, "dense"))()
                assert torch.equal(found, expected), f"{launch}: another result than {shapes[0]}"
                run, restore = case.in_place(NEEDS_MAXIMUM, "dense")
                ways.append(Way(str(launch), launch.around(self.library, run), case.sae.W_enc.nbytes, restore))
        except AssertionError as failure:
            return Row(row, group, (), str(shapes[0]), failed=_first_line(failure))
        return Row(row, group, self.sampler.columns(ways, ways[0].name, cold=True), ways[0].name)

    def _plain_ways(self, case: Case, compiled: bool) -> list[Way]:
        plain, hidden = PlainSae.from_weights(case.sae), case.hidden
        latents = case.lists[NEEDS_MAXIMUM].latents.long()
        ways = [
            Way(EAGER, lambda: with_error_term(plain, hidden, latents)),
            Way(DELTA, lambda: as_delta(plain, hidden, latents)),
            Way(READ, reading(case.sae.W_enc), case.sae.W_enc.nbytes),
        ]
        if compiled and case.shape.batch == 1:
            torch.compiler.reset()
            fast_delta = torch.compile(as_delta, dynamic=False, backend=self._compiler())
            ways.append(Way(COMPILED, lambda: fast_delta(plain, hidden, latents)))
        return ways

    def _compiler(self) -> str:
        return "inductor" if self.sampler.device == "cuda" else "aot_eager"

    @torch.no_grad()
    def _call_columns(self, backend: str, case: Case) -> tuple[Column, ...]:
        """The time of Python for a call, and for one of a step that was prepared, as in generation."""
        run, _ = case.in_place("none active", "lazy")
        hidden = case.hidden.clone()
        step = PreparedStep(case.sae, case.lists["none active"], case.alpha, mode="lazy", backend=backend)
        step.prepare(hidden.dtype)
        calls = {"a call": run, "a prepared step": lambda: step(hidden)}
        return tuple(
            Column(
                f"{backend}, host time of {name}", "us", Interval.around_median(self.sampler.call_microseconds(call))
            )
            for name, call in calls.items()
        )

    # ---- encode_density ----------------------------------------------------------------------------------------------

    def encode_density(self, model: str, d_model: int, tokens: int) -> Row:
        d_sae, device = self.scale.d_sae[0], self.sampler.device
        name, group = f"{model}, {d_model}x{d_sae}-bfloat16, {tokens} tokens", "encode_density, GPU"
        rng = torch.Generator(device).manual_seed(0)
        W_enc = (torch.randn(d_sae, d_model, generator=rng, device=device) / d_model**0.5).bfloat16()
        hidden = torch.randn(tokens, d_model, generator=rng, device=device).bfloat16()
        offsets = torch.tensor([0, tokens // 5, tokens], device=device)
        ones = torch.ones(d_sae, device=device)
        sae = SaeWeights(W_enc=W_enc, b_enc=torch.zeros_like(ones), threshold=ones, activation="jumprelu")
        runs: dict[str, Callable[[], torch.Tensor]] = {
            backend: partial(encode_density, hidden, offsets, sae, backend=backend) for backend in self.backends
        }
        if self.cuda in runs and self.library.has_warpgroup_products():
            by_warps = LaunchShape(warpgroup_products=False).around(self.library, runs[self.cuda])
            runs[f"{self.cuda}, by warps"] = by_warps
        ways, memory = [Way(PRODUCT, lambda: hidden @ W_enc.T)], []
        for way, run in runs.items():
            try:
                check_counts(run(), hidden, offsets, sae)
            except AssertionError as failure:
                return Row(name, group, (), PRODUCT, failed=f"{way}: {_first_line(failure)}")
            ways.append(Way(way, run))
            if device == "cuda":
                memory.append(Column(f"{way}, peak memory", "MiB", Interval.exactly(_peak_mebibytes(run))))
        return Row(name, group, (*self.sampler.columns(ways, PRODUCT, cold=True), *memory), PRODUCT)

    # ---- generate ----------------------------------------------------------------------------------------------------

    def generate(self, name: str, layer: int, changes: dict[str, Any], cache: str | None) -> Row:
        """Steps of whole `generate` calls, steered and not in turn. With a static cache transformers compiles them."""
        device, count = self.sampler.device, self.scale.new_tokens
        model = random_model(name, torch.bfloat16, device, **changes)
        policy = worst_case_policy(model, layer, self.scale.d_sae[0], device)
        prompt = torch.arange(2, 34, device=device)[None] % model.config.vocab_size
        options = {} if cache is None else {"cache_implementation": cache}

        def times(backend: str | None) -> list[float]:
            if backend is None:
                return step_milliseconds(model, prompt, count, **options)
            with dspa.steer(model, policy, backend=backend) as steering:
                taken = step_milliseconds(model, prompt, count, **options)
            assert steering.summary().tokens_edited == count, "not every token was edited"
            return taken

        row = f"{name}, {'dynamic cache, eager' if cache is None else f'{cache} cache, compiled'}"
        samples: dict[str | None, list[float]] = {way: [] for way in (None, *self.backends)}
        try:
            for way in samples:
                times(way)
            for _ in range(self.scale.generate_rounds):
                for way, taken in samples.items():
                    taken += times(way)
        except AssertionError as failure:
            return Row(row, "generate, GPU", (), UNSTEERED, failed=_first_line(failure))
        columns = [time_column(way or UNSTEERED, taken, samples[None]) for way, taken in samples.items()]
        return Row(row, "generate, GPU", tuple(columns), UNSTEERED)


def _peak_mebibytes(run: Callable[[], object]) -> float:
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _first_line(failure: AssertionError) -> str:
    return (str(failure).strip() or "check failed").splitlines()[0]
