"""How far a correct computation of the operations may be from the exact one, bound by bound.

With unit roundoff u, a sum of n products computed in any order, fused or not, is within gamma_n * sum |a_i||b_i| of
the exact one, gamma_n = n u / (1 - n u). From this follows an interval for each pre-activation, from that which gates
are certain and which may fall either way, and for each way they may fall (a "world") the row written and its radius.
Nothing here is a chosen tolerance.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import equations
import numpy as np
import torch
from equations import Matrix, Sae, Vector
from numpy.typing import NDArray

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
# Significand bits (the leading one included) and least exponent of a normal number.
FORMATS = {torch.bfloat16: (8, -126), torch.float16: (11, -14), torch.float32: (24, -126), torch.float64: (53, -1022)}
MOST_WORLDS = 4096

OFF, ON, EITHER = 0, 1, 2


@dataclass(frozen=True)
class LatentBounds:
    """For each latent its value if it is active, the error bound of that value, and whether it is active."""

    value: Vector
    error: Vector
    gate: NDArray[np.int8]
    scale: float
    scale_error: float


@dataclass(frozen=True)
class World:
    """One way in which the undecided gates may fall."""

    row: Vector
    radius: Vector
    changed: frozenset[int]
    maximum: float
    maximum_radius: float


def gamma(n: float, u: float) -> float:
    return n * u / (1 - n * u)


def half_spacing(value: Vector, dtype: torch.dtype) -> Vector:
    """The error of rounding to the nearest number of a format, at most."""
    bits, least = FORMATS[dtype]
    exponent = np.floor(np.log2(np.maximum(np.abs(value), 2.0**least)))
    return 2.0 ** (exponent - bits)


def input_bounds(h: Vector, sae: Sae, u: float) -> tuple[equations.SaeInput, Vector, float]:
    """The exact input of the encoder, what a computed one may be off by, entry by entry, and the same of the scale."""
    n = len(h)
    given = equations.sae_input(h, sae)
    x_error, scale_error = np.zeros(n), 0.0
    if sae.normalization == "constant_norm_rescale":
        scale_error = gamma(n + 4, u) * given.scale
        x_error = (np.abs(h) / given.scale) * gamma(n + 6, u)
    elif sae.normalization == "layer_norm":
        # The mean is off by at most gamma_n mean|h|, which shifts every deviation, and so the standard deviation.
        mean_error = 2 * gamma(n + 1, u) * float(np.abs(h).mean())
        scale_error = gamma(n + 4, u) * given.scale + mean_error * math.sqrt(n / (n - 1))
        divisor = given.scale + 1e-5
        deviation = np.abs(h - given.shift) / divisor
        x_error = deviation * (scale_error / divisor + gamma(4, u)) + mean_error / divisor
    if sae.subtract_b_dec:
        x_error = x_error * (1 + u) + u * np.abs(given.x)
    return given, x_error, scale_error


def products_error(weight: Matrix, x: Vector, x_error: Vector, u: float) -> Vector:
    """What the products of a matrix with a computed input may be off by."""
    return np.abs(weight) @ (x_error + gamma(len(x) + 1, u) * (np.abs(x) + x_error))


def latent_bounds(h: Vector, sae: Sae, u: float) -> LatentBounds:
    """Bounds for one finite token."""
    given, x_error, scale_error = input_bounds(h, sae, u)
    product = equations.products(given.x, sae)
    product_error = products_error(sae.W_enc, given.x, x_error, u)

    z = equations.pre_activation(product, sae)
    norm = 1.0 if sae.decoder_norm is None else sae.decoder_norm
    z_error = (product_error + 2 * u * (np.abs(product) + product_error + np.abs(sae.b_enc))) * norm * (1 + u)
    value, error = z, z_error
    if sae.activation == "gated":
        assert sae.magnitude_scale is not None
        assert sae.magnitude_bias is not None
        value = product * sae.magnitude_scale + sae.magnitude_bias
        scaled = np.abs(sae.magnitude_scale)
        error = product_error * scaled + 3 * u * (
            (np.abs(product) + product_error) * scaled + np.abs(sae.magnitude_bias)
        )
        gate = both(compare(z, z_error, 0.0), compare(value, error, 0.0))
    elif sae.activation == "topk":
        gate = both(rank_gate(z, z_error, sae.k or 0), compare(z, z_error, 0.0))
    else:
        gate = compare(z, z_error, np.maximum(sae.threshold, 0.0))
    return LatentBounds(value, error, gate, given.scale, scale_error)


def compare(value: Vector, error: Vector, threshold: Vector | float) -> NDArray[np.int8]:
    """value > threshold, where the computed value is within `error`."""
    certain = np.where(value - error > threshold, ON, OFF)
    return np.where((value - error <= threshold) & (value + error > threshold), EITHER, certain).astype(np.int8)


def rank_gate(z: Vector, error: Vector, k: int) -> NDArray[np.int8]:
    """Membership of the k largest."""
    gate = np.full(len(z), EITHER, dtype=np.int8)
    for j in range(len(z)):
        others = np.arange(len(z)) != j
        if np.count_nonzero(others & (z + error >= z[j] - error[j])) < k:
            gate[j] = ON
        elif np.count_nonzero(others & (z - error > z[j] + error[j])) >= k:
            gate[j] = OFF
    return gate


def both(a: NDArray[np.int8], b: NDArray[np.int8]) -> NDArray[np.int8]:
    either = np.where((a == EITHER) | (b == EITHER), EITHER, ON)
    return np.where((a == OFF) | (b == OFF), OFF, either).astype(np.int8)


def maxima(bounds: LatentBounds) -> list[tuple[float, float]]:
    """The values M_t may have, each with its radius."""
    certain = np.flatnonzero(bounds.gate == ON)
    base = float(bounds.value[certain].max()) if len(certain) else 0.0
    floor = float((bounds.value[certain] - bounds.error[certain]).max()) if len(certain) else 0.0

    def radius(least: float) -> float:
        # Every latent that could be the largest contributes its error.
        close = (bounds.gate != OFF) & (bounds.value + bounds.error >= least)
        return float(bounds.error[close].max()) if close.any() else 0.0

    values = [(base, radius(floor) if len(certain) else 0.0)]
    for j in np.flatnonzero(bounds.gate == EITHER):
        if bounds.value[j] + bounds.error[j] > floor:
            values.append((max(base, float(bounds.value[j])), radius(floor)))
    return values


def worlds(
    h: Vector, sae: Sae, augment: list[int], ablate: list[int], alpha: float, u: float, dtype: torch.dtype
) -> list[World]:
    """Every row that a correct token_step may write, for a token whose SAE input is finite."""
    assert sae.W_dec is not None
    bounds = latent_bounds(h, sae, u)
    signs = dict.fromkeys(augment, 1) | dict.fromkeys(ablate, -1)
    certain = [j for j in signs if bounds.gate[j] == ON]
    undecided = [j for j in signs if bounds.gate[j] == EITHER]
    tops = maxima(bounds)
    assert len(tops) * 2 ** len(undecided) <= MOST_WORLDS, "too many undecided gates for a useful test; choose others"
    found = []
    for (maximum, maximum_radius), choice in itertools.product(
        tops, itertools.product((False, True), repeat=len(undecided))
    ):
        active = certain + [j for j, chosen in zip(undecided, choice, strict=True) if chosen]
        row, radius, changed = _edited_row(
            h, sae, bounds, {j: signs[j] for j in active}, alpha, maximum, maximum_radius, u, dtype
        )
        found.append(World(row, radius, changed, maximum, maximum_radius))
    return found


def _edited_row(
    h: Vector,
    sae: Sae,
    bounds: LatentBounds,
    signs: dict[int, int],
    alpha: float,
    maximum: float,
    maximum_radius: float,
    u: float,
    dtype: torch.dtype,
) -> tuple[Vector, Vector, frozenset[int]]:
    assert sae.W_dec is not None
    if alpha == 0 or not signs:
        return h, np.zeros(len(h)), frozenset()
    step, step_radius = alpha * maximum, alpha * maximum_radius
    changes: dict[int, tuple[float, float]] = {}
    for j, sign in signs.items():
        f, error = max(float(bounds.value[j]), 0.0), float(bounds.error[j])
        # alpha rounded, alpha * M_t rounded, the sum rounded, the difference rounded.
        off = 4 * u * (f + error + step + step_radius)
        difference = step if sign > 0 else -min(f, step)
        off += step_radius if sign > 0 else max(error, step_radius)
        changes[j] = (difference, off)
    row, radius = decoded_row(h, sae, bounds, changes, u, dtype)
    return row, radius, frozenset(signs)


def decoded_row(
    h: Vector, sae: Sae, bounds: LatentBounds, changes: dict[int, tuple[float, float]], u: float, dtype: torch.dtype
) -> tuple[Vector, Vector]:
    """The row that latents make that change by so much, give or take so much, and its radius."""
    assert sae.W_dec is not None
    decoded, radius, magnitude = np.zeros(len(h)), np.zeros(len(h)), np.zeros(len(h))
    for j, (difference, off) in changes.items():
        norm = 1.0 if sae.decoder_norm is None else float(sae.decoder_norm[j])
        coefficient = difference * bounds.scale / norm
        coefficient_radius = (off * (bounds.scale + bounds.scale_error) + abs(difference) * bounds.scale_error) / norm
        coefficient_radius += 3 * u * (abs(coefficient) + coefficient_radius)
        decoded += coefficient * sae.W_dec[j]
        radius += coefficient_radius * np.abs(sae.W_dec[j])
        magnitude += (abs(coefficient) + coefficient_radius) * np.abs(sae.W_dec[j])
    radius = radius + gamma(len(changes) + 1, u) * magnitude
    row = h + decoded
    radius = radius + u * (np.abs(row) + radius)
    if FORMATS[dtype][0] < -math.log2(u):
        radius = radius + half_spacing(np.abs(row) + radius, dtype)
    return row, radius


def adapter_worlds(h: Vector, sae: Sae, adapter: equations.Adapter, u: float, dtype: torch.dtype) -> list[World]:
    """Every row that a correct adapter_step may write, for a token whose SAE input is finite."""
    bounds = latent_bounds(h, sae, u)
    given, x_error, _ = input_bounds(h, sae, u)
    y = np.array([equations.dot(row, given.x) for row in adapter.W_a]) + adapter.b_a
    error = products_error(adapter.W_a, given.x, x_error, u)
    error = error + 2 * u * (np.abs(y) + error)
    v = equations.steering(y, adapter)
    theta = np.maximum(adapter.theta, 0.0)
    fires = compare(np.abs(y) if adapter.activation == "soft_threshold" else y, error, theta)
    either: list[list[tuple[int, tuple[float, float] | None]]] = []  # by latent: how it may change, None for not at all
    for j in np.flatnonzero(fires != OFF):
        value = v[j] if adapter.activation == "soft_threshold" else y[j]
        off = error[j] + 2 * u * (abs(y[j]) + error[j])
        changes: list[tuple[float, float] | None] = [(value, off)]
        if adapter.clip and value - off < 0:
            falls = []
            if bounds.gate[j] != OFF:
                falls.append((max(value, -bounds.value[j]), max(off, bounds.error[j])))
            if bounds.gate[j] != ON:
                falls.append(None)
            changes = falls if value + off < 0 else [*changes, *falls]
        if fires[j] == EITHER and None not in changes:
            changes.append(None)
        either.append([(int(j), change) for change in changes])
    assert math.prod(len(changes) for changes in either) <= MOST_WORLDS, "too many undecided gates; choose others"
    found = []
    for chosen in itertools.product(*either):
        changed = {j: change for j, change in chosen if change is not None}
        row, radius = decoded_row(h, sae, bounds, changed, u, dtype) if changed else (h, np.zeros(len(h)))
        found.append(World(row, radius, frozenset(changed), math.nan, 0.0))
    return found


def matches(world: World, h: Vector, written: Vector, maximum: float) -> bool:
    """Whether a row, and M_t unless it is NaN, may come from this world. Nothing edited means the very same row."""
    if not world.changed and not np.array_equal(h, written):
        return False
    maximum_right = math.isnan(maximum) or abs(maximum - world.maximum) <= world.maximum_radius
    return bool(maximum_right and (np.abs(written - world.row) <= world.radius).all())


def density_range(hidden: Matrix, offsets: list[int], sae: Sae, u: float) -> tuple[Matrix, Matrix]:
    """The least and the largest counts that encode_density may give."""
    least = np.zeros((len(offsets) - 1, len(sae.b_enc)))
    most = np.zeros_like(least)
    for s in range(len(offsets) - 1):
        for t in range(offsets[s], offsets[s + 1]):
            if np.isfinite(equations.sae_input(hidden[t], sae).x).all():
                gate = latent_bounds(hidden[t], sae, u).gate
                least[s] += gate == ON
                most[s] += gate != OFF
    return least, most
