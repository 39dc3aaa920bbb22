"""A tiny random model, SAEs, triples and density stores, built by hand for the tests of the offline part.

The reference here is method.md, section 2, in numpy: it shares no code with the package.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import Gemma2Config, Gemma2ForCausalLM

from dspa.offline.density_store import CollectionRun, DensityShard, DensityStore, SparseCounts
from dspa.offline.preferences import PreferenceTriple, PreferenceTriples
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.sae.metadata import SaeMetadata
from dspa.transformers_model import ModelFingerprint

Matrix = NDArray[np.float64]
Counts = NDArray[np.int64]

D_MODEL, LAYERS, VOCABULARY, CONTEXT = 16, 4, 40, 40
D_SAE_IN, D_SAE_OUT = 48, 40
BOS, UNCOUNTED = 2, (2, 5)
FINGERPRINT = ModelFingerprint("gemma2", D_MODEL, LAYERS, 2, VOCABULARY)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The shapes here are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# --- a model, SAEs, triples -------------------------------------------------------------------------------------------


def tiny_model(dtype: torch.dtype = torch.float64, seed: int = 0) -> Gemma2ForCausalLM:
    """A Gemma-2 model with random weights, in float64 unless told, so that no gate sits within rounding."""
    torch.manual_seed(seed)
    config = Gemma2Config(
        vocab_size=VOCABULARY,
        hidden_size=D_MODEL,
        intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        sliding_window=6,
        max_position_embeddings=CONTEXT,
        initializer_range=0.3,
        bos_token_id=BOS,
        pad_token_id=0,
        eos_token_id=1,
    )
    model: Any = Gemma2ForCausalLM(config)
    return model.to(dtype).eval()


def tiny_sae(
    d_sae: int, seed: int, d_model: int = D_MODEL, layer: int | None = None, dtype: torch.dtype = torch.float32
) -> SparseAutoencoder:
    """A JumpReLU SAE of which about a quarter of the latents is active on a token of the tiny model."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    small = torch.float64 if dtype == torch.float64 else torch.float32
    return SparseAutoencoder(
        W_enc=normal(d_sae, d_model).to(dtype),
        b_enc=normal(d_sae).to(small),
        threshold=(1 + normal(d_sae).abs()).to(small),
        activation="jumprelu",
        W_dec=(normal(d_sae, d_model) / d_model**0.5).to(dtype),
        b_dec=normal(d_model).to(small),
        subtract_b_dec=True,
        metadata=SaeMetadata(layer=layer),
    )


def tiny_triples(
    count: int, seed: int = 0, longest: int = 9, uncounted: tuple[int, ...] = UNCOUNTED
) -> PreferenceTriples:
    """Triples of many lengths. Prompts start with BOS and hold other uncounted ids, responses hold them too, and the
    padding id 0 is an ordinary token."""
    generator = np.random.default_rng(seed)

    def tokens(least: int) -> tuple[int, ...]:
        return tuple(generator.integers(0, VOCABULARY, generator.integers(least, longest + 1)).tolist())

    def triple(index: int) -> PreferenceTriple:
        chosen, rejected = tokens(1), tokens(1)
        return PreferenceTriple(
            prompt=(BOS, *tokens(0), 6, 5),
            chosen=chosen,
            rejected=rejected,
            chosen_counted=int(generator.integers(1, len(chosen) + 1)),
            rejected_counted=int(generator.integers(1, len(rejected) + 1)),
            source=f"prefs.jsonl:{index + 1}",
        )

    return PreferenceTriples(tuple(triple(index) for index in range(count)), uncounted)


# --- stores made by hand ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What one part of the triples counted: `counts [n, d_sae]` out of `tokens [n]`."""

    counts: Counts
    tokens: Counts

    @property
    def density(self) -> Matrix:
        return self.counts / self.tokens[:, None]


@dataclass(frozen=True)
class Densities:
    """The three parts of all triples, dense."""

    prompt: Part
    chosen: Part
    rejected: Part

    @property
    def difference(self) -> Matrix:
        """D."""
        return self.chosen.density - self.rejected.density


