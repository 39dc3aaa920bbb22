"""`SparseAutoencoder` against sae-lens: the same activations, every way of loading, every refusal."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import hub_cache
import pytest
import sae_lens
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sae_lens.loading.pretrained_sae_loaders import dictionary_learning_sae_huggingface_loader_1
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import SAEMetadata
from safetensors.torch import load_file, save_file
from torch import Tensor

from dspa.errors import CorruptFileError, InvalidInputError, MismatchError, UnsupportedSaeError
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.sae.metadata import SaeMetadata

D_MODEL, D_SAE, K = 24, 96, 7
HOOK = "blocks.3.hook_resid_post"

pytestmark = pytest.mark.filterwarnings("ignore:.*trained on rescaled inputs", "ignore:std.*degrees of freedom")

ARCHITECTURES = ["standard", "jumprelu", "gated", "topk", "topk-rescaled"]
NORMALIZATIONS = ["none", "expected_average_only_in", "constant_norm_rescale", "layer_norm"]


def randomize(sae: sae_lens.SAE[Any], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in sae.named_parameters():
        scale = 0.3 if parameter.ndim == 2 else 0.5
        parameter.data = (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.dtype)
        if name == "threshold":
            parameter.data.abs_()


def sae_lens_object(architecture: str = "jumprelu", seed: int = 0, hook_name: str = HOOK, **config: Any) -> Any:
    """A live inference SAE of sae-lens with random weights, biases and decoder norms; float64 unless told."""
    architecture, _, rescaled = architecture.partition("-")
    sae_class, config_class = get_sae_class(architecture)
    if architecture == "topk":
        config |= {"k": K, "rescale_acts_by_decoder_norm": bool(rescaled)}
    metadata = SAEMetadata(model_name="tiny", hook_name=hook_name)
    config = {"d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float64", "metadata": metadata} | config
    sae = sae_class(config_class(**config))
    randomize(sae, seed)
    return sae


def hidden_states(dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """`[3, 5, d_model]`: 3-D, with rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.tensor([1e-3, 0.1, 1.0, 3.0, 100.0])[:, None]
    return (size * torch.randn(3, 5, D_MODEL, generator=generator)).to(dtype)


def distance_to_gate(theirs: Any, z: Tensor, inputs: Tensor) -> Tensor:
    """How far each latent is from being switched, `[..., d_sae]`, from pre-activations in float64."""
    if isinstance(theirs, sae_lens.JumpReLUSAE):
        return torch.minimum((z - theirs.threshold.double()).abs(), z.abs())
    if isinstance(theirs, sae_lens.GatedSAE):
        magnitude = inputs @ (theirs.W_enc.double() * theirs.r_mag.double().exp()) + theirs.b_mag.double()
        return torch.minimum(z.abs(), magnitude.abs())
    if isinstance(theirs, sae_lens.TopKSAE):
        ranked = z.sort(dim=-1, descending=True).values
        rank_margin = torch.minimum((z - ranked[..., K - 1 : K]).abs(), (z - ranked[..., K : K + 1]).abs())
        # the k-th and the next are at distance 0 from themselves; what matters is their distance from each other
        rank_margin = torch.maximum(rank_margin, ranked[..., K - 1 : K] - ranked[..., K : K + 1])
        return torch.minimum(rank_margin, z.abs())
    return z.abs()


def assert_same_activations(theirs: Any, ours: SparseAutoencoder, hidden: Tensor) -> None:
    """Equal up to the rounding of two sums of `d_model` products in the dtype they are computed in.

    A latent may be active in one and not in the other only if it lies within that bound of its gate.
    """
    expected = theirs.encode(hidden).detach()
    found = ours.encode(hidden)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    inputs = theirs.process_sae_in(hidden).detach().double()
    bias = (theirs.b_gate if isinstance(theirs, sae_lens.GatedSAE) else theirs.b_enc).detach().double()
    z = inputs @ theirs.W_enc.detach().double() + bias
    size = inputs.abs() @ theirs.W_enc.detach().double().abs() + bias.abs()
    if ours.decoder_norm is not None:
        z, size = z * ours.decoder_norm, size * ours.decoder_norm
    if isinstance(theirs, sae_lens.GatedSAE):
        size = size * theirs.r_mag.double().exp() + size + theirs.b_mag.double().abs()
    bound = 2 * (D_MODEL + 4) * torch.finfo(found.dtype).eps * size.detach()
    switched = (found > 0) != (expected > 0)
    assert bool((distance_to_gate(theirs, z, inputs)[switched] <= bound[switched]).all())
    assert bool(((found - expected).abs() <= bound)[~switched].all())
    if found.dtype == torch.float64:
        assert not bool(switched.any())


