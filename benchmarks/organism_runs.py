"""What the benchmarks on the organism share: the organism, and the plain three-pass form of collection."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dspa
from dspa.kernels import AdapterWeights
from dspa.offline.batching import BatchLimits
from dspa.offline.density_store import DensityStore
from dspa.offline.preferences import PreferenceTriple, PreferenceTriples
from dspa.organism import DATA, INPUT_LAYER, OUTPUT_LAYER, load_model, sae_folder, triples_file
from dspa.organism.demo import DemoOptions, Organism, load_organism
from dspa.sae.autoencoder import SparseAutoencoder

TRIPLES = 250


def organism(folder: Path) -> Organism:
    """With the densities of the triples that the demo collects, which stay in the folder."""
    return load_organism(DemoOptions(DATA, TRIPLES, 0, 0, 0), folder, progress=False)


@dataclass(frozen=True, eq=False)
class Collection:
    """Everything that a collection takes."""

    model: Any
    tokenizer: Any
    input_sae: SparseAutoencoder
    output_sae: SparseAutoencoder
    triples: PreferenceTriples

    @classmethod
    def load(cls) -> Collection:
        model, tokenizer = load_model()
        input_sae, output_sae = (SparseAutoencoder.from_sae_lens(sae_folder(which)) for which in ("input", "output"))
        return cls(
            model, tokenizer, input_sae, output_sae, dspa.load_preferences(triples_file(), tokenizer, limit=TRIPLES)
        )

    def collect(self) -> dict[str, Tensor]:
        """The same counts as the package finds them, through the files that it writes."""
        with tempfile.TemporaryDirectory() as folder:
            store = dspa.collect(
                self.model,
                self.tokenizer,
                self.triples,
                input_sae=self.input_sae,
                output_sae=self.output_sae,
                input_layer=INPUT_LAYER,
                output_layer=OUTPUT_LAYER,
                out=Path(folder) / "densities",
            )
            widths = {
                "prompt": self.input_sae.d_sae,
                "chosen": self.output_sae.d_sae,
                "rejected": self.output_sae.d_sae,
            }
            return {part: _dense_counts(store, part, d_sae) for part, d_sae in widths.items()}

    @torch.no_grad()
    def plain(self) -> dict[str, Tensor]:
        """Counts `[N, d_sae]` of each part by three whole forward passes: x, x + y+, x + y-. In batches sorted by
        length and of as many rows as the package's own."""
        return {
            "prompt": self._pass([t.prompt for t in self.triples], self._prompt_tokens, self.input_sae, INPUT_LAYER),
            "chosen": self._pass(
                [t.prompt + t.chosen for t in self.triples],
                lambda t: range(len(t.prompt), len(t.prompt) + t.chosen_counted),
                self.output_sae,
                OUTPUT_LAYER,
            ),
            "rejected": self._pass(
                [t.prompt + t.rejected for t in self.triples],
                lambda t: range(len(t.prompt), len(t.prompt) + t.rejected_counted),
                self.output_sae,
                OUTPUT_LAYER,
            ),
        }

    def _prompt_tokens(self, triple: PreferenceTriple) -> Sequence[int]:
        return [i for i, token in enumerate(triple.prompt) if token not in self.triples.uncounted_token_ids]

    def _pass(
        self,
        sequences: Sequence[tuple[int, ...]],
        counted: Callable[[PreferenceTriple], Sequence[int]],
        sae: SparseAutoencoder,
        layer: int,
    ) -> Tensor:
        counts = torch.zeros(len(sequences), sae.d_sae, dtype=torch.int32)
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        for start in range(0, len(order), BatchLimits().triples):
            batch = order[start : start + BatchLimits().triples]
            width = max(len(sequences[i]) for i in batch)
            ids = torch.tensor([[*sequences[i], *[0] * (width - len(sequences[i]))] for i in batch])
            states = self.model(ids, output_hidden_states=True, use_cache=False).hidden_states[layer + 1]
            active = sae.encode(states) > 0
            for row, i in enumerate(batch):
                counts[i] = active[row, list(counted(self.triples[i]))].sum(dim=0)
        return counts


def kept_adapter(folder: Path, sae: SparseAutoencoder, make: Callable[[], AdapterWeights]) -> AdapterWeights:
    """An adapter of the output SAE that a folder holds, or that is made and written there."""
    if not folder.is_dir():
        dspa.FsrlPolicy(make(), sae, OUTPUT_LAYER).save_pretrained(folder)
    return dspa.FsrlPolicy.from_pretrained(folder).adapter


def _dense_counts(store: DensityStore, part: str, d_sae: int) -> Tensor:
    """`[N, d_sae]` counts of a store."""
    rows = [row for shard in store.read() for row in _rows(shard.part(part), d_sae)]
    return torch.stack(rows)


def _rows(sparse: Any, d_sae: int) -> Iterator[Tensor]:
    for start, end in zip(sparse.offsets.tolist(), sparse.offsets[1:].tolist(), strict=False):
        row = torch.zeros(d_sae, dtype=torch.int32)
        row[sparse.latents[start:end].long()] = sparse.counts[start:end].int()
        yield row
