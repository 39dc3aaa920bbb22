"""The operations in float64, one vector and one latent at a time, from the equations of method.md.

Written from the equations alone: it imports nothing of the package, so that agreement means something.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Sae:
    """An SAE in float64. `W_dec` has all rows; those that a compact decoder left out are NaN."""

    W_enc: Matrix
    b_enc: Vector
    threshold: Vector
    activation: str
    W_dec: Matrix | None = None
    b_dec: Vector | None = None
    k: int | None = None
    subtract_b_dec: bool = False
    normalization: str = "none"
    decoder_norm: Vector | None = None
    magnitude_scale: Vector | None = None
    magnitude_bias: Vector | None = None


@dataclass(frozen=True)
class SaeInput:
    """`h'`, and what maps a reconstruction back: `h = scale * x + shift`."""

    x: Vector
    scale: float
    shift: float


@dataclass(frozen=True)
class Adapter:
    """An FSRL adapter in float64."""

    W_a: Matrix
    b_a: Vector
    theta: Vector
    activation: str
    clip: bool


@dataclass(frozen=True)
class Step:
    """What the edit of one token gives."""

    row: Vector
    finite: bool
    f: Vector
    f_edited: Vector
    maximum: float
    changed: list[int] = field(default_factory=list)


def dot(a: Vector, b: Vector) -> float:
    """The inner product, summed without rounding."""
    return math.fsum(float(p) * float(q) for p, q in zip(a, b, strict=True))


def sae_input(h: Vector, sae: Sae) -> SaeInput:
    """norm(h) - b_dec (section 1)."""
    x, scale, shift, n = np.array(h, dtype=np.float64), 1.0, 0.0, len(h)
    if not np.isfinite(x).all():
        return SaeInput(np.full(n, np.nan), math.nan, math.nan)
    if sae.normalization == "constant_norm_rescale":
        norm = math.sqrt(dot(x, x))
        scale = norm / math.sqrt(n) if norm > 0 else math.nan
        x = x / scale
    elif sae.normalization == "layer_norm":
        shift = math.fsum(x) / n
        x = x - shift
        scale = math.sqrt(dot(x, x) / (n - 1)) if n > 1 else math.nan
        x = x / (scale + 1e-5)
    if sae.subtract_b_dec:
        assert sae.b_dec is not None
        x = x - sae.b_dec
    return SaeInput(x, scale, shift)


def products(x: Vector, sae: Sae) -> Vector:
    """`W_enc h'`."""
    if len(sae.W_enc) * len(x) > 20_000:  # exact sums take too long here; numpy's are within a few 1e-16 of them
        return sae.W_enc @ x
    return np.array([dot(row, x) for row in sae.W_enc])


def pre_activation(product: Vector, sae: Sae) -> Vector:
    """z."""
    z = product + sae.b_enc
    return z if sae.decoder_norm is None else z * sae.decoder_norm


def ahead(z: Vector, j: int) -> int:
    """How many latents come before j when the largest are taken first and ties go to the lower index."""
    return sum(1 for i in range(len(z)) if z[i] > z[j] or (z[i] == z[j] and i < j))


def activate(product: Vector, sae: Sae) -> Vector:
    """f, from the bare products (section 1)."""
    z = pre_activation(product, sae)
    f = np.zeros(len(z))
    for j in range(len(z)):
        if sae.activation == "gated":
            assert sae.magnitude_scale is not None
            assert sae.magnitude_bias is not None
            if z[j] > 0:
                f[j] = max(product[j] * sae.magnitude_scale[j] + sae.magnitude_bias[j], 0.0)
        elif sae.activation == "topk":
            assert sae.k is not None
            if z[j] > 0 and ahead(z, j) < sae.k:
                f[j] = z[j]
        elif z[j] > sae.threshold[j] and z[j] > 0:
            f[j] = z[j]
    return f


def encode(h: Vector, sae: Sae) -> Vector:
    """f(h); all zero where the input is not finite."""
    x = sae_input(h, sae).x
    return activate(products(x, sae), sae) if np.isfinite(x).all() else np.zeros(len(sae.b_enc))


def decode(f: Vector, h: Vector, sae: Sae) -> Vector:
    """The reconstruction of h from latents f, bias, scale and shift included."""
    assert sae.W_dec is not None
    given = sae_input(h, sae)
    out = np.zeros(len(h)) if sae.b_dec is None else sae.b_dec.copy()
    for j in range(len(f)):
        if f[j] != 0:
            out = out + (f[j] if sae.decoder_norm is None else f[j] / sae.decoder_norm[j]) * sae.W_dec[j]
    return out * given.scale + given.shift


def encode_density(hidden: Matrix, offsets: list[int], sae: Sae) -> NDArray[np.int32]:
    """#{t in segment: f_i(h[t]) > 0} (section 2)."""
    counts = np.zeros((len(offsets) - 1, len(sae.b_enc)), dtype=np.int32)
    for s in range(len(offsets) - 1):
        for t in range(offsets[s], offsets[s + 1]):
            counts[s] += encode(hidden[t], sae) > 0
    return counts


