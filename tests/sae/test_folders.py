"""Local folders in the formats of sparsify, dictionary_learning, Gemma Scope and Gemma Scope 2: each encodes as the
arithmetic of its package, written out here, and as the package itself where that is installed."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pickle
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from dspa.errors import CorruptFileError, InvalidInputError, MismatchError, UnsupportedSaeError
from dspa.sae.autoencoder import SparseAutoencoder

D_MODEL, D_SAE, K = 12, 40, 7
HIDDEN = torch.randn(64, D_MODEL, generator=torch.Generator().manual_seed(9))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def unit(rows: Tensor) -> Tensor:
    return rows / rows.norm(dim=1, keepdim=True)


def top_k(z: Tensor, k: int) -> Tensor:
    best = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, best.indices, best.values)


# ---------------------------------------------------------------------------------------------------------- sparsify

SPARSIFY: dict[str, Any] = {"activation": "topk", "expansion_factor": 32, "num_latents": D_SAE, "k": K, "d_in": D_MODEL}


def sparsify_tensors() -> dict[str, Tensor]:
    return {
        "encoder.weight": random(D_SAE, D_MODEL),
        "encoder.bias": random(D_SAE, seed=1),
        "W_dec": unit(random(D_SAE, D_MODEL, seed=2)),
        "b_dec": random(D_MODEL, seed=3),
    }


def sparsify_folder(folder: Path, tensors: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors or sparsify_tensors(), folder / "sae.safetensors")
    (folder / "cfg.json").write_text(json.dumps({**SPARSIFY, **changes}))
    return folder


def test_sparsify(tmp_path: Path) -> None:
    sae = SparseAutoencoder.from_sae_lens(sparsify_folder(tmp_path / "layers.3"))
    t = sparsify_tensors()
    z = torch.relu((HIDDEN - t["b_dec"]) @ t["encoder.weight"].T + t["encoder.bias"])
    torch.testing.assert_close(sae.encode(HIDDEN), top_k(z, K), rtol=1e-5, atol=1e-5)
    assert (sae.metadata.layer, sae.activation, sae.k) == (3, "topk", K)
    assert sae.W_dec is not None
    assert torch.equal(sae.W_dec, t["W_dec"])


def test_sparsify_by_its_expansion_factor(tmp_path: Path) -> None:
    tensors = {
        name: value[: 2 * D_MODEL].clone() if len(value) == D_SAE else value
        for name, value in sparsify_tensors().items()
    }
    folder = sparsify_folder(tmp_path / "sae", tensors, num_latents=0, expansion_factor=2)
    assert SparseAutoencoder.from_sae_lens(folder).d_sae == 2 * D_MODEL


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("layers.3", {"transcode": True}, "a transcoder"),
        ("layers.3", {"skip_connection": True}, "a skip connection"),
        ("layers.3", {"activation": "groupmax"}, "activation groupmax"),
        ("layers.3", {"signed": True}, "size and sign apart"),
        ("layers.3.mlp", {}, "hook point layers.3.mlp"),
        ("model.embed_tokens", {}, "hook point model.embed_tokens"),
        ("norm", {}, "hook point norm"),
        ("model.layers.3.self_attn", {}, "hook point model.layers.3.self_attn"),
    ],
)
def test_sparsify_that_is_refused(name: str, changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSaeError, match=line):
        SparseAutoencoder.from_sae_lens(sparsify_folder(tmp_path / name, **changes))


def test_sparsify_itself_encodes_the_same(tmp_path: Path) -> None:
    sparsify = pytest.importorskip("sparsify", reason="the comparison needs: pip install eai-sparsify")
    config = sparsify.SparseCoderConfig(num_latents=D_SAE, k=K)
    theirs = sparsify.SparseCoder(D_MODEL, config)
    with torch.no_grad():
        theirs.encoder.bias.copy_(random(D_SAE, seed=1))
        theirs.b_dec.copy_(random(D_MODEL, seed=3))
        theirs.save_to_disk(tmp_path / "layers.5")
        acts, indices, _ = theirs.encode(HIDDEN)
    expected = torch.zeros(len(HIDDEN), D_SAE).scatter(1, indices, acts)
    sae = SparseAutoencoder.from_sae_lens(tmp_path / "layers.5")
    torch.testing.assert_close(sae.encode(HIDDEN), expected, rtol=1e-5, atol=1e-5)
    assert sae.metadata.layer == 5


# ----------------------------------------------------------------------------------------------- dictionary_learning

LINEAR = {"encoder.weight": random(D_SAE, D_MODEL), "encoder.bias": random(D_SAE, seed=1)}
DECODER = {"decoder.weight": 0.7 * random(D_MODEL, D_SAE, seed=2)}
PARAMETERS = {
    "W_enc": random(D_MODEL, D_SAE),
    "b_enc": random(D_SAE, seed=1),
    "W_dec": unit(random(D_SAE, D_MODEL, seed=2)),
    "b_dec": random(D_MODEL, seed=3),
}
BIAS = random(D_MODEL, seed=3)
THRESHOLD = torch.tensor(0.8)
DICTIONARIES: dict[str, dict[str, Tensor]] = {
    "AutoEncoder": {**LINEAR, **DECODER, "bias": BIAS},
    "AutoEncoderNew": {**LINEAR, **DECODER, "decoder.bias": BIAS},
    "GatedAutoEncoder": {
        "encoder.weight": LINEAR["encoder.weight"],
        "decoder.weight": DECODER["decoder.weight"],
        "decoder_bias": BIAS,
        "r_mag": 0.3 * random(D_SAE, seed=4),
        "gate_bias": random(D_SAE, seed=5),
        "mag_bias": random(D_SAE, seed=6),
    },
    "JumpReluAutoEncoder": {**PARAMETERS, "threshold": random(D_SAE, seed=7).abs()},
    "AutoEncoderTopK": {**LINEAR, **DECODER, "b_dec": BIAS, "k": torch.tensor(K), "threshold": THRESHOLD},
    "BatchTopKSAE": {**LINEAR, **DECODER, "b_dec": BIAS, "k": torch.tensor(K), "threshold": THRESHOLD},
    "MatryoshkaBatchTopKSAE": {
        **PARAMETERS,
        "k": torch.tensor(K),
        "threshold": THRESHOLD,
        "group_sizes": torch.tensor([10, 30]),
    },
}


def linear(t: dict[str, Tensor], subtracted: Tensor | None) -> Tensor:
    """Pre-activations of either layout of the weights."""
    x = HIDDEN if subtracted is None else HIDDEN - subtracted
    if "W_enc" in t:
        return x @ t["W_enc"] + t["b_enc"]
    return x @ t["encoder.weight"].T + t.get("encoder.bias", torch.zeros(D_SAE))


def gated(t: dict[str, Tensor]) -> Tensor:
    x = linear(t, t["decoder_bias"])
    return (x + t["gate_bias"] > 0) * torch.relu(t["r_mag"].exp() * x + t["mag_bias"])


def jumprelu(t: dict[str, Tensor], subtracted: Tensor | None) -> Tensor:
    z = linear(t, subtracted)
    return torch.relu(z) * (z > t["threshold"])


ENCODE: dict[str, Callable[[dict[str, Tensor]], Tensor]] = {
    # this package scales decoder rows to unit norm when it loads them
    "AutoEncoder": lambda t: torch.relu(linear(t, t["bias"])) * t["decoder.weight"].norm(dim=0),
    "AutoEncoderNew": lambda t: torch.relu(linear(t, None)),
    "GatedAutoEncoder": gated,
    "JumpReluAutoEncoder": lambda t: jumprelu(t, None),
    "AutoEncoderTopK": lambda t: top_k(torch.relu(linear(t, t["b_dec"])), K),
    "BatchTopKSAE": lambda t: jumprelu(t, t["b_dec"]),
    "MatryoshkaBatchTopKSAE": lambda t: jumprelu(t, t["b_dec"]),
}


def dictionary_folder(
    folder: Path, kind: str, tensors: dict[str, Tensor] | None = None, *, io: str = "out", **changes: Any
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors or DICTIONARIES.get(kind, LINEAR), folder / "ae.pt")
    trainer = {"dict_class": kind, "activation_dim": D_MODEL, "dict_size": D_SAE, "k": K, "layer": 8}
    trainer |= {"lm_name": "EleutherAI/pythia-70m", "submodule_name": "resid_post_layer_8", **changes}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"io": io}}))
    return folder


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_dictionary_learning(kind: str, tmp_path: Path) -> None:
    tensors = DICTIONARIES[kind]
    sae = SparseAutoencoder.from_sae_lens(dictionary_folder(tmp_path, kind))
    expected = ENCODE[kind](tensors)
    assert (expected > 0).any()
    torch.testing.assert_close(sae.encode(HIDDEN), expected, rtol=1e-5, atol=1e-5)
    assert (sae.metadata.layer, sae.metadata.model_name) == (8, "EleutherAI/pythia-70m")
    # what is decoded is the same as well
    decoder = tensors["W_dec"] if "W_dec" in tensors else tensors["decoder.weight"].T
    if kind == "AutoEncoder":
        decoder = unit(decoder)
    torch.testing.assert_close(sae.W_dec, decoder.contiguous())


def test_a_threshold_that_was_never_set(tmp_path: Path) -> None:
    tensors = {**DICTIONARIES["BatchTopKSAE"], "threshold": torch.tensor(-1.0)}
    sae = SparseAutoencoder.from_sae_lens(dictionary_folder(tmp_path, "BatchTopKSAE", tensors))
    torch.testing.assert_close(sae.encode(HIDDEN), torch.relu(linear(tensors, tensors["b_dec"])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", DICTIONARIES)
def test_dictionary_learning_itself_encodes_the_same(kind: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Its modules alone: the package itself imports nnsight, which pins an old transformers."""
    found = importlib.util.find_spec("dictionary_learning")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("the comparison needs: pip install --no-deps dictionary-learning einops")
    place = Path(next(iter(found.submodule_search_locations)))
    for name, path in (("dictionary_learning", place), ("dictionary_learning.trainers", place / "trainers")):
        module = types.ModuleType(name)
        module.__path__ = [str(path)]
        monkeypatch.setitem(sys.modules, name, module)
    modules = {"AutoEncoderTopK": "trainers.top_k", "BatchTopKSAE": "trainers.batch_top_k"}
    modules["MatryoshkaBatchTopKSAE"] = "trainers.matryoshka_batch_top_k"
    try:
        module = importlib.import_module(f"dictionary_learning.{modules.get(kind, 'dictionary')}")
    except ModuleNotFoundError as error:
        pytest.skip(f"the comparison needs {error.name}")
    folder = dictionary_folder(tmp_path, kind)
    theirs_class = getattr(module, kind)
    options = {"k": K} if "TopK" in kind else {}
    theirs = theirs_class.from_pretrained(str(folder / "ae.pt"), **options)
    with torch.no_grad():
        expected = theirs.encode(HIDDEN)
    ours = SparseAutoencoder.from_sae_lens(folder).encode(HIDDEN)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
    for name in [name for name in sys.modules if name.startswith("dictionary_learning.")]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.parametrize(
    ("kind", "changes", "line"),
    [
        ("IdentityDict", {}, "dict_class IdentityDict; supported: one of AutoEncoder, "),
        ("CrossCoder", {}, "dict_class CrossCoder"),
        ("AutoEncoder", {"submodule_name": "mlp_out_layer_8"}, "submodule mlp_out_layer_8"),
        ("AutoEncoder", {"io": "in_and_out"}, "activations of kind 'in_and_out'"),
    ],
)
def test_dictionaries_that_are_refused(kind: str, changes: dict[str, Any], line: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedSaeError, match=line):
        SparseAutoencoder.from_sae_lens(dictionary_folder(tmp_path, kind, **changes))