def random_densities(
    triples: int, d_sae_in: int, d_sae_out: int, seed: int, lengths: Sequence[int] = (1, 2, 4, 8), active: float = 0.3
) -> Densities:
    """Random counts. With powers of two as lengths every sum of the method is exact in float64, so that ties are ties
    whatever the order of addition."""
    generator = np.random.default_rng(seed)

    def part(d_sae: int) -> Part:
        tokens = generator.choice(np.asarray(lengths), triples)
        counts = generator.integers(0, tokens[:, None] + 1, (triples, d_sae))
        return Part(counts * (generator.random((triples, d_sae)) < active), tokens)

    return Densities(part(d_sae_in), part(d_sae_out), part(d_sae_out))


def described(rho: Matrix, centre: Matrix, count: int) -> Matrix:
    """Which at most `count` latents are densest beyond `centre`, in units of the deviation of one token, as 0 and 1."""
    unit = np.sqrt(centre * (1 - centre))
    deviation = np.where(unit > 0, (rho - centre) / np.where(unit > 0, unit, 1), 0).astype(np.float32)
    chosen = np.zeros_like(rho)
    for row, values in zip(chosen, deviation, strict=True):
        row[[latent for latent in np.argsort(-values, kind="stable")[:count] if values[latent] > 0]] = 1
    return chosen


def ridge_coefficients(densities: Densities, count: int, penalty: float = 1.0) -> tuple[Matrix, Matrix]:
    """Of the estimator `ridge` (docs/method.md, section 2.1), by singular vectors: `[d_sae_in, N]`, what a triple's
    difference counts in a row of A, and `[N, d_sae_out]`, the differences minus their mean."""
    rho = densities.prompt.density
    centre = rho.mean(axis=0).astype(np.float32).astype(np.float64)
    features = described(rho, centre, count)
    features -= features.mean(axis=0)
    deviation = densities.difference - densities.difference.mean(axis=0)
    left, sizes, right = np.linalg.svd(features, full_matrices=False)
    ridge = right.T @ np.diag(sizes / (sizes**2 + penalty * (sizes**2).sum() / len(rho))) @ left.T
    left, sizes, _ = np.linalg.svd(deviation, full_matrices=False)
    shrunk = left @ np.diag(sizes**2 / (sizes**2 + penalty * (sizes**2).sum() / len(rho))) @ left.T
    return ridge @ shrunk, deviation


def collection_run(
    triples: int,
    d_sae_in: int,
    d_sae_out: int,
    per_shard: int,
    saes: tuple[SparseAutoencoder, SparseAutoencoder] | None = None,
) -> CollectionRun:
    """The record of a collection on the tiny model that nobody ran."""
    fingerprints = [sae.encoder_only().fingerprint() for sae in saes] if saes else ["in", "out"]
    return CollectionRun(
        model=FINGERPRINT,
        input_layer=1,
        output_layer=2,
        input_sae=fingerprints[0],
        output_sae=fingerprints[1],
        d_sae_in=d_sae_in,
        d_sae_out=d_sae_out,
        triples="t",
        triple_count=triples,
        triples_per_shard=per_shard,
        triples_per_batch=1,
        count_bos=False,
        count_template=True,
        count_eos=True,
        uncounted_token_ids=UNCOUNTED,
        dtype="float64",
    )


def write_store(
    folder: Path,
    densities: Densities,
    per_shard: int = 4,
    saes: tuple[SparseAutoencoder, SparseAutoencoder] | None = None,
) -> DensityStore:
    """A complete store with these counts."""
    parts = (densities.prompt, densities.chosen, densities.rejected)
    triples = len(densities.prompt.tokens)
    run = collection_run(triples, parts[0].counts.shape[1], parts[1].counts.shape[1], per_shard, saes)
    store = DensityStore.create_or_resume(folder, run)
    for first in range(0, triples, per_shard):
        rows = slice(first, first + per_shard)
        shard = [
            SparseCounts.from_dense(torch.from_numpy(p.counts[rows]), torch.from_numpy(p.tokens[rows])) for p in parts
        ]
        store = store.append(DensityShard(*shard), 0)
    return store


def folder_bytes(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by relative path."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
