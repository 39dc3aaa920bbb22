"""`adapter_step` as a function that autograd follows, for training an adapter (docs/method.md, section 6).

The fused form never keeps a `[T, d_sae]` tensor. Tokens are processed in chunks; of a chunk in which few latents fire,
their positions and values are kept for the backward pass, and a chunk in which many do (at initialisation nearly all)
is computed again there, so that memory grows with the active latents and not with `T * d_sae`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from dspa.errors import InvalidInputError
from dspa.kernels.adapter_step.equation import clipped, steering_activations
from dspa.kernels.adapter_weights import AdapterActivation, AdapterWeights
from dspa.sae.encode import activations, encoder_input
from dspa.sae.weights import SaeWeights

CHUNK_ELEMENTS = 2**22
"""Elements of the largest `[tokens, d_sae]` tensor there is at any time."""

DENSE_ABOVE = 0.05
"""Share of latents that fire from which on matrix products are faster than reading rows one by one."""


@dataclass(frozen=True, eq=False)
class SteeredTokens:
    """What `differentiable_adapter_step` computes.

    Attributes:
        hidden: `[N, d_model]`, after the edit.
        l1: `[N]`, `sum_j |v_j|` of each token; 0 for tokens that are not enabled.
        l0: `[N]`, how many `v_j` are not 0; no gradient.
    """

    hidden: Tensor
    l1: Tensor
    l0: Tensor


def differentiable_adapter_step(
    hidden: Tensor,
    sae: SaeWeights,
    adapter: AdapterWeights,
    enabled: Tensor | None = None,
    *,
    steering_fraction: float | None = None,
    bandwidth: float = 1e-3,
    dense_above: float = DENSE_ABOVE,
) -> SteeredTokens:
    """The hidden states after the edit of docs/method.md, section 6, as new tensors.

    The value is that of `adapter_step`, up to rounding. The gradient reaches `adapter.weight`, `adapter.bias` and
    `adapter.threshold` (for soft_threshold; for jump_relu by a rectangle of width `bandwidth` around the threshold),
    and `hidden` where it requires one: then, and with `steering_fraction`, in plain torch with `[N, d_sae]` in memory.
    A negative threshold counts as 0 and gets no gradient. The latents kept by `steering_fraction` are constant.

    Args:
        hidden: `[N, d_model]` floating point.
        sae: the SAE, with all rows of `W_dec`.
        adapter, enabled, steering_fraction: as for `adapter_step`.
        bandwidth: of the gradient of a jump_relu threshold.
        dense_above: share of firing latents above which a chunk of tokens is computed densely.

    Raises:
        InvalidInputError: if the SAE lacks decoder rows.
    """
    if sae.W_dec is None or sae.decoder_rows is not None:
        raise InvalidInputError("training an adapter needs every decoder row of its SAE; pass the whole SAE")
    rows = None if enabled is None else enabled.nonzero().flatten()
    states = hidden if rows is None else hidden[rows]
    x, scale = encoder_input(states, sae)
    x = x.to(torch.promote_types(x.dtype, adapter.bias.dtype))
    decode_scale = torch.ones_like(x[:, :1]) if scale is None else scale.to(x.dtype)
    if hidden.requires_grad or steering_fraction is not None:
        decoded, l1, l0 = _plain_step(x, decode_scale, sae, adapter, steering_fraction, bandwidth)
    else:
        decoded, l1, l0 = _FusedStep.apply(
            x,
            decode_scale,
            adapter.weight,
            adapter.bias,
            adapter.threshold,
            _Setting(sae, adapter.activation, adapter.clip, bandwidth, dense_above),
        )  # type: ignore[misc]
    steered = (states.to(decoded.dtype) + decoded).to(hidden.dtype)
    steered = torch.where((decoded.isfinite().all(dim=-1) & (l0 > 0))[:, None], steered, states)
    if rows is None:
        return SteeredTokens(steered, l1, l0)
    everything = len(hidden)
    return SteeredTokens(
        hidden.index_copy(0, rows, steered),
        l1.new_zeros(everything).index_copy(0, rows, l1),
        l0.new_zeros(everything).index_copy(0, rows, l0),
    )


class _JumpReLU(torch.autograd.Function):
    """`y` above the threshold, else 0, with the rectangle of section 6 as the gradient of the threshold."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(y, threshold)
        ctx.bandwidth = bandwidth
        return steering_activations(y, threshold, "jump_relu")

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor, Tensor, None]:
        y, threshold = ctx.saved_tensors
        (gradient,) = gradients
        dy = gradient * (steering_activations(y, threshold, "jump_relu") != 0)
        dthreshold = gradient * _threshold_slope(y, threshold, ctx.bandwidth)
        return dy, dthreshold.sum(dim=0).to(threshold.dtype), None


