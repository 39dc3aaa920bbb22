"""What a token step costs the processor, whatever the kernel takes: the time of Python, and of launching on a GPU.

    python benchmarks/host_time.py [--backend NAME] [--without-kernel]

The SAE is small, so that a GPU keeps up with the calls. `--without-kernel` replaces the kernel by nothing at all: the
C++ operation on a CPU; on a machine without a GPU, Triton's compiled kernel as well (--backend triton).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from statistics import median
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch

from dspa.kernels import EditList, SaeWeights, TokenStats, available, token_step
from dspa.kernels.token_step.prepared import PreparedStep

D_MODEL, D_SAE, K = 256, 512, 16
CALLS, ROUNDS = 100, 41


def microseconds(call: Callable[[], object], device: torch.device) -> tuple[float, float]:
    """The time of a call in the fastest and the median round. A GPU's queue never fills up."""
    rounds: list[float] = []
    for _ in range(ROUNDS):
        if device.type == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append((time.perf_counter() - begin) / CALLS * 1e6)
    return min(rounds), median(rounds)


@contextmanager
def without_operation() -> Iterator[None]:
    """Within it, a prepared step of the C++ library calls nothing."""

    def nothing(*_: object) -> None: ...

    packet = torch.ops.dspa.token_step  # its library is loaded
    with mock.patch.object(packet, "default", nothing):
        yield


@contextmanager
def without_gpu() -> Iterator[None]:
    """Within it, Triton's steps are laid out, and their compiled kernel is nothing."""
    from dspa.kernels.token_step import triton_bound
    from dspa.kernels.triton_common import launch

    class Nothing:
        function, packed_metadata = 0, ()

        def run(self, *_: object) -> None: ...

    compiled = Nothing()

    def run(_: object) -> Nothing:
        return compiled

    active = SimpleNamespace(get_current_stream=lambda _: 0, get_current_device=lambda: None)
    with (
        mock.patch.object(launch, "architecture", return_value="sm_90"),
        mock.patch.object(launch.Launch, "run", run),
        mock.patch.object(triton_bound, "is_interpreted", return_value=False),
        mock.patch.object(triton_bound, "driver", SimpleNamespace(active=active)),
    ):
        yield


def main() -> None:
    parser = argparse.ArgumentParser(description="What a token step costs the processor.")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--without-kernel", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    available()  # loads the backends
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    W = torch.randn(D_SAE, D_MODEL, device=device).bfloat16()
    zeros = torch.zeros(D_SAE, device=device)
    sae = SaeWeights(W_enc=W, W_dec=W, b_enc=zeros, threshold=zeros + 1e9, activation="jumprelu")
    hidden = torch.randn(1, D_MODEL, device=device).bfloat16()
    edits, stats = EditList.empty(1, K, device), TokenStats.zeros(1, D_SAE, device)
    enabled = torch.ones(1, dtype=torch.bool, device=device)
    left_out: Any = nullcontext()
    if options.without_kernel:
        left_out = without_gpu() if options.backend == "triton" else without_operation()
    with torch.no_grad(), left_out:
        step = PreparedStep(sae, edits, 0.2, backend=options.backend)
        step.prepare(torch.bfloat16)
        for name, call in {
            "token_step": lambda: token_step(hidden, sae, edits, 0.2, enabled, stats, backend=options.backend),
            "prepared step": lambda: step(hidden, enabled, stats),
        }.items():
            for _ in range(CALLS):
                call()
            fastest, middle = microseconds(call, device)
            print(f"{name:14} {options.backend:8} on {device.type}: {middle:6.1f} us a call (fastest {fastest:.1f})")


if __name__ == "__main__":
    main()
