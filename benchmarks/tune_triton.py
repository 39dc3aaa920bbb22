"""Chooses the block sizes of the Triton kernels on the GPU that is here, and writes them into the package.

    python benchmarks/tune_triton.py             measures, and rewrites dspa/kernels/triton_common/configurations.py
    python benchmarks/tune_triton.py --plain     the same for plain products alone; those in parts keep their sizes
    python benchmarks/tune_triton.py --dry-run   the same at toy shapes through the interpreter; writes nothing

The candidates are compiled by several processes first. One is used only if it computes the reference's result and
spills no register. Exits with 2 where there is no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:  # imported where TRITON_INTERPRET is set
    from dspa.kernels.triton_common.table import Tile

SHAPES = [(2304, 16384), (3584, 16384), (4096, 65536), (2304, 65536), (3584, 131072)]
TOY_SHAPES = [(64, 256)]
BATCH, TOKENS, TOY_TOKENS, LISTED = 1, 1024, 40, 16
REPETITIONS = 20
OPERATIONS = ("token_step", "encode_density")

Sizes = tuple[int, int, int, int, int]  # latents, tokens, model, warps, stages


def main() -> int:
    parser = argparse.ArgumentParser(description="Choose the block sizes of the Triton kernels on this GPU.")
    parser.add_argument("--dry-run", action="store_true", help="toy shapes through the interpreter; writes nothing")
    parser.add_argument("--plain", action="store_true", help="only the sizes for plain products, those of bfloat16")
    parser.add_argument("--operations", nargs="+", default=OPERATIONS, choices=OPERATIONS, help="default: all")
    parser.add_argument("--out", type=Path, help="the table; default: in the package")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    elif not torch.cuda.is_available():
        print("no GPU was found; --dry-run goes through all of it with the interpreter", file=sys.stderr)
        return 2
    sys.path.insert(0, str(Path(__file__).parents[1]))  # where the package is not installed
    from dspa.kernels.triton_common import configurations as triton_configurations
    from dspa.kernels.triton_common import launch as triton_launch
    from dspa.kernels.triton_common.table import tile_of

    device = torch.device("cpu" if arguments.dry_run else "cuda")
    architecture = triton_launch.architecture(device)
    tables = dict(
        zip(OPERATIONS, (triton_configurations.TOKEN_STEP, triton_configurations.ENCODE_DENSITY), strict=True)
    )
    for operation in arguments.operations:
        shapes = TOY_SHAPES if arguments.dry_run else SHAPES
        if not arguments.dry_run:
            compile_candidates(operation, shapes, arguments.plain)
        of_shape: dict[tuple[int, int], tuple[Sizes, Sizes]] = {}
        for shape in shapes:
            plain = best(operation, shape, device, False)
            in_parts = sizes_of(tile_of(operation, architecture, *shape, True))
            of_shape[shape] = (plain, in_parts if arguments.plain else best(operation, shape, device, True))
            print(f"{operation} {shape} on {architecture}: {plain}, in parts {of_shape[shape][1]}", flush=True)
        if not arguments.dry_run:
            tables[operation][architecture] = of_shape
            path = arguments.out or Path(triton_configurations.__file__)
            write(path, torch.cuda.get_device_name(device))  # after each operation, lest a late failure costs the first
    return 0


def sizes_of(tile: Tile) -> Sizes:
    return tile.latents, tile.tokens, tile.model, tile.warps, tile.stages


def compile_candidates(operation: str, shapes: Sequence[tuple[int, int]], plain: bool) -> None:
    """Fills Triton's cache: each candidate is run once, many at a time, since compiling takes most of the time. What
    fails here fails again where it is measured, and is named there."""
    work = [
        (operation, shape, in_parts, sizes)
        for shape in shapes[:1]  # the code of a candidate does not depend on the shape
        for in_parts in ((False,) if plain else (False, True))
        for sizes in candidates(operation, False)
    ]
    processes = max(1, (os.cpu_count() or 1) - 1)
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(run_once, work, chunksize=-(-len(work) // processes)))


def run_once(work: tuple[str, tuple[int, int], bool, Sizes]) -> None:
    from dspa.kernels.triton_common.table import Tile

    operation, shape, in_parts, sizes = work
    run, _ = workload(operation, shape, torch.device("cuda"), in_parts, with_reference=False)
    with contextlib.suppress(Exception), tile(Tile(*sizes)):  # too much shared memory, say
        run("triton")


def candidates(operation: str, toy: bool) -> Iterator[Sizes]:
    """Block sizes to try."""
    if toy:
        yield from [(64, 16, 64, 1, 1), (128, 16, 64, 1, 1)]
        return
    if operation == "token_step":
        yield from itertools.product((64, 128), (16,), (64, 128, 256), (4, 8), (3, 4, 5))
    else:
        yield from itertools.product((64, 128, 256), (64, 128, 256), (64,), (4, 8), (3, 4))


def best(operation: str, shape: tuple[int, int], device: torch.device, in_parts: bool) -> Sizes:
    """The fastest of the candidates that are right and do not spill."""
    from dspa.kernels.triton_common.table import Tile

    run, expected = workload(operation, shape, device, in_parts)
    times: dict[Sizes, float] = {}
    for sizes in candidates(operation, device.type == "cpu"):
        with tile(Tile(*sizes)):
            forget_kernels()
            try:
                found = run("triton")
            except Exception as error:  # too much shared memory, say: not a candidate
                print(f"{operation} {shape} {sizes}: {type(error).__name__}", file=sys.stderr)
                continue
            if not agrees(operation, found, expected):
                print(f"{operation} {shape} {sizes}: another result than the reference's", file=sys.stderr)
            elif not spills():
                times[sizes] = seconds(lambda: run("triton"), device)
    if not times:
        raise SystemExit(f"no block sizes work for {operation} at {shape}")
    return min(times, key=times.__getitem__)


def workload(
    operation: str, shape: tuple[int, int], device: torch.device, in_parts: bool, *, with_reference: bool = True
) -> tuple[Callable[[str], Tensor], Tensor]:
    """A call of the operation by a backend, and the result of the reference, or nothing in its place."""
    from dspa.kernels import EditList, SaeWeights, encode_density, token_step

    d_model, d_sae = shape
    rng = torch.Generator(device).manual_seed(0)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=rng, device=device) / d_model**0.5

    sae = SaeWeights(
        W_enc=normal(d_sae, d_model).bfloat16(),
        b_enc=torch.zeros(d_sae, device=device),
        threshold=torch.full((d_sae,), 0.05, device=device),
        activation="jumprelu",
        W_dec=normal(d_sae, d_model).bfloat16(),
        b_dec=torch.zeros(d_model, device=device),
        subtract_b_dec=in_parts,
    )
    tokens = TOY_TOKENS if device.type == "cpu" else TOKENS
    hidden = normal(BATCH if operation == "token_step" else tokens, d_model).bfloat16() * d_model**0.5
    edits = EditList.from_lists([[]] * BATCH, [list(range(LISTED))] * BATCH, device)
    offsets = torch.tensor([0, tokens], device=device)

    def run(backend: str) -> Tensor:
        if operation == "encode_density":
            return encode_density(hidden, offsets, sae, backend=backend)
        row = hidden.clone()
        token_step(row, sae, edits, 0.2, mode="dense", backend=backend)
        return row

    return run, run("reference") if with_reference else torch.empty(0)


def agrees(operation: str, found: Tensor, expected: Tensor) -> bool:
    """Within what the rounding of bfloat16, or of gates that are met exactly, may change. Tests are stricter."""
    if operation == "encode_density":
        return bool(((found - expected).abs() <= 2).all())
    return bool(((found - expected).float().abs() <= 2**-7 * expected.float().abs().clamp(min=1e-3)).all())


@contextmanager
def tile(candidate: object) -> Iterator[None]:
    """Within it, every kernel runs with these block sizes."""
    from dspa.kernels.triton_common import launch as triton_launch

    original = triton_launch.tile_of
    triton_launch.tile_of = lambda *_: candidate  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        triton_launch.tile_of = original


def forget_kernels() -> None:
    """Empties the kernels' caches, so that what is there after a run is what the run has loaded."""
    for kernel in kernels():
        getattr(kernel, "device_caches", {}).clear()


