"""One row of the table: an SAE of some shape, tokens that need this or that, and the ways to edit them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from interleaved import Way
from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig
from torch import Tensor, nn

from dspa.kernels import EditList, SaeWeights, StepMode, token_step
from dspa.kernels.encode import encode
from dspa.kernels.token_step.cpu import scratch_of, work_of

BASELINE = "sae-lens with error term"
ALPHA = 0.2
K_DIFF = 16
THRESHOLD = 0.1  # latents of unit variance: the largest is about 4, alpha * M_t about 0.8


@dataclass(frozen=True)
class Shape:
    d_model: int
    d_sae: int
    dtype: torch.dtype
    batch: int

    def __str__(self) -> str:
        return f"{self.d_model}x{self.d_sae}-{str(self.dtype).removeprefix('torch.')}-batch{self.batch}"


class Case:
    """Everything one row needs. The decoder is shared by all columns; sae-lens has the encoder in its own layout."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        rng = torch.Generator().manual_seed(0)
        size, scale = (shape.d_sae, shape.d_model), 1 / math.sqrt(shape.d_model)
        W_enc = torch.empty(size, dtype=shape.dtype).normal_(generator=rng).mul_(scale)
        W_dec = torch.empty(size, dtype=shape.dtype).normal_(generator=rng).mul_(scale)
        self.hidden = torch.randn(shape.batch, shape.d_model, generator=rng).to(shape.dtype)
        self.sae = SaeWeights(
            W_enc=W_enc,
            b_enc=torch.zeros(shape.d_sae),
            threshold=torch.full((shape.d_sae,), THRESHOLD),
            activation="jumprelu",
            W_dec=W_dec,
        )
        self.lists = self._lists()
        self.sae_lens = self._sae_lens(W_enc, W_dec)

    def _lists(self) -> dict[str, EditList]:
        """Ablated latents, none of them near a threshold or near `alpha * M_t`."""
        f = torch.cat([encode(row, self.sae) for row in self.hidden.split(1)])
        maximum = f.amax(dim=1, keepdim=True)
        wanted = {
            "none active": f == 0,
            "all certainly zero": (f > 1.5 * THRESHOLD) & (f < 0.9 * ALPHA * maximum),
            "needs M_t": (f > 1.1 * ALPHA * maximum) & (f < 0.9 * maximum),
        }
        lists = {name: [row.nonzero().flatten()[:K_DIFF].tolist() for row in mask] for name, mask in wanted.items()}
        return {name: EditList.of([[]] * self.shape.batch, latents) for name, latents in lists.items()}

    def _sae_lens(self, W_enc: Tensor, W_dec: Tensor) -> JumpReLUSAE:
        config = JumpReLUSAEConfig(
            d_in=self.shape.d_model,
            d_sae=self.shape.d_sae,
            dtype=str(self.shape.dtype).removeprefix("torch."),
            device="meta",
            apply_b_dec_to_input=False,
        )
        sae = JumpReLUSAE(config)
        weights = {
            "W_enc": W_enc.T.contiguous(),
            "W_dec": W_dec,
            "b_enc": self.sae.b_enc.to(self.shape.dtype),
            "b_dec": torch.zeros(self.shape.d_model, dtype=self.shape.dtype),
            "threshold": self.sae.threshold.to(self.shape.dtype),
        }
        for name, value in weights.items():
            setattr(sae, name, nn.Parameter(value, requires_grad=False))
        return sae

    def step(self, lists: str, mode: StepMode, backend: str = "cpu") -> Tensor:
        hidden = self.hidden.clone()
        token_step(hidden, self.sae, self.lists[lists], ALPHA, mode=mode, backend=backend)
        return hidden

    def bytes_read(self, lists: str, mode: StepMode) -> int:
        """Measured, in the steady state: what one step reads of the encoder or its codes."""
        self.step(lists, mode)
        scratch_of(self.sae).counters.zero_()
        self.step(lists, mode)
        return work_of(self.sae).encoder_bytes

    def check(self) -> None:
        """Every way gives what the reference gives, the modes to the last bit."""
        unit = torch.finfo(self.shape.dtype).eps
        for name in self.lists:
            dense = self.step(name, "dense")
            change = (dense.float() - self.hidden.float()).abs().amax()
            assert change == 0 if name == "none active" else change > 8 * unit
            for mode in ("lazy", "screened"):
                assert torch.equal(self.step(name, mode), dense), f"{mode} differs from dense"
            expected = self.step(name, "dense", backend="reference")
            torch.testing.assert_close(dense, expected, rtol=unit, atol=unit)

    def ways(self) -> list[Way]:
        edits = self.lists["needs M_t"]
        latents = edits.latents.long()
        compiled = torch.compile(as_delta, dynamic=False)
        ours: list[tuple[str, StepMode]] = [
            ("needs M_t", "dense"),
            ("none active", "lazy"),
            ("all certainly zero", "lazy"),
            ("needs M_t", "lazy"),
            ("needs M_t", "screened"),
        ]
        return [
            Way("read W_enc", lambda: torch.ops.dspa.stream_read(self.sae.W_enc), self.sae.W_enc.nbytes),
            Way(BASELINE, lambda: with_error_term(self.sae_lens, self.hidden, latents)),
            Way("sae-lens as a delta", lambda: as_delta(self.sae_lens, self.hidden, latents)),
            Way("torch.compile of the delta", lambda: compiled(self.sae_lens, self.hidden, latents)),
            *(
                Way(
                    mode if mode != "lazy" else f"lazy, {lists}",
                    lambda lists=lists, mode=mode: self.step(lists, mode),
                    self.bytes_read(lists, mode),
                )
                for lists, mode in ours
            ),
        ]


def edited(f: Tensor, latents: Tensor) -> Tensor:
    """Ablation as one writes it on top of sae-lens."""
    selected = f.gather(1, latents)
    return f.scatter(1, latents, (selected - ALPHA * f.amax(dim=1, keepdim=True)).clamp(min=0))


@torch.no_grad()
def with_error_term(sae: JumpReLUSAE, hidden: Tensor, latents: Tensor) -> Tensor:
    """Encode, edit, decode, and add what the SAE does not reconstruct: three passes over the weights."""
    f = sae.encode(hidden)
    return sae.decode(edited(f, latents)) + (hidden - sae.decode(f))


@torch.no_grad()
def as_delta(sae: JumpReLUSAE, hidden: Tensor, latents: Tensor) -> Tensor:
    """The same by decoding only the difference: two passes."""
    f = sae.encode(hidden)
    return hidden + (edited(f, latents) - f) @ sae.W_dec
