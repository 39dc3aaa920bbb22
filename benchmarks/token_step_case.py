"""An SAE of some shape with random weights, tokens that need this or that of it, and the ways to edit them in plain
torch. Nothing here needs sae-lens."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from dspa.kernels import EditList, SaeWeights, StepMode, token_step
from dspa.sae.encode import encode

ALPHA = 0.2
K_DIFF = 16
THRESHOLD = 0.1  # latents of unit variance: the largest is about 4, alpha * M_t about 0.8
NEEDS_MAXIMUM = "needs M_t"
LISTS = ("none active", "all certainly zero", NEEDS_MAXIMUM)


@dataclass(frozen=True)
class Shape:
    d_model: int
    d_sae: int
    dtype: torch.dtype
    batch: int
    k: int | None = None
    """Latents that a top-k SAE keeps; None for a JumpReLU SAE."""

    def __str__(self) -> str:
        kind = "" if self.k is None else f"-top{self.k}"
        return f"{self.d_model}x{self.d_sae}{kind}-{str(self.dtype).removeprefix('torch.')}-batch{self.batch}"


class Case:
    """Weights, hidden states and edit lists of one row."""

    def __init__(self, shape: Shape, backend: str, device: str = "cpu") -> None:
        self.shape = shape
        self.backend = backend
        rng = torch.Generator(device).manual_seed(0)
        size, scale = (shape.d_sae, shape.d_model), 1 / math.sqrt(shape.d_model)
        W_enc = torch.empty(size, dtype=shape.dtype, device=device).normal_(generator=rng).mul_(scale)
        W_dec = torch.empty(size, dtype=shape.dtype, device=device).normal_(generator=rng).mul_(scale)
        self.hidden = torch.randn(shape.batch, shape.d_model, generator=rng, device=device).to(shape.dtype)
        self.sae = SaeWeights(
            W_enc=W_enc,
            b_enc=torch.zeros(shape.d_sae, device=device),
            threshold=torch.full((shape.d_sae,), THRESHOLD, device=device),
            activation="jumprelu" if shape.k is None else "topk",
            k=shape.k,
            W_dec=W_dec,
        )
        self.lists = self._lists()

    def _lists(self) -> dict[str, EditList]:
        """Ablated latents, none of them near a threshold or near `alpha * M_t`."""
        f = torch.cat([encode(row, self.sae) for row in self.hidden.split(1)])
        maximum = f.amax(dim=1, keepdim=True)
        lowest = f.where(f > 0, torch.inf).amin(dim=1, keepdim=True)  # of the active latents
        wanted = {
            "none active": f == 0,
            "all certainly zero": (f > 1.5 * lowest) & (f < 0.9 * ALPHA * maximum),
            NEEDS_MAXIMUM: (f > 1.1 * ALPHA * maximum) & (f > 1.05 * lowest) & (f < 0.9 * maximum),
        }
        lists = {name: [row.nonzero().flatten()[:K_DIFF].tolist() for row in mask] for name, mask in wanted.items()}
        return {
            name: EditList.from_lists([[]] * self.shape.batch, latents, self.hidden.device)
            for name, latents in lists.items()
        }

    def step(self, lists: str, mode: StepMode | None, backend: str | None = None) -> Tensor:
        """The hidden states after one step, as a new tensor."""
        hidden = self.hidden.clone()
        token_step(hidden, self.sae, self.lists[lists], ALPHA, mode=mode, backend=backend or self.backend)
        return hidden

    def on(self, backend: str) -> Case:
        """The same row by another backend, with the same tensors."""
        other = copy.copy(self)
        other.backend = backend
        return other

    def in_place(self, lists: str, mode: StepMode | None) -> tuple[Callable[[], object], Callable[[], object]]:
        """One step alone, and what restores its hidden states before the next."""
        hidden = self.hidden.clone()
        edits = self.lists[lists]
        return (
            lambda: token_step(hidden, self.sae, edits, ALPHA, mode=mode, backend=self.backend),
            lambda: hidden.copy_(self.hidden),
        )

    def check(self, modes: tuple[StepMode, ...], lists: tuple[str, ...] = LISTS) -> None:
        """Every mode gives the same bits, and those of the reference on float64 copies, rounded.

        Raises:
            AssertionError: if not.
        """
        unit = torch.finfo(self.shape.dtype).eps
        for name in lists:
            first = self.step(name, modes[0])
            change = (first.float() - self.hidden.float()).abs().amax()
            assert change == 0 if name == "none active" else change > 8 * unit, f"{name}: changed by {change}"
            for mode in modes[1:]:
                assert torch.equal(self.step(name, mode), first), f"{mode} differs from {modes[0]}"
            torch.testing.assert_close(first, self._expected(name), rtol=unit, atol=unit)

    def _expected(self, lists: str) -> Tensor:
        hidden = self.hidden.double()
        doubled = {name: t.double() for name, t in self.sae.tensors().items() if t.is_floating_point()}
        token_step(hidden, replace(self.sae, **doubled), self.lists[lists], ALPHA, backend="reference")
        return hidden.to(self.shape.dtype)


class EncoderDecoder(Protocol):
    """What the plain ways need of an SAE: sae-lens' own, or `PlainSae`."""

    @property
    def W_dec(self) -> Tensor: ...  # noqa: N802, sae-lens' name

    def encode(self, x: Tensor) -> Tensor: ...
    def decode(self, feature_acts: Tensor) -> Tensor: ...


@dataclass(eq=False)
class PlainSae:
    """sae-lens' arithmetic for these two kinds of SAE, written out: encoder as `[d_model, d_sae]`, everything in the
    dtype of the weights."""

    W_enc: Tensor
    W_dec: Tensor
    b_enc: Tensor
    b_dec: Tensor
    threshold: Tensor
    k: int | None

    @classmethod
    def from_weights(cls, sae: SaeWeights) -> PlainSae:
        assert sae.W_dec is not None
        dtype, zeros = sae.dtype, torch.zeros(sae.d_model, dtype=sae.dtype, device=sae.device)
        return cls(sae.W_enc.T.contiguous(), sae.W_dec, sae.b_enc.to(dtype), zeros, sae.threshold.to(dtype), sae.k)

    def encode(self, x: Tensor) -> Tensor:
        z = x @ self.W_enc + self.b_enc
        if self.k is None:
            return torch.relu(z) * (z > self.threshold)
        top = torch.topk(z, self.k, dim=-1)
        return torch.zeros_like(z).scatter(-1, top.indices, torch.relu(top.values))

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts @ self.W_dec + self.b_dec


def edited(f: Tensor, latents: Tensor) -> Tensor:
    """Ablation as one writes it on top of an SAE library."""
    selected = f.gather(1, latents)
    return f.scatter(1, latents, (selected - ALPHA * f.amax(dim=1, keepdim=True)).clamp(min=0))


@torch.no_grad()
def with_error_term(sae: EncoderDecoder, hidden: Tensor, latents: Tensor) -> Tensor:
    """Encode, edit, decode, and add what the SAE does not reconstruct: three passes over the weights."""
    f = sae.encode(hidden)
    return sae.decode(edited(f, latents)) + (hidden - sae.decode(f))


@torch.no_grad()
def as_delta(sae: EncoderDecoder, hidden: Tensor, latents: Tensor) -> Tensor:
    """The same by decoding only the difference: two passes."""
    f = sae.encode(hidden)
    return hidden + (edited(f, latents) - f) @ sae.W_dec