def test_a_k_that_its_config_contradicts(tmp_path: Path) -> None:
    folder = dictionary_folder(tmp_path, "AutoEncoderTopK")
    tensors = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({**tensors, "k": torch.tensor(K + 3)}, folder / "ae.pt")
    with pytest.raises(CorruptFileError, match=f"k is {K + 3} beside the weights and {K} in its config"):
        SparseAutoencoder.from_sae_lens(folder)


def test_an_unknown_tensor_is_not_left_out(tmp_path: Path) -> None:
    tensors = {**DICTIONARIES["AutoEncoder"], "W_skip": random(D_MODEL, D_MODEL)}
    with pytest.raises(UnsupportedSaeError, match="found tensor W_skip"):
        SparseAutoencoder.from_sae_lens(dictionary_folder(tmp_path, "AutoEncoder", tensors))


class Runs:
    def __reduce__(self) -> Any:
        return pytest.fail, ("code in a file was run",)


def test_nothing_in_a_file_is_run(tmp_path: Path) -> None:
    folder = dictionary_folder(tmp_path, "AutoEncoder")
    (folder / "ae.pt").write_bytes(pickle.dumps(Runs()))
    with pytest.raises(CorruptFileError, match="cannot be read"):
        SparseAutoencoder.from_sae_lens(folder)


