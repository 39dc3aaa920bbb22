"""SAEs, hidden states and edit lists for the kernel tests, and the calls that poison what must not be touched."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import equations
import numpy as np
import pytest
import torch
from torch import Tensor

from dspa.kernels import (
    Activation,
    CsrMap,
    EditList,
    InputNormalization,
    SaeWeights,
    StepMode,
    TokenStats,
    available,
    token_step,
)

LOW_PRECISION = (torch.float32, torch.bfloat16, torch.float16)
MODES: tuple[StepMode | None, ...] = (None, "dense", "lazy", "screened")
INTEGER_OF = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
DEVICE_TYPES = {"triton": "cuda", "cuda": "cuda"}


@dataclass(frozen=True)
class Backend:
    """A backend under test and the device its tensors live on."""

    name: str
    device: str


def backend_parameters() -> list[Any]:
    """Every backend that is available here; `test_registry.py` names the others. One for a GPU carries its marker."""
    listed = []
    for name, status in available().items():
        if status == "available":
            device = DEVICE_TYPES.get(name, "cpu") if torch.cuda.is_available() else "cpu"
            marks = [pytest.mark.gpu] if device == "cuda" else []
            listed.append(pytest.param(Backend(name, device), id=name, marks=marks))
    return listed


def distinct_modes(backend: Backend) -> tuple[StepMode | None, ...]:
    """The modes that are different code in a backend: Triton's default is "lazy"."""
    return ("dense", "lazy", "screened") if backend.name == "triton" else MODES


def seeds(backend: Backend) -> range:
    """Of cases that a test draws: a multiple of three, for as many dtypes; fewer where kernels are interpreted."""
    return range(3) if backend.name == "triton" and backend.device == "cpu" else range(6)


@dataclass(frozen=True)
class Kind:
    """What an SAE means, apart from its numbers."""

    activation: Activation = "jumprelu"
    normalization: InputNormalization = "none"
    subtract_b_dec: bool = False
    rescaled: bool = False
    compact: bool = False

    def __str__(self) -> str:
        words = [self.activation, "" if self.normalization == "none" else self.normalization]
        words += [name for name in ("subtract_b_dec", "rescaled", "compact") if getattr(self, name)]
        return "-".join(word for word in words if word)


KINDS = (
    Kind(),
    Kind("relu"),
    Kind("batchtopk", subtract_b_dec=True),
    Kind("gated", subtract_b_dec=True),
    Kind("gated", "layer_norm"),
    Kind("topk"),
    Kind("topk", subtract_b_dec=True, rescaled=True),
    Kind("topk", "layer_norm", compact=True),
    Kind("jumprelu", "constant_norm_rescale", subtract_b_dec=True),
    Kind("jumprelu", "layer_norm", subtract_b_dec=True),
    Kind("relu", "constant_norm_rescale", compact=True),
    Kind(compact=True),
)


def generator(seed: int) -> torch.Generator:
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def normal(rng: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=rng, dtype=torch.float64, device=rng.device)


