"""What steering does on prompts, latent by latent: counts, examples in context, and the totals of the report."""

from __future__ import annotations

import heapq
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from dspa.auditing.classes import EditedTokens, TokenKinds, token_kinds
from dspa.auditing.forward import Decoding, Reading, read_batch
from dspa.auditing.overlap import list_overlap
from dspa.auditing.prompts import ReadPrompt
from dspa.auditing.records import ContextToken, Example, LatentUse, Measured, PromptAudit
from dspa.auditing.statistics import mean, quantiles
from dspa.methods.personal import PersonalPolicy
from dspa.methods.policy import Policy
from dspa.methods.steering_policy import SteeringPolicy
from dspa.offline.chat_template import special_token_ids
from dspa.sae.encode import encode
from dspa.sae.weights import SaeWeights
from dspa.util.progress import track

EXAMPLES = 4  # of a latent
CONTEXT = 14  # tokens of an example before its token, and after it
DECODED_TOGETHER = 8  # tokens, so that a token's text is that in its place


@dataclass
class _Latent:
    """What is counted of one latent.

    `examples` is a heap whose least entry is the first to go: how many of its prompt were more active, its activation,
    the prompt and the position, each so that more is better, and the example.
    """

    augment_lists: int = 0
    ablate_lists: int = 0
    prompts_edited: int = 0
    tokens_listed: int = 0
    before: float = 0.0
    change: float = 0.0
    tokens: EditedTokens = field(default_factory=EditedTokens)
    examples: list[tuple[int, float, int, int, Example]] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Measurement:
    """Everything that was counted.

    Attributes:
        measured: the totals, and what happened on each prompt.
        uses: by latent, of those that were listed or edited.
        examples: by latent.
        tokens: by latent, what the rule of classes goes by.
        picks: on how many prompts a row of the map was picked while a latent was listed that it names, by row and
            latent; None for policies without a map.
    """

    measured: Measured
    uses: dict[int, LatentUse]
    examples: dict[int, tuple[Example, ...]]
    tokens: dict[int, EditedTokens]
    picks: dict[tuple[int, int], int] | None


def measure(
    policy: Policy,
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[ReadPrompt],
    decoding: Decoding,
    *,
    progress: bool = False,
) -> Measurement:
    """Steers the model on prompts and counts what happens.

    Raises:
        MismatchError: if the policy was made for another model.
        InvalidInputError: if the model is steered already.
    """
    selecting = policy.policy if isinstance(policy, PersonalPolicy) else policy
    picks = _picked_rows(selecting, model, prompts) if isinstance(selecting, SteeringPolicy) else None
    special = special_token_ids(tokenizer)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    counts = _Counts(getattr(policy.intervention, "sae", None), tokenizer, special)
    starts = range(0, len(prompts), decoding.batch_size)
    for start in track(starts, "Steering", enabled=progress, unit="batches"):
        part = prompts[start : start + decoding.batch_size]
        readings = read_batch(model, policy, [prompt.ids for prompt in part], decoding, pad)
        for number, (prompt, reading) in enumerate(zip(part, readings, strict=True), start=start):
            counts.add(number, prompt, reading)
    return counts.result(str(decoding), picks)


