"""A model of the Triton `token_step` launch: its time from bytes, chains of dependent loads, and programs per
multiprocessor, to be held against the floor, the time to read `W_enc` once, and against what was measured.

It knows no GPU but the one whose constants it is given. It answers which part of a launch keeps it from the floor; it
does not replace a measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dspa.kernels.token_step.triton_kernel.structures import SLICE
from dspa.kernels.triton_common.rows import LISTED, ROW
from dspa.kernels.triton_common.table import Tile, blocks, for_batch, tile_of

Mode = Literal["dense", "lazy"]


@dataclass(frozen=True)
class Gpu:
    """What a GPU does at most.

    Attributes:
        architecture: as in the table of block sizes.
        multiprocessors: of them.
        read_bytes_per_us: what a sum over a large tensor reads.
        load_us: a load from memory that nothing else waits for.
        atomic_us: an atomic operation in L2 and the barrier of a program around it.
        launch_us: an empty launch out of a graph, between two events.
        shared_bytes: shared memory of a multiprocessor.
    """

    architecture: str
    multiprocessors: int
    read_bytes_per_us: float
    load_us: float
    atomic_us: float
    launch_us: float
    shared_bytes: int


# Multiprocessors and shared memory: NVIDIA, H100 Tensor Core GPU Architecture (SXM5). The rate of reading:
# benchmarks/results/20261126-1010-152ff9b-gpu.md. Latencies: of the order that microbenchmarks of Hopper find (a load
# from memory 500 to 800 ns, one from L2 200 to 300 ns); an empty launch takes about 2 us.
H100 = Gpu("sm_90", 132, 3.113e6, 0.7, 0.6, 2.0, 228 << 10)


@dataclass(frozen=True)
class Prediction:
    """Times in us.

    Attributes:
        floor: to read `W_enc` once.
        launch: an empty launch.
        before, reading, after: preparing what the pass waits for, the pass, and the edit behind it.
    """

    floor: float
    launch: float
    before: float
    reading: float
    after: float

    @property
    def total(self) -> float:
        return self.launch + self.before + self.reading + self.after

    @property
    def share_of_floor(self) -> float:
        return self.floor / self.total


def predict(gpu: Gpu, d_model: int, d_sae: int, batch: int, mode: Mode, *, listed: int = 16) -> Prediction:
    """A full pass over bfloat16 weights from cold caches; every row of the batch needs M_t.

    Args:
        listed: entries of each row's list.
    """
    tile = for_batch(tile_of("token_step", gpu.architecture, d_model, d_sae, False), batch)
    floor = 2 * d_model * d_sae / gpu.read_bytes_per_us
    # The lists are prepared beside the pass; only lazy waits for them, with its first columns on the way.
    lists = blocks(max(listed, 1), LISTED.value)
    prepare = lists * gpu.load_us * (3 + math.ceil(d_model / ROW.value / 3)) + 2 * gpu.atomic_us
    leaders = gpu.load_us * (1 + math.ceil(d_model / ROW.value / 3))
    before = gpu.atomic_us + (prepare + leaders if mode == "lazy" else 0.0)
    reading = reading_us(gpu, tile, d_model, d_sae, batch)
    # The finish has loaded what it needs by then: a wait, the maximum, a sum over the list, a store and a last count.
    slices = batch * blocks(d_model, SLICE.value)
    rounds = blocks(slices, gpu.multiprocessors * resident(gpu, tile))
    after = rounds * (2 * gpu.atomic_us + 2 * gpu.load_us) + (lists - 1) * 2 * gpu.load_us
    return Prediction(floor, gpu.launch_us, before, reading, after)


def resident(gpu: Gpu, tile: Tile) -> int:
    """Programs of the pass on one multiprocessor at a time, by their shared memory and by 2048 threads."""
    staged = tile.stages * 2 * tile.model * (tile.latents + tile.tokens)
    return max(1, min(gpu.shared_bytes // staged, 2048 // (32 * tile.warps)))


def reading_us(gpu: Gpu, tile: Tile, d_model: int, d_sae: int, batch: int) -> float:
    """The pass: limited by the memory, by the bytes that its programs have asked for at a time, and by the last ones
    of them, which leave other multiprocessors without work."""
    groups = blocks(batch, tile.tokens)
    programs = blocks(d_sae, tile.latents) * groups
    on_each = resident(gpu, tile)
    in_flight = gpu.multiprocessors * on_each * (tile.stages - 1) * 2 * tile.model * tile.latents
    rate = min(gpu.read_bytes_per_us, in_flight / gpu.load_us)
    most = blocks(programs, gpu.multiprocessors)  # programs that the busiest multiprocessor runs
    bytes_of_tile = 2 * d_model * tile.latents / groups  # a tile is read from memory once, by the first of its groups
    return gpu.load_us + most * gpu.multiprocessors * bytes_of_tile / rate
