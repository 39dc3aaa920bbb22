"""Where a sparse autoencoder comes from and where in a model it belongs."""

from __future__ import annotations

from dataclasses import dataclass

NEURONPEDIA = "https://www.neuronpedia.org"


@dataclass(frozen=True, kw_only=True)
class SaeMetadata:
    """Where an SAE comes from and where in a model it belongs. A field is None where the source does not say.

    Attributes:
        release, sae_id: the pair it was loaded by, None for folders and live objects.
        model_name: the model it was trained on, in the source's spelling.
        hook_name: the activation it was trained on, in the source's spelling.
        layer: the decoder block (0-based) whose output it reads and edits. The input of block L (`hook_resid_pre`)
            is the output of block L - 1, so such an SAE has layer L - 1.
        neuronpedia_id: its id on neuronpedia.org.
        architecture: how it was trained: standard, gated, jumprelu, topk, batchtopk or matryoshka_batchtopk.
    """

    release: str | None = None
    sae_id: str | None = None
    model_name: str | None = None
    hook_name: str | None = None
    layer: int | None = None
    neuronpedia_id: str | None = None
    architecture: str | None = None

    def neuronpedia_page(self, latent: int) -> str | None:
        """The address of a latent's page on neuronpedia.org; None where the source names no id."""
        return f"{NEURONPEDIA}/{self.neuronpedia_id}/{latent}" if self.neuronpedia_id else None
