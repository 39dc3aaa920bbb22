"""Preference triples as token ids, with the rules by which their tokens count."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, overload

import numpy as np

from dspa.errors import InvalidInputError
from dspa.util.html_table import html_table


@dataclass(frozen=True)
class CountingRules:
    """By which rules the tokens of triples count; see `PreferenceTriples`."""

    uncounted_token_ids: tuple[int, ...]
    count_bos: bool
    count_template: bool
    count_eos: bool


@dataclass(frozen=True)
class PreferenceTriple:
    """Token ids of one preference. `prompt + chosen` and `prompt + rejected` are what the model reads.

    The first `chosen_counted` tokens of `chosen` count in its activation density, likewise for `rejected`; the rest, if
    any, are the end-of-turn and end-of-sequence tokens that `count_eos=False` leaves out. `source` names the row,
    `rules` are those of the `PreferenceTriples` it was read into.
    """

    prompt: tuple[int, ...]
    chosen: tuple[int, ...]
    rejected: tuple[int, ...]
    chosen_counted: int
    rejected_counted: int
    source: str
    rules: CountingRules | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True)
class SkippedRow:
    """A row that yielded no triple, and why."""

    source: str
    reason: str


@dataclass(frozen=True, repr=False)
class PreferenceTriples:
    """An immutable sequence of triples with the rules by which their tokens count.

    `uncounted_token_ids` never count in a prompt; they say nothing about responses.
    """

    triples: tuple[PreferenceTriple, ...]
    uncounted_token_ids: tuple[int, ...]
    count_bos: bool = False
    count_template: bool = True
    count_eos: bool = True
    skipped: tuple[SkippedRow, ...] = ()

    def __post_init__(self) -> None:
        rules = CountingRules(self.uncounted_token_ids, self.count_bos, self.count_template, self.count_eos)
        if any(triple.rules != rules for triple in self.triples):
            object.__setattr__(self, "triples", tuple(replace(triple, rules=rules) for triple in self.triples))

    def __len__(self) -> int:
        return len(self.triples)

    def __iter__(self) -> Iterator[PreferenceTriple]:
        return iter(self.triples)

    @overload
    def __getitem__(self, index: int) -> PreferenceTriple: ...
    @overload
    def __getitem__(self, index: slice) -> PreferenceTriples: ...
    def __getitem__(self, index: int | slice) -> PreferenceTriple | PreferenceTriples:
        if isinstance(index, slice):
            return replace(self, triples=self.triples[index])
        return self.triples[index]

    def __repr__(self) -> str:
        skipped = f", {len(self.skipped)} rows skipped" if self.skipped else ""
        return f"PreferenceTriples({len(self)} triples, {self._tokens()} tokens{skipped})"

    def _repr_html_(self) -> str:
        """For notebooks: how many, how long, and by which rules their tokens count."""
        triples = self.triples
        lengths = {
            "prompts": [len(triple.prompt) for triple in triples],
            "chosen responses": [len(triple.chosen) for triple in triples],
            "rejected responses": [len(triple.rejected) for triple in triples],
        }
        rows: dict[str, object] = {"triples": len(triples)}
        for name, counts in lengths.items():
            if counts:
                rows[f"tokens of {name}"] = f"{min(counts)} to {max(counts)}, mean {sum(counts) / len(counts):.1f}"
        rows["counted"] = ", ".join(
            f"{name} {'yes' if on else 'no'}"
            for name, on in (("BOS", self.count_bos), ("template", self.count_template), ("EOS", self.count_eos))
        )
        rows["rows skipped"] = len(self.skipped)
        return html_table(rows)

    def _tokens(self) -> int:
        return sum(len(triple.prompt) + len(triple.chosen) + len(triple.rejected) for triple in self.triples)

    @classmethod
    def from_any(cls, value: Any) -> PreferenceTriples:
        """Triples that were passed as they are, or as a list of some of them.

        Raises:
            InvalidInputError: for anything else, and for triples that were read by different rules.
        """
        if isinstance(value, cls):
            return value
        listed = list(value) if isinstance(value, (list, tuple)) else []
        if not listed or not all(isinstance(triple, PreferenceTriple) for triple in listed):
            raise InvalidInputError(
                f"the triples are a {type(value).__name__}; expected what load_preferences(...) returned, or a list of "
                "triples from it"
            )
        rules = {triple.rules for triple in listed}
        if len(rules) != 1 or None in rules:
            raise InvalidInputError(
                "the triples of the list do not say, or not alike, by which rules their tokens count; pass triples of "
                "one load_preferences(...)"
            )
        (rule,) = rules
        assert rule is not None
        counted = (rule.uncounted_token_ids, rule.count_bos, rule.count_template, rule.count_eos)
        return cls(tuple(listed), *counted)

    def fingerprint(self) -> str:
        """SHA-256 over the token ids and the counting rules; where the rows came from does not enter."""
        rules = [self.uncounted_token_ids, self.count_bos, self.count_template, self.count_eos]
        digest = hashlib.sha256(json.dumps(rules).encode())
        for triple in self.triples:
            parts = (triple.prompt, triple.chosen, triple.rejected)
            lengths = (*map(len, parts), triple.chosen_counted, triple.rejected_counted)
            digest.update(np.array([*lengths, *parts[0], *parts[1], *parts[2]], dtype="<i8").tobytes())
        return digest.hexdigest()