@pytest.mark.product
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["float64", "float32"])
@pytest.mark.parametrize("apply_b_dec_to_input", [True, False], ids=["b_dec", "no_b_dec"])
@pytest.mark.parametrize("normalize_activations", NORMALIZATIONS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_encode_equals_sae_lens(
    architecture: str, normalize_activations: Any, apply_b_dec_to_input: bool, dtype: torch.dtype
) -> None:
    theirs = sae_lens_object(
        architecture,
        dtype=str(dtype).removeprefix("torch."),
        normalize_activations=normalize_activations,
        apply_b_dec_to_input=apply_b_dec_to_input,
    )
    ours = SparseAutoencoder.from_sae_lens(theirs)
    hidden = hidden_states(dtype)
    assert_same_activations(theirs, ours, hidden)
    assert 0 < (ours.encode(hidden) > 0).double().mean() < 1
    assert torch.equal(ours.encode(hidden[1, 2]), ours.encode(hidden[1, 2][None])[0])


@settings(max_examples=25, deadline=None)
@given(
    architecture=st.sampled_from(ARCHITECTURES),
    normalize_activations=st.sampled_from(NORMALIZATIONS),
    apply_b_dec_to_input=st.booleans(),
    seed=st.integers(0, 2**31),
    shape=st.lists(st.integers(0, 4), max_size=3),
)
def test_encode_equals_sae_lens_for_any_shape(
    architecture: str, normalize_activations: str, apply_b_dec_to_input: bool, seed: int, shape: list[int]
) -> None:
    theirs = sae_lens_object(
        architecture,
        seed,
        normalize_activations=normalize_activations,
        apply_b_dec_to_input=apply_b_dec_to_input,
    )
    hidden = torch.randn(*shape, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    assert_same_activations(theirs, SparseAutoencoder.from_sae_lens(theirs), hidden)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("architecture", ARCHITECTURES[:4])
def test_small_integers_are_exact(architecture: str, dtype: str) -> None:
    """Sums of small integers round nowhere: pre-activations lie exactly on thresholds, on 0, and on each other."""
    theirs = sae_lens_object(architecture, dtype=dtype)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in theirs.named_parameters():
        integers = torch.randint(-2, 3, parameter.shape, generator=generator).to(parameter.dtype)
        parameter.data = torch.zeros_like(integers) if name == "r_mag" else integers
    hidden = torch.randint(-1, 2, (200, D_MODEL), generator=generator).to(theirs.dtype)
    hidden[0] = 0
    expected = theirs.encode(hidden).detach()
    found = SparseAutoencoder.from_sae_lens(theirs).encode(hidden)
    if architecture != "topk":
        assert torch.equal(found, expected)
        return
    assert torch.equal(found.sort(dim=-1).values, expected.sort(dim=-1).values)  # torch.topk breaks ties anyhow
    z = theirs.process_sae_in(hidden) @ theirs.W_enc + theirs.b_enc
    larger = (z[:, :, None] > z[:, None, :]).sum(1)
    equal_before = (z[:, :, None] == z[:, None, :]).triu(1).sum(1)
    assert bool((equal_before > 0).any())
    assert torch.equal(found, torch.where(larger + equal_before < K, z.relu(), 0))


@pytest.mark.parametrize("value", [-1e3, 0.0], ids=["all_negative", "all_on_the_gate"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nothing_active(architecture: str, value: float) -> None:
    theirs = sae_lens_object(architecture, apply_b_dec_to_input=False)
    for name, parameter in theirs.named_parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(0.0 if name in ("threshold", "r_mag") else value)
    hidden = hidden_states()[:, :3] if value else torch.zeros(2, D_MODEL, dtype=torch.float64)
    assert not bool(theirs.encode(hidden).any())
    assert not bool(SparseAutoencoder.from_sae_lens(theirs).encode(hidden).any())


def test_bfloat16_weights_are_computed_in_float32() -> None:
    """sae-lens computes in bfloat16 there; ours equals sae-lens on the same weights in float32."""
    theirs = sae_lens_object(dtype="bfloat16")
    ours = SparseAutoencoder.from_sae_lens(theirs)
    assert ours.dtype == torch.bfloat16
    assert_same_activations(theirs.to(dtype=torch.float32), ours, hidden_states(torch.float32))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_canonical_layout(architecture: str) -> None:
    theirs = sae_lens_object(architecture, dtype="float32")
    ours = SparseAutoencoder.from_sae_lens(theirs, dtype=torch.bfloat16)
    assert torch.equal(ours.W_enc, theirs.W_enc.T.to(torch.bfloat16))
    assert ours.W_dec is not None
    assert torch.equal(ours.W_dec, theirs.W_dec.to(torch.bfloat16))
    assert {tensor.dtype for name, tensor in ours.tensors().items() if not name.startswith("W_")} == {torch.float32}
    norm = theirs.W_dec.norm(dim=-1) if architecture == "topk-rescaled" else None
    assert ours.decoder_norm is None if norm is None else torch.equal(ours.decoder_norm, norm)  # pyright: ignore


def test_a_live_object_may_go_on_training() -> None:
    theirs = sae_lens_object()
    ours = SparseAutoencoder.from_sae_lens(theirs)
    before = ours.fingerprint()
    for parameter in theirs.parameters():
        parameter.data.zero_()
    assert ours.fingerprint() == before


def training_object(architecture: str, rescale: bool) -> Any:
    sae_class, config_class = get_sae_training_class(architecture)
    config: dict[str, Any] = {"d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float64", "decoder_init_norm": None}
    if "topk" in architecture:
        config |= {"k": K, "rescale_acts_by_decoder_norm": rescale}
    if "matryoshka" in architecture:
        config |= {"matryoshka_widths": [16, D_SAE]}
    sae = sae_class(config_class(**config))
    randomize(sae, 5)
    if "batchtopk" in architecture:
        sae.topk_threshold.fill_(0.8)  # pyright: ignore
    return sae


@pytest.mark.parametrize("rescale", [True, False], ids=["rescaled", "plain"])
@pytest.mark.parametrize("architecture", ["standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk"])
def test_training_objects_become_their_inference_form(architecture: str, rescale: bool, tmp_path: Path) -> None:
    training = training_object(architecture, rescale)
    before = {name: tensor.clone() for name, tensor in training.state_dict().items()}
    ours = SparseAutoencoder.from_sae_lens(training)
    assert all(torch.equal(tensor, before[name]) for name, tensor in training.state_dict().items())
    training.save_inference_model(tmp_path)
    assert ours.metadata.architecture == architecture
    assert_same_activations(sae_lens.SAE.load_from_disk(tmp_path), ours, hidden_states())
    assert ours.fingerprint() == SparseAutoencoder.from_sae_lens(tmp_path).fingerprint()


# Ways to load


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    hub_cache.use_hub_cache(tmp_path, monkeypatch)
    return tmp_path


@pytest.mark.parametrize("layer", [7, 24])
def test_gemma_scope(hub: Path, layer: int) -> None:
    weights = hub_cache.write_gemma_scope(hub, layer, D_MODEL, D_SAE, seed=layer)
    release, sae_id = hub_cache.GEMMA_SCOPE_RELEASE, f"layer_{layer}/width_16k/canonical"
    ours = SparseAutoencoder.from_sae_lens(release, sae_id)
    assert ours.metadata == SaeMetadata(
        release=release,
        sae_id=sae_id,
        model_name="gemma-2-2b",
        hook_name=f"blocks.{layer}.hook_resid_post",
        layer=layer,
        neuronpedia_id=f"gemma-2-2b/{layer}-gemmascope-res-16k",
        architecture="jumprelu",
    )
    assert torch.equal(ours.W_enc, weights["W_enc"].T)
    assert ours.W_dec is not None
    assert torch.equal(ours.W_dec, weights["W_dec"])
    theirs = sae_lens_object(dtype="float32", apply_b_dec_to_input=False)
    theirs.load_state_dict(weights)
    assert_same_activations(theirs, ours, hidden_states(torch.float32))


def test_dictionary_learning_batchtopk(hub: Path) -> None:
    folder, _ = hub_cache.write_qwen3_batchtopk(hub, 9, D_MODEL, D_SAE, seed=9)
    ours = SparseAutoencoder.from_sae_lens(hub_cache.QWEN3_REPO, folder)
    assert (ours.activation, ours.subtract_b_dec, ours.metadata.layer) == ("jumprelu", True, 9)
    theirs = sae_lens.SAE.from_pretrained(
        hub_cache.QWEN3_REPO, folder, converter=dictionary_learning_sae_huggingface_loader_1
    )
    assert_same_activations(theirs, ours, hidden_states(torch.float32))


def old_config(**changes: object) -> dict[str, object]:
    """The config of an SAE saved before sae-lens 6."""
    return {
        "architecture": "standard",
        "d_in": D_MODEL,
        "d_sae": D_SAE,
        "dtype": "float32",
        "hook_name": "blocks.0.hook_resid_post",
        "activation_fn": "relu",
        "apply_b_dec_to_input": True,
        "normalize_activations": "expected_average_only_in",
    } | changes


def standard_weights(seed: int = 0) -> dict[str, Tensor]:
    weights = hub_cache.random_weights(D_MODEL, D_SAE, seed)
    del weights["threshold"]
    return weights


def test_sae_lens_release_with_a_norm_scaling_factor(hub: Path) -> None:
    folder = "gemma_2b_blocks.12.hook_resid_post_16384"
    files = hub_cache.sae_lens_files(standard_weights(), old_config(hook_name="blocks.12.hook_resid_post"))
    hub_cache.write_repo(
        hub, "jbloom/Gemma-2b-Residual-Stream-SAEs", {f"{folder}/{name}": data for name, data in files.items()}
    )
    release = ("gemma-2b-res-jb", "blocks.12.hook_resid_post")
    ours = SparseAutoencoder.from_sae_lens(*release)
    theirs = sae_lens.SAE.from_pretrained(*release)
    assert torch.equal(ours.W_enc, theirs.W_enc.T)
    assert ours.W_dec is not None
    assert torch.equal(ours.W_dec, theirs.W_dec)
    assert not torch.equal(ours.W_enc, standard_weights()["W_enc"].T)
    assert_same_activations(theirs, ours, hidden_states(torch.float32))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sae_lens_folder_and_hub_repository(architecture: str, hub: Path, tmp_path: Path) -> None:
    theirs = sae_lens_object(architecture, dtype="float32")
    theirs.save_model(tmp_path / "sae")
    from_folder = SparseAutoencoder.from_sae_lens(tmp_path / "sae")
    files = {f"early/{path.name}": path.read_bytes() for path in (tmp_path / "sae").iterdir()}
    hub_cache.write_repo(hub, "someone/saes", files)
    from_hub = SparseAutoencoder.from_sae_lens("someone/saes", "early")
    from_object = SparseAutoencoder.from_sae_lens(theirs)
    assert_same_activations(theirs, from_folder, hidden_states(torch.float32))
    assert from_folder.fingerprint() == from_hub.fingerprint() == from_object.fingerprint()
    assert from_folder.metadata == from_object.metadata
    assert from_hub.metadata == replace(from_object.metadata, release="someone/saes", sae_id="early")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtype_is_for_the_matrices(dtype: torch.dtype, tmp_path: Path) -> None:
    theirs = sae_lens_object(dtype="float32")
    theirs.save_model(tmp_path)
    ours = SparseAutoencoder.from_sae_lens(str(tmp_path), dtype=dtype)
    assert ours.dtype == dtype
    assert torch.equal(ours.W_enc, theirs.W_enc.T.to(dtype))
    assert torch.equal(ours.b_enc, theirs.b_enc.to(ours.b_enc.dtype))  # not rounded to bfloat16


@pytest.mark.parametrize(
    ("hook_name", "layer"),
    [
        ("blocks.3.hook_resid_post", 3),
        ("blocks.3.hook_resid_pre", 2),  # the input of block 3 is the output of block 2
        ("model.layers.12", 12),
        ("model.language_model.layers.0", 0),
        ("transformer.h.5", 5),
        (None, None),
    ],
)
def test_layer(hook_name: Any, layer: int | None) -> None:
    assert SparseAutoencoder.from_sae_lens(sae_lens_object(hook_name=hook_name)).metadata.layer == layer


# Refusals


class OwnEncode(sae_lens.StandardSAE):
    pass


def own_class() -> sae_lens.StandardSAE:
    return OwnEncode(sae_lens.StandardSAEConfig(d_in=D_MODEL, d_sae=D_SAE))


def own_activation() -> Any:
    sae = sae_lens_object("standard")
    sae.activation_fn = torch.nn.Tanh()
    return sae


def centred_model() -> Any:
    sae = sae_lens_object()
    sae.cfg.metadata.model_from_pretrained_kwargs = {"center_writing_weights": True}
    return sae


def transcoder(architecture: str) -> Any:
    return sae_lens_object(architecture, d_out=D_MODEL, apply_b_dec_to_input=False)


def temporal() -> Any:
    config = sae_lens.TemporalSAEConfig(d_in=64, d_sae=64, n_heads=1, bottleneck_factor=64)
    return sae_lens.TemporalSAE(config)


def training_abstopk() -> Any:
    return sae_lens.AbsTopKTrainingSAE(sae_lens.AbsTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=D_SAE, k=K))


@pytest.mark.parametrize(
    ("make", "found"),
    [
        (lambda: transcoder("transcoder"), "architecture transcoder"),
        (lambda: transcoder("skip_transcoder"), "architecture skip_transcoder"),
        (lambda: transcoder("jumprelu_transcoder"), "architecture jumprelu_transcoder"),
        (lambda: transcoder("jumprelu_skip_transcoder"), "architecture jumprelu_skip_transcoder"),
        (temporal, "architecture temporal"),
        (lambda: sae_lens_object("matching_pursuit"), "architecture matching_pursuit"),
        (lambda: sae_lens_object("abstopk", k=K), "architecture abstopk"),
        (training_abstopk, "architecture abstopk"),
        (own_class, "a class of its own"),
        (own_activation, "activation Tanh"),
        (centred_model, "center_writing_weights"),
        (lambda: sae_lens_object(normalize_activations="covariance_whitening"), "covariance_whitening"),
        (lambda: sae_lens_object(reshape_activations="hook_z", hook_name="blocks.1.attn.hook_z"), "attention heads"),
        (lambda: sae_lens_object(hook_name="blocks.1.attn.hook_z"), "blocks.1.attn.hook_z"),
        (lambda: sae_lens_object(hook_name="blocks.1.hook_attn_out"), "blocks.1.hook_attn_out"),
        (lambda: sae_lens_object(hook_name="blocks.1.hook_mlp_out"), "blocks.1.hook_mlp_out"),
        (lambda: sae_lens_object(hook_name="blocks.1.hook_resid_mid"), "blocks.1.hook_resid_mid"),
        (lambda: sae_lens_object(hook_name="blocks.0.hook_resid_pre"), "blocks.0.hook_resid_pre"),
        (lambda: sae_lens_object(hook_name="hook_embed"), "hook_embed"),
        (lambda: sae_lens_object(hook_name="model.layers.1.mlp"), "model.layers.1.mlp"),
    ],
)
def test_refused_objects(make: Callable[[], Any], found: str) -> None:
    with pytest.raises(UnsupportedSaeError, match=f"^[^\n]*found [^\n]*{found}[^\n]*; supported: [^\n]+$"):
        SparseAutoencoder.from_sae_lens(make())


@pytest.mark.parametrize(
    ("config", "tensors", "found"),
    [
        ({"activation_fn": "tanh-relu"}, {}, "activation_fn tanh-relu"),
        ({"activation_fn": "topk", "activation_fn_kwargs": {"k": 4, "signed": True}}, {}, "signed top-k"),
        ({"architecture": "crosslayer_transcoder"}, {}, "architecture crosslayer_transcoder"),
        ({"hook_head_index": 2}, {}, "attention heads"),
        (
            {"finetuning_scaling_factor": True},
            {"scaling_factor": 2 * torch.ones(D_SAE)},
            "tensor finetuning_scaling_factor",
        ),
    ],
)
def test_refused_folders(config: dict[str, Any], tensors: dict[str, Tensor], found: str, tmp_path: Path) -> None:
    for name, data in hub_cache.sae_lens_files(standard_weights() | tensors, old_config(**config)).items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UnsupportedSaeError, match=found):
        SparseAutoencoder.from_sae_lens(tmp_path)


def test_refused_before_its_weights_are_fetched(hub: Path) -> None:
    with pytest.raises(UnsupportedSaeError, match="hook_mlp_out"):
        SparseAutoencoder.from_sae_lens("gemma-scope-2b-pt-mlp-canonical", "layer_7/width_16k/canonical")


def test_an_unfolded_scale_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="trained on rescaled inputs"):
        SparseAutoencoder.from_sae_lens(sae_lens_object(normalize_activations="expected_average_only_in"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("gemma-scope-2b-pt-res-canonicl", "x"), "neither a folder nor a release.*gemma-scope-2b-pt-res-canonical"),
        (("no/such/folder",), "neither a folder nor a release"),
        (("gemma-scope-2b-pt-res-canonical",), "needs a sae_id, for example layer_0/width_16k/canonical"),
        (("gemma-scope-2b-pt-res-canonical", "layer_7/width_16k"), "has no SAE.*closest: layer_7/width_16k/canonical"),
        (("gemma-scope-2b-pt-res-canonical", "layer_8/width_16k/canonical"), "cannot be fetched"),
        (("someone/saes", "early"), "SAE early of someone/saes: .*cannot be fetched"),
        ((Path(__file__).parent, "x"), "belongs to a release"),
        ((Path("no/such/folder"),), "no/such/folder: .*cfg.json"),
        ((3,), "source is a int"),
    ],
)
def test_unknown_sources(arguments: tuple[Any, ...], message: str, hub: Path) -> None:
    with pytest.raises(InvalidInputError, match=f"^[^\n]*{message}[^\n]*$"):
        SparseAutoencoder.from_sae_lens(*arguments)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_unknown_storage_dtype(dtype: torch.dtype) -> None:
    with pytest.raises(InvalidInputError, match="expected bfloat16"):
        SparseAutoencoder.from_sae_lens(sae_lens_object(), dtype=dtype)


