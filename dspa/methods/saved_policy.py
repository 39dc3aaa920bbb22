"""Reading a policy folder of any kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dspa.errors import CorruptFileError, InvalidInputError
from dspa.methods import steering_policy, vector_policy
from dspa.methods.fsrl import policy as fsrl_policy
from dspa.methods.hub import local_folder
from dspa.util.files import CONFIG
from dspa.util.records import read_json

SavedPolicy = steering_policy.SteeringPolicy | fsrl_policy.FsrlPolicy | vector_policy.VectorPolicy

KINDS = (steering_policy.FOLDER, fsrl_policy.FOLDER, vector_policy.FOLDER)


def load_policy(source: str | Path, **options: Any) -> SavedPolicy:
    """The policy in a folder, or on the hub if there is no such folder, by the kind its configuration names.

    Args:
        source: a folder that a policy's `save_pretrained` wrote, or a hub repository's id.
        options: fields to change, as that policy's `from_pretrained` takes them.

    Raises:
        InvalidInputError: if there is no policy, or an option is unknown or out of range.
        CorruptFileError: if a file is truncated, altered, or holds values out of bounds.
    """
    folder = local_folder(source, [pattern for kind in KINDS for pattern in kind.patterns])
    if not (folder / CONFIG).is_file():
        raise InvalidInputError(f"{source} is not a policy folder: {CONFIG} is missing")
    try:
        kind = read_json(folder / CONFIG)["kind"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptFileError(f"{folder / CONFIG} cannot be read as a policy configuration ({error})") from error
    if kind == fsrl_policy.FOLDER.kind:
        return fsrl_policy.FsrlPolicy.from_pretrained(folder, **options)
    if kind == vector_policy.FOLDER.kind:
        if options:
            raise InvalidInputError(f"a vector policy is read without options; found {next(iter(options))!r}")
        return vector_policy.VectorPolicy.from_pretrained(folder)
    return steering_policy.SteeringPolicy.from_pretrained(folder, **options)
