"""From sae-lens' releases, folders and objects to `SaeWeights`. The only module that imports sae-lens."""

from __future__ import annotations

import difflib
import errno
import re
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sae_lens
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from sae_lens.loading.pretrained_sae_loaders import (
    NAMED_PRETRAINED_SAE_CONFIG_GETTERS,
    NAMED_PRETRAINED_SAE_LOADERS,
    get_conversion_loader_name,
    get_sae_lens_config_from_disk,
    handle_config_defaulting,
    sae_lens_disk_loader,
)
from sae_lens.loading.pretrained_saes_directory import (
    get_config_overrides,
    get_norm_scaling_factor,
    get_pretrained_saes_directory,
    get_repo_id_and_folder_name,
)
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.topk_sae import TopK
from torch import Tensor, nn

from dspa.errors import CorruptFileError, DspaError, InvalidInputError, UnsupportedSaeError
from dspa.sae.metadata import SaeMetadata
from dspa.sae.weights import STORAGE_DTYPES, Activation, InputNormalization, SaeWeights

# Inference architectures, the tensors of each beside W_enc, W_dec and b_dec, and the rule they select latents by.
TENSORS: dict[str, tuple[str, ...]] = {
    "standard": ("b_enc",),
    "jumprelu": ("b_enc", "threshold"),
    "gated": ("b_gate", "b_mag", "r_mag"),
    "topk": ("b_enc",),
}
ACTIVATIONS: dict[str, Activation] = {"standard": "relu", "jumprelu": "jumprelu", "gated": "gated", "topk": "topk"}
TRAINING_ARCHITECTURES = (*TENSORS, "batchtopk", "matryoshka_batchtopk")

# expected_average_only_in is a factor that is folded into the weights; where it was not, sae-lens' encode ignores it.
NORMALIZATIONS: dict[str, InputNormalization] = {
    "none": "none",
    "expected_average_only_in": "none",
    "constant_norm_rescale": "constant_norm_rescale",
    "layer_norm": "layer_norm",
}

LoadedSae = tuple[SaeWeights, SaeMetadata]

RESIDUAL_HOOK = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")
DECODER_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)")


def load(source: str | Path | sae_lens.SAE[Any], sae_id: str | None, dtype: torch.dtype | None) -> LoadedSae:
    """See `SparseAutoencoder.from_sae_lens`."""
    if dtype not in (None, *STORAGE_DTYPES):
        raise InvalidInputError(f"dtype is {dtype}; expected bfloat16, float16, float32 or float64")
    if isinstance(source, str) and (sae_id is not None or not Path(source).is_dir()):
        return _from_hub(source, sae_id, dtype)
    if sae_id is not None:
        raise InvalidInputError(f"sae_id {sae_id!r} was given with a {type(source).__name__}; it belongs to a release")
    if isinstance(source, (str, Path)):
        return _from_folder(Path(source), dtype)
    if isinstance(source, sae_lens.SAE):
        return _from_object(source, dtype)
    raise InvalidInputError(
        f"source is a {type(source).__name__}; expected a release name with its sae_id, a folder, or a sae-lens object"
    )


def _from_hub(release: str, sae_id: str | None, dtype: torch.dtype | None) -> LoadedSae:
    directory = get_pretrained_saes_directory()
    if sae_id is None and release not in directory:
        release, sae_id = _by_neuronpedia_id(release) or (release, None)
    if release in directory:
        known = directory[release].saes_map
        if sae_id is None:
            raise InvalidInputError(f"release {release} needs a sae_id, for example {', '.join(list(known)[:3])}")
        if sae_id not in known:
            raise InvalidInputError(f"release {release} has no SAE {sae_id!r}{_closest(sae_id, known)}")
    elif sae_id is None or "/" not in release:
        raise InvalidInputError(
            f"{release!r} is neither a folder nor a release of sae-lens {sae_lens.__version__}"
            f"{_closest(release, directory)}"
        )
    what = f"SAE {sae_id} of {release}"
    repo_id, folder = get_repo_id_and_folder_name(release, sae_id)
    overrides = get_config_overrides(release, sae_id) | {"device": "cpu", "dtype": _loading_dtype(dtype) or "float32"}
    with _reading(what):
        loader = get_conversion_loader_name(release) if release in directory else _format_of_repository(repo_id, folder)
        # The config first: an SAE that will be refused is refused before its weights are downloaded.
        raw = NAMED_PRETRAINED_SAE_CONFIG_GETTERS[loader](repo_id, folder, "cpu", False, dict(overrides))
        config = _check_config(raw, what)
        _, state, _ = NAMED_PRETRAINED_SAE_LOADERS[loader](repo_id, folder, "cpu", False, dict(overrides))
        if loader != "sae_lens":  # its cfg.json states the widths; the other formats' are guessed from names
            config.d_in, config.d_sae = state["W_enc"].shape
        scale = get_norm_scaling_factor(release, sae_id)
        if scale is not None and config.normalize_activations == "expected_average_only_in":
            state["W_enc"] = state["W_enc"] * scale
            state["W_dec"] = state["W_dec"] / scale
            state["b_dec"] = state["b_dec"] / scale
            config.normalize_activations = "none"
    return _convert(config, state, what, dtype or torch.float32, release=release, sae_id=sae_id)