def test_overflow_in_the_storage_dtype() -> None:
    theirs = sae_lens_object()
    theirs.W_dec.data[3, 4] = 1e6
    with pytest.raises(InvalidInputError, match="W_dec overflows in torch"):
        SparseAutoencoder.from_sae_lens(theirs, dtype=torch.float16)


# Damaged files


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    sae_lens_object(dtype="float32").save_model(folder)
    return folder


def copy_of(saved: Path, folder: Path) -> tuple[Path, Path]:
    for path in saved.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder / "cfg.json", folder / "sae_weights.safetensors"


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.999])
@pytest.mark.parametrize("file", ["cfg.json", "sae_weights.safetensors"])
def test_truncated_folder(saved: Path, tmp_path: Path, file: str, kept: float) -> None:
    copy_of(saved, tmp_path)
    data = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CorruptFileError, match=r"^[^\n]+cannot be read[^\n]+$"):
        SparseAutoencoder.from_sae_lens(tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.3, 0.6, 0.999])
@pytest.mark.parametrize("release", ["gemma_scope", "dictionary_learning"])
def test_truncated_hub_file(hub: Path, release: str, kept: float) -> None:
    if release == "gemma_scope":
        hub_cache.write_gemma_scope(hub, 7, D_MODEL, D_SAE, seed=0)
        source = (hub_cache.GEMMA_SCOPE_RELEASE, "layer_7/width_16k/canonical")
    else:
        folder, _ = hub_cache.write_qwen3_batchtopk(hub, 9, D_MODEL, D_SAE, seed=0)
        source = (hub_cache.QWEN3_REPO, folder)
    SparseAutoencoder.from_sae_lens(*source)
    weights = max((path for path in hub.rglob("blobs/*")), key=lambda path: path.stat().st_size)
    weights.write_bytes(weights.read_bytes()[: int(kept * weights.stat().st_size)])
    with pytest.raises(CorruptFileError, match=r"^[^\n]+cannot be read[^\n]+$"):
        SparseAutoencoder.from_sae_lens(*source)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_enc", "b_dec", "threshold"])
