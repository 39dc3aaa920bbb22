"""Vectors of other steering libraries, as policies: steering-vectors, repeng, and mappings from layers to vectors.

Both libraries number decoder layers from 0 and add their vector to a layer's output, as `VectorPolicy` does, at every
position; hence edit_positions "all". Neither library is needed; a `.gguf` file is read by the package gguf.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspa.errors import CorruptFileError, InvalidInputError
from dspa.methods.policy import EditPositions
from dspa.methods.vector_policy import VectorPolicy

ARCHITECTURE, PREFIX = "controlvector", "direction."


def import_vectors(
    source: Any, *, scale: float = 1.0, edit_positions: EditPositions = "all"
) -> dict[int, VectorPolicy]:
    """One policy for each layer that has a vector, by layer.

    Args:
        source: a `steering_vectors.SteeringVector`, a `repeng.ControlVector`, a mapping from layers to vectors
            (tensors or arrays), or the path of a `.gguf` file of `ControlVector.export_gguf`.
        scale: factor of the vectors.
        edit_positions: as in `VectorPolicy`.

    Raises:
        InvalidInputError: if it is none of these, or holds vectors of another place than a decoder layer's output.
        CorruptFileError: if a file cannot be read.
    """
    if isinstance(source, (str, Path)):
        found: Any = _read_gguf(Path(source))
    elif isinstance(source, Mapping):
        found = source
    elif isinstance(getattr(source, "layer_activations", None), Mapping):
        place = getattr(source, "layer_type", "decoder_block")
        if place != "decoder_block":
            raise InvalidInputError(f"the vectors belong to {place}; expected decoder_block, the residual stream")
        found = source.layer_activations
    else:
        found = getattr(source, "directions", None)
    if not isinstance(found, Mapping) or not found:
        raise InvalidInputError(
            f"{type(source).__name__} holds no vectors by layer; expected a SteeringVector, a ControlVector, a mapping "
            "or a .gguf file"
        )
    return {
        int(layer): VectorPolicy(_vector(found[layer]), int(layer), scale, edit_positions=edit_positions)
        for layer in sorted(found)
    }


def _vector(values: Any) -> Tensor:
    tensor = torch.as_tensor(values).detach().clone()
    return tensor if tensor.is_floating_point() else tensor.float()


def _read_gguf(path: Path) -> dict[int, Tensor]:
    try:
        import gguf
    except ImportError as error:
        raise InvalidInputError("reading a .gguf file needs the package gguf: pip install 'dspa[vectors]'") from error
    if not path.is_file():
        raise InvalidInputError(f"{path}: no such file")
    try:
        reader = gguf.GGUFReader(path)
        architecture = reader.get_field("general.architecture")
        name = "" if architecture is None else bytes(architecture.parts[-1]).decode()
        found = {
            int(tensor.name.removeprefix(PREFIX)): torch.tensor(tensor.data)
            for tensor in reader.tensors
            if tensor.name.startswith(PREFIX)
        }
    except (ValueError, KeyError, IndexError, OSError) as error:
        raise CorruptFileError(f"{path} cannot be read as a .gguf file ({error})") from error
    if name != ARCHITECTURE:
        raise InvalidInputError(f"{path} holds a {name or 'model'}; expected a {ARCHITECTURE}")
    return found
