"""Local folders of SAEs in the formats of other packages than sae-lens, read without those packages.

    sparsify              cfg.json, sae.safetensors               https://github.com/EleutherAI/sparsify
    dictionary_learning   config.json, ae.pt                      https://github.com/saprmarks/dictionary_learning
    Gemma Scope 2         config.json, params.safetensors         on the hub, google/gemma-scope-2-*
    Gemma Scope           params.npz                              on the hub, google/gemma-scope-*

`ae.pt` is read with `weights_only`: nothing in it is run. What cannot be represented exactly is refused by name.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspa.errors import CorruptFileError, DspaError, InvalidInputError, UnsupportedSaeError
from dspa.sae.metadata import SaeMetadata
from dspa.sae.weights import Activation, SaeWeights

Loaded = tuple[SaeWeights, SaeMetadata]

_BLOCK = re.compile(r"(?:.*\.)?(?:layers|h)\.(\d+)(?:\.output)?")
_GEMMA_SCOPE_PLACE = re.compile(r"(resid_post|att|attn_out|mlp|mlp_out|transcoder|clt)[^/]*/layer_(\d+)")


def load_folder(folder: Path, dtype: torch.dtype | None) -> Loaded | None:
    """The SAE in a folder; None if the folder has none of these formats.

    Raises:
        InvalidInputError: if it holds no SAE or lacks its config, or only its subfolders hold SAEs.
        UnsupportedSaeError: if it cannot be represented exactly, or is not on the residual stream.
        CorruptFileError: if a file is truncated, altered, lacks a tensor, or holds NaN or Inf.
    """
    for weights, config, read in _FORMATS:
        if (folder / weights).is_file() and (config is None or (folder / config).is_file()):
            what = f"SAE folder {folder}"
            try:
                settings = {} if config is None else _object(json.loads((folder / config).read_bytes()), what)
                return read(folder, settings, _Tensors(_read_tensors(folder / weights), what, dtype), what)
            except DspaError:
                raise
            except Exception as error:
                reason = (str(error).strip().splitlines() or ["no details"])[0][:200]
                raise CorruptFileError(f"{what}: cannot be read: {type(error).__name__}: {reason}") from error
    for weights, config, _ in _FORMATS:
        if config is not None and (folder / weights).is_file():
            raise InvalidInputError(f"{folder} holds {weights}, but no {config}, which says what the tensors mean")
    if not (folder / "cfg.json").is_file():
        inner = sorted({path.parent.relative_to(folder) for name in _WEIGHT_FILES for path in folder.glob(f"*/{name}")})
        if inner:
            shown = ", ".join(str(path) for path in inner[:5])
            raise InvalidInputError(f"{folder} holds no SAE itself, but its folders do: {shown}; pass one of them")
        if not any((folder / name).is_file() for name in _WEIGHT_FILES):
            raise InvalidInputError(f"{folder} holds no SAE; expected one of {', '.join(_WEIGHT_FILES)} in it")
    return None


class _Tensors:
    """The tensors of a file, each with the shape it has to have."""

    def __init__(self, tensors: Mapping[str, Any], what: str, dtype: torch.dtype | None) -> None:
        self._tensors = dict(tensors)
        self._what = what
        matrix = max((t for t in self._tensors.values() if isinstance(t, Tensor)), key=Tensor.numel, default=None)
        if matrix is None or not matrix.is_floating_point():
            raise CorruptFileError(f"{what}: holds no floating-point tensor")
        self.dtype = dtype or matrix.dtype
        self.small = torch.float64 if self.dtype == torch.float64 else torch.float32

    def names(self) -> set[str]:
        return set(self._tensors)

    def take(self, name: str, *shape: int) -> Tensor:
        """A tensor of this shape, finite; -1 fits any size. In float32, or float64 if the SAE is."""
        tensor = self._tensors.pop(name, None)
        if not isinstance(tensor, Tensor):
            known = ", ".join(sorted(self._tensors)) or "none"
            raise CorruptFileError(f"{self._what}: no tensor {name}; found {known}")
        found = tuple(tensor.shape)
        if len(found) != len(shape) or any(size not in (-1, real) for size, real in zip(shape, found, strict=True)):
            raise CorruptFileError(f"{self._what}: {name} is {found}; expected {shape}")
        if not bool(tensor.isfinite().all()):
            raise CorruptFileError(f"{self._what}: {name} holds NaN or Inf")
        return tensor.to(self.small)

    def stored(self, name: str) -> int | None:
        """A whole number that may be among the tensors, read and dropped."""
        value = self._tensors.pop(name, None)
        return int(value) if isinstance(value, (Tensor, int)) else None

    def drop(self, *names: str) -> None:
        """Tensors that encoding does not read."""
        for name in names:
            self._tensors.pop(name, None)

    def done(self) -> None:
        """Raises UnsupportedSaeError for tensors that nothing has read."""
        if self._tensors:
            raise UnsupportedSaeError(
                f"{self._what}: found tensor {', '.join(sorted(self._tensors))}, which this package would leave out"
            )

    def weights(
        self,
        activation: Activation,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        *,
        threshold: Tensor | None = None,
        k: int | None = None,
        subtract_b_dec: bool = False,
        magnitude: tuple[Tensor, Tensor] | None = None,
    ) -> SaeWeights:
        """In the canonical layout; `W_enc` and `W_dec` are `[d_sae, d_model]`."""
        self.done()
        narrow = {"W_enc": W_enc.to(self.dtype), "W_dec": W_dec.to(self.dtype)}
        for name, tensor in narrow.items():
            if not bool(tensor.isfinite().all()):
                raise InvalidInputError(f"{self._what}: {name} overflows in {tensor.dtype}; load it in a wider dtype")
        return SaeWeights(
            W_enc=narrow["W_enc"].contiguous(),
            b_enc=b_enc.contiguous(),
            threshold=torch.zeros_like(b_enc) if threshold is None else threshold.expand_as(b_enc).contiguous(),
            activation=activation,
            W_dec=narrow["W_dec"].contiguous(),
            b_dec=torch.zeros(W_dec.shape[1], dtype=self.small) if b_dec is None else b_dec.contiguous(),
            k=k,
            subtract_b_dec=subtract_b_dec,
            magnitude_scale=None if magnitude is None else magnitude[0].contiguous(),
            magnitude_bias=None if magnitude is None else magnitude[1].contiguous(),
        )


def _sparsify(folder: Path, config: dict[str, Any], tensors: _Tensors, what: str) -> Loaded:
    d_in = _number(config, "d_in", what)
    d_sae = int(config.get("num_latents") or 0) or d_in * _number(config, "expansion_factor", what)
    if config.get("transcode"):
        raise _unsupported(what, "a transcoder (transcode)", "autoencoders of the residual stream")
    if config.get("skip_connection") or "W_skip" in tensors.names():
        raise _unsupported(what, "a skip connection", "encoder and decoder alone")
    activation = config.get("activation", "topk")
    if activation != "topk":
        raise _unsupported(what, f"activation {activation}", "topk")
    if config.get("signed"):
        raise _unsupported(what, "latents chosen by size and sign apart (signed)", "the k largest")
    if folder.name.rpartition(".")[2] in ("embed_tokens", "wte", "embed_in", "norm", "ln_f", "final_layer_norm"):
        raise _unsupported(what, f"hook point {folder.name}", "the output of a decoder block, such as layers.10")
    layer = _layer_of_hook(folder.name, what)
    weights = tensors.weights(
        "topk",
        tensors.take("encoder.weight", d_sae, d_in),
        tensors.take("encoder.bias", d_sae),
        tensors.take("W_dec", d_sae, d_in),
        tensors.take("b_dec", d_in),
        k=_number(config, "k", what),
        subtract_b_dec=True,
    )
    hook = None if layer is None else folder.name
    return weights, SaeMetadata(hook_name=hook, layer=layer, architecture="topk")


def _dictionary_learning(folder: Path, config: dict[str, Any], tensors: _Tensors, what: str) -> Loaded:
    trainer = _object(config.get("trainer"), what)
    kind = str(trainer.get("dict_class"))
    reader = _DICTIONARIES.get(kind)
    if reader is None:
        raise _unsupported(what, f"dict_class {kind}", f"one of {', '.join(_DICTIONARIES)}")
    io = (config.get("buffer") or {}).get("io", "out")
    if io != "out":
        raise _unsupported(what, f"activations of kind {io!r} (buffer.io)", "the output of a decoder block")
    place = str(trainer.get("submodule_name") or "resid_post")
    if not place.startswith("resid_post"):
        raise _unsupported(what, f"submodule {place}", "the residual stream after a decoder block (resid_post)")
    d_model = _number(trainer, "activation_dim", what)
    d_sae = _number(trainer, "dict_size", what)
    weights = reader(tensors, trainer, d_sae, d_model, what)
    layer = trainer.get("layer")
    model = trainer.get("lm_name")
    return weights, SaeMetadata(
        model_name=str(model) if model else None,
        hook_name=f"blocks.{layer}.hook_resid_post" if isinstance(layer, int) else None,
        layer=layer if isinstance(layer, int) else None,
        architecture=kind,
    )


def _relu_dictionary(t: _Tensors, trainer: dict[str, Any], d_sae: int, d_model: int, what: str) -> SaeWeights:
    """`AutoEncoder`; as that package loads it, with decoder rows of unit norm."""
    W_enc, W_dec = t.take("encoder.weight", d_sae, d_model), t.take("decoder.weight", d_model, d_sae).T
    b_enc, bias = t.take("encoder.bias", d_sae), t.take("bias", d_model)
    norms = W_dec.norm(dim=1)
    if not torch.allclose(norms, torch.ones_like(norms)):
        W_dec, W_enc, b_enc = W_dec / norms[:, None], W_enc * norms[:, None], b_enc * norms
    return t.weights("relu", W_enc, b_enc, W_dec, bias, subtract_b_dec=True)


def _new_dictionary(t: _Tensors, trainer: dict[str, Any], d_sae: int, d_model: int, what: str) -> SaeWeights:
    """`AutoEncoderNew`, of the April update: nothing is subtracted."""
    return t.weights(
        "relu",
        t.take("encoder.weight", d_sae, d_model),
        t.take("encoder.bias", d_sae),
        t.take("decoder.weight", d_model, d_sae).T,
        t.take("decoder.bias", d_model),
    )


def _gated_dictionary(t: _Tensors, trainer: dict[str, Any], d_sae: int, d_model: int, what: str) -> SaeWeights:
    return t.weights(
        "gated",
        t.take("encoder.weight", d_sae, d_model),
        t.take("gate_bias", d_sae),
        t.take("decoder.weight", d_model, d_sae).T,
        t.take("decoder_bias", d_model),
        subtract_b_dec=True,
        magnitude=(t.take("r_mag", d_sae).exp(), t.take("mag_bias", d_sae)),
    )


def _jumprelu_dictionary(t: _Tensors, trainer: dict[str, Any], d_sae: int, d_model: int, what: str) -> SaeWeights:
    return t.weights(
        "jumprelu",
        t.take("W_enc", d_model, d_sae).T,
        t.take("b_enc", d_sae),
        t.take("W_dec", d_sae, d_model),
        t.take("b_dec", d_model),
        threshold=t.take("threshold", d_sae),
    )


def _topk_dictionary(t: _Tensors, trainer: dict[str, Any], d_sae: int, d_model: int, what: str) -> SaeWeights:
    """`AutoEncoderTopK`. Its stored threshold is for an option of its encode; by default it selects by rank."""
    t.drop("threshold")
    k, stored = _number(trainer, "k", what), t.stored("k")
    if stored not in (None, k):
        raise CorruptFileError(f"{what}: k is {stored} beside the weights and {k} in its config; expected the same")
    return t.weights(
        "topk",
        t.take("encoder.weight", d_sae, d_model),
        t.take("encoder.bias", d_sae),
        t.take("decoder.weight", d_model, d_sae).T,
        t.take("b_dec", d_model),
        k=k,
        subtract_b_dec=True,
    )


def _batch_topk_dictionary(t: _Tensors, trainer: dict[str, Any], d_sae: int, d_model: int, what: str) -> SaeWeights:
    """`BatchTopKSAE` and `MatryoshkaBatchTopKSAE`, by their one threshold, as their encode does by default."""
    t.drop("k", "group_sizes")
    threshold = t.take("threshold")
    matryoshka = "W_enc" in t.names()
    W_enc = t.take("W_enc", d_model, d_sae).T if matryoshka else t.take("encoder.weight", d_sae, d_model)
    b_enc = t.take("b_enc" if matryoshka else "encoder.bias", d_sae)
    W_dec = t.take("W_dec", d_sae, d_model) if matryoshka else t.take("decoder.weight", d_model, d_sae).T
    b_dec = t.take("b_dec", d_model)
    return t.weights("jumprelu", W_enc, b_enc, W_dec, b_dec, threshold=threshold.clamp(min=0), subtract_b_dec=True)


_DICTIONARIES: dict[str, Callable[[_Tensors, dict[str, Any], int, int, str], SaeWeights]] = {
    "AutoEncoder": _relu_dictionary,
    "AutoEncoderNew": _new_dictionary,
    "GatedAutoEncoder": _gated_dictionary,
    "JumpReluAutoEncoder": _jumprelu_dictionary,
    "AutoEncoderTopK": _topk_dictionary,
    "BatchTopKSAE": _batch_topk_dictionary,
    "MatryoshkaBatchTopKSAE": _batch_topk_dictionary,
}


def _gemma_scope_2(folder: Path, config: dict[str, Any], tensors: _Tensors, what: str) -> Loaded:
    kind = config.get("type", "sae")
    if kind != "sae" or "affine_skip_connection" in tensors.names() or config.get("affine_connection"):
        raise _unsupported(what, f"a transcoder (type {kind})", "autoencoders of the residual stream")
    architecture = config.get("architecture")
    if architecture != "jump_relu":
        raise _unsupported(what, f"architecture {architecture}", "jump_relu")
    hook_in, hook_out = config.get("hf_hook_point_in"), config.get("hf_hook_point_out")
    if hook_out not in (None, hook_in):
        raise _unsupported(what, f"a transcoder from {hook_in} to {hook_out}", "autoencoders of the residual stream")
    layer = _layer_of_gemma_scope(folder, what)
    if hook_in is not None:
        of_hook = _layer_of_hook(str(hook_in), what)
        if of_hook is None:
            raise _unsupported(what, f"hook point {hook_in}", "the output of a decoder block")
        if layer not in (None, of_hook):
            raise CorruptFileError(f"{what}: its folder says layer {layer}, its config {hook_in}; expected the same")
        layer = of_hook
    names = {name.lower(): name for name in tensors.names()}
    return _jumprelu_folder(tensors, names, config.get("model_name"), layer, what)


def _gemma_scope(folder: Path, config: dict[str, Any], tensors: _Tensors, what: str) -> Loaded:
    names = {name.lower(): name for name in tensors.names()}
    return _jumprelu_folder(tensors, names, None, _layer_of_gemma_scope(folder, what), what)


def _jumprelu_folder(
    tensors: _Tensors, names: Mapping[str, str], model: object, layer: int | None, what: str
) -> Loaded:
    W_enc = tensors.take(names.get("w_enc", "w_enc"), -1, -1).T
    d_sae, d_model = W_enc.shape
    weights = tensors.weights(
        "jumprelu",
        W_enc,
        tensors.take(names.get("b_enc", "b_enc"), d_sae),
        tensors.take(names.get("w_dec", "w_dec"), d_sae, d_model),
        tensors.take(names.get("b_dec", "b_dec"), d_model),
        threshold=tensors.take("threshold", d_sae),
    )
    return weights, SaeMetadata(
        model_name=str(model) if model else None,
        hook_name=None if layer is None else f"blocks.{layer}.hook_resid_post",
        layer=layer,
        architecture="jumprelu",
    )


def _layer_of_gemma_scope(folder: Path, what: str) -> int | None:
    """By the folders it lies in, such as `resid_post/layer_12_width_16k_l0_small`, or `layer_7/width_16k/canonical`."""
    path = folder.resolve().as_posix()
    place = _GEMMA_SCOPE_PLACE.search(path)
    if place is not None and place[1] != "resid_post":
        raise _unsupported(what, f"an SAE of {place[1]}", "the residual stream after a decoder block (resid_post)")
    layers = re.findall(r"/layer_(\d+)(?=[_/]|$)", path)
    return int(layers[-1]) if layers else None


def _layer_of_hook(name: str, what: str) -> int | None:
    """The block in a module's name such as `layers.10`; None for a name that is no module's."""
    match = _BLOCK.fullmatch(name)
    if match is not None:
        return int(match[1])
    if re.search(r"(?:^|\.)(?:layers|h)\.\d+\.", name):
        raise _unsupported(what, f"hook point {name}", "the output of a decoder block, such as layers.10")
    return None


def _read_tensors(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix == ".npz":
        import numpy as np

        with np.load(path, allow_pickle=False) as arrays:
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    loaded = torch.load(path, map_location="cpu", weights_only=True)
    return {str(name): value for name, value in loaded.items()}


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CorruptFileError(f"{what}: its config is a {type(value).__name__} where an object is expected")
    return value


def _number(config: Mapping[str, Any], name: str, what: str) -> int:
    value = config.get(name)
    if type(value) is not int or not 0 < value < 2**31:
        raise CorruptFileError(f"{what}: {name} is {value!r} in its config; expected a positive integer")
    return value


def _unsupported(what: str, found: str, supported: str) -> UnsupportedSaeError:
    return UnsupportedSaeError(f"{what}: found {found}; supported: {supported}")


_FORMATS: tuple[tuple[str, str | None, Callable[[Path, dict[str, Any], _Tensors, str], Loaded]], ...] = (
    ("sae.safetensors", "cfg.json", _sparsify),
    ("ae.pt", "config.json", _dictionary_learning),
    ("params.safetensors", "config.json", _gemma_scope_2),
    ("params.npz", None, _gemma_scope),
)
_WEIGHT_FILES = (*(weights for weights, _, _ in _FORMATS), "sae_weights.safetensors")