def test_not_finite(saved: Path, tmp_path: Path, name: str, value: float) -> None:
    _, weights = copy_of(saved, tmp_path)
    tensors = load_file(weights)
    tensors[name].flatten()[5] = value
    save_file(tensors, weights)
    with pytest.raises(CorruptFileError, match=f"{name} holds NaN or Inf"):
        SparseAutoencoder.from_sae_lens(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config, tensors: tensors.pop("threshold"), "no tensor threshold"),
        (lambda config, tensors: config.update(d_in=D_MODEL + 1), r"W_enc is \(24, 96\); its config says \(25, 96\)"),
        (lambda config, tensors: tensors.update(b_enc=torch.zeros(D_SAE + 1)), r"b_enc is \(97,\)"),
        (lambda config, tensors: config.pop("d_in"), "cannot be read"),
        (lambda config, tensors: config.update(normalize_activations="twice"), "cannot be read"),
        (lambda config, tensors: config.update(dtype="int4"), "cannot be read"),
    ],
)
def test_altered_folder(saved: Path, tmp_path: Path, change: Callable[[Any, Any], Any], message: str) -> None:
    config_path, weights_path = copy_of(saved, tmp_path)
    config, tensors = json.loads(config_path.read_text()), load_file(weights_path)
    change(config, tensors)
    config_path.write_text(json.dumps(config))
    save_file(tensors, weights_path)
    with pytest.raises(CorruptFileError, match=message):
        SparseAutoencoder.from_sae_lens(tmp_path)


