"""Hostile operands through the public kernels: an error of the package, or the result of the reference backend.

Run as a program, under the sanitizers: python -m soak.operands CASES
"""

from __future__ import annotations

import math
import random
import sys
from typing import Any

import torch
from torch import Tensor

from dspa.errors import DspaError
from dspa.kernels import (
    AdapterWeights,
    CsrMap,
    EditList,
    SaeWeights,
    TokenStats,
    adapter_step,
    encode_density,
    lookup,
    token_step,
)
from dspa.kernels.token_step import token_step_with_lookup
from soak.deadline import Deadline

D_MODEL, D_SAE = 19, 48
VALUES = (0.0, -1.0, 1e30, -1e30, 1e38, 1e-45, math.nan, math.inf, -math.inf)
NOT_COMPARED = "computed from weights with NaN or Inf"
NEARLY_INFINITE = 1e37
INTEGERS = (0, 1, -1, 47, 48, 49, 10**6, 2**31 - 1, -(2**31))


def _noise(rng: random.Random, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(rng.randrange(2**31)))


def _spoil(rng: random.Random, tensor: Tensor) -> Tensor:
    """The tensor, often as it is; else of another dtype, shape, layout or device, or with other values."""
    kind = rng.randrange(90)
    if kind == 0:
        return tensor.to(rng.choice((torch.float64, torch.float16, torch.bfloat16, torch.int32, torch.int64)))
    if kind == 1:
        return rng.choice((tensor[:-1], tensor[None], tensor.flatten(), tensor[:0]))
    if kind == 2:
        return tensor.to("meta")
    if kind == 3:
        return torch.stack([tensor, tensor], dim=-1)[..., 0]  # strided
    if kind in (4, 5) and tensor.numel():
        tensor = tensor.clone()
        flat = tensor.view(-1)
        if tensor.is_floating_point():
            flat[rng.randrange(len(flat))] = rng.choice(VALUES)
        elif tensor.dtype != torch.bool:
            limits = torch.iinfo(tensor.dtype)
            value = rng.choice((*INTEGERS, 2**63 - 1, -2))
            flat[rng.randrange(len(flat))] = max(limits.min, min(limits.max, value))
    return tensor


def _sae(rng: random.Random) -> SaeWeights:
    return SaeWeights(
        W_enc=_spoil(rng, _noise(rng, D_SAE, D_MODEL)),
        b_enc=_spoil(rng, _noise(rng, D_SAE)),
        threshold=_spoil(rng, torch.zeros(D_SAE)),
        W_dec=_spoil(rng, _noise(rng, D_SAE, D_MODEL)),
        activation="jumprelu" if rng.random() < 0.7 else "topk",
        k=None if rng.random() < 0.7 else 5,
    )


def _adapter(rng: random.Random) -> AdapterWeights:
    threshold = torch.tensor([rng.choice((math.inf, 0.0, 1.0, 1.0)) for _ in range(D_SAE)])
    return AdapterWeights(
        weight=_spoil(rng, _noise(rng, D_SAE, D_MODEL)),
        bias=_spoil(rng, _noise(rng, D_SAE)),
        threshold=_spoil(rng, threshold),
        activation=rng.choice((*("soft_threshold", "relu", "jump_relu") * 6, "none")),  # type: ignore[arg-type]
        clip=rng.random() < 0.5,
    )


def _map(rng: random.Random) -> CsrMap:
    lengths = torch.tensor([rng.randrange(4) for _ in range(D_SAE)])
    offsets = torch.zeros(D_SAE + 1, dtype=torch.int64)
    offsets[1:] = lengths.cumsum(0)
    columns = [column for n in lengths.tolist() for column in sorted(rng.sample(range(D_SAE), n))]
    entries = torch.tensor(columns, dtype=torch.int32)
    width = rng.choice((D_SAE,) * 40 + (1, 0, -1, 2**31, D_SAE + 1))
    return CsrMap(_spoil(rng, offsets), _spoil(rng, entries), _spoil(rng, _noise(rng, len(entries))), width)


def _lists(rng: random.Random, batch: int) -> EditList:
    latents = torch.stack([torch.randperm(D_SAE, generator=torch.Generator().manual_seed(n))[:4] for n in range(batch)])
    signs = torch.ones(batch, 4, dtype=torch.int8)
    counts = torch.full((batch,), 4, dtype=torch.int32)
    return EditList(_spoil(rng, latents.int()), _spoil(rng, -signs), _spoil(rng, counts))


def _are_finite(weights: list[Tensor]) -> bool:
    return all(tensor.is_meta or bool(tensor.isfinite().all()) for tensor in weights)


