"""The page that explains a policy on the hub: its settings, and the latents it edits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from dspa.kernels import CsrMap
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.util.files import write_atomically

AUDITED_LATENTS = 20
CARD_HEAD = "---\nlibrary_name: dspa\n"

Page = Callable[[int], str | None]  # the address of a latent's page, where there is one


class EditedLatent(Protocol):
    @property
    def latent(self) -> int: ...
    @property
    def tokens(self) -> int: ...


class EditCounts(Protocol):
    """What the card reads of a steering's summary."""

    @property
    def prompts(self) -> int: ...
    @property
    def tokens_seen(self) -> int: ...
    @property
    def tokens_edited(self) -> int: ...
    @property
    def latents(self) -> Sequence[EditedLatent]: ...


DSPA_INTRODUCTION = (
    "A steering policy of DSPA (Dynamic SAE Steering for Preference Alignment, arXiv 2603.21461): per prompt it "
    "selects latents of a sparse autoencoder, and edits those of them that are active on a token while a frozen model "
    "generates."
)


def model_card(
    repo_id: str,
    settings: Mapping[str, object],
    audit: str,
    *,
    policy_class: str = "SteeringPolicy",
    introduction: str = DSPA_INTRODUCTION,
) -> str:
    """Markdown with the header the hub reads.

    Args:
        repo_id: where the policy will be found, for the example.
        settings: names and values for the table of the configuration.
        audit: the section on edited latents.
        policy_class: the name in `dspa` that reads it.
        introduction: what the method is.
    """
    table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return f"""{CARD_HEAD}tags:
- dspa
- steering
- sparse-autoencoder
- preference-alignment
---

# {repo_id}

{introduction} It holds no language model; bring the one below.

```python
import dspa
policy = dspa.{policy_class}.from_pretrained("{repo_id}")
with dspa.steer(model, policy) as steering:
    out = model.generate(**inputs)
print(steering.summary())
```

## Configuration

| | |
|---|---|
{table}

## Edited latents

{audit}
"""


def write_card(folder: Path, card: str) -> None:
    """Writes a card as README.md, unless there is one that this package has not written."""
    path = folder / "README.md"
    if path.exists() and not path.read_bytes().startswith(CARD_HEAD.encode()):
        return
    write_atomically(path, card.encode())


def audit_of_counts(counts: EditCounts, page: Page) -> str:
    """The latents edited on prompts, most often edited first."""
    heading = (
        f"Counted where the edits happened, on {counts.prompts} prompts: {counts.tokens_edited} of "
        f"{counts.tokens_seen} tokens were edited."
    )
    return _audit(heading, "tokens edited", [(edit.latent, f"{edit.tokens}") for edit in counts.latents], page)


def audit_of_map(matrix: CsrMap, page: Page, editable: Tensor | None = None, factors: Tensor | None = None) -> str:
    """The latents that rows of a conditional map name, most often named first.

    Args:
        matrix: the map.
        page: of a latent.
        editable: `[d_sae_out]` bool, the latents that may be edited; None for all.
        factors: `[d_sae_out]`, what the decoder rows were multiplied by; None for 1.
    """
    heading = (
        "Not measured on prompts. By the map: in how many of its rows, one for each prompt latent, a latent has an "
        "entry, and the mean of these entries (positive: more frequent in preferred responses)."
    )
    columns, values = matrix.columns.long().cpu(), matrix.values.double().cpu()
    rows = torch.zeros(matrix.d_sae_out, dtype=torch.int64).index_add_(0, columns, torch.ones_like(columns))
    total = torch.zeros(matrix.d_sae_out, dtype=torch.float64).index_add_(0, columns, values)
    if editable is not None:
        off = int((rows[~editable] > 0).sum())
        heading += f" Left out are {off} latents of the map that are switched off in this policy."
        rows[~editable] = 0
    order = sorted(rows.nonzero().flatten().tolist(), key=lambda latent: (-int(rows[latent]), latent))

    def scale(latent: int) -> str:
        factor = 1.0 if factors is None else float(factors[latent])
        return "" if factor == 1 else f", its edits times {factor:g}"

    ranked = [
        (latent, f"{int(rows[latent])}, mean {float(total[latent] / rows[latent]):+.4f}{scale(latent)}")
        for latent in order
    ]
    return _audit(heading, "rows of the map", ranked, page)


def _audit(heading: str, column: str, ranked: Sequence[tuple[int, str]], page: Page) -> str:
    lines = [f"| {_linked(latent, page)} | {count} |" for latent, count in ranked[:AUDITED_LATENTS]]
    more = len(ranked) - AUDITED_LATENTS
    table = "\n".join([f"| output latent | {column} |", "|---|---|", *lines])
    return f"{heading}\n\n{table}" + (f"\n\nand {more} more latents." if more > 0 else "")


def _linked(latent: int, page: Page) -> str:
    link = page(latent)
    return str(latent) if link is None else f"[{latent}]({link})"


def describe_sae(sae: SparseAutoencoder) -> str:
    """Where an SAE comes from, and its kind and size, in one line."""
    metadata = sae.metadata
    source = " ".join(part for part in (metadata.release, metadata.sae_id) if part)
    if not source:  # a folder or a live object
        source = f"of {metadata.hook_name}" if metadata.hook_name else "source not recorded"
    trained = f", trained on {metadata.model_name}" if metadata.model_name else ""
    return f"{source}{trained}, {sae.activation}, {sae.d_sae} latents"


def counted_tokens(bos: bool, template: bool, eos: bool) -> str:
    """Which special tokens count in densities, in one line."""
    kinds: Iterable[tuple[str, bool]] = (("BOS", bos), ("template", template), ("EOS", eos))
    return ", ".join(f"{name} {'counted' if counted else 'not counted'}" for name, counted in kinds)