def test_missing_weights(saved: Path, tmp_path: Path) -> None:
    _, weights = copy_of(saved, tmp_path)
    weights.unlink()
    with pytest.raises(InvalidInputError, match=r"sae_weights\.safetensors"):
        SparseAutoencoder.from_sae_lens(tmp_path)


# The object itself


@pytest.fixture
def sae() -> SparseAutoencoder:
    return SparseAutoencoder.from_sae_lens(sae_lens_object("topk-rescaled", dtype="float32"))


def test_repr(sae: SparseAutoencoder) -> None:
    assert repr(sae) == "SparseAutoencoder(d_sae=96, d_model=24, topk k=7, float32, layer=3)"
    assert repr(sae.encoder_only()).endswith("layer=3, no decoder)")
    assert repr(sae.with_decoder_rows(torch.tensor([4, 2]))).endswith("layer=3, 2 decoder rows)")


@pytest.mark.parametrize("shape", [(), (D_MODEL + 1,), (D_MODEL, 3)])
def test_encode_of_another_width(sae: SparseAutoencoder, shape: tuple[int, ...]) -> None:
    with pytest.raises(MismatchError, match=r"expected \[\.\.\., 24\]"):
        sae.encode(torch.zeros(shape))


def test_encoder_only_encodes_the_same(sae: SparseAutoencoder) -> None:
    hidden = hidden_states(torch.float32)
    assert torch.equal(sae.encoder_only().encode(hidden), sae.encode(hidden))
    assert sae.encoder_only().W_dec is None