def _call(rng: random.Random, backend: str, used: list[Tensor]) -> Any:
    """One call, with the weights that it uses added to `used`."""
    batch = rng.choice((1, 2, 3))
    hidden = _spoil(rng, _noise(rng, batch, D_MODEL))
    alpha: Any = rng.choice((*(0.2,) * 20, 0.0, -1, 1e308, math.nan, "x", _spoil(rng, torch.full((batch,), 0.2))))
    stats = TokenStats.zeros(batch, D_SAE) if rng.random() < 0.5 else None
    enabled = _spoil(rng, torch.ones(batch, dtype=torch.bool)) if rng.random() < 0.5 else None
    options: dict[str, Any] = {
        "k_prompt": rng.choice((*(4,) * 20, 0, D_SAE, D_SAE + 1, -1, 2.0, True)),
        "k_diff": rng.choice((*(3,) * 20, 0, D_SAE, D_SAE + 1, -1, 2.0)),
        "edit": rng.choice((*("ablate", "augment", "both") * 6, "none")),
        "sign_guard": rng.choice((*(False, True) * 10, "no")),
    }
    operation = rng.randrange(5)
    if operation == 0:
        edits = lookup(_spoil(rng, torch.rand(batch, D_SAE)), _map(rng), **options, backend=backend)
        return edits.latents, edits.signs, edits.counts
    sae = _sae(rng)
    used += sae.tensors().values()
    if operation == 1:
        offsets = _spoil(rng, torch.tensor([0, 1, batch]))
        return (encode_density(hidden, offsets, sae, backend=backend),)
    hidden = hidden.clone()
    if operation == 2:
        token_step(hidden, sae, _lists(rng, batch), alpha, enabled, stats, backend=backend)
        return (hidden,)
    if operation == 3:
        adapter = _adapter(rng)
        used += (adapter.weight, adapter.bias)  # a threshold of Inf masks a latent
        fraction: Any = rng.choice((*(None,) * 30, 0.1, 1.0, 0, 2.0, math.nan, True, "x"))
        adapter_step(hidden, sae, adapter, enabled, stats, steering_fraction=fraction, backend=backend)
        return (hidden,)
    density, conditional_map = torch.rand(batch, D_SAE), _map(rng)
    edits = token_step_with_lookup(
        hidden, sae, density, conditional_map, alpha, enabled, stats, **options, backend=backend
    )
    return hidden, edits.counts


def _refused(case: int, message: str) -> None:
    assert "\n" not in message, f"case {case}: {message!r} is not one line"


def _outcome(case: int, backend: str) -> tuple[Any, bool]:
    """What a call returns, None if it is refused; and whether its weights are finite."""
    torch.manual_seed(case)
    used: list[Tensor] = []
    try:
        return _call(random.Random(case), backend, used), _are_finite(used)
    except DspaError as error:
        return _refused(case, str(error)), _are_finite(used)
    except Exception as error:
        raise AssertionError(f"case {case}, {backend}: {error!r}") from error


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether rows are equal within rounding; where sums overflow, or nearly so, they do in both, and how depends on
    their order."""
    overflows = [~(rows.abs() < NEARLY_INFINITE).all(dim=-1) for rows in (found, expected)]
    kept = ~overflows[1]
    same = torch.allclose(found[kept], expected[kept], rtol=2e-2, atol=1e-3)
    return same and torch.equal(overflows[0], overflows[1])


def run(cases: int, *, first: int = 0, until: Deadline | None = None) -> dict[str, int]:
    """So many calls, or as many as fit into the time, each with the CPU kernels and with the reference."""
    torch.set_num_threads(1)
    until = until or Deadline()
    counts = {f"kernel calls, {what}": 0 for what in ("refused", "computed as the reference", NOT_COMPARED)}
    for case in range(first, first + cases):
        if until.passed:
            break
        (found, finite), (expected, _) = _outcome(case, "auto"), _outcome(case, "reference")
        assert (found is None) == (expected is None), f"case {case} is refused by one backend only"
        if found is not None and not finite:
            counts[f"kernel calls, {NOT_COMPARED}"] += 1
            continue
        counts["kernel calls, refused" if found is None else "kernel calls, computed as the reference"] += 1
        for one, other in zip(found or (), expected or (), strict=True):
            if one.device.type == "meta":
                continue
            if one.is_floating_point():
                assert _agree(one.double(), other.double()), f"case {case}"
            else:
                assert int((one != other).sum()) <= 1, f"case {case}"  # a latent within rounding of its threshold
    return counts


if __name__ == "__main__":
    print(run(int(sys.argv[1])))