def integers(rng: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    """Both ends included."""
    return torch.randint(low, high + 1, shape, generator=rng).double()


def make_sae(kind: Kind, d_model: int, d_sae: int, dtype: torch.dtype, seed: int) -> SaeWeights:
    """Weights as a trained SAE has them: about a third of the latents active on normal hidden states."""
    rng = generator(seed)
    W_enc, W_dec = normal(rng, d_sae, d_model) / math.sqrt(d_model), normal(rng, d_sae, d_model) / math.sqrt(d_model)
    return _assemble(
        kind,
        dtype,
        W_enc=W_enc,
        W_dec=W_dec,
        b_enc=normal(rng, d_sae) * 0.1,
        threshold=normal(rng, d_sae) * 0.2 + 0.3,
        b_dec=normal(rng, d_model) * 0.3,
        decoder_norm=normal(rng, d_sae).abs() + 0.5,
        magnitude_scale=(normal(rng, d_sae) * 0.3).exp(),
        magnitude_bias=normal(rng, d_sae) * 0.1,
        missing=torch.rand(d_sae, generator=rng, device=rng.device) < 0.3,
    )


def make_integer_sae(kind: Kind, d_model: int, d_sae: int, dtype: torch.dtype, seed: int) -> SaeWeights:
    """Small integers and powers of two: every sum of every backend is exact in float32, so gates sit on thresholds and
    ranks are tied on purpose, and results must agree to the last bit."""
    assert kind.normalization == "none"
    rng = generator(seed)
    return _assemble(
        kind,
        dtype,
        W_enc=integers(rng, -1, 1, d_sae, d_model),
        W_dec=integers(rng, -2, 2, d_sae, d_model),
        b_enc=integers(rng, -2, 2, d_sae),
        threshold=integers(rng, -1, 3, d_sae),
        b_dec=integers(rng, -1, 1, d_model),
        decoder_norm=2.0 ** integers(rng, -1, 1, d_sae),
        magnitude_scale=2.0 ** integers(rng, -1, 1, d_sae),
        magnitude_bias=integers(rng, -1, 2, d_sae),
        missing=torch.rand(d_sae, generator=rng, device=rng.device) < 0.3,
    )


def _assemble(kind: Kind, dtype: torch.dtype, *, missing: Tensor, **numbers: Tensor) -> SaeWeights:
    small = torch.float64 if dtype == torch.float64 else torch.float32
    d_sae = len(numbers["b_enc"])
    gated, thresholded = kind.activation == "gated", kind.activation in ("jumprelu", "batchtopk")
    threshold = numbers["threshold"] if thresholded else torch.zeros(d_sae)
    if kind.activation == "batchtopk":
        threshold = threshold[:1].abs().expand(d_sae)
    W_dec, decoder_rows = numbers["W_dec"], None
    if kind.compact:
        missing[0] = False
        kept = torch.arange(d_sae)[~missing].flip(0)  # not in order, so that a row number is not mistaken for a latent
        decoder_rows = torch.full((d_sae,), -1, dtype=torch.int32)
        decoder_rows[kept] = torch.arange(len(kept), dtype=torch.int32)
        W_dec = W_dec[kept]
    return SaeWeights(
        W_enc=numbers["W_enc"].to(dtype),
        W_dec=W_dec.to(dtype).contiguous(),
        b_enc=numbers["b_enc"].to(small),
        threshold=threshold.to(small).contiguous(),
        activation=kind.activation,
        b_dec=numbers["b_dec"].to(small),
        decoder_rows=decoder_rows,
        k=max(1, d_sae // 4) if kind.activation == "topk" else None,
        subtract_b_dec=kind.subtract_b_dec,
        normalization=kind.normalization,
        decoder_norm=numbers["decoder_norm"].to(small) if kind.rescaled else None,
        magnitude_scale=numbers["magnitude_scale"].to(small) if gated else None,
        magnitude_bias=numbers["magnitude_bias"].to(small) if gated else None,
    )


def exact(tensor: Tensor) -> equations.Matrix:
    """The same numbers in float64."""
    return tensor.detach().cpu().double().numpy()


def as_equations(sae: SaeWeights) -> equations.Sae:
    """The same SAE in float64, with a compact decoder spread out again."""
    names = {field.name for field in fields(equations.Sae)}
    arrays = {name: exact(tensor) for name, tensor in sae.tensors().items() if name in names}
    if sae.decoder_rows is not None and sae.W_dec is not None:
        spread = np.full((sae.d_sae, sae.d_model), np.nan)
        for latent, row in enumerate(sae.decoder_rows.tolist()):
            if row >= 0:
                spread[latent] = arrays["W_dec"][row]
        arrays["W_dec"] = spread
    return equations.Sae(
        activation=sae.activation,
        k=sae.k,
        subtract_b_dec=sae.subtract_b_dec,
        normalization=sae.normalization,
        **arrays,
    )


def decodable(sae: SaeWeights) -> list[int]:
    """The latents that have a decoder row."""
    return [j for j in range(sae.d_sae) if sae.decoder_rows is None or int(sae.decoder_rows[j]) >= 0]


def random_lists(sae: SaeWeights, batch: int, k: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Different lists for every row, of 0 to k latents in all, each latent at most once."""
    rng = np.random.default_rng(seed)
    latents = np.array(decodable(sae))
    augment, ablate = [], []
    for _ in range(batch):
        chosen = rng.permutation(latents)[: rng.integers(0, k + 1)].tolist()
        split = int(rng.integers(0, len(chosen) + 1))
        augment.append(chosen[:split])
        ablate.append(chosen[split:])
    return augment, ablate


def edit_list(augment: Sequence[Sequence[int]], ablate: Sequence[Sequence[int]], k: int, garbage: int = 0) -> EditList:
    """Lists with room for k a row. What lies behind the count is latent `garbage` with both signs, to be ignored."""
    edits = EditList.empty(len(augment), k)
    edits.latents.fill_(garbage)
    edits.signs[:, ::2], edits.signs[:, 1::2] = 1, -1
    for row, (up, down) in enumerate(zip(augment, ablate, strict=True)):
        count = len(up) + len(down)
        edits.latents[row, :count] = torch.tensor([*up, *down], dtype=torch.int32)
        edits.signs[row, :count] = torch.tensor([1] * len(up) + [-1] * len(down), dtype=torch.int8)
        edits.counts[row] = count
    return edits


def poisoned_view(rows: Tensor, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """The rows as a strided view [B, d_model] of a larger tensor that is NaN everywhere else, and that tensor."""
    batch, d_model = rows.shape
    surroundings = torch.full((batch, 3, d_model + 5), torch.nan, dtype=rows.dtype, device=device)
    view = surroundings[:, 1, 2 : 2 + d_model]
    view.copy_(rows)
    return view, surroundings


def same_bits(a: Tensor, b: Tensor) -> bool:
    integer = INTEGER_OF.get(a.dtype, torch.int64)
    return a.dtype == b.dtype and torch.equal(a.cpu().contiguous().view(integer), b.cpu().contiguous().view(integer))


def step(
    rows: Tensor,
    sae: SaeWeights,
    edits: EditList,
    alpha: float | Tensor,
    *,
    backend: Backend,
    enabled: Tensor | None = None,
    stats: TokenStats | None = None,
    mode: StepMode | None = None,
) -> Tensor:
    """token_step on a strided copy of the rows. Checks that nothing but the rows was written, edit lists included."""
    view, surroundings = poisoned_view(rows, backend.device)
    before, on_device, weights = surroundings.clone(), edits.to(backend.device), sae.to(backend.device)
    lists = [tensor.clone() for tensor in (on_device.latents, on_device.signs, on_device.counts)]
    token_step(
        view,
        weights,
        on_device,
        alpha.to(backend.device) if isinstance(alpha, Tensor) else alpha,
        None if enabled is None else enabled.to(backend.device),
        stats,
        mode=mode,
        backend=backend.name,
    )
    written = view.cpu().clone()
    view.copy_(before[:, 1, 2 : 2 + rows.shape[1]])
    assert same_bits(surroundings, before), "something beside the rows was written"
    for tensor, copy in zip((on_device.latents, on_device.signs, on_device.counts), lists, strict=True):
        assert torch.equal(tensor, copy), "the edit lists were written"
    return written


def fresh_stats(batch: int, d_sae: int, device: str = "cpu") -> TokenStats:
    """Counters that have counted before, so that setting is told from adding."""
    stats = TokenStats.zeros(batch, d_sae, device)
    stats.seen.add_(3)
    stats.edited.add_(2)
    stats.nonfinite.add_(1)
    stats.maximum.fill_(0.125)
    stats.maximum_sum.add_(10)
    stats.maximum_known.add_(2)
    stats.latent_edits.copy_(torch.arange(d_sae))
    return stats


def counted(stats: TokenStats, batch: int, d_sae: int) -> TokenStats:
    """What was added since `fresh_stats`, on the CPU; `maximum` as it is."""
    start = fresh_stats(batch, d_sae)
    values = {field.name: getattr(stats, field.name).cpu() for field in fields(TokenStats)}
    return TokenStats(
        **{name: value if name == "maximum" else value - getattr(start, name) for name, value in values.items()}
    )


def dense_map(A: Tensor) -> CsrMap:
    """A dense matrix as a map; zeros are left out."""
    columns = [row.nonzero().flatten() for row in A]
    offsets = torch.tensor([0, *np.cumsum([len(c) for c in columns]).tolist()], dtype=torch.int64)
    return CsrMap(offsets, torch.cat(columns).int(), A[A != 0], A.shape[1]).check()


def with_threshold(sae: SaeWeights, threshold: Tensor) -> SaeWeights:
    return replace(sae, threshold=threshold.to(sae.b_enc.dtype).contiguous())
