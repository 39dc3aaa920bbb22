"""The C++ operations return what they allocate, to the last byte: the C library counts it."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable

import pytest
import torch
from kernel_cases import Kind, dense_map, edit_list, generator, make_sae, normal, random_lists

from dspa.kernels import TokenStats, available, encode_density, lookup, token_step

LIBC = ctypes.CDLL(None)
pytestmark = [
    pytest.mark.skipif(available()["cpu"] != "available", reason=f"backend cpu: {available()['cpu']}"),
    pytest.mark.skipif(not hasattr(LIBC, "mallinfo2"), reason="the C library has no mallinfo2 (glibc 2.33 has)"),
]
COUNTS = ("arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost")
D_MODEL, D_SAE, BATCH, CALLS = 37, 64, 3, 300


class Mallinfo2(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_size_t) for name in COUNTS)


def allocated() -> int:
    """Bytes that the C library has handed out and not got back."""
    gc.collect()
    LIBC.mallinfo2.restype = Mallinfo2
    counts = LIBC.mallinfo2()
    return int(counts.uordblks + counts.hblkhd)


def operations() -> dict[str, Callable[[], object]]:
    sae = make_sae(Kind(), D_MODEL, D_SAE, torch.float32, seed=0)
    conditional_map = dense_map(normal(generator(5), D_SAE, D_SAE))
    edits = edit_list(*random_lists(sae, BATCH, 4, 0), 4)
    hidden, density = normal(generator(1), BATCH, D_MODEL).float(), torch.rand(BATCH, D_SAE)
    offsets, stats = torch.tensor([0, BATCH]), TokenStats.zeros(BATCH, D_SAE)
    return {
        "lookup": lambda: lookup(density, conditional_map, 4, 4, backend="cpu"),
        "encode_density": lambda: encode_density(hidden, offsets, sae, backend="cpu"),
        "token_step": lambda: token_step(hidden.clone(), sae, edits, 0.2, None, stats, backend="cpu"),
    }


@pytest.mark.long
@pytest.mark.parametrize("name", ["lookup", "encode_density", "token_step"])
def test_a_call_leaves_nothing_allocated(name: str) -> None:
    torch.set_num_threads(1)
    call = operations()[name]
    for _ in range(50):
        call()
    before = allocated()
    for _ in range(CALLS):
        call()
    assert (allocated() - before) / CALLS < 16  # bytes; the least that a leaked block takes is 32
