"""SAEs as they are named on the command line."""

from __future__ import annotations

from pathlib import Path

from dspa.errors import InvalidInputError
from dspa.sae.autoencoder import SparseAutoencoder


def load_sae(source: str) -> SparseAutoencoder:
    """An SAE from a folder, from `RELEASE:SAE_ID` of sae-lens' list, or from `HUB_REPOSITORY:FOLDER`.

    Raises:
        InvalidInputError: if the name is none of these.
        DspaError: as `SparseAutoencoder.from_sae_lens`.
    """
    if Path(source).is_dir():
        return SparseAutoencoder.from_sae_lens(source)
    release, separator, sae_id = source.partition(":")
    if not separator:
        raise InvalidInputError(f"SAE {source!r} is no folder; expected a folder or RELEASE:SAE_ID")
    return SparseAutoencoder.from_sae_lens(release, sae_id)