def spills() -> bool:
    """Whether a kernel that is loaded on this GPU spills registers."""
    caches = [cache for kernel in kernels() for cache, *_ in getattr(kernel, "device_caches", {}).values()]
    return any(getattr(loaded, "n_spills", 0) for cache in caches for loaded in cache.values())


def kernels() -> tuple[Any, ...]:
    from dspa.kernels.encode_density import triton as density
    from dspa.kernels.token_step import triton as step

    return step.token_step_kernel, density.count_gates


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median time of a call, with the caches of the GPU full of something else."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):  # a replay: what the host takes for a launch would hide the kernel
        run()
    flood = torch.ones(64 << 20, device=device)
    times = []
    for _ in range(REPETITIONS):
        flood.sum()  # not written: dirty lines would be written back while the kernel is timed
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


def write(path: Path, device: str) -> None:
    """Rewrites the table, all architectures, with the measured ones in place."""
    from dspa.kernels.triton_common import configurations as triton_configurations

    lines = [
        '"""Block sizes of the Triton kernels by architecture and SAE shape (d_model, d_sae).',
        "",
        f"Written by benchmarks/tune_triton.py, last on {device}. Architectures that were not at hand have",
        "blocks chosen by hand among a few that spill no register.",
        '"""',
        "",
        "# latents, tokens, model, warps, stages: see dspa.kernels.triton_common.table.Tile",
        "Sizes = tuple[int, int, int, int, int]",
        "",
        "# For each shape, first the sizes for plain products, then those for products in parts.",
    ]
    for name in ("TOKEN_STEP", "ENCODE_DENSITY"):
        lines.append(f"{name}: dict[str, dict[tuple[int, int], tuple[Sizes, Sizes]]] = {{")
        for architecture, of_shape in getattr(triton_configurations, name).items():
            lines.append(f'    "{architecture}": {{')
            lines += [f"        {shape}: {sizes}," for shape, sizes in of_shape.items()]
            lines.append("    },")
        lines.append("}")
    path.write_text("\n".join(lines) + "\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(main())