@given(latents=st.lists(st.integers(0, D_SAE - 1)))
@settings(max_examples=30, deadline=None)
def test_with_decoder_rows(latents: list[int]) -> None:
    sae = SparseAutoencoder.from_sae_lens(sae_lens_object())
    kept = sae.with_decoder_rows(torch.tensor(latents, dtype=torch.int32))
    assert sae.W_dec is not None
    assert kept.W_dec is not None
    assert kept.decoder_rows is not None
    assert kept.W_dec.shape == (len(set(latents)), D_MODEL)
    assert (kept.decoder_rows >= 0).nonzero().flatten().tolist() == sorted(set(latents))
    for latent in latents:
        assert torch.equal(kept.W_dec[kept.decoder_rows[latent]], sae.W_dec[latent])
    again = kept.with_decoder_rows(torch.tensor(latents[:1], dtype=torch.int64))
    assert again.fingerprint() == sae.with_decoder_rows(torch.tensor(latents[:1], dtype=torch.int64)).fingerprint()


@pytest.mark.parametrize("latents", [[-1], [D_SAE], [0, D_SAE + 5]])
def test_decoder_rows_out_of_range(sae: SparseAutoencoder, latents: list[int]) -> None:
    with pytest.raises(InvalidInputError, match="expected 0 to 95"):
        sae.with_decoder_rows(torch.tensor(latents))