# ------------------------------------------------------------------------------------------------------- Gemma Scope


def gemma_scope_2_folder(folder: Path, extra: dict[str, Tensor] | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    tensors = {name.lower(): value for name, value in PARAMETERS.items()}
    tensors["threshold"] = DICTIONARIES["JumpReluAutoEncoder"]["threshold"]
    save_file({**tensors, **(extra or {})}, folder / "params.safetensors")
    config = {"architecture": "jump_relu", "model_name": "google/gemma-3-1b-pt", "type": "sae", **changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def gemma_scope_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    arrays: dict[str, Any] = {name: value.numpy() for name, value in PARAMETERS.items()}
    np.savez(folder / "params.npz", threshold=DICTIONARIES["JumpReluAutoEncoder"]["threshold"].numpy(), **arrays)
    return folder


@pytest.mark.parametrize(
    ("make", "place", "layer"),
    [
        (gemma_scope_2_folder, "resid_post/layer_12_width_16k_l0_small", 12),
        (gemma_scope_2_folder, "renamed", 7),
        (gemma_scope_folder, "layer_7/width_16k/average_l0_71", 7),
        (gemma_scope_folder, "renamed", None),
    ],
)
def test_gemma_scope_folders(make: Any, place: str, layer: int | None, tmp_path: Path) -> None:
    changes = {"hf_hook_point_in": "model.layers.7.output"} if make is gemma_scope_2_folder else {}
    if layer == 12:
        changes = {}
    sae = SparseAutoencoder.from_sae_lens(make(tmp_path / place, **changes))
    expected = jumprelu(DICTIONARIES["JumpReluAutoEncoder"], None)
    torch.testing.assert_close(sae.encode(HIDDEN), expected, rtol=1e-5, atol=1e-5)
    assert sae.metadata.layer == layer


@pytest.mark.parametrize(
    ("place", "changes", "extra", "line"),
    [
        ("transcoder/layer_3_width_16k", {}, {}, "an SAE of transcoder"),
        ("mlp_out/layer_3_width_16k", {}, {}, "an SAE of mlp"),
        ("attn_out_all/layer_3_width_16k", {}, {}, "an SAE of att"),
        ("x", {"type": "transcoder"}, {}, "a transcoder"),
        ("x", {"architecture": "topk"}, {}, "architecture topk"),
        ("x", {"hf_hook_point_in": "model.layers.3.mlp.input"}, {}, "hook point model.layers.3.mlp.input"),
        ("x", {"hf_hook_point_in": "a", "hf_hook_point_out": "b"}, {}, "a transcoder from a to b"),
        ("x", {}, {"affine_skip_connection": random(D_MODEL, D_MODEL)}, "a transcoder"),
    ],
)
def test_gemma_scope_2_that_is_refused(
    place: str, changes: dict[str, Any], extra: dict[str, Tensor], line: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedSaeError, match=line):
        SparseAutoencoder.from_sae_lens(gemma_scope_2_folder(tmp_path / place, extra, **changes))


def test_a_layer_that_its_folder_contradicts(tmp_path: Path) -> None:
    folder = gemma_scope_2_folder(tmp_path / "resid_post/layer_9_w", hf_hook_point_in="model.layers.12.output")
    with pytest.raises(CorruptFileError, match=r"folder says layer 9, its config model\.layers\.12\.output"):
        SparseAutoencoder.from_sae_lens(folder)


# ------------------------------------------------------------------------------------------- what is wrong, in a line


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda t: t.pop("W_dec"), "no tensor W_dec; found b_dec"),
        (lambda t: t.update(W_dec=random(D_SAE, D_MODEL + 1)), r"W_dec is \(40, 13\); expected \(40, 12\)"),
        (lambda t: t.update(b_dec=torch.full((D_MODEL,), torch.nan)), "b_dec holds NaN or Inf"),
    ],
)
def test_tensors_that_are_wrong(change: Any, line: str, tmp_path: Path) -> None:
    tensors = sparsify_tensors()
    change(tensors)
    with pytest.raises(CorruptFileError, match=line):
        SparseAutoencoder.from_sae_lens(sparsify_folder(tmp_path / "sae", tensors))


