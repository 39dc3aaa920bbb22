"""Which of several policies share an SAE at a layer, so that one launch serves all of their rows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from dspa.errors import MismatchError
from dspa.kernels import SaeWeights
from dspa.methods.policy import Policy
from dspa.sae.autoencoder import SparseAutoencoder


@dataclass(frozen=True, eq=False)
class PolicyGroup:
    """Policies that read, or edit, after one layer by one SAE.

    Attributes:
        layer: the decoder layer, from 0.
        sae: the SAE; None for policies that do not look at the prompt.
        names: the policies, by name.
    """

    layer: int
    sae: SaeWeights | None
    names: tuple[str, ...]


def reading_groups(policies: Mapping[str, Policy]) -> list[PolicyGroup]:
    """By input layer and input SAE."""
    saes = {name: policy.input_sae for name, policy in policies.items()}
    layers = {name: policy.input_layer for name, policy in policies.items()}
    return [PolicyGroup(layer, found[0], names) for layer, found, names in _grouped(layers, saes)]


def editing_groups(policies: Mapping[str, Policy]) -> list[PolicyGroup]:
    """By output layer and output SAE. Saved policies keep different decoder rows of it; the group's SAE has them all.

    Raises:
        MismatchError: if two output SAEs have the same encoder, but decode a latent differently.
    """
    layers = {name: policy.output_layer for name, policy in policies.items()}
    saes: dict[str, SaeWeights | None] = {name: policy.output_sae for name, policy in policies.items()}
    groups = []
    for layer, found, names in _grouped(layers, saes):
        groups.append(PolicyGroup(layer, _with_all_decoder_rows([sae for sae in found if sae is not None]), names))
    return groups


def _grouped(
    layers: Mapping[str, int], saes: Mapping[str, SaeWeights | None]
) -> Iterable[tuple[int, list[SaeWeights | None], tuple[str, ...]]]:
    by_layer: dict[int, list[str]] = {}
    for name, layer in layers.items():
        by_layer.setdefault(layer, []).append(name)
    for layer, names in sorted(by_layer.items()):
        one_object = len({id(saes[name]) for name in names}) == 1  # then there is nothing to compare
        keys = {name: 0 if one_object else _encoder_key(saes[name]) for name in names}
        for key in dict.fromkeys(keys.values()):
            members = tuple(name for name in names if keys[name] == key)
            yield layer, [saes[name] for name in members], members


def _encoder_key(sae: SaeWeights | None) -> object:
    """Equal for SAEs that encode alike, where that can be told."""
    return sae.encoder_only().fingerprint() if isinstance(sae, SparseAutoencoder) else id(sae)


def _with_all_decoder_rows(saes: Sequence[SaeWeights]) -> SaeWeights:
    first = saes[0]
    if all(sae is first or sae.W_dec is first.W_dec for sae in saes):
        return first
    decoder_rows = torch.full((first.d_sae,), -1, dtype=torch.int32, device=first.device)
    W_dec = first.W_enc.new_empty(0, first.d_model)
    for sae in saes:
        assert sae.W_dec is not None  # policies check it
        own = torch.arange(sae.d_sae, device=sae.device) if sae.decoder_rows is None else sae.decoder_rows.long()
        known = (own >= 0) & (decoder_rows >= 0)
        if not torch.equal(W_dec[decoder_rows[known].long()], sae.W_dec[own[known]]):
            raise MismatchError(
                "two policies have output SAEs with the same encoder and different decoders; steer with one at a time"
            )
        new = (own >= 0) & (decoder_rows < 0)
        decoder_rows[new] = len(W_dec) + torch.arange(int(new.sum()), dtype=torch.int32, device=first.device)
        W_dec = torch.cat([W_dec, sae.W_dec[own[new]]])
    return replace(first, W_dec=W_dec, decoder_rows=decoder_rows)
