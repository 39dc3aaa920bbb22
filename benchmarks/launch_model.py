"""A model of the Triton `token_step` launch: its time from bytes, chains of dependent loads, and programs per
multiprocessor, to be held against the floor, a launch that does nothing but read `W_enc` once, and against what was
measured.

It knows no GPU but the one whose constants it is given. It answers which part of a launch keeps it from the floor; it
does not replace a measurement.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from dspa.kernels.token_step.triton import programs_of
from dspa.kernels.token_step.triton_kernel.structures import FINISHING, SLICE
from dspa.kernels.triton_common.rows import IN_FLIGHT, LISTED, ROW
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
        registers_us: what a launch of programs with this much shared memory and as many registers takes longer to
            begin and to end than an empty one.
        shared_bytes: shared memory of a multiprocessor.
    """

    architecture: str
    multiprocessors: int
    read_bytes_per_us: float
    load_us: float
    atomic_us: float
    launch_us: float
    registers_us: float
    shared_bytes: int


# Multiprocessors and shared memory: NVIDIA, H100 Tensor Core GPU Architecture (SXM5). The rate of reading:
# benchmarks/results/20261126-1010-152ff9b-gpu.md. The others were read off clocks inside a launch, and off launches
# that do nothing (3.4 us), only read (28.7 us for 2304 x 16384 in bfloat16) or only multiply (30.1 us).
H100 = Gpu("sm_90", 132, 3.113e6, 0.8, 0.6, 3.4, 1.4, 228 << 10)


@dataclass(frozen=True)
class Prediction:
    """Times in us.

    Attributes:
        floor: to read `W_enc` once, in a launch of its own.
        launch: one that does nothing.
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
    floor = gpu.launch_us + gpu.load_us + 2 * d_model * d_sae / gpu.read_bytes_per_us
    # The lists are prepared beside the pass; only lazy waits for them: for a list, the numbers of its latents and their
    # rows of W_enc, sums over these, a count that others see, and what a program of the pass then looks at.
    lists = blocks(max(listed, 1), LISTED.value)
    rows_of_weights = math.ceil(d_model / ROW.value / (2 * IN_FLIGHT.value - 1)) + 1
    prepare = lists * gpu.load_us * (1 + rows_of_weights) + 3 * gpu.atomic_us
    looking = gpu.atomic_us + gpu.load_us / 2
    before = gpu.atomic_us + (prepare + looking if mode == "lazy" else 0.0)
    reading = reading_us(gpu, tile, d_model, d_sae, batch)
    # The finish has loaded what it needs by then: the maximum and the count behind it, which others see, a sum over the
    # list, and a store.
    slices = blocks(d_model, SLICE.value)
    each = min(slices, blocks(batch * slices, FINISHING.value))
    after = 3 * gpu.atomic_us + (each + lists - 1) * 1.5 * gpu.load_us
    programs = programs_of(batch, d_model, d_sae, tile, "jumprelu", mode)
    waves = blocks(programs, gpu.multiprocessors * resident(gpu, tile)) if batch > 1 else 1
    after += (waves - 1) * (2 * gpu.atomic_us + gpu.load_us)
    return Prediction(floor, gpu.launch_us + gpu.registers_us, before, reading, after)


def resident(gpu: Gpu, tile: Tile) -> int:
    """Programs of the pass on one multiprocessor at a time, by their shared memory and by 2048 threads."""
    staged = tile.stages * 2 * tile.model * (tile.latents + tile.tokens)
    return max(1, min(gpu.shared_bytes // staged, 2048 // (32 * tile.warps)))


def reading_us(gpu: Gpu, tile: Tile, d_model: int, d_sae: int, batch: int) -> float:
    """The pass: limited by the memory, or by the bytes that its programs have asked for at a time. Programs that run
    beside each other share the memory, so that the last of them only take longer if they are too few."""
    programs = blocks(d_sae, tile.latents) * blocks(batch, tile.tokens)
    at_a_time = gpu.multiprocessors * resident(gpu, tile)
    last = programs % at_a_time or at_a_time
    bytes_of_program = 2 * d_model * d_sae / programs  # a tile is read from memory once, by the first of its groups

    def time(count: int, beside: int) -> float:
        in_flight = beside * (tile.stages - 1) * 2 * tile.model * tile.latents
        return count * bytes_of_program / min(gpu.read_bytes_per_us, in_flight / gpu.load_us)

    return gpu.load_us + time(programs - last, at_a_time) + time(last, last)