def test_decoder_rows_that_are_gone(sae: SparseAutoencoder) -> None:
    with pytest.raises(InvalidInputError, match="latent 3 has no decoder row"):
        sae.with_decoder_rows(torch.tensor([1, 2])).with_decoder_rows(torch.tensor([2, 3]))
    with pytest.raises(InvalidInputError, match="without a decoder"):
        sae.encoder_only().with_decoder_rows(torch.tensor([2]))


@pytest.mark.parametrize(
    "change",
    [
        {"k": K + 1},
        {"subtract_b_dec": False},
        {"normalization": "layer_norm"},
        {"decoder_norm": None},
        {"W_dec": None},
        {"W_enc": torch.zeros(D_SAE, D_MODEL)},
        {"activation": "relu", "k": None},
    ],
    ids=str,
)
def test_fingerprint_sees_every_change(sae: SparseAutoencoder, change: dict[str, Any]) -> None:
    assert replace(sae, **change).fingerprint() != sae.fingerprint()


@pytest.mark.parametrize("architecture", ["gated", "topk-rescaled"])
def test_fingerprint_sees_one_bit_of_any_tensor(architecture: str) -> None:
    sae = SparseAutoencoder.from_sae_lens(sae_lens_object(architecture))
    for name, tensor in sae.tensors().items():
        changed = tensor.clone()
        changed.view(torch.int64).flatten()[-1] ^= 1
        assert replace(sae, **{name: changed}).fingerprint() != sae.fingerprint(), name


