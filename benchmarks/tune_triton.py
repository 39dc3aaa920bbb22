"""Chooses the block sizes of the Triton kernels on the GPU that is here, and writes them into the package.

    python benchmarks/tune_triton.py             measures, and rewrites dspa/kernels/triton_common/configurations.py
    python benchmarks/tune_triton.py --dry-run   the same at toy shapes through the interpreter; writes nothing

A candidate is used only if it gives the result of the reference and spills no register. Exits with 2 where there is no
GPU.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

SHAPES = [(2304, 16384), (3584, 16384), (4096, 65536), (2304, 65536), (3584, 131072)]
TOY_SHAPES = [(64, 256)]
BATCH, TOKENS, TOY_TOKENS, LISTED = 1, 1024, 40, 16
REPETITIONS = 20

Sizes = tuple[int, int, int, int, int]  # latents, tokens, model, warps, stages


def main() -> int:
    parser = argparse.ArgumentParser(description="Choose the block sizes of the Triton kernels on this GPU.")
    parser.add_argument("--dry-run", action="store_true", help="toy shapes through the interpreter; writes nothing")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported
    elif not torch.cuda.is_available():
        print("no GPU was found; --dry-run goes through all of it with the interpreter", file=sys.stderr)
        return 2
    from dspa.kernels.triton_common import configurations as triton_configurations
    from dspa.kernels.triton_common import launch as triton_launch

    device = torch.device("cpu" if arguments.dry_run else "cuda")
    architecture = triton_launch.architecture(device)
    for operation, table in (
        ("token_step", triton_configurations.TOKEN_STEP),
        ("encode_density", triton_configurations.ENCODE_DENSITY),
    ):
        of_shape = {
            shape: (best(operation, shape, device, False), best(operation, shape, device, True))
            for shape in (TOY_SHAPES if arguments.dry_run else SHAPES)
        }
        if not arguments.dry_run:
            table[architecture] = of_shape
        for shape, sizes in of_shape.items():
            print(f"{operation} {shape} on {architecture}: {sizes[0]}, in parts {sizes[1]}")
    if not arguments.dry_run:
        write(Path(triton_configurations.__file__), torch.cuda.get_device_name(device))
    return 0


def candidates(operation: str, toy: bool) -> Iterator[Sizes]:
    """Block sizes to try."""
    if toy:
        yield from [(64, 16, 64, 1, 1), (128, 16, 64, 1, 1)]
        return
    tokens = (16,) if operation == "token_step" else (64, 128, 256)
    yield from itertools.product((64, 128), tokens, (32, 64, 128), (4, 8), (2, 3, 4, 5))


def best(operation: str, shape: tuple[int, int], device: torch.device, in_parts: bool) -> Sizes:
    """The fastest of the candidates that are right and do not spill."""
    from dspa.kernels.triton_common.table import Tile

    run, expected = workload(operation, shape, device, in_parts)
    times: dict[Sizes, float] = {}
    for sizes in candidates(operation, device.type == "cpu"):
        with tile(Tile(*sizes)):
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
    operation: str, shape: tuple[int, int], device: torch.device, in_parts: bool
) -> tuple[Callable[[str], Tensor], Tensor]:
    """A call of the operation by a backend, and what the reference gives."""
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

    return run, run("reference")


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


def spills() -> bool:
    """Whether a kernel that is loaded on this GPU spills registers."""
    from dspa.kernels.encode_density import triton as density
    from dspa.kernels.token_step import triton as step

    for kernel in (step.token_step_kernel, density.count_gates):
        caches = getattr(kernel, "device_caches", {})
        for cache, *_ in caches.values():
            loaded = list(cache.values())
            if loaded and loaded[-1].n_spills:
                return True
    return False


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """The median time of a call, with the caches of the GPU full of something else."""
    if device.type == "cpu":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    flood = torch.empty(256 << 20, dtype=torch.int8, device=device)
    times = []
    for _ in range(REPETITIONS):
        flood.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
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
