"""The page that explains a policy on the hub: written from its configuration, with the latents it edits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from dspa.methods.policy import SteeringPolicy
    from dspa.online.summary import SteeringSummary

AUDITED_LATENTS = 20


def model_card(policy: SteeringPolicy, repo_id: str, summary: SteeringSummary | None = None) -> str:
    """Markdown with the header the hub reads.

    Args:
        policy: the policy.
        repo_id: where it will be found, for the example.
        summary: what it edited on prompts of one's own; without one, the card counts how often the map names a latent.
    """
    model = policy.model
    run, fit = policy.conditional_map.run, policy.conditional_map.options
    settings = {
        "model": f"{model.model_type}, {model.num_hidden_layers} layers, width {model.hidden_size}",
        "input SAE": f"after layer {policy.input_layer}: {_origin(policy, 'input')}",
        "output SAE": f"after layer {policy.output_layer}: {_origin(policy, 'output')}",
        "k_prompt, k_diff": f"{policy.k_prompt}, {policy.k_diff}",
        "alpha": policy.alpha,
        "edit": policy.edit,
        "sign_guard": policy.sign_guard,
        "edit_positions": policy.edit_positions,
        "gate_percentile, gate_rule": f"{fit.gate_percentile}, {fit.gate_rule}",
        "sparsify": fit.sparsify,
        "map entries": policy.conditional_map.matrix.nonzeros,
        "preference triples": f"{run.triple_count}",
        "counted tokens": f"BOS {_yes(run.count_bos)}, template {_yes(run.count_template)}, EOS {_yes(run.count_eos)}",
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in settings.items())
    return f"""---
library_name: dspa
tags:
- dspa
- steering
- sparse-autoencoder
- preference-alignment
---

# {repo_id}

A steering policy of DSPA (Dynamic SAE Steering for Preference Alignment, arXiv 2603.21461): per prompt it selects
latents of a sparse autoencoder, and edits those of them that are active on a token while a frozen model generates. It
holds no language model; bring the one below.

```python
import dspa
policy = dspa.SteeringPolicy.from_pretrained("{repo_id}")
with dspa.steer(model, policy) as steering:
    out = model.generate(**inputs)
print(steering.summary())
```

## Configuration

| | |
|---|---|
{table}

## Edited latents

{_audit(policy, summary)}
"""


def _audit(policy: SteeringPolicy, summary: SteeringSummary | None) -> str:
    if summary is not None:
        heading = (
            f"Counted where the edits happened, on {summary.prompts} prompts: {summary.tokens_edited} of "
            f"{summary.tokens_seen} tokens were edited."
        )
        ranked = [(edit.latent, f"{edit.tokens}") for edit in summary.latents]
        column = "tokens edited"
    else:
        heading = (
            "Not measured on prompts. By the map: in how many of its rows, one for each prompt latent, a latent has an "
            "entry, and the mean of these entries (positive: more frequent in preferred responses)."
        )
        matrix = policy.conditional_map.matrix
        columns, values = matrix.columns.long().cpu(), matrix.values.double().cpu()
        rows = torch.zeros(matrix.d_sae_out, dtype=torch.int64).index_add_(0, columns, torch.ones_like(columns))
        total = torch.zeros(matrix.d_sae_out, dtype=torch.float64).index_add_(0, columns, values)
        order = sorted(rows.nonzero().flatten().tolist(), key=lambda latent: (-int(rows[latent]), latent))
        ranked = [(latent, f"{int(rows[latent])}, mean {float(total[latent] / rows[latent]):+.4f}") for latent in order]
        column = "rows of the map"
    lines = [f"| {_linked(policy, latent)} | {count} |" for latent, count in ranked[:AUDITED_LATENTS]]
    more = len(ranked) - AUDITED_LATENTS
    table = "\n".join([f"| output latent | {column} |", "|---|---|", *lines])
    return f"{heading}\n\n{table}" + (f"\n\nand {more} more latents." if more > 0 else "")


def _linked(policy: SteeringPolicy, latent: int) -> str:
    link = policy.output_sae.metadata.neuronpedia_page(latent)
    return str(latent) if link is None else f"[{latent}]({link})"


def _origin(policy: SteeringPolicy, which: str) -> str:
    sae = policy.input_sae if which == "input" else policy.output_sae
    metadata = sae.metadata
    source = " ".join(part for part in (metadata.release, metadata.sae_id) if part) or "source not recorded"
    trained = f", trained on {metadata.model_name}" if metadata.model_name else ""
    return f"{source}{trained}, {sae.activation}, {sae.d_sae} latents"


def _yes(counted: bool) -> str:
    return "counted" if counted else "not counted"
