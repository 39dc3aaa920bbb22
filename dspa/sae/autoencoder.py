"""Sparse autoencoders in the layout of the kernels, whatever they were loaded from."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dspa.errors import InvalidInputError, MismatchError
from dspa.sae.encode import encode
from dspa.sae.folders import load_folder
from dspa.sae.metadata import SaeMetadata
from dspa.sae.weights import STORAGE_DTYPES, SaeWeights
from dspa.util.scalars import check_integer

if TYPE_CHECKING:
    import sae_lens


@dataclass(frozen=True, eq=False, kw_only=True, repr=False)
class SparseAutoencoder(SaeWeights):
    """An SAE on the residual stream: `SaeWeights` plus where they come from (method, section 1)."""

    metadata: SaeMetadata = field(default_factory=SaeMetadata)

    @classmethod
    def from_sae_lens(
        cls,
        source: str | Path | sae_lens.SAE[Any],
        sae_id: str | None = None,
        *,
        layer: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
    ) -> SparseAutoencoder:
        """Load an SAE by sae-lens and check that its arithmetic is one this package reproduces.

        Standard, gated, jumprelu and topk SAEs are taken as they are, batchtopk and matryoshka ones in the jumprelu
        form that sae-lens saves. The result's `encode` equals sae-lens' own, except that sae-lens computes in the dtype
        of the weights where this package computes in float32 or float64.

        Args:
            source: a release of sae-lens' list, or a hub repository (in sae-lens' or in dictionary_learning's format),
                both with a `sae_id`; or its id on neuronpedia.org (`gemma-2-2b/7-gemmascope-res-16k`), if sae-lens'
                list names it; or a live object; or a folder in the format of sae-lens, sparsify, dictionary_learning,
                Gemma Scope or Gemma Scope 2, of which only the first needs sae-lens.
            layer: the decoder block, from 0, whose output the SAE reads, where the source does not say.
            sae_id: the SAE's id in the release, or its folder in the hub repository.
            dtype: storage dtype of the weight matrices. None keeps the folder's or the object's; float32 for the hub.
            device: where the tensors go.

        Raises:
            InvalidInputError: unknown release or id, files that are missing and cannot be fetched, no sae-lens, a layer
                that is no whole number from 0.
            UnsupportedSaeError: an SAE that cannot be represented exactly or is not on the residual stream.
            CorruptFileError: files that are truncated, altered, or hold NaN or Inf.
            MismatchError: if `layer` is not the one that the source names.
        """
        if layer is not None:
            check_integer("layer", layer, 0)
        weights, metadata = cls._load(source, sae_id, dtype)
        if layer is not None:
            if metadata.layer not in (None, layer):
                raise MismatchError(f"layer is {layer}; the SAE says it was trained on layer {metadata.layer}")
            metadata = replace(metadata, layer=layer)
        return cls(**{part.name: getattr(weights, part.name) for part in fields(weights)}, metadata=metadata).to(device)

    @staticmethod
    def _load(source: Any, sae_id: str | None, dtype: torch.dtype | None) -> tuple[SaeWeights, SaeMetadata]:
        if isinstance(source, (str, Path)) and Path(source).is_dir():
            if sae_id is not None:
                raise InvalidInputError(
                    f"{source} is a folder here, and sae_id {sae_id!r} belongs to a release; pass the SAE's own "
                    f"folder, such as {Path(source) / sae_id}"
                )
            if dtype not in (None, *STORAGE_DTYPES):
                raise InvalidInputError(f"dtype is {dtype}; expected bfloat16, float16, float32 or float64")
            found = load_folder(Path(source), dtype)
            if found is not None:
                return found
        try:
            from dspa.sae.sae_lens import load
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "sae_lens":
                raise
            raise InvalidInputError("sae-lens is not installed; install it with: pip install 'dspa[sae]'") from error
        return load(source, sae_id, dtype)

    def encode(self, hidden: Tensor) -> Tensor:
        """Latent activations `[..., d_sae]` of `hidden [..., d_model]`.

        Computed in float64 if `hidden` or the weights are float64, else in float32.

        Raises:
            MismatchError: `hidden` has another width than the SAE.
        """
        if hidden.ndim == 0 or hidden.shape[-1] != self.d_model:
            raise MismatchError(f"hidden is {tuple(hidden.shape)}; expected [..., {self.d_model}] for {self!r}")
        return encode(hidden, self)

    @classmethod
    def from_any(cls, value: Any, which: str) -> SparseAutoencoder:
        """An SAE that was passed as it is, or as a live sae-lens object.

        Args:
            value: what was passed.
            which: "input" or "output", for the message.

        Raises:
            InvalidInputError: for anything else.
        """
        if isinstance(value, cls):
            return value
        if any(kind.__module__.partition(".")[0] == "sae_lens" for kind in type(value).__mro__):
            return cls.from_sae_lens(value)
        raise InvalidInputError(
            f"the {which} SAE is a {type(value).__name__}; expected a SparseAutoencoder, such as "
            "SparseAutoencoder.from_sae_lens(...) loads"
        )

    def encoder_only(self) -> SparseAutoencoder:
        """The same SAE without its decoder matrix, for where nothing is decoded."""
        return replace(self, W_dec=None, decoder_rows=None)

    def with_decoder_rows(self, latents: Tensor) -> SparseAutoencoder:
        """The same SAE with only the decoder rows of `latents`, an integer tensor, in ascending order of latents.

        Raises:
            InvalidInputError: a latent that is out of range or has no decoder row.
        """
        latents = torch.unique(latents.to(self.device, torch.int64))
        if self.W_dec is None:
            raise InvalidInputError(f"decoder rows were requested of an SAE without a decoder: {self!r}")
        if latents.numel() and not 0 <= int(latents[0]) <= int(latents[-1]) < self.d_sae:
            raise InvalidInputError(
                f"latents range from {int(latents[0])} to {int(latents[-1])}; expected 0 to {self.d_sae - 1}"
            )
        rows = latents if self.decoder_rows is None else self.decoder_rows[latents].to(torch.int64)
        if bool((rows < 0).any()):
            raise InvalidInputError(f"latent {int(latents[rows < 0][0])} has no decoder row in {self!r}")
        decoder_rows = torch.full((self.d_sae,), -1, dtype=torch.int32, device=self.device)
        decoder_rows[latents] = torch.arange(latents.numel(), dtype=torch.int32, device=self.device)
        return replace(self, W_dec=self.W_dec[rows], decoder_rows=decoder_rows)

    def fingerprint(self) -> str:
        """SHA-256 (hex) of the semantics and of every tensor's bytes; the same on every device and in every process.

        Metadata is left out: the same weights are the same SAE wherever they were loaded from.
        """
        tensors = self.tensors()
        semantics = {
            "activation": self.activation,
            "k": self.k,
            "subtract_b_dec": self.subtract_b_dec,
            "normalization": self.normalization,
            "tensors": {name: [str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()},
        }
        digest = hashlib.sha256(json.dumps(semantics, sort_keys=True).encode())
        for name in sorted(tensors):
            digest.update(tensors[name].cpu().flatten().view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def __repr__(self) -> str:
        activation = self.activation if self.k is None else f"{self.activation} k={self.k}"
        decoder = ""
        if self.W_dec is None:
            decoder = ", no decoder"
        elif self.decoder_rows is not None:
            decoder = f", {self.W_dec.shape[0]} decoder rows"
        return (
            f"SparseAutoencoder(d_sae={self.d_sae}, d_model={self.d_model}, {activation}, "
            f"{str(self.dtype).removeprefix('torch.')}, layer={self.metadata.layer}{decoder})"
        )