class _Counts:
    """Adds up readings, prompt by prompt."""

    def __init__(self, sae: SaeWeights | None, tokenizer: Any, special: frozenset[int]) -> None:
        self._sae = sae
        self._tokenizer = tokenizer
        self._special = special
        self._latents: defaultdict[int, _Latent] = defaultdict(_Latent)
        self._prompts: list[PromptAudit] = []
        self._lists: list[frozenset[tuple[int, int]]] = []
        self._maxima: list[float] = []
        self._moves: list[Tensor] = []
        self._kl: list[Tensor] = []
        self._kl_edited: list[Tensor] = []

    def add(self, number: int, prompt: ReadPrompt, reading: Reading) -> None:
        texts = token_texts(self._tokenizer, reading.ids)
        kinds = token_kinds(texts, [token in self._special for token in reading.ids], reading.prompt_tokens)
        # An edit without latents (a plain vector) changes every token that it sees.
        edited = [token for token in reading.tokens if token.edits or self._sae is None]
        places = torch.tensor([token.position for token in edited], dtype=torch.int64)
        chose = places[places >= reading.prompt_tokens - 1] - (reading.prompt_tokens - 1)
        self._maxima += [token.maximum for token in reading.tokens]
        self._moves.append(reading.moved[places])
        self._kl.append(reading.kl)
        self._kl_edited.append(reading.kl[chose])
        self._count_latents(number, reading, texts, kinds)
        listed = reading.listed or ()
        if reading.listed is not None:
            self._lists.append(frozenset(listed))
        self._prompts.append(
            PromptAudit(
                text=prompt.text,
                response=self._tokenizer.decode(list(reading.response), skip_special_tokens=True),
                tokens_seen=len(reading.tokens),
                tokens_edited=len(edited),
                mean_maximum=mean([token.maximum for token in reading.tokens]),
                mean_kl=mean(reading.kl.tolist()),
                mean_move=mean(reading.moved[places].tolist()),
                augment=tuple(latent for latent, sign in listed if sign > 0),
                ablate=tuple(latent for latent, sign in listed if sign < 0),
                cluster=None,
            )
        )

    def _count_latents(self, number: int, reading: Reading, texts: list[str], kinds: TokenKinds) -> None:
        for latent, sign in reading.listed or ():
            counted = self._latents[latent]
            counted.augment_lists += sign > 0
            counted.ablate_lists += sign < 0
            counted.tokens_listed += len(reading.tokens)
        edits: defaultdict[int, list[tuple[float, int, float, float]]] = defaultdict(list)
        for token in reading.tokens:
            for edit in token.edits:
                edits[edit.latent].append((edit.before, token.position, edit.after, token.maximum))
        if not edits or self._sae is None:
            return
        columns = {latent: column for column, latent in enumerate(sorted(edits))}
        activations = encode(reading.before.to(self._sae.device), self._sae)[:, list(columns)].cpu()
        for latent, changes in edits.items():
            counted = self._latents[latent]
            counted.prompts_edited += 1
            counted.tokens.prompts += 1
            for before, place, after, _ in changes:
                counted.before += before
                counted.change += after - before
                counted.tokens.add(kinds.structural[place], kinds.repeated[place])
            on = {place for _, place, _, _ in changes}
            for rank, change in enumerate(sorted(changes, key=lambda x: (-x[0], x[1]))[:EXAMPLES]):
                before, place, _, _ = change
                key = (-rank, before, -number, -place)
                if len(counted.examples) == EXAMPLES and key <= counted.examples[0][:4]:
                    break
                example = _example(number, change, reading, texts, activations[:, columns[latent]], on)
                push = heapq.heappush if len(counted.examples) < EXAMPLES else heapq.heappushpop
                push(counted.examples, (*key, example))

    def result(self, decoding: str, picks: dict[tuple[int, int], int] | None) -> Measurement:
        prompts, latents = self._prompts, self._latents
        seen, total = sum(prompt.tokens_seen for prompt in prompts), sum(x.tokens.edited for x in latents.values())
        overlap = list_overlap(self._lists) if len(self._lists) == len(prompts) else None
        if overlap is not None:
            of = {prompt: number for number, cluster in enumerate(overlap.clusters) for prompt in cluster.prompts}
            prompts = [replace(prompt, cluster=of[number]) for number, prompt in enumerate(prompts)]
        uses = {
            latent: LatentUse(
                augment_lists=counted.augment_lists,
                ablate_lists=counted.ablate_lists,
                prompts_edited=counted.prompts_edited,
                tokens_listed=counted.tokens_listed if self._lists else seen,
                tokens_edited=counted.tokens.edited,
                edit_share=counted.tokens.edited / total if total else 0.0,
                mean_before=counted.before / counted.tokens.edited if counted.tokens.edited else float("nan"),
                mean_change=counted.change / counted.tokens.edited if counted.tokens.edited else float("nan"),
            )
            for latent, counted in latents.items()
        }
        measured = Measured(
            decoding=decoding,
            tokens_seen=seen,
            tokens_edited=sum(prompt.tokens_edited for prompt in prompts),
            edits=total,
            maximum=quantiles(self._maxima),
            move=quantiles(torch.cat(self._moves)),
            kl=quantiles(torch.cat(self._kl)),
            kl_edited=quantiles(torch.cat(self._kl_edited)),
            prompts=tuple(prompts),
            overlap=overlap,
        )
        return Measurement(
            measured=measured,
            uses=uses,
            examples={
                latent: tuple(example for *_, example in sorted(counted.examples, key=lambda x: x[:4], reverse=True))
                for latent, counted in latents.items()
            },
            tokens={latent: counted.tokens for latent, counted in latents.items()},
            picks=picks,
        )


def _example(
    number: int,
    change: tuple[float, int, float, float],
    reading: Reading,
    texts: list[str],
    activation: Tensor,
    edited: set[int],
) -> Example:
    before, place, after, maximum = change
    first, end = max(0, place - CONTEXT), min(len(activation), place + CONTEXT + 1)
    tokens = tuple(
        ContextToken(texts[at], float(activation[at]), at in edited, at < reading.prompt_tokens)
        for at in range(first, end)
    )
    return Example(number, place - first, before, after, maximum, tokens)


def _picked_rows(policy: SteeringPolicy, model: nn.Module, prompts: Sequence[ReadPrompt]) -> dict[tuple[int, int], int]:
    """See `Measurement.picks`."""
    matrix = policy.conditional_map.matrix.to("cpu")
    picks: Counter[tuple[int, int]] = Counter()
    for prompt in prompts:
        explained = policy.explain(prompt.ids, model)
        listed = {edit.latent for edit in explained.edits}
        for picked in explained.rows:
            span = slice(int(matrix.row_offsets[picked.latent]), int(matrix.row_offsets[picked.latent + 1]))
            picks.update((picked.latent, latent) for latent in matrix.columns[span].tolist() if latent in listed)
    return dict(picks)


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """The text of each token in its place, with the space that it begins with: what it adds to those before it."""
    texts = []
    for place, token in enumerate(ids):
        earlier = list(ids[max(0, place - DECODED_TOGETHER) : place])
        without, together = tokenizer.decode(earlier), tokenizer.decode([*earlier, token])
        texts.append(together[len(without) :] if together.startswith(without) else tokenizer.decode([token]))
    return texts