@pytest.mark.parametrize(
    "config", ["[]", "{", '{"d_in": "12"}', '{"d_in": 12, "num_latents": 40, "k": -1}', "[" * 9999]
)
def test_configs_that_are_wrong(config: str, tmp_path: Path) -> None:
    folder = sparsify_folder(tmp_path / "sae")
    (folder / "cfg.json").write_text(config)
    with pytest.raises(CorruptFileError, match=r"^[^\n]*$"):
        SparseAutoencoder.from_sae_lens(folder)


def test_a_folder_of_saes(tmp_path: Path) -> None:
    for layer in (3, 4):
        sparsify_folder(tmp_path / f"layers.{layer}")
    with pytest.raises(InvalidInputError, match=r"its folders do: layers\.3, layers\.4; pass one of them"):
        SparseAutoencoder.from_sae_lens(tmp_path)
    with pytest.raises(
        InvalidInputError, match=r"belongs to a release; pass the SAE's own folder, such as .*layers\.3"
    ):
        SparseAutoencoder.from_sae_lens(str(tmp_path), "layers.3")


def test_the_layer_where_the_source_does_not_say(tmp_path: Path) -> None:
    folder = sparsify_folder(tmp_path / "renamed")
    assert SparseAutoencoder.from_sae_lens(folder).metadata.layer is None
    assert SparseAutoencoder.from_sae_lens(folder, layer=6).metadata.layer == 6
    named = sparsify_folder(tmp_path / "layers.3")
    assert SparseAutoencoder.from_sae_lens(named, layer=3).metadata.layer == 3
    with pytest.raises(MismatchError, match="layer is 4; the SAE says it was trained on layer 3"):
        SparseAutoencoder.from_sae_lens(named, layer=4)


