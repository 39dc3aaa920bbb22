"""On the organism, collected densities against the plain three passes: x, x + y+ and x + y-, whole, one at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_collection import one_thread  # noqa: F401
from torch import Tensor

import dspa
from dspa.organism import DATA, INPUT_LAYER, OUTPUT_LAYER, load_model, sae_folder, triples_file
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.sae.encode import encoder_input

TRIPLES = 40
ROUNDING = 2.0**-18
"""Of float32 hidden states after a few layers, each sum taken in another order; relative to `|h| |W|`."""

pytestmark = pytest.mark.skipif(not (DATA / "triples.jsonl").is_file(), reason="the organism has not been made")


def plain_states(model: Any, ids: tuple[int, ...], layer: int) -> Tensor:
    with torch.no_grad():
        return model(torch.tensor([ids]), output_hidden_states=True, use_cache=False).hidden_states[layer + 1][0]


def doubtful(hidden: Tensor, sae: SparseAutoencoder) -> Tensor:
    """Of each latent, on how many tokens its gate is within rounding of its threshold."""
    x, _ = encoder_input(hidden, sae)
    z = x.double() @ sae.W_enc.double().T + sae.b_enc
    size = x.double().abs() @ sae.W_enc.double().abs().T + sae.b_enc.abs()
    return ((z - sae.threshold.clamp(min=0)).abs() <= ROUNDING * size).sum(dim=0)


@pytest.mark.long
def test_counts_are_equal_but_for_listed_gates_within_rounding(tmp_path: Path) -> None:
    pytest.importorskip("sae_lens")
    model, tokenizer = load_model()
    saes = [SparseAutoencoder.from_sae_lens(sae_folder(which)) for which in ("input", "output")]
    triples = dspa.load_preferences(str(triples_file()), tokenizer, limit=TRIPLES)
    store = dspa.collect(
        model,
        tokenizer,
        triples,
        input_sae=saes[0],
        output_sae=saes[1],
        input_layer=INPUT_LAYER,
        output_layer=OUTPUT_LAYER,
        out=tmp_path,
    )
    (shard,) = store.read()
    listed, gates = [], 0
    for number, triple in enumerate(triples):
        start = len(triple.prompt)
        kept = [t for t, token in enumerate(triple.prompt) if token not in triples.uncounted_token_ids]
        states = {
            "prompt": plain_states(model, triple.prompt, INPUT_LAYER)[kept],
            "chosen": plain_states(model, triple.prompt + triple.chosen, OUTPUT_LAYER)[start:][: triple.chosen_counted],
            "rejected": plain_states(model, triple.prompt + triple.rejected, OUTPUT_LAYER)[start:][
                : triple.rejected_counted
            ],
        }
        for part, hidden in states.items():
            sae, sparse = saes[part != "prompt"], shard.part(part)
            entries = slice(int(sparse.offsets[number]), int(sparse.offsets[number + 1]))
            found = torch.zeros(sae.d_sae, dtype=torch.int64)
            found[sparse.latents[entries].long()] = sparse.counts[entries].long()
            expected = (sae.encode(hidden) > 0).sum(dim=0)
            assert int(sparse.tokens[number]) == len(hidden)
            assert ((found - expected).abs() <= doubtful(hidden, sae)).all(), (triple.source, part)
            listed += [(triple.source, part, latent) for latent in (found != expected).nonzero().flatten().tolist()]
            gates += hidden.shape[0] * sae.d_sae
    print(f"{len(listed)} of {gates} gates differ, all within rounding: {listed}")
    assert len(listed) <= 1e-5 * gates