def _threshold_slope(y: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
    """`dv / dthreshold` of jump_relu: `-threshold / bandwidth` where `relu(y)` lies within half the bandwidth of it."""
    near = ((y.relu() - threshold).abs() < bandwidth / 2) & (threshold >= 0)
    return torch.where(near, -threshold / bandwidth, 0).to(y.dtype)


def _plain_step(
    x: Tensor,
    decode_scale: Tensor,
    sae: SaeWeights,
    adapter: AdapterWeights,
    steering_fraction: float | None,
    bandwidth: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The equations in plain torch."""
    assert sae.W_dec is not None
    y = x @ adapter.weight.to(x.dtype).T + adapter.bias
    if adapter.activation == "jump_relu":
        v: Tensor = _JumpReLU.apply(y, adapter.threshold, bandwidth)  # type: ignore[assignment]
    else:
        v = steering_activations(y, adapter.threshold, adapter.activation)
    if steering_fraction is not None:
        kept = max(1, int(v.shape[1] * steering_fraction))
        order = v.abs().sort(dim=1, descending=True, stable=True).indices[:, :kept]
        v = v * torch.zeros_like(v).scatter(1, order, 1)
    delta = clipped(v, activations(x @ sae.W_enc.to(x.dtype).T, sae)) if adapter.clip else v
    if sae.decoder_norm is not None:
        delta = delta / sae.decoder_norm
    return (delta @ sae.W_dec.to(x.dtype)) * decode_scale, v.abs().sum(dim=1), (v != 0).sum(dim=1)


@dataclass(frozen=True, eq=False)
class _Setting:
    """What of a step is not a tensor that autograd knows."""

    sae: SaeWeights
    activation: AdapterActivation
    clip: bool
    bandwidth: float
    dense_above: float


@dataclass(frozen=True, eq=False)
class _Entries:
    """Entries of a sparse `[N, d_sae]` matrix, ascending by token and then by latent.

    Attributes:
        token, latent: `[n]` int64.
        v: `[n]`.
        passes: `[n]` bool, whether the clip lets a change of v through.
        slope: `[n]`, the gradient of v by the threshold.
    """

    token: Tensor
    latent: Tensor
    v: Tensor
    passes: Tensor
    slope: Tensor


class _FusedStep(torch.autograd.Function):
    """Decoded steering vectors `[N, d_model]`, `sum_j |v_j|` and the number of active latents `[N]` of each token."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, weight: Tensor, bias: Tensor, threshold: Tensor, setting: _Setting
    ) -> tuple[Tensor, Tensor, Tensor]:
        decoded = torch.empty_like(x)
        l1, l0 = x.new_empty(len(x)), torch.empty(len(x), dtype=torch.int64, device=x.device)
        entries: list[_Entries] = []
        dense: list[tuple[int, int]] = []
        wide = weight.to(x.dtype)
        for first, last in _chunks(len(x), weight.shape[0]):
            part = slice(first, last)
            y = torch.addmm(bias.to(x.dtype), x[part], wide.T)
            v = steering_activations(y, threshold, setting.activation)
            active = v != 0
            l1[part], l0[part] = v.abs().sum(dim=1), active.sum(dim=1)
            kept = active
            if setting.activation == "jump_relu":  # near its threshold, a latent that is off teaches the threshold
                kept = active | (_threshold_slope(y, threshold, setting.bandwidth) != 0)
            if int(kept.sum()) > setting.dense_above * kept.numel():
                dense.append((first, last))
                decoded[part] = _decode_dense(_delta_dense(v, x[part], setting), setting.sae)
            else:
                chunk, delta = _sparse(y, v, kept, threshold, x[part], setting)
                decoded[part] = _decode_sparse(chunk, delta, last - first, setting.sae)
                entries.append(_Entries(chunk.token + first, chunk.latent, chunk.v, chunk.passes, chunk.slope))
        kept_tensors = [torch.cat([getattr(e, name) for e in entries]) for name in _FIELDS] if entries else []
        ctx.save_for_backward(x, scale, weight, bias, threshold, *kept_tensors)
        ctx.setting, ctx.dense = setting, dense
        ctx.mark_non_differentiable(l0)
        return decoded * scale, l1, l0

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        x, scale, weight, bias, threshold, *kept = ctx.saved_tensors
        setting: _Setting = ctx.setting
        on_decoded, on_l1, _ = gradients
        g = torch.zeros_like(x) if on_decoded is None else on_decoded * scale
        c = x.new_zeros(len(x)) if on_l1 is None else on_l1
        dweight = torch.zeros_like(weight, dtype=x.dtype)
        dbias, dthreshold = x.new_zeros(len(bias)), x.new_zeros(len(bias))
        if kept:
            _add_sparse_gradients(_Entries(*kept), x, g, c, setting, (dweight, dbias, dthreshold))
        wide = weight.to(x.dtype)
        for first, last in ctx.dense:
            part = slice(first, last)
            y = torch.addmm(bias.to(x.dtype), x[part], wide.T)
            v = steering_activations(y, threshold, setting.activation)
            s = g[part] @ _decoder(setting.sae, x.dtype).T
            if setting.sae.decoder_norm is not None:
                s = s / setting.sae.decoder_norm
            if setting.clip:
                s = s * _passes_dense(v, x[part], setting)
            dv = s + c[part, None] * v.sign()
            dthreshold += (dv * _slope(y, v, threshold, setting)).sum(dim=0)
            dy = dv * (v != 0)
            dbias += dy.sum(dim=0)
            dweight.addmm_(dy.T, x[part])
        dthreshold = torch.where(threshold >= 0, dthreshold, 0)  # a negative one counts as 0
        return None, None, dweight.to(weight.dtype), dbias.to(bias.dtype), dthreshold.to(threshold.dtype), None


_FIELDS = ("token", "latent", "v", "passes", "slope")


def _add_sparse_gradients(
    entries: _Entries,
    x: Tensor,
    g: Tensor,
    c: Tensor,
    setting: _Setting,
    sums: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Adds the gradients of the kept entries to those of weight, bias and threshold."""
    dweight, dbias, dthreshold = sums
    sae, latent = setting.sae, entries.latent
    s = _row_products(entries.token, latent, g, _decoder(sae, x.dtype))
    if sae.decoder_norm is not None:
        s = s / sae.decoder_norm[latent]
    dv = s * entries.passes + c[entries.token] * entries.v.sign()
    dthreshold.index_add_(0, latent, dv * entries.slope)
    dy = dv * (entries.v != 0)
    dbias.index_add_(0, latent, dy)
    by_latent = latent.argsort(stable=True)  # ascending by token within a latent: the order of the sums is fixed
    counts = torch.bincount(latent, minlength=len(dbias))
    starts = counts.cumsum(dim=0) - counts
    dweight += F.embedding_bag(
        entries.token[by_latent], x, starts, mode="sum", per_sample_weights=dy[by_latent].contiguous()
    )


def _sparse(
    y: Tensor, v: Tensor, kept: Tensor, threshold: Tensor, x: Tensor, setting: _Setting
) -> tuple[_Entries, Tensor]:
    """The kept entries of a chunk, and `delta` of each."""
    sae = setting.sae
    token, latent = kept.nonzero(as_tuple=True)
    value = v[token, latent]
    slope = _slope(y[token, latent], value, threshold[latent], setting)
    passes = torch.ones_like(value, dtype=torch.bool)
    delta = value
    low = value <= 0  # only there can the clip act
    if setting.clip and bool(low.any()):
        f = _activations_of(token[low], latent[low], x, sae)
        passes[low] = f + value[low] > 0
        delta = value.clone()
        delta[low] = clipped(value[low], f)
    return _Entries(token, latent, value, passes, slope), delta


def _slope(y: Tensor, v: Tensor, threshold: Tensor, setting: _Setting) -> Tensor:
    """The gradient of v by the threshold."""
    if setting.activation == "soft_threshold":
        return -v.sign()
    if setting.activation == "jump_relu":
        return _threshold_slope(y, threshold, setting.bandwidth)
    return torch.zeros_like(v)


def _activations_of(token: Tensor, latent: Tensor, x: Tensor, sae: SaeWeights) -> Tensor:
    """`f` of some latents of some tokens, `[n]`."""
    W_enc = sae.W_enc.to(x.dtype)
    if sae.activation == "topk":  # a rank depends on all latents
        return activations(x @ W_enc.T, sae)[token, latent]
    product = _row_products(token, latent, x, W_enc)
    z = product + sae.b_enc[latent]
    if sae.decoder_norm is not None:
        z = z * sae.decoder_norm[latent]
    if sae.activation == "gated":
        assert sae.magnitude_scale is not None  # SaeWeights checks it
        assert sae.magnitude_bias is not None
        return (product * sae.magnitude_scale[latent] + sae.magnitude_bias[latent]).relu() * (z > 0)
    return z.relu() * (z > sae.threshold[latent])


def _row_products(token: Tensor, latent: Tensor, states: Tensor, matrix: Tensor) -> Tensor:
    """`<states[token], matrix[latent]>`, `[n]`; token ascends.

    It is the gradient of the weights in a weighted sum of rows, for which torch has kernels that store no row."""
    counts = torch.bincount(token, minlength=len(states))
    starts = counts.cumsum(dim=0) - counts
    with torch.enable_grad():
        ones = torch.ones(len(latent), dtype=states.dtype, device=states.device, requires_grad=True)
        sums = F.embedding_bag(latent, matrix, starts, mode="sum", per_sample_weights=ones)
        (products,) = torch.autograd.grad(sums, ones, states)
    return products


def _decode_sparse(entries: _Entries, delta: Tensor, tokens: int, sae: SaeWeights) -> Tensor:
    if sae.decoder_norm is not None:
        delta = delta / sae.decoder_norm[entries.latent]
    counts = torch.bincount(entries.token, minlength=tokens)
    starts = counts.cumsum(dim=0) - counts
    matrix = _decoder(sae, delta.dtype)
    return F.embedding_bag(entries.latent, matrix, starts, mode="sum", per_sample_weights=delta)


def _delta_dense(v: Tensor, x: Tensor, setting: _Setting) -> Tensor:
    if not setting.clip or not bool((v < 0).any()):
        return v
    return clipped(v, activations(x @ setting.sae.W_enc.to(x.dtype).T, setting.sae))


def _passes_dense(v: Tensor, x: Tensor, setting: _Setting) -> Tensor:
    """Whether the clip lets a change of v through."""
    if not bool((v <= 0).any()):
        return torch.ones_like(v, dtype=torch.bool)
    f = activations(x @ setting.sae.W_enc.to(x.dtype).T, setting.sae)
    return f + v > 0


def _decode_dense(delta: Tensor, sae: SaeWeights) -> Tensor:
    if sae.decoder_norm is not None:
        delta = delta / sae.decoder_norm
    return delta @ _decoder(sae, delta.dtype)


def _decoder(sae: SaeWeights, dtype: torch.dtype) -> Tensor:
    assert sae.W_dec is not None  # checked at the start
    return sae.W_dec.to(dtype)


def _chunks(tokens: int, d_sae: int) -> list[tuple[int, int]]:
    size = max(1, CHUNK_ELEMENTS // max(d_sae, 1))
    return [(first, min(first + size, tokens)) for first in range(0, tokens, size)]
