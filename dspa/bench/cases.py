"""Cases for `token_step`: an SAE, hidden states, and edit lists that need more or less of it. Nothing here needs
sae-lens."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspa.bench.eager import ALPHA
from dspa.errors import InvalidInputError
from dspa.kernels import EditList, SaeWeights, StepMode, token_step
from dspa.sae.encode import compute_dtype, encode

K_DIFF = 16
THRESHOLD = 0.1  # latents of unit variance: the largest is about 4, alpha * M_t about 0.8
NEEDS_MAXIMUM = "needs M_t"
LISTS = ("none active", "all certainly zero", NEEDS_MAXIMUM)
ROUNDINGS = 16
DRAWN_AT_ONCE = 1 << 20
TRIES = 64  # random hidden states before a latent that is edited counts as not to be found


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
    """Weights, hidden states and edit lists of one row: random ones of some shape, or those for a given SAE.

    Attributes:
        shape, backend, sae: the SAE and the kernel backend that edits.
        alpha: edit strength.
        slack: by how much a hidden state may differ from the float64 one beside its own rounding: what rounding of the
            products can move. 0 for random weights, whose products and states are all of the order of 1.
        hidden: `[batch, d_model]`.
        lists: ablated latents for each row of the batch, by what they need; see `LISTS`. Without an entry where no row
            has such latents.
    """

    def __init__(self, shape: Shape, backend: str, device: str = "cpu") -> None:
        self.shape = shape
        self.backend = backend
        self.alpha, self.slack = ALPHA, 0.0
        rng = torch.Generator(device).manual_seed(0)
        size, scale = (shape.d_sae, shape.d_model), 1 / math.sqrt(shape.d_model)
        W_enc = normal_matrix(size, scale, shape.dtype, rng)
        W_dec = normal_matrix(size, scale, shape.dtype, rng)
        self._after_weights = rng.get_state()
        self.hidden = self._random_states(shape.batch, device)
        self.sae = SaeWeights(
            W_enc=W_enc,
            b_enc=torch.zeros(shape.d_sae, device=device),
            threshold=torch.full((shape.d_sae,), THRESHOLD, device=device),
            activation="jumprelu" if shape.k is None else "topk",
            k=shape.k,
            W_dec=W_dec,
        )
        self.lists = self._lists()

    def with_batch(self, batch: int) -> Case:
        """The case of random weights with another batch: the same as a new one, without drawing the weights again."""
        other = copy.copy(self)
        other.shape = replace(self.shape, batch=batch)
        other.hidden = self._random_states(batch, str(self.hidden.device))
        other.lists = other._lists()
        return other

    def _random_states(self, batch: int, device: str) -> Tensor:
        rng = torch.Generator(device)
        rng.set_state(self._after_weights)
        return torch.randn(batch, self.shape.d_model, generator=rng, device=device).to(self.shape.dtype)

    @classmethod
    def from_sae(cls, sae: SaeWeights, batch: int, alpha: float, backend: str) -> Case:
        """For an SAE with a decoder: random hidden states along the encoder row of a latent that can be decoded, so
        that there is something to edit.

        Raises:
            InvalidInputError: if none is found on which a latent with a decoder row is active and not ablated to 0.
        """
        case = cls.__new__(cls)
        case.shape = Shape(sae.d_model, sae.d_sae, sae.dtype, batch, sae.k)
        case.sae, case.backend, case.alpha = sae, backend, alpha
        rng = torch.Generator().manual_seed(0)
        case.hidden = torch.cat([case._edited_state(rng) for _ in range(batch)])
        case.lists = case._lists()
        case.slack = _products_error(case.hidden, sae) * (1 + alpha) * K_DIFF * decoder_size(sae)
        return case

    def _edited_state(self, rng: torch.Generator) -> Tensor:
        """`[1, d_model]`: noise, and more and more of a latent's direction."""
        decodable = decodable_latents(self.sae)
        choices = decodable.nonzero().flatten()
        for attempt in range(TRIES if len(choices) else 0):
            latent = int(choices[int(torch.randint(len(choices), (), generator=rng))])
            direction = self.sae.W_enc[latent].float()
            direction = direction / direction.norm().clamp(min=1e-12) * math.sqrt(self.shape.d_model)
            noise = torch.randn(self.shape.d_model, generator=rng).to(direction.device)
            hidden = (noise + 2.0 ** (attempt % 8) * direction).to(self.shape.dtype)[None]
            if bool(_kinds(hidden, self.sae, decodable, self.alpha)[NEEDS_MAXIMUM].any()):
                return hidden
        raise InvalidInputError(
            f"no hidden state was found on which one of {len(choices)} latents with a decoder row is edited at "
            f"alpha = {self.alpha}; expected an output SAE that edits something"
        )

    def _lists(self) -> dict[str, EditList]:
        """Ablated latents, none of them near a threshold or near `alpha * M_t`."""
        encoder = _in_compute_dtype(self.sae)
        rows = [_kinds(row, encoder, decodable_latents(self.sae), self.alpha) for row in self.hidden.split(1)]
        found = {name: [row[name].nonzero()[:, 1][:K_DIFF].tolist() for row in rows] for name in LISTS}
        empty: list[list[int]] = [[]] * self.shape.batch
        return {
            name: EditList.from_lists(empty, latents, self.hidden.device)
            for name, latents in found.items()
            if any(latents)
        }

    def step(self, lists: str, mode: StepMode | None, backend: str | None = None) -> Tensor:
        """The hidden states after one step, as a new tensor."""
        hidden = self.hidden.clone()
        token_step(hidden, self.sae, self.lists[lists], self.alpha, mode=mode, backend=backend or self.backend)
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
            lambda: token_step(hidden, self.sae, edits, self.alpha, mode=mode, backend=self.backend),
            lambda: hidden.copy_(self.hidden),
        )

    def check(self, modes: tuple[StepMode, ...], lists: tuple[str, ...] = LISTS) -> None:
        """Every mode produces the same bits, and those of the reference on float64 copies, rounded.

        Raises:
            AssertionError: if not.
        """
        unit = torch.finfo(self.shape.dtype).eps
        exact = self._in_float64(lists)
        for name in lists:
            assert name in self.lists, f"no latents for the list {name!r}"
            first = self.step(name, modes[0])
            change = (first.float() - self.hidden.float()).abs().amax()
            assert change == 0 if name == "none active" else change > 8 * unit, f"{name}: changed by {change}"
            for mode in modes[1:]:
                assert torch.equal(self.step(name, mode), first), f"{mode} differs from {modes[0]}"
            torch.testing.assert_close(first, self._expected(exact, name), rtol=unit, atol=unit + self.slack)

    def _in_float64(self, lists: tuple[str, ...]) -> SaeWeights:
        """The SAE in float64, with the decoder rows of the listed latents only: the others are never read."""
        assert self.sae.W_dec is not None
        listed = torch.cat([edits.latents[edits.valid()].long() for n, edits in self.lists.items() if n in lists])
        listed = listed.unique()
        rows = listed if self.sae.decoder_rows is None else self.sae.decoder_rows[listed].long()
        decoder_rows = torch.full((self.sae.d_sae,), -1, dtype=torch.int32, device=self.sae.device)
        decoder_rows[listed] = torch.arange(len(listed), dtype=torch.int32, device=self.sae.device)
        small = replace(self.sae, W_dec=self.sae.W_dec[rows], decoder_rows=decoder_rows)
        return replace(small, **{n: x.double() for n, x in small.tensors().items() if x.is_floating_point()})

    def _expected(self, exact: SaeWeights, lists: str) -> Tensor:
        hidden = self.hidden.double()
        token_step(hidden, exact, self.lists[lists], self.alpha, backend="reference")
        return hidden.to(self.shape.dtype)


