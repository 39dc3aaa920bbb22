"""Operands that do not fit: a public kernel refuses them in one line, or computes what its equation says."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from kernel_cases import Kind, dense_map, edit_list, generator, make_sae, normal, random_lists, same_bits
from torch import Tensor

from dspa.errors import CorruptFileError, DspaError, InvalidInputError
from dspa.kernels import CsrMap, EditList, TokenStats, encode_density, lookup, token_step

D_MODEL, D_SAE, BATCH = 37, 64, 3
BACKENDS = ("reference", "cpu")

# In a process of its own: what reads out of bounds may take the process with it.
OUT_OF_BOUNDS = """
import sys, torch
from dspa import DspaError
from dspa.kernels import CsrMap, SaeWeights, lookup
from dspa.kernels.token_step import token_step_with_lookup

def run(column, d_sae_out, call, backend):
    columns = torch.arange(64, dtype=torch.int32)
    columns[7] = column
    conditional_map = CsrMap(torch.arange(65), columns, torch.ones(64), d_sae_out)
    density, zeros = torch.rand(3, 64), torch.zeros(d_sae_out)
    weights = {"W_enc": torch.randn(d_sae_out, 37), "W_dec": torch.randn(d_sae_out, 37), "b_enc": zeros}
    sae = SaeWeights(**weights, threshold=zeros, activation="relu")
    if call == "lookup":
        return lookup(density, conditional_map, 64, 1, backend=backend)
    return token_step_with_lookup(
        torch.randn(3, 37), sae, density, conditional_map, 0.2, k_prompt=64, k_diff=1, backend=backend
    )

for column, d_sae_out in ((10**6, 64), (-1, 64), (64, 64), (7, 1)):
    for call in ("lookup", "token_step_with_lookup"):
        try:
            print("accepted", run(column, d_sae_out, call, sys.argv[1]))
        except DspaError as error:
            print(error)
