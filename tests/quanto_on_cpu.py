"""optimum-quanto without its C++ extension, which it would compile for a minute when it is first used on a CPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor


def quanto_without_compiling(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package, or a skip where it is not installed."""
    quanto = pytest.importorskip("optimum.quanto", reason="4-bit weights and quantized caches need optimum-quanto")
    extension = pytest.importorskip("optimum.quanto.library.extensions.cpp").ext
    monkeypatch.setattr(extension, "_lib", SimpleNamespace(unpack=unpack))
    return quanto


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Values of so many bits out of bytes, the lowest ones first."""
    return torch.cat([(packed >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]).to(torch.uint8)
