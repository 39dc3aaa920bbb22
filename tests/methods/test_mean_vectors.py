"""Comparators from hidden states of pairs, controls, and vectors of other libraries."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_collection as tiny
import torch
from fsrl_cases import tiny_fsrl_policy
from tiny_models import BOS, D_MODEL, D_SAE_OUT, EOS, OUTPUT_LAYER, VOCAB, tiny_model, tiny_sae
from torch import Tensor

import dspa
from dspa.errors import CorruptFileError, InvalidInputError, MismatchError
from dspa.kernels import EditList
from dspa.methods.controls import random_latents, response_density, with_permuted_latents
from dspa.methods.imported_vectors import import_vectors
from dspa.methods.mean_vectors import (
    ResponseMeans,
    latent_addition_policy,
    mean_difference_policy,
    principal_directions,
    principal_directions_policy,
    response_means,
)
from dspa.offline.preferences import PreferenceTriple

MODEL: Any = tiny_model("llama")
SAE = tiny_sae()


def triples(count: int) -> list[PreferenceTriple]:
    generator = torch.Generator().manual_seed(0)

    def tokens(longest: int) -> tuple[int, ...]:
        length = int(torch.randint(1, longest, (1,), generator=generator))
        return tuple(torch.randint(5, VOCAB, (length,), generator=generator).tolist())

    rows = []
    for index in range(count):
        prompt, chosen, rejected = (BOS, *tokens(6)), (*tokens(8), EOS), (*tokens(8), EOS)
        rows.append(PreferenceTriple(prompt, chosen, rejected, len(chosen), len(rejected), f"row {index}"))
    return rows


def means(count: int = 20) -> ResponseMeans:
    return response_means(MODEL, triples(count), OUTPUT_LAYER, SAE)


def test_means_are_those_of_the_model_run_by_itself() -> None:
    found, rows = means(20), triples(20)
    for index in (0, 7, 19):
        for response, mean, latents in (
            (rows[index].chosen, found.chosen, found.latents_chosen),
            (rows[index].rejected, found.rejected, found.latents_rejected),
        ):
            prompt = rows[index].prompt
            with torch.no_grad():
                states = MODEL(torch.tensor([[*prompt, *response]]), output_hidden_states=True, use_cache=False)
            own = states.hidden_states[OUTPUT_LAYER + 1][0, len(prompt) :]
            torch.testing.assert_close(mean[index], own.mean(dim=0), rtol=1e-9, atol=1e-10)
            assert latents is not None
            torch.testing.assert_close(latents[index], SAE.encode(own).mean(dim=0), rtol=1e-9, atol=1e-10)


def test_mean_difference() -> None:
    found = means()
    policy = mean_difference_policy(found, scale=2.0)
    torch.testing.assert_close(policy.vector, (found.chosen.mean(dim=0) - found.rejected.mean(dim=0)).float())
    assert (policy.layer, policy.scale, policy.edit_positions) == (OUTPUT_LAYER, 2.0, "from_last_prompt")


def test_principal_directions_are_those_of_the_differences_and_point_to_what_was_chosen() -> None:
    found = means(40)
    differences = found.chosen - found.rejected
    directions = principal_directions(found, 5)
    values, vectors = torch.linalg.eigh(differences.T @ differences)
    strongest = vectors[:, values.argsort(descending=True)[:5]].T
    torch.testing.assert_close((directions * strongest).sum(dim=1).abs(), torch.ones(5, dtype=torch.float64))
    assert (directions @ differences.mean(dim=0) > 0).all()
    policy = principal_directions_policy(found)
    assert policy.scale == 0.5
    torch.testing.assert_close(policy.vector.double().square().sum(), torch.tensor(16.0, dtype=torch.float64))
    with pytest.raises(InvalidInputError, match="directions is 3; expected 1 to 2 for 2 pairs"):
        principal_directions(means(2), 3)


@pytest.mark.parametrize("k", [1, 5])
def test_latent_addition_adds_the_extremes_of_the_mean_difference(k: int) -> None:
    found = means()
    assert found.latents_chosen is not None
    assert found.latents_rejected is not None
    difference = (found.latents_chosen - found.latents_rejected).mean(dim=0)
    ranked = sorted(range(D_SAE_OUT), key=lambda latent: float(difference[latent]))
    kept = {*ranked[:k], *ranked[-k:]}
    policy = latent_addition_policy(found, k=k, scale=0.5)
    h = torch.randn(1, 3, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    f = SAE.encode(h)
    v = 0.5 * torch.tensor([float(difference[j]) if j in kept else 0.0 for j in range(D_SAE_OUT)], dtype=torch.float64)
    assert SAE.W_dec is not None
    expected = h + ((f + v).relu() - f) @ SAE.W_dec
    edit = policy.intervention
    editor = edit.editor({"a": edit}, torch.device("cpu"), "auto", None)
    editor.begin_prompt(["a"])
    editor.edit(h, None, [None] * 3)
    torch.testing.assert_close(h, expected, rtol=1e-9, atol=1e-9)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="pass the SAE to response_means"):
        latent_addition_policy(response_means(MODEL, triples(3), OUTPUT_LAYER))
    with pytest.raises(InvalidInputError, match="k is 0"):
        latent_addition_policy(means(3), k=0)
    with pytest.raises(InvalidInputError, match="no triples"):
        response_means(MODEL, [], OUTPUT_LAYER)
    with pytest.raises(MismatchError, match="layer is 9"):
        response_means(MODEL, triples(2), 9)


# ------------------------------------------------------------------------------------------------------------ controls


def test_random_latents_keep_lengths_signs_and_what_lists_share() -> None:
    lists = EditList.from_lists([[3, 5], [5]], [[9], []])
    found = random_latents(lists, torch.rand(D_SAE_OUT, generator=torch.Generator().manual_seed(0)), seed=1)
    assert torch.equal(found.counts, lists.counts)
    assert torch.equal(found.signs, lists.signs)
    (first, shared), ablated = found.augmented(0), found.ablated(0)
    assert found.augmented(1) == [shared]
    assert len({first, shared, *ablated}) == 3
    assert [first, shared, *ablated] != [3, 5, 9]
    assert int(found.latents[1, 1]) == 0  # padding stays padding


@pytest.mark.parametrize("d_sae", [2, 15, 40, 100])
def test_random_latents_are_others_that_fire_about_as_often(d_sae: int) -> None:
    density = torch.rand(d_sae, generator=torch.Generator().manual_seed(3))
    everything = EditList.from_lists([list(range(d_sae))], [[]])
    found, other = (random_latents(everything, density, seed).augmented(0) for seed in (1, 2))
    assert sorted(found) == list(range(d_sae))
    assert all(latent != instead for latent, instead in enumerate(found))
    assert d_sae == 2 or found != other
    rank = density.argsort().argsort()
    assert int((rank - rank[found]).abs().max()) < 32


def test_response_density_is_the_mean_over_chosen_and_rejected(tmp_path: Path) -> None:
    densities = tiny.random_densities(7, 5, 9, 1, (3, 5))
    expected = (densities.chosen.density.mean(axis=0) + densities.rejected.density.mean(axis=0)) / 2
    found = response_density(tiny.write_store(tmp_path, densities, 3))
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_permuted_latents_are_the_same_rows_elsewhere() -> None:
    policy = tiny_fsrl_policy()
    moved = with_permuted_latents(policy, seed=1)
    assert not torch.equal(moved.adapter.weight, policy.adapter.weight)
    order = [row for row in range(D_SAE_OUT) for other in [moved.adapter.bias] if policy.adapter.bias[row] in other]
    assert len(order) == D_SAE_OUT
    where = [int((moved.adapter.bias == value).nonzero()) for value in policy.adapter.bias]
    for name in ("weight", "bias", "threshold"):
        assert torch.equal(getattr(moved.adapter, name)[where], getattr(policy.adapter, name))


# ----------------------------------------------------------------------------------------------------- other libraries


@dataclass
class SteeringVector:
    """The fields of `steering_vectors.SteeringVector`."""

    layer_activations: dict[int, Tensor]
    layer_type: str = "decoder_block"


@dataclass
class ControlVector:
    """The fields of `repeng.ControlVector`."""

    model_type: str
    directions: dict[int, Any]


VECTORS = {layer: np.random.default_rng(layer).normal(size=D_MODEL).astype(np.float32) for layer in (1, 3)}


def as_gguf(folder: Path, architecture: str = "controlvector") -> Path:
    gguf = pytest.importorskip("gguf", reason="pip install 'dspa[vectors]' for gguf")
    file = folder / "vector.gguf"
    writer = gguf.GGUFWriter(file, architecture)
    writer.add_string(f"{architecture}.model_hint", "llama")
    writer.add_uint32(f"{architecture}.layer_count", len(VECTORS))
    for layer, vector in VECTORS.items():
        writer.add_tensor(f"direction.{layer}", vector)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


SOURCES: dict[str, Any] = {
    "steering-vectors": lambda folder: SteeringVector({k: torch.tensor(v) for k, v in VECTORS.items()}),
    "repeng": lambda folder: ControlVector("llama", VECTORS),
    "repeng, saved": as_gguf,
    "mapping": lambda folder: VECTORS,
}


@pytest.mark.parametrize("source", SOURCES)
def test_vectors_of_other_libraries_steer(source: str, tmp_path: Path) -> None:
    found = import_vectors(SOURCES[source](tmp_path), scale=0.5)
    assert sorted(found) == [1, 3]
    for layer, policy in found.items():
        np.testing.assert_array_equal(policy.vector.numpy(), VECTORS[layer])
        assert (policy.layer, policy.scale, policy.edit_positions) == (layer, 0.5, "all")
    with dspa.steer(MODEL, found[3]) as steering:
        MODEL(torch.tensor([[BOS, 7, 8]]))
    assert steering.summary().tokens_edited == 3


def test_what_holds_no_vectors_of_the_residual_stream_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="the vectors belong to self_attn"):
        import_vectors(SteeringVector({1: torch.zeros(3)}, "self_attn"))
    for nothing in (object(), {}, ControlVector("llama", {})):
        with pytest.raises(InvalidInputError, match="holds no vectors by layer"):
            import_vectors(nothing)
    with pytest.raises(InvalidInputError, match="holds a llama; expected a controlvector"):
        import_vectors(as_gguf(tmp_path, "llama"))
    with pytest.raises(InvalidInputError, match="no such file"):
        import_vectors(tmp_path / "nowhere.gguf")
    (tmp_path / "no.gguf").write_bytes(b"no")
    with pytest.raises(CorruptFileError, match=r"cannot be read as a \.gguf file"):
        import_vectors(tmp_path / "no.gguf")
