"""A copy of `W_enc` in 8 bits per weight on its own device, by which the Triton kernel rules latents out."""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from dspa.kernels.operands import Versions, is_being_captured, versions_of
from dspa.kernels.quantized_rows import scores_never_fall
from dspa.sae.encode import encoder_input
from dspa.sae.weights import SaeWeights

LARGEST_CODE = 127
EXACT_COLUMNS = 32
COLUMNS_PER_EXACT = 8  # small models have fewer exact columns
LATENTS_TOGETHER, COLUMNS_TOGETHER = 128, 256  # codes are padded to whole blocks of these, so that no load is masked
WEIGHTS_AT_A_TIME = 2**22
ROUNDED_UP = 1 + 2**-20
SMALLEST_NORMAL = 2.0**-126


@dataclass(frozen=True, eq=False)
class EncoderCodes:
    """The codes of an encoder and what bounds their error; see `Screen` in `triton_kernel/screening.py`."""

    codes: Tensor
    factors: Tensor
    exact: Tensor
    exact_columns: Tensor
    is_exact: Tensor


@dataclass(frozen=True, eq=False)
class KeptCodes:
    """The codes of an SAE.

    Attributes:
        versions: of the weights that they were made from.
        codes: None where they would prove nothing.
        columns_are_chosen: whether the exact columns are those of hidden states that are not all 0.
    """

    versions: Versions
    codes: EncoderCodes | None
    columns_are_chosen: bool


_codes: WeakKeyDictionary[SaeWeights, KeptCodes] = WeakKeyDictionary()


def codes_of(sae: SaeWeights, hidden: Tensor) -> EncoderCodes | None:
    """The codes of this SAE, made at its first screened step outside a compiled or captured graph, and again when the
    weights were written in place since. The columns that are largest in the first hidden states that are not all 0 are
    kept exactly: the massive channels of a residual stream are the same ones at all tokens. Others cost speed, and
    change no result. Codes that are made again are written where they were, as graphs hold them.

    None where there are no codes yet, where they would prove nothing, for weights of inference mode, which do not tell
    that they were written, and for topk, which ranks latents.
    """
    if sae.activation == "topk":
        return None
    if torch.compiler.is_compiling():
        return None if sae not in _codes else _codes[sae].codes
    factors = (factor for factor in (sae.decoder_norm, sae.magnitude_scale) if factor is not None)
    versions = versions_of(sae.W_enc, *factors)
    if versions is None:
        return None
    known = _codes.get(sae)
    is_current = known is not None and known.versions == versions
    if known is not None and is_current and (known.columns_are_chosen or known.codes is None):
        return known.codes
    if is_being_captured(sae.device):
        return known.codes if known is not None and is_current else None
    columns_are_chosen = hidden.is_meta or bool(hidden.any())
    if known is not None and is_current and not columns_are_chosen:
        return known.codes
    with torch.inference_mode(False), torch.no_grad():
        made = encode_weights(sae.W_enc, largest_columns(hidden, sae)) if scores_never_fall(sae) else None
        if known is not None and known.codes is not None and made is not None:
            for old, new in zip(vars(known.codes).values(), vars(made).values(), strict=True):
                old.copy_(new)
            made = known.codes
    if sae.device.type == "cuda":  # steps on other streams may be the next to use them
        torch.cuda.current_stream(sae.device).synchronize()
    _codes[sae] = KeptCodes(versions, made, columns_are_chosen)
    return made


def largest_columns(hidden: Tensor, sae: SaeWeights) -> Tensor:
    """The columns of the encoder input that are largest in some row of `[B, d_model]` hidden states, int64."""
    count = min(EXACT_COLUMNS, sae.d_model // COLUMNS_PER_EXACT)
    sizes = encoder_input(hidden, sae)[0].abs().nan_to_num(0.0, 0.0, 0.0)
    return sizes.amax(dim=0).topk(count).indices


def encode_weights(W_enc: Tensor, columns: Tensor) -> EncoderCodes:
    """The codes of `[d_sae, d_model]` weights, with some columns kept exactly."""
    d_sae, d_model = W_enc.shape
    latents, width = _padded(d_sae, LATENTS_TOGETHER), _padded(d_model, COLUMNS_TOGETHER)
    device = W_enc.device
    found = EncoderCodes(
        codes=torch.zeros(latents, width, dtype=torch.int8, device=device),
        factors=torch.zeros(4, latents, device=device),
        exact=torch.zeros(latents, EXACT_COLUMNS, dtype=W_enc.dtype, device=device),
        exact_columns=torch.full((EXACT_COLUMNS,), d_model, dtype=torch.int32, device=device),
        is_exact=torch.zeros(width, dtype=torch.int8, device=device),
    )
    found.exact_columns[: len(columns)] = columns.int()
    found.is_exact[columns] = 1
    found.exact[:d_sae, : len(columns)] = W_enc[:, columns]
    together = max(1, WEIGHTS_AT_A_TIME // d_model)
    for first in range(0, d_sae, together):
        some = slice(first, min(first + together, d_sae))
        weights = W_enc[some].double()
        exact_sizes = weights[:, columns].norm(dim=1)
        weights[:, columns] = 0.0
        scale = (weights.abs().amax(dim=1) / LARGEST_CODE).float()
        coded = weights / torch.where(scale > 0, scale, 1.0)[:, None]
        codes = coded.nan_to_num(0.0).round().clamp(-LARGEST_CODE, LARGEST_CODE)
        codes = torch.where(scale[:, None] > 0, codes, 0.0)
        found.codes[some, :d_model] = codes.to(torch.int8)
        represented = codes * scale.double()[:, None]
        sizes = torch.maximum(weights.norm(dim=1), represented.norm(dim=1))
        norms = torch.stack([(weights - represented).norm(dim=1), sizes, exact_sizes])
        found.factors[0, some] = scale
        found.factors[1:, some] = (norms * ROUNDED_UP + SMALLEST_NORMAL).float()
    return found


def _padded(size: int, block: int) -> int:
    return -(-size // block) * block