def test_fingerprint_leaves_out_metadata(sae: SparseAutoencoder) -> None:
    assert replace(sae, metadata=SaeMetadata(layer=9)).fingerprint() == sae.fingerprint()


# Processes


@pytest.mark.long
def test_import_is_lazy_and_other_processes_agree(tmp_path: Path) -> None:
    """Importing the module leaves sae-lens alone; HF_HOME and HF_HUB_OFFLINE are honoured; fingerprints are stable."""
    hub_cache.write_gemma_scope(tmp_path, 7, D_MODEL, D_SAE, seed=7)
    program = """
import sys
from dspa.sae.autoencoder import SparseAutoencoder
assert "sae_lens" not in sys.modules
print(SparseAutoencoder.from_sae_lens(*sys.argv[1:]).fingerprint())
"""
    source = (hub_cache.GEMMA_SCOPE_RELEASE, "layer_7/width_16k/canonical")
    printed = subprocess.run(
        [sys.executable, "-c", program, *source],
        env=hub_cache.offline_environment(tmp_path),
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    with pytest.MonkeyPatch.context() as monkeypatch:
        hub_cache.use_hub_cache(tmp_path, monkeypatch)
        assert printed[-1] == SparseAutoencoder.from_sae_lens(*source).fingerprint()


def test_without_sae_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    monkeypatch.delitem(sys.modules, "dspa.sae.sae_lens", raising=False)
    with pytest.raises(InvalidInputError, match=r"pip install 'dspa\[sae\]'"):
        SparseAutoencoder.from_sae_lens("gemma-scope-2b-pt-res-canonical", "layer_7/width_16k/canonical")
