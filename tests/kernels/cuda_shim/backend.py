"""The kernels on the shim as the backend "cuda-shim", called by the same Python code as on a GPU."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from cuda_shim import build
from dspa.kernels.adapter_step.cuda import adapter_step
from dspa.kernels.backends.interface import Backend, Operations
from dspa.kernels.backends.registry import register_backend
from dspa.kernels.backends.table import BACKENDS
from dspa.kernels.encode_density.cuda import encode_density
from dspa.kernels.lookup.cuda import lookup
from dspa.kernels.token_step.cuda import bind_step, token_step, token_step_with_lookup

NAME = "cuda-shim"
THREADS = 64  # of a block; what a GPU gets is more, and the same kernel
SHARED_LIMIT = 227 * 1024
DENSITY_BYTES = 64 << 20
_DEVICES = {(2, SHARED_LIMIT, 9): 0}  # their numbers, by processors, shared memory and compute capability


def operations() -> Any:
    """`torch.ops.dspa_cuda_shim`, built and loaded."""
    path = str(build.library())
    torch.ops.load_library(path)
    found = torch.ops.dspa_cuda_shim
    found.set_cuda_tuning(THREADS, 1, DENSITY_BYTES, warpgroup_products=False)
    return found


def load() -> Operations:
    library = operations()
    return Operations(
        partial(encode_density, library=library),
        partial(lookup, library=library),
        partial(token_step, library=library),
        partial(token_step_with_lookup, library=library),
        partial(adapter_step, library=library),
        bind_step=partial(bind_step, library=library),
    )


def register() -> None:
    """Registers the backend; "auto" never chooses it."""
    on_gpu = next(backend for backend in BACKENDS if backend.name == "cuda")
    register_backend(Backend(NAME, (), load, replace(on_gpu.serves, devices=("cpu",))))


@contextmanager
def machine(
    *,
    clusters_at_a_time: int = 3,
    processors: int = 2,
    shared_limit: int = SHARED_LIMIT,
    compute_capability: int = 9,
    seed: int = 1,
    cluster: int = 1,
    threads: int = THREADS,
    density_bytes: int = DENSITY_BYTES,
    warpgroup_products: bool = False,
    bulk_copies: bool = False,
    early_launch: bool = False,
    calls_to_failure: int = 0,
) -> Iterator[None]:
    """Another GPU, another shape of the launch, or another order of the threads, for a while.

    Args:
        clusters_at_a_time: how many really run; one is enough for a kernel that is right.
        processors: of two blocks each, as the launcher is told.
        shared_limit: bytes of shared memory that a block may have.
        compute_capability: 9 is sm_90a, with clusters, bulk copies and products of warpgroups; 8 has none.
        seed: of the order in which threads go on.
        cluster: blocks of a cluster.
        threads: of a block.
        density_bytes: of inputs, or scores, that encode_density holds.
        warpgroup_products: encode_density multiplies by warpgroups.
        bulk_copies: the copy engine brings W_enc to token_step.
        early_launch: token_step begins while the kernel before it ends.
        calls_to_failure: the call of CUDA that fails, counted from here on; 0 for none.
    """
    configure = ctypes.CDLL(str(build.library())).cuda_shim_configure
    configure.argtypes = [*[ctypes.c_int] * 4, ctypes.c_uint64, ctypes.c_int, ctypes.c_int]
    # A number of its own for each, as what a kernel may have on a device is asked once.
    device = _DEVICES.setdefault((processors, shared_limit, compute_capability), len(_DEVICES))
    tune = operations().set_cuda_tuning
    configure(clusters_at_a_time, processors, shared_limit, compute_capability, seed, device, calls_to_failure)
    tune(threads, cluster, density_bytes, warpgroup_products, bulk_copies, early_launch)
    try:
        yield
    finally:
        configure(3, 2, SHARED_LIMIT, 9, 1, 0, 0)
        tune(THREADS, 1, DENSITY_BYTES, warpgroup_products=False)


def last_error() -> int:
    """The error of CUDA that nobody has asked for yet; 0 for none."""
    return ctypes.CDLL(str(build.library())).cuda_shim_last_error()
