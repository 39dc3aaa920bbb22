"""Times on a GPU: replays of a captured graph, the ways in turn, with the L2 cache emptied or not.

Without a GPU (`--dry-run`) the same calls are run and timed on the CPU, so that the script itself is tested; such
times mean nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dspa.bench.measurements import Column
from dspa.bench.timing import Way, time_column

EVICTING_BYTES = 256 << 20  # several times the L2 of any GPU so far


@dataclass(frozen=True)
class Sampler:
    """How samples are taken.

    Attributes:
        device: "cuda", or "cpu" for a dry run.
        rounds: samples of each way.
    """

    device: str
    rounds: int

    def columns(self, ways: Sequence[Way], reference: str, *, cold: bool) -> tuple[Column, ...]:
        """One column for each way; a round runs all of them, the reference with them.

        Args:
            ways: what to time; their tensors must stay where they are.
            reference: the name of the way whose time divides the others'.
            cold: whether the L2 cache is emptied before each sample; else the way itself has just run.
        """
        runs = [self._captured(way.run) for way in ways]
        evicting = torch.ones((EVICTING_BYTES if self.device == "cuda" else 1 << 10) // 4, device=self.device)
        samples: list[list[float]] = [[] for _ in ways]
        for _ in range(self.rounds):
            for way, run, taken in zip(ways, runs, samples, strict=True):
                way.prepare()
                evicting.sum() if cold else run()  # writing would leave lines that are written back meanwhile
                way.prepare()
                taken.append(self._milliseconds(run))
        by_name = {way.name: taken for way, taken in zip(ways, samples, strict=True)}
        return tuple(time_column(way.name, by_name[way.name], by_name[reference], way.bytes_read) for way in ways)

    def call_microseconds(self, run: Callable[[], object]) -> list[float]:
        """What a call costs the host, launches included, nothing waited for."""
        run()
        self._wait()
        samples = []
        for _ in range(self.rounds):
            start = time.perf_counter()
            run()
            samples.append((time.perf_counter() - start) * 1e6)
            self._wait()
        return samples

    def _captured(self, run: Callable[[], object]) -> Callable[[], object]:
        for _ in range(2):  # compiles, allocates
            run()
        self._wait()
        if self.device != "cuda":
            return run
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return graph.replay

    def _milliseconds(self, run: Callable[[], object]) -> float:
        if self.device != "cuda":
            start = time.perf_counter()
            run()
            return (time.perf_counter() - start) * 1e3
        start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start_event.record()
        run()
        end_event.record()
        end_event.synchronize()
        return start_event.elapsed_time(end_event)

    def _wait(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Ceilings:
    """What this GPU does at most, measured here.

    Attributes:
        copy_gb_per_s: a device-to-device copy, bytes read plus bytes written.
        read_gb_per_s: a sum over a large tensor.
        matrix_tflop_per_s: a large bf16 matrix product of random numbers.
    """

    copy_gb_per_s: float
    read_gb_per_s: float
    matrix_tflop_per_s: float

    @classmethod
    def measure(cls, sampler: Sampler) -> Ceilings:
        real = sampler.device == "cuda"
        source = torch.ones((1 << 30) if real else (1 << 12), dtype=torch.float32, device=sampler.device)
        target = torch.empty_like(source)
        size = 8192 if real else 32
        a, b = (torch.randn(size, size, device=sampler.device, dtype=torch.bfloat16) for _ in range(2))
        ways = [
            Way("copy", lambda: target.copy_(source)),
            Way("read", lambda: source.sum()),
            Way("product", lambda: a @ b),
        ]
        columns = {column.name: column.measured.value for column in sampler.columns(ways, "copy", cold=True)}
        return cls(
            2 * source.nbytes / columns["copy"] / 1e6,
            source.nbytes / columns["read"] / 1e6,
            2 * size**3 / columns["product"] / 1e9,
        )
