"""FSRL behind DSPA's gates, the labels of latents, and the programs that measure them, on a few prompts."""

from __future__ import annotations

import json
from pathlib import Path

import beyond_both
import fsrl_latents
import head_to_head
import pytest
import torch
from fsrl_latents import CLASSES, FEWEST, Labels, masked_sets
from gated_adapter import gated_delta, signs_of
from torch import Tensor

import dspa
from dspa.kernels import AdapterWeights, EditList, adapter_step
from dspa.organism import sae_folder
from dspa.organism.language import MOVES, REGISTERS

SAE = dspa.SparseAutoencoder.from_sae_lens(sae_folder("output"))


def adapter(seed: int = 0) -> AdapterWeights:
    generator = torch.Generator().manual_seed(seed)
    return AdapterWeights(
        weight=torch.randn(SAE.d_sae, SAE.d_model, generator=generator) * 0.05,
        bias=torch.randn(SAE.d_sae, generator=generator) * 0.05,
        threshold=torch.full((SAE.d_sae,), 0.1),
    )


def states() -> Tensor:
    assert SAE.W_dec is not None
    assert SAE.b_dec is not None
    return 3 * SAE.W_dec[:12].view(2, 6, -1) + SAE.b_dec


def test_without_gates_it_is_the_adapter_of_the_package() -> None:
    hidden, weights = states(), adapter()
    expected = hidden.flatten(0, 1).clone()
    adapter_step(expected, SAE, weights, backend="reference")
    delta, l1 = gated_delta(hidden, SAE, weights, torch.ones(2, SAE.d_sae), "free")
    torch.testing.assert_close((hidden + delta).flatten(0, 1), expected)
    assert bool((l1 > 0).all())


@pytest.mark.parametrize("direction", ["free", "signed"])
def test_only_listed_latents_move(direction: fsrl_latents.Any) -> None:
    lists = EditList.from_lists([[3, 5], []], [[7], []])
    signs = signs_of(lists, SAE.d_sae)
    assert signs[0].nonzero().flatten().tolist() == [3, 5, 7]
    assert signs[0, [3, 5, 7]].tolist() == [1, 1, -1]
    hidden, rows = states(), SAE.W_dec
    assert rows is not None
    delta, _ = gated_delta(hidden, SAE, adapter(), signs, direction)
    assert not bool(delta[1].any())  # a row without a list
    moved = torch.linalg.lstsq(rows[[3, 5, 7]].T.double(), delta[0].T.double()).solution
    torch.testing.assert_close(moved.T @ rows[[3, 5, 7]].double(), delta[0].double(), rtol=1e-4, atol=1e-5)
    if direction == "signed":
        assert bool((moved[:2] > -1e-6).all())
        assert bool((moved[2] < 1e-6).all())


def test_a_latent_has_the_label_of_what_it_is_active_on() -> None:
    names = list(MOVES)
    rates = torch.zeros(len(names), 5)
    rates[names.index("joke"), 0] = 0.2  # half of its activity
    rates[names.index("rule"), 0] = 0.1
    rates[names.index("list"), 0] = 0.1
    for move in REGISTERS["stern"]:
        rates[names.index(move), 1] = 0.3
    rates[names.index("joke"), 1] = 0.5
    rates[:, 2] = 0.4
    rates[names.index("joke"), 3] = 1.0
    active = torch.tensor([100, 100, 100, FEWEST - 1, 0])
    labels = Labels.from_rates(rates, active)
    assert labels.classes == [
        "one move",
        "one register",
        "several registers",
        "not in responses",
        "not in responses",
    ]
    assert labels.registers[:2] == ["casual", "stern"]
    assert labels.registers[3:] == ["", ""]
    sets = masked_sets(labels, 2)
    assert {name: len(latents) for name, latents in sets.items() if ":" not in name} == dict(
        zip(CLASSES, (1, 1, 1, 2), strict=True)
    )
    for name, latents in sets.items():
        assert len(set(latents)) == len(sets[name.split(":")[0]])


@pytest.mark.long
@pytest.mark.usefixtures("short_responses")
def test_every_variant_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_to_head, "TRAINING_STEPS", 2)
    out = tmp_path / "beyond.json"
    arguments = ["--out", str(out), "--triples", "20", "--prompts", "6"]
    beyond_both.main(arguments)
    report = json.loads(out.read_text())
    assert len(report["rows"]) == 17  # the last of them is not in the committed table yet
    assert len(beyond_both.table(report)) == 2 + 17
    beyond_both.main(arguments)
    assert json.loads(out.read_text())["rows"] == report["rows"]


@pytest.mark.long
@pytest.mark.usefixtures("short_responses")
def test_classes_and_random_sets_are_masked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_to_head, "TRAINING_STEPS", 2)
    monkeypatch.setattr(fsrl_latents, "UNSEEN_PAIRS", 8)
    monkeypatch.setattr(fsrl_latents, "LABELLED_PAIRS", 12)
    out = tmp_path / "latents.json"
    fsrl_latents.main(["--out", str(out), "--triples", "20", "--prompts", "6"])
    report = json.loads(out.read_text())
    assert sum(report["sizes"].values()) == SAE.d_sae
    for part in ("prompt", "response"):
        for what in ("f", "v"):
            shares = [report["usage"][name][f"{what}, {part}"] for name in CLASSES]
            assert sum(shares) == pytest.approx(1, abs=1e-4)
    names = set(report["rows"])
    for name in CLASSES:
        if report["sizes"][name]:
            assert {f"masked, {name}", f"masked, {name}: random 2"} <= names
    for name in fsrl_latents.RETRAINED:
        without = [f"trained without, {name}{random}" for random in ("", ": random 1", ": random 2")]
        assert set(without) <= names
        assert len({report["rows"][each]["masked"] for each in without}) == 1
