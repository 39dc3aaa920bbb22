"""What a steering did, counted where the edit happens."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass

from dspa.kernels import TokenStats

SHOWN_LATENTS = 10


@dataclass(frozen=True)
class LatentEdits:
    """How many tokens had a latent edited after a layer; None where it is not known."""

    latent: int
    tokens: int
    layer: int | None = None


@dataclass(frozen=True)
class SteeringSummary:
    """Totals over everything a steering has seen.

    Attributes:
        prompts: prompts for which edit lists were selected, one per row of a batch.
        tokens_seen: tokens at positions to be edited. Rows of a batch that have finished are computed by `generate`
            until the longest one has, and are seen as well.
        tokens_edited: tokens whose hidden state was changed.
        tokens_nonfinite: tokens left alone because their hidden state held NaN or Inf.
        mean_maximum: mean of M_t over the tokens for which it was computed; NaN if there were none.
        latents: the edited latents, most often edited first.
    """

    prompts: int
    tokens_seen: int
    tokens_edited: int
    tokens_nonfinite: int
    mean_maximum: float
    latents: tuple[LatentEdits, ...]

    @classmethod
    def from_stats(cls, stats: Iterable[TokenStats], prompts: int) -> SteeringSummary:
        """Adds up counters of batches of different sizes."""
        return cls.from_layers([(None, stats)], prompts)

    @classmethod
    def from_layers(cls, stats: Iterable[tuple[int | None, Iterable[TokenStats]]], prompts: int) -> SteeringSummary:
        """Adds up counters of several output SAEs, whose latents are told apart by their layers."""
        seen = edited = nonfinite = known = 0
        maximum = 0.0
        latents: dict[tuple[int, int | None], int] = {}
        for layer, of_layer in stats:
            for counters in of_layer:
                seen += int(counters.seen.sum())
                edited += int(counters.edited.sum())
                nonfinite += int(counters.nonfinite.sum())
                known += int(counters.maximum_known.sum())
                maximum += float(counters.maximum_sum.sum())
                for latent in counters.latent_edits.nonzero().flatten().tolist():
                    key = (latent, layer)
                    latents[key] = latents.get(key, 0) + int(counters.latent_edits[latent])
        ranked = sorted(latents.items(), key=lambda item: (-item[1], item[0][1] or 0, item[0][0]))
        return cls(
            prompts=prompts,
            tokens_seen=seen,
            tokens_edited=edited,
            tokens_nonfinite=nonfinite,
            mean_maximum=maximum / known if known else float("nan"),
            latents=tuple(LatentEdits(latent, tokens, layer) for (latent, layer), tokens in ranked),
        )

    def __str__(self) -> str:
        share = f" ({self.tokens_edited / self.tokens_seen:.0%})" if self.tokens_seen else ""
        lines = [
            f"prompts {self.prompts}, tokens seen {self.tokens_seen}, edited {self.tokens_edited}{share}, "
            f"mean M_t {self.mean_maximum:.3g}"
        ]
        if self.tokens_nonfinite:
            lines.append(f"tokens left alone because of NaN or Inf: {self.tokens_nonfinite}")
        if self.latents:
            several = len({edit.layer for edit in self.latents}) > 1
            shown = ", ".join(
                f"{f'{edit.layer}/' if several else ''}{edit.latent} ({edit.tokens})"
                for edit in self.latents[:SHOWN_LATENTS]
            )
            more = len(self.latents) - SHOWN_LATENTS
            lines.append(f"latents edited (tokens): {shown}" + (f" and {more} more" if more > 0 else ""))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        """For notebooks: the totals, and a table of the latents most often edited."""
        totals, _, _ = str(self).partition("\nlatents")
        rows = "".join(
            f"<tr><td>{'' if edit.layer is None else edit.layer}</td><td>{edit.latent}</td><td>{edit.tokens}</td></tr>"
            for edit in self.latents[:SHOWN_LATENTS]
        )
        head = "<tr><th>layer</th><th>latent</th><th>tokens edited</th></tr>"
        return f"<p>{html.escape(totals)}</p><table>{head}{rows}</table>"