def _by_neuronpedia_id(name: str) -> tuple[str, str] | None:
    """The release and the SAE that have an id on neuronpedia.org, such as gemma-2-2b/7-gemmascope-res-16k."""
    for release, entry in get_pretrained_saes_directory().items():
        for sae_id, neuronpedia_id in (entry.neuronpedia_id or {}).items():
            if neuronpedia_id == name:
                return release, sae_id
    return None


def _from_folder(folder: Path, dtype: torch.dtype | None) -> LoadedSae:
    what = f"SAE folder {folder}"
    overrides = {"dtype": _loading_dtype(dtype)} if dtype is not None else None
    with _reading(what):
        config = _check_config(get_sae_lens_config_from_disk(folder), what)
        _, state = sae_lens_disk_loader(folder, "cpu", overrides)
    return _convert(config, state, what, dtype)


def _from_object(sae: sae_lens.SAE[Any], dtype: torch.dtype | None) -> LoadedSae:
    architecture = sae.cfg.architecture()
    what = f"{type(sae).__name__} object"
    training = isinstance(sae, sae_lens.TrainingSAE)
    if architecture not in (TRAINING_ARCHITECTURES if training else TENSORS):
        raise _unsupported(what, f"architecture {architecture}", f"one of {', '.join(TRAINING_ARCHITECTURES)}")
    known_class = (get_sae_training_class if training else get_sae_class)(architecture)[0]
    if type(sae) is not known_class:
        raise _unsupported(what, "a class of its own, whose encode may differ", f"sae-lens' {known_class.__name__}")
    if not training and type(sae.activation_fn) not in (nn.ReLU, TopK):
        raise _unsupported(what, f"activation {type(sae.activation_fn).__name__}", "ReLU or TopK")
    state = {name: tensor.detach().clone() for name, tensor in sae.state_dict().items()}
    if not training:
        return _convert(_check_config(sae.cfg.to_dict(), what), state, what, dtype)
    # What save_inference_model would write: thresholds set, decoder norms folded.
    sae.process_state_dict_for_saving_inference(state)
    return _convert(_check_config(sae.cfg.get_inference_sae_cfg_dict(), what), state, what, dtype)


def _check_config(raw: dict[str, Any], what: str) -> sae_lens.SAEConfig:
    """The config as sae-lens understands it; UnsupportedSaeError if this package cannot do the same."""
    architecture = raw.get("architecture", "standard")
    if architecture not in TENSORS:
        raise _unsupported(what, f"architecture {architecture}", f"one of {', '.join(TENSORS)}")
    # sae-lens drops these fields of old configs in silence.
    activation_fn = raw.get("activation_fn") or raw.get("activation_fn_str") or "relu"
    if activation_fn not in ("relu", "topk"):
        raise _unsupported(what, f"activation_fn {activation_fn}", "relu or topk")
    if (raw.get("activation_fn_kwargs") or {}).get("signed"):
        raise _unsupported(what, "a signed top-k", "top-k followed by relu")

    config = sae_lens.SAEConfig.from_dict(handle_config_defaulting(raw))
    if config.reshape_activations != "none" or config.metadata.hook_head_index is not None:
        raise _unsupported(what, f"attention heads ({config.metadata.hook_name})", "the residual stream")
    if config.normalize_activations not in NORMALIZATIONS:
        raise _unsupported(
            what,
            f"normalize_activations {config.normalize_activations} that is not folded into the weights",
            f"one of {', '.join(NORMALIZATIONS)}",
        )
    if (config.metadata.model_from_pretrained_kwargs or {}).get("center_writing_weights"):
        raise _unsupported(what, "training on a model with center_writing_weights", "the model as it is published")
    _residual_layer(config.metadata.hook_name, what)
    return config


def _residual_layer(hook_name: str | None, what: str) -> int | None:
    """The block whose output the hook reads, by TransformerLens' names or those of transformers' modules."""
    if hook_name is None:
        return None
    if match := DECODER_BLOCK.fullmatch(hook_name):
        return int(match[1])
    match = RESIDUAL_HOOK.fullmatch(hook_name)
    layer = -1 if match is None else int(match[1]) - (match[2] == "pre")
    if layer < 0:
        raise _unsupported(what, f"hook {hook_name}", "the residual stream after a decoder block (hook_resid_post)")
    return layer


