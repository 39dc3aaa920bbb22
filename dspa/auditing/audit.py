"""`dspa.audit`: what a policy edits, how much that changes, and what the edited latents mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dspa.auditing.classes import RULE, EditedTokens
from dspa.auditing.forward import Decoding
from dspa.auditing.labels import Label, read_labels
from dspa.auditing.logit_lens import LogitLens
from dspa.auditing.map_facts import MapByLatent
from dspa.auditing.measure import Measurement, measure
from dspa.auditing.prompts import PromptSource, tokenise
from dspa.auditing.records import (
    CLASSES,
    AuditedLatent,
    AuditSubject,
    ClassShares,
    Direction,
    LatentClass,
    LensTokens,
    Support,
)
from dspa.auditing.report import PolicyAudit
from dspa.auditing.support import TripleTexts, supporting_triples
from dspa.errors import InvalidInputError
from dspa.methods.model_card import describe_sae
from dspa.methods.personal import Overlay, PersonalPolicy
from dspa.methods.policy import Policy
from dspa.methods.static_policy import StaticPolicy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.offline.density_store import DensityStore
from dspa.offline.triples import PreferenceTriples
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.util.provenance import Provenance


def audit(
    policy: Policy,
    model: nn.Module | None = None,
    tokenizer: Any = None,
    *,
    prompts: Sequence[PromptSource] | None = None,
    labels: str | Path | None = None,
    densities: DensityStore | str | Path | None = None,
    triples: PreferenceTriples | None = None,
    decoding: Decoding | None = None,
    chat: bool = True,
    progress: bool = False,
) -> PolicyAudit:
    """Says what a policy edits.

    Of the policy alone: which output latents its map names, in how many rows, how strongly, and which prompt latents
    lead there; gates that are always open; the mass of the rows. With a model, the logit lens of the decoder rows as
    well. With prompts, steered responses are generated and read again with and without the policy: what was listed and
    edited, on which tokens, and how far the residual stream and the next-token distribution moved.

    Args:
        policy: a `SteeringPolicy`, a `PersonalPolicy` or a `StaticPolicy`; other policies with a model and prompts
            only, since nothing can be read from them alone.
        model: the model it was made for, not steered at the moment.
        tokenizer: its tokenizer.
        prompts: texts or conversations to steer on.
        labels: a file that says what output latents are; see `dspa.auditing.labels.read_labels`.
        densities: the store the map was fitted from, to name the triples that support an edit.
        triples: those triples, to show their texts.
        decoding: how responses are generated.
        chat: whether a text is a user's turn of a conversation, if the tokenizer has a chat template.
        progress: whether to draw a progress bar.

    Raises:
        InvalidInputError: if a model comes without its tokenizer, prompts without a model, triples without densities,
            or the policy has nothing to say without prompts; if the model is steered or a file cannot be read.
        MismatchError: if the policy, the model, the labels, the densities or the triples do not belong together.
    """
    _check(policy, model, tokenizer, prompts, densities, triples)
    known = {} if labels is None else _labels(policy, labels)
    by_latent = MapByLatent.of(policy)
    if model is not None and policy.model is not None:
        policy.model.check(model)
    measurement = None
    if prompts is not None and model is not None:
        chosen = decoding or Decoding()
        measurement = measure(policy, model, tokenizer, tokenise(prompts, tokenizer, chat), chosen, progress=progress)
    latents = _latents(policy, by_latent, measurement)
    store = DensityStore.open(densities) if isinstance(densities, (str, Path)) else densities
    support: dict[int, tuple[Support, ...]] = {}
    if by_latent is not None and store is not None:
        texts = None if triples is None else TripleTexts(triples, store, tokenizer)
        picks, listed = (None, None) if measurement is None else (measurement.picks, _listed(measurement))
        support = supporting_triples(by_latent, latents, store, picks, listed, texts)
    lens = None if model is None else LogitLens(model, tokenizer)
    seen = {} if lens is None else _through_lens(lens, policy, latents)
    described = tuple(
        _described(latent, policy, by_latent, measurement, known, seen, support.get(latent, ())) for latent in latents
    )
    return PolicyAudit(
        subject=_subject(policy),
        map=None if by_latent is None else by_latent.facts(),
        latents=described,
        measured=None if measurement is None else measurement.measured,
        classes=_shares(described),
        lens=None if lens is None or not seen else lens.description,
        provenance=Provenance.here(),
    )


def _check(
    policy: Policy, model: object, tokenizer: object, prompts: object, densities: object, triples: object
) -> None:
    kind = type(policy).__name__
    if not hasattr(policy, "intervention"):
        raise InvalidInputError(f"a {kind} is no policy; pass one, or read its folder with from_pretrained")
    has_map = isinstance(policy, (SteeringPolicy, PersonalPolicy))
    if model is not None and tokenizer is None:
        raise InvalidInputError("the model comes without its tokenizer; pass tokenizer=")
    if prompts is not None and model is None:
        raise InvalidInputError("prompts need a model to steer; pass model= and tokenizer=")
    if triples is not None and densities is None:
        raise InvalidInputError("triples come without their densities; pass densities=, the folder dspa collect wrote")
    if triples is not None and tokenizer is None:
        raise InvalidInputError("the texts of triples need the tokenizer; pass tokenizer=")
    if densities is not None and not has_map:
        raise InvalidInputError(f"a {kind} has no map, so no triple supports its edits; audit it without densities")
    if prompts is None and not has_map and not isinstance(policy, StaticPolicy):
        raise InvalidInputError(f"a {kind} names no latents by itself; audit it with a model and prompts")


def _labels(policy: Policy, file: str | Path) -> dict[int, Label]:
    sae = getattr(policy.intervention, "sae", None)
    if not isinstance(sae, SparseAutoencoder):
        raise InvalidInputError(f"a {type(policy).__name__} edits no latents; audit it without labels")
    return read_labels(file, sae.d_sae, sae.metadata.neuronpedia_id)


def _latents(policy: Policy, by_latent: MapByLatent | None, measurement: Measurement | None) -> list[int]:
    """Which latents have a record: most often edited first, then by mass of the map, then by number."""
    named: dict[int, float] = {}
    if by_latent is not None:
        named = {latent: float(by_latent.entries_of(latent)[1].abs().sum()) for latent in by_latent.latents}
    if isinstance(policy, StaticPolicy):
        listed = policy.edits.latents[policy.edits.valid()].tolist()
        named = {latent: float(listed.count(latent)) for latent in listed}
    for latent in _overlaid(policy):
        named[latent] = math.inf  # it is edited on every prompt
    edits = {} if measurement is None else {latent: use.tokens_edited for latent, use in measurement.uses.items()}
    return sorted({*named, *edits}, key=lambda x: (-edits.get(x, 0), -named.get(x, 0.0), x))


def _listed(measurement: Measurement) -> dict[int, int]:
    return {latent: use.augment_lists + use.ablate_lists for latent, use in measurement.uses.items()}


def _through_lens(lens: LogitLens, policy: Policy, latents: Sequence[int]) -> dict[int, LensTokens]:
    """The logit lens of the latents whose decoder rows are there."""
    sae = getattr(policy.intervention, "sae", None)
    if sae is None or not latents:
        return {}
    rows = torch.tensor(latents, device=sae.device)
    rows = rows if sae.decoder_rows is None else sae.decoder_rows[rows].long()
    there = rows >= 0
    directions: Tensor = sae.W_dec[rows[there]]
    kept = [latent for latent, has_row in zip(latents, there.tolist(), strict=True) if has_row]
    return dict(zip(kept, lens.tokens(directions), strict=True))


def _described(
    latent: int,
    policy: Policy,
    by_latent: MapByLatent | None,
    measurement: Measurement | None,
    labels: Mapping[int, Label],
    seen: Mapping[int, LensTokens],
    support: tuple[Support, ...],
) -> AuditedLatent:
    label, factors = labels.get(latent), None if by_latent is None else by_latent.policy.factors
    latent_class: LatentClass | None = None if label is None else label.latent_class
    class_by = None if latent_class is None else "label"
    if latent_class is None and measurement is not None:
        tokens = measurement.tokens.get(latent, EditedTokens())
        latent_class = tokens.decide(len(measurement.measured.prompts))
        class_by = None if latent_class is None else "rule"
    sae = getattr(policy.intervention, "sae", None)
    return AuditedLatent(
        latent=latent,
        link=sae.metadata.neuronpedia_page(latent) if isinstance(sae, SparseAutoencoder) else None,
        label=None if label is None else label.text,
        latent_class=latent_class,
        class_by=class_by,
        map=None if by_latent is None else by_latent.use_of(latent, None if measurement is None else measurement.picks),
        lens=seen.get(latent),
        use=None if measurement is None else measurement.uses.get(latent),
        examples=() if measurement is None else measurement.examples.get(latent, ()),
        support=support,
        factor=1.0 if factors is None else float(factors[latent]),
        overlay=_overlaid(policy).get(latent),
    )


def _overlaid(policy: Policy) -> dict[int, Direction]:
    """The latents that an overlay edits on every prompt."""
    if not isinstance(policy, PersonalPolicy):
        return {}
    overlay = policy.overlay
    pairs = zip(overlay.latents.tolist(), overlay.signs.tolist(), strict=True)
    return {latent: "augment" if sign > 0 else "ablate" for latent, sign in pairs if sign}


def _shares(latents: Sequence[AuditedLatent]) -> ClassShares | None:
    """By edits where there are any, else by the mass of the map."""
    if not any(latent.latent_class for latent in latents):
        return None
    by_edits = any(latent.use is not None and latent.use.tokens_edited for latent in latents)

    def weight(latent: AuditedLatent) -> float:
        if by_edits:
            return 0.0 if latent.use is None else float(latent.use.tokens_edited)
        return 0.0 if latent.map is None else latent.map.share

    total = sum(map(weight, latents)) or 1.0
    shares = {name: sum(weight(x) for x in latents if x.latent_class == name) / total for name in CLASSES}
    deciders = {by: sum(weight(x) for x in latents if x.class_by == by) / total for by in ("label", "rule")}
    return ClassShares(
        of="edits" if by_edits else "mass of the map",
        shares={**shares, "unclassified": max(0.0, 1 - sum(shares.values()))},
        by_label=deciders["label"],
        by_rule=deciders["rule"],
        rule={str(name): words for name, words in RULE.items()},
    )


def _subject(policy: Policy) -> AuditSubject:
    intervention, fingerprint = policy.intervention, policy.model
    sae = getattr(intervention, "sae", None)
    overlay = policy.overlay if isinstance(policy, PersonalPolicy) else None
    shared: Any = policy.policy if isinstance(policy, PersonalPolicy) else policy
    named = {
        field.name: getattr(shared, field.name)
        for field in (fields(shared) if is_dataclass(shared) else ())
        if isinstance(getattr(shared, field.name), (str, bool, int, float))
    }
    if overlay is not None:
        named["alpha"] = intervention.strength
    return AuditSubject(
        kind=type(policy).__name__,
        model=None
        if fingerprint is None
        else f"{fingerprint.model_type}, {fingerprint.num_hidden_layers} layers, width {fingerprint.hidden_size}",
        layer=intervention.layer,
        settings={"strength": intervention.strength, **named},
        output_sae=describe_sae(sae) if isinstance(sae, SparseAutoencoder) else None,
        changes=shared.changes if isinstance(shared, SteeringPolicy) else (),
        overlay=None if overlay is None else _overlay_words(overlay),
    )


def _overlay_words(overlay: Overlay) -> str:
    up, down, still = (int((overlay.signs == sign).sum()) for sign in (1, -1, 0))
    strength = "the shared alpha" if overlay.alpha is None else f"alpha {overlay.alpha:g}"
    return (
        f"{up} latents augmented and {down} ablated on every prompt, {still} left alone; from {overlay.examples} "
        f"examples; {strength}"
    )