def take(values: Vector, k: int, sign: int) -> list[int]:
    """The k indices with the largest (sign 1) or smallest (sign -1) values, best first, ties to the lower index."""
    return sorted(range(len(values)), key=lambda i: (-sign * values[i], i))[:k]


def lookup(
    density: Vector, A: Matrix, k_prompt: int, k_diff: int, edit: str, sign_guard: bool
) -> tuple[list[int], list[int]]:
    """S_augment and S_ablate, best first (section 3). Rows of A are added in ascending order, in A's own dtype."""
    s = np.zeros(A.shape[1], dtype=A.dtype)
    for i in sorted(take(density, k_prompt, 1)):
        s = s + A[i]
    augment = take(s, k_diff, 1) if edit in ("augment", "both") else []
    ablate = take(s, k_diff, -1) if edit in ("ablate", "both") else []
    if sign_guard:
        augment, ablate = [j for j in augment if s[j] > 0], [j for j in ablate if s[j] < 0]
    both = set(augment) & set(ablate)
    return [j for j in augment if j not in both], [j for j in ablate if j not in both]


def token_step(h: Vector, sae: Sae, augment: list[int], ablate: list[int], alpha: float) -> Step:
    """The edit of one token (section 4)."""
    assert sae.W_dec is not None
    given = sae_input(h, sae)
    nothing = np.zeros(len(sae.b_enc))
    if not np.isfinite(given.x).all():
        return Step(h.copy(), False, nothing, nothing, math.nan)
    f = activate(products(given.x, sae), sae)
    maximum = float(f.max())
    edited = f.copy()
    for j in augment:
        if f[j] > 0:
            edited[j] = f[j] + alpha * maximum
    for j in ablate:
        if f[j] > 0:
            edited[j] = max(f[j] - alpha * maximum, 0.0)
    changed = [j for j in range(len(f)) if edited[j] != f[j]]
    row = h.copy()
    for j in changed:
        norm = 1.0 if sae.decoder_norm is None else sae.decoder_norm[j]
        row = row + (edited[j] - f[j]) / norm * given.scale * sae.W_dec[j]
    return Step(row, True, f, edited, maximum, changed)


def steering(y: Vector, adapter: Adapter) -> Vector:
    """v (section 6); a latent with an infinite theta is masked."""
    v = np.zeros(len(y))
    for j in range(len(y)):
        theta = max(adapter.theta[j], 0.0)
        if math.isinf(theta):
            continue
        if adapter.activation == "soft_threshold":
            v[j] = math.copysign(max(abs(y[j]) - theta, 0.0), y[j])
        elif y[j] > theta:
            v[j] = y[j]
    return v


def strongest(v: Vector, fraction: float) -> Vector:
    """v with all but the largest in size set to 0."""
    kept = take(np.abs(v), max(1, int(len(v) * fraction)), 1)
    return np.array([v[j] if j in kept else 0.0 for j in range(len(v))])


def adapter_step(h: Vector, sae: Sae, adapter: Adapter, fraction: float | None = None) -> Step:
    """FSRL's edit of one token (section 6), in the form with both reconstructions: decode(u) + (h - decode(f))."""
    given = sae_input(h, sae)
    nothing = np.zeros(len(sae.b_enc))
    if not np.isfinite(given.x).all():
        return Step(h.copy(), False, nothing, nothing, math.nan)
    f = activate(products(given.x, sae), sae)
    v = steering(np.array([dot(row, given.x) for row in adapter.W_a]) + adapter.b_a, adapter)
    if fraction is not None:
        v = strongest(v, fraction)
    u = np.maximum(f + v, 0.0) if adapter.clip else f + v
    row = decode(u, h, sae) + (h - decode(f, h, sae))
    return Step(row, True, f, u, math.nan, [j for j in range(len(f)) if v[j] > 0 or (v[j] < 0 and u[j] != f[j])])
