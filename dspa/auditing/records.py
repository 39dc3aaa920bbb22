"""What an audit found: plain records that become JSON, tables and a page."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dspa.util.provenance import Provenance

LatentClass = Literal["discourse", "style", "content"]
CLASSES: tuple[LatentClass, ...] = ("discourse", "style", "content")
Direction = Literal["augment", "ablate"]


@dataclass(frozen=True)
class Quantiles:
    """A distribution in a few numbers; NaN where there are no values."""

    mean: float
    median: float
    p90: float
    maximum: float


@dataclass(frozen=True)
class AuditSubject:
    """What was audited.

    Attributes:
        kind: the policy's class.
        model: the model it was made for, in words; None for any model.
        layer: the decoder layer after which it edits, from 0.
        settings: names and values of its options.
        output_sae: where the SAE of the edited latents comes from, in words; None for an edit without latents.
        changes: what was done to the policy since it was fitted; of a personal policy, to the shared one.
        overlay: what a personal policy has of its own, in words; None for others.
    """

    kind: str
    model: str | None
    layer: int
    settings: dict[str, Any]
    output_sae: str | None
    changes: tuple[str, ...] = ()
    overlay: str | None = None


@dataclass(frozen=True)
class MapRow:
    """A row of the conditional-difference map A.

    Attributes:
        row: the number of its prompt latent.
        entries: how many output latents it names.
        mass: the sum of |A_ij| over them.
        share: its part of the mass of all rows.
        gate_count: N_i, for how many triples its gate was open, or with `ridge` how many it described.
        always_open: whether that was all of them.
        link: the prompt latent's page on neuronpedia.org, if the SAE's metadata name one.
    """

    row: int
    entries: int
    mass: float
    share: float
    gate_count: int
    always_open: bool
    link: str | None


@dataclass(frozen=True)
class MapFacts:
    """The conditional-difference map as a whole (docs/method.md, section 2), as far as the policy may use it: columns
    of latents that are switched off, or that an overlay decides, are left out of everything but the shape.

    Attributes:
        shape: rows and columns.
        triples: N.
        entries: how many are not 0.
        sparsity: the share of entries that are 0.
        columns_used: output latents that some row names.
        columns_left_out: output latents that some row names and that are left out.
        rows_used: rows that name some latent.
        always_open: how many gates were open for every triple.
        always_open_mass: the share of the mass in their rows; None where all entries are 0.
        entry_size: of |A_ij| over the entries.
        rows_for_half_the_mass: how many rows, heaviest first, hold half of the mass.
        heaviest: the rows with the largest mass, heaviest first.
    """

    shape: tuple[int, int]
    triples: int
    entries: int
    sparsity: float
    columns_used: int
    columns_left_out: int
    rows_used: int
    always_open: int
    always_open_mass: float | None
    entry_size: Quantiles
    rows_for_half_the_mass: int
    heaviest: tuple[MapRow, ...]


@dataclass(frozen=True)
class Lead:
    """A row of the map that leads to an edit of a latent.

    Attributes:
        row: the number of its prompt latent.
        entry: A_ij.
        prompts: on how many of the audit's prompts it was picked while the latent was listed; None without prompts.
        link: the prompt latent's page, if there is one.
    """

    row: int
    entry: float
    prompts: int | None
    link: str | None


@dataclass(frozen=True)
class MapUse:
    """How the rows of the map name one output latent.

    Attributes:
        raising, lowering: rows whose entry for it is positive, and negative: more, and less, frequent in preferred
            responses.
        in_extremes: rows among whose own k_diff extremes in a direction the policy edits it is; a prompt that picked
            such a row alone would edit it.
        mean, strongest: of its entries: their mean, and the one with the largest magnitude.
        share: its part of the mass of all entries.
        leads: rows that lead to its edit, the strongest first.
    """

    raising: int
    lowering: int
    in_extremes: int
    mean: float
    strongest: float
    share: float
    leads: tuple[Lead, ...]


@dataclass(frozen=True)
class LensTokens:
    """The logit lens of a decoder row: the tokens whose logits it raises and lowers most, with by how much."""

    promoted: tuple[tuple[str, float], ...]
    suppressed: tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class ContextToken:
    """A token of an example.

    Attributes:
        text: as the tokenizer decodes it in its place.
        activation: of the example's latent on it, before edits.
        edited: whether the policy edited that latent on it.
        in_prompt: whether it belongs to the prompt.
    """

    text: str
    activation: float
    edited: bool
    in_prompt: bool


@dataclass(frozen=True)
class Example:
    """A token on which a latent was edited, in its context.

    Attributes:
        prompt: the number of its prompt.
        focus: which of the tokens it is.
        before, after: the latent's activation before and after the edit.
        maximum: M_t.
        tokens: the context.
    """

    prompt: int
    focus: int
    before: float
    after: float
    maximum: float
    tokens: tuple[ContextToken, ...]


@dataclass(frozen=True)
class LatentUse:
    """What happened to one latent on the audit's prompts.

    Attributes:
        augment_lists, ablate_lists: prompts whose edit list named it; 0 for policies without lists.
        prompts_edited: prompts on which it was edited at least once.
        tokens_listed: steered tokens of the prompts that listed it; of policies without lists, all steered tokens.
        tokens_edited: tokens on which it was active and listed, so that the edit changed it.
        edit_share: its part of all edits.
        mean_before, mean_change: of its activation, over the tokens on which it was edited.
    """

    augment_lists: int
    ablate_lists: int
    prompts_edited: int
    tokens_listed: int
    tokens_edited: int
    edit_share: float
    mean_before: float
    mean_change: float


@dataclass(frozen=True)
class Support:
    """A triple that supports an edit.

    Attributes:
        triple: its number in the collection.
        contribution: its part of the scores s_j that list the latent.
        difference: D_j, by how much more often the latent was active in the preferred response.
        prompt, chosen, rejected: its texts; None where the triples were not passed.
    """

    triple: int
    contribution: float
    difference: float
    prompt: str | None = None
    chosen: str | None = None
    rejected: str | None = None


@dataclass(frozen=True)
class AuditedLatent:
    """An output latent that the policy can edit or did edit.

    Attributes:
        latent: its number in the output SAE.
        link: its page on neuronpedia.org, if the SAE's metadata name one.
        label: what the labels file says it is.
        latent_class: discourse, style or content; None where nothing decides.
        class_by: whether a label says so or the rule of `dspa.auditing.classes`.
        map: how the map names it; None for a policy without a map, and for a latent that it does not name.
        lens: its logit lens; None without a model, or for a latent whose decoder row was not saved.
        use: what happened to it on the prompts; None without prompts.
        examples: tokens on which it was edited, the most active first, of different prompts before several of one.
        support: the triples that support its edit most; empty without a density store.
        factor: what its decoder row was multiplied by (`SteeringPolicy.scaled`), so that an edit adds so many times as
            much.
        overlay: how a personal policy's overlay edits it on every prompt; None where it does not.
    """

    latent: int
    link: str | None
    label: str | None
    latent_class: LatentClass | None
    class_by: Literal["label", "rule"] | None
    map: MapUse | None
    lens: LensTokens | None
    use: LatentUse | None
    examples: tuple[Example, ...]
    support: tuple[Support, ...]
    factor: float = 1.0
    overlay: Direction | None = None


@dataclass(frozen=True)
class PromptAudit:
    """What happened on one prompt.

    Attributes:
        text, response: the prompt, and the steered response.
        tokens_seen, tokens_edited: steered tokens, and those of them whose hidden state the edit changed.
        mean_maximum: mean of M_t over the tokens seen.
        mean_kl: mean KL divergence in nats of the steered from the unsteered next-token distribution.
        mean_move: mean length of the change of the residual stream, relative to the stream's, over edited tokens.
        augment, ablate: its edit list; empty for policies without lists.
        cluster: the number of its cluster of edit lists; None for policies without lists.
    """

    text: str
    response: str
    tokens_seen: int
    tokens_edited: int
    mean_maximum: float
    mean_kl: float
    mean_move: float
    augment: tuple[int, ...]
    ablate: tuple[int, ...]
    cluster: int | None


@dataclass(frozen=True)
class ListCluster:
    """Prompts whose edit lists are alike.

    Attributes:
        prompts: their numbers.
        overlap: the mean Jaccard overlap of two of them; 1 for a cluster of one.
        shared: latents that at least half of them list, most often listed first.
    """

    prompts: tuple[int, ...]
    overlap: float
    shared: tuple[int, ...]


@dataclass(frozen=True)
class ListOverlap:
    """How alike the edit lists of prompts are.

    Attributes:
        mean: the mean Jaccard overlap of the lists of two prompts.
        order: the prompts, so that clusters stand together.
        matrix: the overlaps, rows and columns in that order.
        clusters: in that order.
    """

    mean: float
    order: tuple[int, ...]
    matrix: tuple[tuple[float, ...], ...]
    clusters: tuple[ListCluster, ...]


@dataclass(frozen=True)
class Measured:
    """What steering did on prompts: the steered responses, read again with and without the policy.

    Attributes:
        decoding: how responses were chosen, in words.
        tokens_seen: tokens at positions that the policy edits.
        tokens_edited: tokens whose hidden state was changed.
        edits: changes of single latents.
        maximum: of M_t over the tokens seen.
        move: of the change's length relative to the residual stream's, over the edited tokens.
        kl: of the KL divergence in nats of the steered from the unsteered next-token distribution, over all tokens that
            chose a token of the response.
        kl_edited: the same, over edited tokens only.
        prompts: one by one.
        overlap: of their edit lists; None for policies without lists, and for a single prompt.
    """

    decoding: str
    tokens_seen: int
    tokens_edited: int
    edits: int
    maximum: Quantiles
    move: Quantiles
    kl: Quantiles
    kl_edited: Quantiles
    prompts: tuple[PromptAudit, ...]
    overlap: ListOverlap | None


@dataclass(frozen=True)
class ClassShares:
    """Which share of the edits falls on which class.

    Attributes:
        of: what is shared out: edits on prompts, or the mass of the map.
        shares: by class; "unclassified" is the rest.
        by_label, by_rule: the shares that labels and the rule decided.
        rule: by class, where the rule decides for it; discourse comes before content.
    """

    of: Literal["edits", "mass of the map"]
    shares: dict[str, float]
    by_label: float
    by_rule: float
    rule: dict[str, str]


@dataclass(frozen=True, repr=False)
class AuditRecord:
    """What an audit of a policy found.

    Attributes:
        subject: what was audited.
        map: facts about its map; None for a policy without one.
        latents: most often edited first, then those that hold most of the map.
        measured: what steering did on prompts; None without.
        classes: None where no latent has a class.
        lens: how the logit lens was computed, in words; None without a model.
        provenance: which versions computed it.
    """

    subject: AuditSubject
    map: MapFacts | None
    latents: tuple[AuditedLatent, ...]
    measured: Measured | None
    classes: ClassShares | None
    lens: str | None
    provenance: Provenance

    def latent(self, number: int) -> AuditedLatent:
        """The record of a latent; KeyError if the policy neither edits nor can edit it."""
        for each in self.latents:
            if each.latent == number:
                return each
        raise KeyError(number)

    def to_json(self) -> str:
        """Every field on one line, numbers to six digits; NaN is null."""
        return json.dumps(_rounded(asdict(self)), allow_nan=False) + "\n"


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _rounded(each) for name, each in value.items()}
    return [_rounded(each) for each in value] if isinstance(value, (list, tuple)) else value