@pytest.mark.parametrize("layer", [-1, True, 2.0, "3"])
def test_a_layer_is_a_whole_number(layer: Any, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="layer is "):
        SparseAutoencoder.from_sae_lens(sparsify_folder(tmp_path / "renamed"), layer=layer)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (dictionary_folder(tmp_path, "AutoEncoder") / "config.json").unlink()
    with pytest.raises(InvalidInputError, match=r"holds ae\.pt, but no config\.json"):
        SparseAutoencoder.from_sae_lens(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInputError, match="empty holds no SAE; expected one of"):
        SparseAutoencoder.from_sae_lens(tmp_path / "empty")


def test_dtype_is_for_the_matrices(tmp_path: Path) -> None:
    sae = SparseAutoencoder.from_sae_lens(sparsify_folder(tmp_path / "sae"), dtype=torch.bfloat16)
    assert (sae.W_enc.dtype, sae.b_enc.dtype) == (torch.bfloat16, torch.float32)


def test_an_id_of_neuronpedia() -> None:
    pytest.importorskip("sae_lens", reason="its list is sae-lens'")
    from dspa.sae.sae_lens import _by_neuronpedia_id

    release = ("gemma-scope-2b-pt-res-canonical", "layer_7/width_16k/canonical")
    assert _by_neuronpedia_id("gemma-2-2b/7-gemmascope-res-16k") == release
    assert _by_neuronpedia_id("gemma-2-2b/nothing") is None