def _convert(
    config: sae_lens.SAEConfig,
    state: dict[str, Tensor],
    what: str,
    dtype: torch.dtype | None,
    release: str | None = None,
    sae_id: str | None = None,
) -> LoadedSae:
    _check_tensors(config, state, what)
    if config.normalize_activations == "expected_average_only_in":
        warnings.warn(
            f"{what}: trained on rescaled inputs, but the factor is not stored; encoded without it, as by sae-lens",
            stacklevel=5,
        )
    architecture, metadata = config.architecture(), config.metadata
    dtype = dtype or state["W_enc"].dtype
    small = torch.float64 if dtype == torch.float64 else torch.float32
    gated = architecture == "gated"
    rescale: bool = getattr(config, "rescale_acts_by_decoder_norm", False)
    weights = SaeWeights(
        W_enc=state["W_enc"].T.to(dtype).contiguous(),
        b_enc=state["b_gate" if gated else "b_enc"].to(small).contiguous(),
        threshold=state["threshold"].to(small).contiguous()
        if "threshold" in state
        else torch.zeros(config.d_sae, dtype=small),
        activation=ACTIVATIONS[architecture],
        W_dec=state["W_dec"].to(dtype).contiguous(),
        b_dec=state["b_dec"].to(small).contiguous(),
        k=getattr(config, "k", None),
        subtract_b_dec=config.apply_b_dec_to_input,
        normalization=NORMALIZATIONS[config.normalize_activations],
        # A vector of its own: folded into bfloat16 weights, the norms would round them.
        decoder_norm=state["W_dec"].to(small).norm(dim=-1) if rescale else None,
        magnitude_scale=state["r_mag"].to(small).exp() if gated else None,
        magnitude_bias=state["b_mag"].to(small).contiguous() if gated else None,
    )
    for name, tensor in weights.tensors().items():
        if not bool(tensor.isfinite().all()):
            raise InvalidInputError(f"{what}: {name} overflows in {tensor.dtype}; load it in a wider dtype")
    return weights, SaeMetadata(
        release=release,
        sae_id=sae_id,
        model_name=metadata.model_name,
        hook_name=metadata.hook_name,
        layer=_residual_layer(metadata.hook_name, what),
        neuronpedia_id=metadata.neuronpedia_id,
        architecture=metadata.training_architecture or architecture,
    )


def _check_tensors(config: sae_lens.SAEConfig, state: dict[str, Tensor], what: str) -> None:
    """Exactly the tensors of the architecture, in the widths of the config, all finite."""
    shapes = {"W_enc": (config.d_in, config.d_sae), "W_dec": (config.d_sae, config.d_in), "b_dec": (config.d_in,)}
    shapes |= dict.fromkeys(TENSORS[config.architecture()], (config.d_sae,))
    if missing := shapes.keys() - state.keys():
        raise CorruptFileError(
            f"{what}: no tensor {', '.join(sorted(missing))}; its config says {config.architecture()}"
        )
    if unknown := state.keys() - shapes.keys():
        raise _unsupported(what, f"tensor {', '.join(sorted(unknown))}", f"only {', '.join(shapes)}")
    for name, shape in shapes.items():
        if tuple(state[name].shape) != shape:
            raise CorruptFileError(f"{what}: {name} is {tuple(state[name].shape)}; its config says {shape}")
        if not bool(state[name].isfinite().all()):
            raise CorruptFileError(f"{what}: {name} holds NaN or Inf")


def _format_of_repository(repo_id: str, folder: str) -> str:
    """sae-lens' loader for a hub repository that is not in its list, by the config file that is there."""
    try:
        hf_hub_download(repo_id, f"{folder}/cfg.json")
    except EntryNotFoundError:
        hf_hub_download(repo_id, f"{folder}/config.json")
        return "dictionary_learning_1"
    return "sae_lens"


def _loading_dtype(dtype: torch.dtype | None) -> str | None:
    """The dtype sae-lens reads in. Narrow storage dtypes are for the matrices alone, which are converted afterwards."""
    return dtype and ("float64" if dtype == torch.float64 else "float32")


def _closest(name: str, known: Iterable[str]) -> str:
    matches = difflib.get_close_matches(name, known, n=3)
    return f"; closest: {', '.join(matches)}" if matches else ""


def _unsupported(what: str, found: str, supported: str) -> UnsupportedSaeError:
    return UnsupportedSaeError(f"{what}: found {found}; supported: {supported}")


@contextmanager
def _reading(what: str) -> Iterator[None]:
    """Turn whatever sae-lens, torch, numpy and safetensors raise while they read files into one line."""
    try:
        yield
    except (DspaError, MemoryError):
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no details'])[0]}"
        # torch seeks to impossible places in a truncated file: EINVAL
        absent = isinstance(error, OSError) and error.errno != errno.EINVAL
        if absent or isinstance(error, (EntryNotFoundError, HFValidationError)):
            raise InvalidInputError(f"{what}: its files are not here and cannot be fetched: {reason}") from error
        raise CorruptFileError(f"{what}: cannot be read: {reason}") from error
