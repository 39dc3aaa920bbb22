"""Records on disk: JSON that carries a checksum of its own and is checked against the dataclass that describes it."""

from __future__ import annotations

import functools
import hashlib
import json
import math
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from dspa.errors import DspaError

CHECKSUM = "checksum"
LARGEST_RECORD = 2**24  # bytes; so many brackets take a third of a GiB once they are read

RecordT = TypeVar("RecordT")


def encode_record(record: dict[str, Any]) -> bytes:
    """The record as JSON, with a checksum over all of it."""
    return (json.dumps({**record, CHECKSUM: checksum_of(record)}, indent=1, allow_nan=False) + "\n").encode()


def checksum_of(record: dict[str, Any]) -> str:
    """SHA-256 (hex) of what a record says, however it is spaced and ordered."""
    canonical = json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()


def read_json(path: Path) -> Any:
    """The JSON in a file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is larger than any record, not JSON, nested too deeply, or holds a number without a value.
    """
    with path.open("rb") as file:
        content = file.read(LARGEST_RECORD + 1)
    if len(content) > LARGEST_RECORD:
        raise ValueError(f"it is larger than {LARGEST_RECORD} bytes")
    return parse_json(content)


def parse_json(content: bytes) -> Any:
    """JSON of finite numbers; raises ValueError for everything else."""
    try:
        return json.loads(content, parse_constant=_refuse, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def check_checksum(record: dict[str, Any]) -> dict[str, Any]:
    """The record without its checksum; raises ValueError if that is missing or another."""
    rest = {name: value for name, value in record.items() if name != CHECKSUM}
    if CHECKSUM not in record:
        raise ValueError(f"{CHECKSUM} is missing")
    if record[CHECKSUM] != checksum_of(rest):
        raise ValueError("its checksum differs, so it was altered")
    return rest


def validated(schema: type[RecordT], record: object) -> RecordT:
    """The record as an instance of a dataclass: every field there, of its type without conversion, and no other.

    Raises:
        ValueError: naming the first field that is not so.
    """
    from pydantic import ValidationError

    try:
        return _adapter(schema).validate_json(json.dumps(record), strict=True, extra="forbid")
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise ValueError(f"{place}: {first['msg']}" if place else first["msg"]) from error
    except DspaError as error:  # of the dataclass itself
        raise ValueError(str(error)) from error


@functools.cache
def _adapter(schema: type[Any]) -> Any:
    from pydantic import TypeAdapter  # here, so that importing this package stays light

    return TypeAdapter(schema)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"it holds {constant}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds the number {text[:20]}, which is too large")
    return value