"""


@pytest.mark.long
@pytest.mark.parametrize("backend", BACKENDS)
def test_maps_out_of_bounds_are_refused(backend: str) -> None:
    arguments = [sys.executable, "-c", OUT_OF_BOUNDS, backend]
    ran = subprocess.run(arguments, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert len(lines) == 8
    assert all(line.startswith("map columns run from ") for line in lines), lines


def some_map() -> CsrMap:
    return dense_map(normal(generator(5), D_SAE, D_SAE))


def test_a_map_is_checked_once_and_again_when_it_was_written_to(monkeypatch: pytest.MonkeyPatch) -> None:
    given, density = some_map(), torch.rand(BATCH, D_SAE)
    conditional_map = CsrMap(given.row_offsets, given.columns, given.values, D_SAE)
    checks, row_of_entry = 0, CsrMap._row_of_entry

    def counting(self: CsrMap) -> Tensor:
        nonlocal checks
        checks += 1
        return row_of_entry(self)

    monkeypatch.setattr(CsrMap, "_row_of_entry", counting)
    for _ in range(3):
        lookup(density, conditional_map, 4, 4, backend="cpu")
    assert checks == 1
    conditional_map.values[3] = 2.0
    lookup(density, conditional_map, 4, 4, backend="cpu")
    assert checks == 2
    with torch.inference_mode():
        conditional_map.columns[0] = 10**6
    with pytest.raises(CorruptFileError, match="map columns run"):
        lookup(density, conditional_map, 4, 4, backend="cpu")


def test_a_map_of_inference_mode_is_checked_each_time() -> None:
    with torch.inference_mode():
        conditional_map, density = some_map(), torch.rand(BATCH, D_SAE)
        lookup(density, conditional_map, 4, 4, backend="cpu")
        conditional_map.columns[0] = -1
        with pytest.raises(CorruptFileError, match="map columns run"):
            lookup(density, conditional_map, 4, 4, backend="cpu")


def test_lists_are_checked_again_when_they_were_written_to() -> None:
    sae = make_sae(Kind(), D_MODEL, D_SAE, torch.float32, seed=0)
    edits = edit_list(*random_lists(sae, BATCH, 4, 0), 4)
    hidden = torch.zeros(BATCH, D_MODEL)
    for backend in BACKENDS:
        token_step(hidden, sae, edits, 0.2, backend=backend)
        before = edits.latents.clone()
        edits.latents[0, 0] = 10**6
        with pytest.raises(InvalidInputError, match="edit lists name latents"):
            token_step(hidden, sae, edits, 0.2, backend=backend)
        edits.latents.copy_(before)


META = torch.device("meta")


def step_operands() -> dict[str, Any]:
    sae = make_sae(Kind(), D_MODEL, D_SAE, torch.float32, seed=0)
    return {
        "hidden": normal(generator(1), BATCH, D_MODEL).float(),
        "sae": sae,
        "edits": edit_list(*random_lists(sae, BATCH, 4, 0), 4),
        "alpha": torch.full((BATCH,), 0.2),
        "enabled": torch.ones(BATCH, dtype=torch.bool),
        "stats": TokenStats.zeros(BATCH, D_SAE),
    }


STEP: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "alpha below 0": lambda o: {"alpha": torch.tensor([0.1, -1.0, 0.1])},
    "alpha NaN": lambda o: {"alpha": torch.tensor([0.1, torch.nan, 0.1])},
    "alpha infinite": lambda o: {"alpha": torch.tensor([0.1, torch.inf, 0.1])},
    "alpha infinite in float32": lambda o: {"alpha": torch.tensor([0.1, 1e308, 0.1], dtype=torch.float64)},
    "alpha of integers": lambda o: {"alpha": torch.ones(BATCH, dtype=torch.int64)},
    "hidden a list": lambda o: {"hidden": o["hidden"].tolist()},
    "hidden sparse": lambda o: {"hidden": o["hidden"].to_sparse()},
    "hidden on meta": lambda o: {"hidden": o["hidden"].to(META)},
    "sae on meta": lambda o: {"sae": o["sae"].to(META)},
    "edits on meta": lambda o: {"edits": o["edits"].to(META)},
    "alpha on meta": lambda o: {"alpha": o["alpha"].to(META)},
    "enabled on meta": lambda o: {"enabled": o["enabled"].to(META)},
    "stats on meta": lambda o: {"stats": TokenStats.zeros(BATCH, D_SAE, META)},
    "latents of another SAE": lambda o: {"edits": replace(o["edits"], latents=o["edits"].latents + D_SAE)},
    "signs of another strength": lambda o: {"edits": replace(o["edits"], signs=o["edits"].signs * 48)},
    "signs of neither direction": lambda o: {"edits": replace(o["edits"], signs=o["edits"].signs * 0)},
    "counts beyond the lists": lambda o: {"edits": replace(o["edits"], counts=o["edits"].counts + 9)},
}


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("case", STEP)
def test_a_token_step_refuses(case: str, backend: str) -> None:
    operands = step_operands()
    with pytest.raises(DspaError, match=r"^[^\n]+$"):
        token_step(**{**operands, **STEP[case](operands)}, backend=backend)


COUNTERS: dict[str, dict[str, Tensor]] = {
    "another batch": {"edited": torch.zeros(9, dtype=torch.int64)},
    "another dtype": {"nonfinite": torch.zeros(BATCH)},
    "a matrix": {"seen": torch.zeros(BATCH, 1, dtype=torch.int64)},
    "another device": {"maximum": torch.zeros(BATCH, dtype=torch.float64, device=META)},
    "not contiguous": {"latent_edits": torch.zeros(2 * D_SAE, dtype=torch.int64)[::2]},
}


@pytest.mark.parametrize("case", COUNTERS)
def test_counters_that_do_not_fit_cannot_be_made(case: str) -> None:
    with pytest.raises(InvalidInputError, match=r"^[^\n]+$"):
        replace(TokenStats.zeros(BATCH, D_SAE), **COUNTERS[case])


LOOKUP: dict[str, dict[str, Any]] = {
    "k_prompt a float": {"k_prompt": 2.0},
    "k_diff a float": {"k_diff": 2.0},
    "k_diff True": {"k_diff": True},
    "sign_guard a word": {"sign_guard": "no"},
    "density of integers": {"density": torch.ones(BATCH, D_SAE, dtype=torch.int64)},
    "density on meta": {"density": torch.ones(BATCH, D_SAE, device=META)},
    "density a list": {"density": [[0.5] * D_SAE]},
    "map on meta": {"conditional_map": some_map().to(META)},
}


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("case", LOOKUP)
def test_a_lookup_refuses(case: str, backend: str) -> None:
    operands = {"density": torch.rand(BATCH, D_SAE), "conditional_map": some_map(), "k_prompt": 4, "k_diff": 4}
    with pytest.raises(DspaError, match=r"^[^\n]+$"):
        lookup(**{**operands, **LOOKUP[case]}, backend=backend)


DENSITY: dict[str, dict[str, Any]] = {
    "offsets that wrap around": {"offsets": torch.tensor([0, 2**63 - 1, -2, 3])},
    "offsets of floats": {"offsets": torch.tensor([0.0, 3.0])},
    "offsets on meta": {"offsets": torch.tensor([0, 3], device=META)},
    "hidden on meta": {"hidden": torch.zeros(3, D_MODEL, device=META)},
    "hidden a list": {"hidden": [[0.0] * D_MODEL]},
}


@pytest.mark.parametrize("backend", ["auto", *BACKENDS])
@pytest.mark.parametrize("case", DENSITY)
def test_counting_refuses(case: str, backend: str) -> None:
    sae = make_sae(Kind(), D_MODEL, D_SAE, torch.float32, seed=0)
    operands: dict[str, Any] = {"hidden": torch.zeros(3, D_MODEL), "offsets": torch.tensor([0, 3])}
    with pytest.raises(DspaError, match=r"^[^\n]+$"):
        encode_density(**{**operands, **DENSITY[case]}, sae=sae, backend=backend)


@pytest.mark.parametrize("kind", [Kind(), Kind("gated")], ids=["jumprelu", "gated"])
def test_screening_notices_weights_that_are_written_in_place(kind: Kind) -> None:
    sae = make_sae(kind, D_MODEL, 512, torch.float32, seed=3)
    rows = normal(generator(0), 8, D_MODEL).float() * 2
    edits = edit_list(*random_lists(sae, 8, 8, 0), 8)

    def run(mode: Any) -> Tensor:
        hidden = rows.clone()
        token_step(hidden, sae, edits, 0.2, mode=mode, backend="cpu")
        return hidden

    assert same_bits(run("screened"), run("dense"))
    before = run("dense")
    with torch.no_grad():
        sae.W_enc.copy_(normal(generator(9), 512, D_MODEL).float() * 3)
    assert not same_bits(run("dense"), before)
    assert same_bits(run("screened"), run("dense"))
    with torch.inference_mode():
        sae.W_enc.mul_(0.5)
    assert same_bits(run("screened"), run("dense"))


def test_screening_is_right_for_weights_of_inference_mode() -> None:
    with torch.inference_mode():
        sae = make_sae(Kind(), D_MODEL, 512, torch.float32, seed=3)
        rows = normal(generator(0), 8, D_MODEL).float() * 2
        edits = edit_list(*random_lists(sae, 8, 8, 0), 8)
        found: list[Tensor] = []
        for factor in (1.0, 3.0):
            sae.W_enc.mul_(factor)
            for mode in ("screened", "dense"):
                found.append(rows.clone())
                token_step(found[-1], sae, edits, 0.2, mode=mode, backend="cpu")
    assert same_bits(found[0], found[1])
    assert same_bits(found[2], found[3])
    assert not same_bits(found[0], found[2])


def test_lists_of_another_device_cannot_be_made() -> None:
    edits = EditList.empty(2, 2)
    with pytest.raises(InvalidInputError, match="counts is on meta"):
        replace(edits, counts=edits.counts.to(META))