def normal_matrix(size: tuple[int, int], scale: float, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Normal numbers times `scale`, on the generator's device: drawn in float32, a part at a time, and rounded, which
    takes half as long as drawing them in 16 bits."""
    found = torch.empty(size, dtype=dtype, device=generator.device)
    for part in found.view(-1).split(DRAWN_AT_ONCE):
        part.copy_(torch.randn(len(part), generator=generator, device=generator.device).mul_(scale))
    return found


def _kinds(hidden: Tensor, sae: SaeWeights, decodable: Tensor, alpha: float) -> dict[str, Tensor]:
    """Which latents `[1, d_sae]` belong to which of `LISTS` on a hidden state `[1, d_model]`: decodable ones,
    none of them near a threshold or near `alpha * M_t`."""
    f = encode(hidden, sae)
    maximum = f.amax(dim=1, keepdim=True)
    lowest = f.where(f > 0, torch.inf).amin(dim=1, keepdim=True)  # of the active latents
    return {
        "none active": (f == 0) & decodable,
        "all certainly zero": (f > 1.5 * lowest) & (f < 0.9 * alpha * maximum) & decodable,
        NEEDS_MAXIMUM: (f > 1.1 * alpha * maximum) & (f > 1.05 * lowest) & (f < 0.9 * maximum) & decodable,
    }


def _in_compute_dtype(sae: SaeWeights) -> SaeWeights:
    """The encoder in the dtype in which `encode` computes: converted once and not for each row."""
    return replace(sae, W_enc=sae.W_enc.to(compute_dtype(sae.W_enc)), W_dec=None, decoder_rows=None)


def decodable_latents(sae: SaeWeights) -> Tensor:
    """`[d_sae]` bool: the latents with a decoder row."""
    if sae.decoder_rows is None:
        return torch.ones(sae.d_sae, dtype=torch.bool, device=sae.device)
    return sae.decoder_rows >= 0


def _products_error(hidden: Tensor, sae: SaeWeights) -> float:
    """What rounding can move an activation by: a few roundings of float32 for sums in blocks, relative to the norms."""
    norm = float(hidden.float().norm(dim=1).max()) + (float(sae.b_dec.norm()) if sae.b_dec is not None else 0.0)
    gain = 1.0 if sae.magnitude_scale is None else max(1.0, float(sae.magnitude_scale.abs().max()))
    if sae.decoder_norm is not None:
        gain *= float(sae.decoder_norm.max())
    return ROUNDINGS * torch.finfo(torch.float32).eps * norm * float(sae.W_enc.float().norm(dim=1).max()) * gain


def decoder_size(sae: SaeWeights) -> float:
    """The largest entry by which a unit of activation is decoded, at most."""
    assert sae.W_dec is not None
    smallest = 1.0 if sae.decoder_norm is None else float(sae.decoder_norm.min())
    return float(sae.W_dec.abs().max()) / smallest
