"""adapter_step against the equations: exactly where arithmetic is exact, within rounding bounds elsewhere."""

from __future__ import annotations

import equations
import numpy as np
import pytest
import torch
from adapter_cases import (
    VERSIONS,
    Version,
    adapt,
    as_adapter_equations,
    as_whole_equations,
    make_adapter,
)
from kernel_cases import KINDS, Backend, Kind, counted, exact, fresh_stats, generator, make_sae, normal

from dspa.errors import BackendUnavailableError
from dspa.kernels.backends.registry import operations_for


@pytest.fixture(scope="session")
def float64_backend(backend: Backend) -> Backend:
    """A backend that serves float64 here. Refusing it is allowed, refusing anything else is not."""
    zeros = torch.zeros(1, 1, dtype=torch.float64, device=backend.device)
    try:
        operations_for(backend.name, "adapter_step", (zeros,))
    except BackendUnavailableError as refusal:
        pytest.skip(str(refusal))
    return backend


# ---- against the equations -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fraction", [None, 0.1], ids=lambda fraction: "all" if fraction is None else "strongest")
@pytest.mark.parametrize("version", VERSIONS, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_float64_equals_the_form_with_both_reconstructions(
    float64_backend: Backend, kind: Kind, version: Version, fraction: float | None
) -> None:
    fell = 0
    for seed, (batch, d_model, d_sae) in enumerate([(2, 2, 1), (3, 9, 21), (4, 24, 48)]):
        sae = make_sae(kind, d_model, d_sae, torch.float64, seed)
        adapter = make_adapter(version, sae, torch.float64, seed + 1)
        rows = normal(generator(seed + 2), batch, d_model) * 3
        stats = fresh_stats(batch, d_sae)
        written = adapt(rows, sae, adapter, backend=float64_backend, stats=stats, steering_fraction=fraction)
        added, latent_edits = counted(stats, batch, d_sae), np.zeros(d_sae, dtype=np.int64)
        for b in range(batch):
            h = exact(rows[b])
            expected = equations.adapter_step(h, as_whole_equations(sae), as_adapter_equations(adapter), fraction)
            scale = max(np.abs(expected.row).max(), np.abs(h).max())
            assert np.abs(exact(written[b]) - expected.row).max() <= 1e-12 * scale
            assert bool(added.edited[b]) == bool(expected.changed)
            latent_edits[expected.changed] += 1
            fell += int((expected.f_edited < expected.f).sum())
        assert (added.latent_edits.numpy() == latent_edits).all()
        assert (added.seen == 1).all()
        assert not added.nonfinite.any()
        assert not added.maximum_known.any()
    assert fraction or (fell > 0) == (version.activation == "soft_threshold"), (
        "only the two-sided adapter lowers activations"
    )
