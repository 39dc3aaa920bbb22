"""Labels of latents, from a file in the format in which neuronpedia.org exports explanations."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from dspa.auditing.records import LatentClass
from dspa.errors import InvalidInputError, MismatchError
from dspa.util.records import parse_json


@dataclass(frozen=True)
class Label:
    """What a latent is said to be; its class where the file names one."""

    text: str
    latent_class: LatentClass | None


def read_labels(file: str | Path, latents: int | None = None, neuronpedia_id: str | None = None) -> dict[int, Label]:
    """Labels by latent.

    The file is what neuronpedia.org exports, as JSON (a list, or an object with a list of `explanations`) or as JSON
    Lines, gzip-compressed or not: objects with an `index` (the latent) and a `description`. A `class`, which that
    format does not have, may be added: discourse, style or content. Of several descriptions of a latent the first
    counts. `modelId` and `layer` say of which SAE an entry is; other fields are not read.

    Args:
        file: where it is.
        latents: how many the SAE has; None to take any.
        neuronpedia_id: the SAE's id there, such as `gemma-2-2b/24-gemmascope-res-16k`; None to take any.

    Raises:
        InvalidInputError: if the file cannot be read, or an entry is none of these.
        MismatchError: if an entry is of another SAE.
    """
    path = Path(file)
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if content[:2] == b"\x1f\x8b" else content
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidInputError(f"labels {path} cannot be read: {error}") from error
    labels: dict[int, Label] = {}
    for place, entry in _entries(content, path):
        latent, label = _label(entry, place)
        if latents is not None and latent >= latents:
            raise MismatchError(f"{place} labels latent {latent}; this SAE's are 0 to {latents - 1}")
        source = "/".join(str(entry[name]) for name in ("modelId", "layer") if entry.get(name) is not None)
        if neuronpedia_id is not None and "/" in source and source != neuronpedia_id:
            raise MismatchError(f"{place} is of {source}; expected labels of {neuronpedia_id}")
        labels.setdefault(latent, label)
    if not labels:
        raise InvalidInputError(f"{path} holds no label; expected objects with an index and a description")
    return labels


def _entries(content: bytes, path: Path) -> Iterator[tuple[str, Any]]:
    try:
        whole = parse_json(content)
    except ValueError:
        for number, line in enumerate(content.splitlines(), start=1):
            if line.strip():
                try:
                    yield f"{path}:{number}", parse_json(line)
                except ValueError as error:
                    raise InvalidInputError(f"{path}:{number} is not JSON ({error})") from error
        return
    if isinstance(whole, dict) and "index" not in whole:
        whole = whole.get("explanations")
    entries = [whole] if isinstance(whole, dict) else whole
    if not isinstance(entries, list):
        raise InvalidInputError(f"{path} holds no list of labels; expected objects with an index and a description")
    for number, entry in enumerate(entries):
        yield f"{path}, entry {number}", entry


def _label(entry: Any, place: str) -> tuple[int, Label]:
    index = entry.get("index") if isinstance(entry, dict) else None
    text = entry.get("description") if isinstance(entry, dict) else None
    number = int(index) if isinstance(index, str) and index.isdecimal() else index  # exports have both
    if type(number) is not int or number < 0 or not isinstance(text, str):
        raise InvalidInputError(f"{place} is no label; expected an object with an index and a description")
    named = entry.get("class")
    if named is not None and named not in get_args(LatentClass):
        raise InvalidInputError(f"{place} has class {str(named)[:40]!r}; expected {', '.join(get_args(LatentClass))}")
    return number, Label(text.strip(), cast("LatentClass | None", named))
