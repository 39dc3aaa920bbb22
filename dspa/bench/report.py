"""What `dspa bench` found, as one record: rows of times, and the cost of a generated token."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass

import torch

from dspa.bench.generation import GenerationCost
from dspa.bench.measurements import Row
from dspa.bench.operations import READ
from dspa.kernels import available
from dspa.util.machine import processor_name
from dspa.util.provenance import Provenance


@dataclass(frozen=True)
class TokenCost:
    """What a steered token costs in one column of `token_step`, for the whole batch, in ms.

    Attributes:
        name: of the column.
        bytes_read: of the encoder.
        predicted: these bytes by the measured read bandwidth.
        measured: the median.
    """

    name: str
    bytes_read: int
    predicted: float
    measured: float


@dataclass(frozen=True)
class BenchReport:
    """A whole report.

    Attributes:
        subject: what was measured: a shape or a policy.
        machine: processor, threads, versions.
        provenance: versions of the package and of what it builds on.
        rows: times of the operations; a row whose results were wrong is there as failed, without a time.
        read_bandwidth: GB/s at which the encoder is streamed; None where `token_step` was not measured.
        token_costs: predicted and measured cost of the edit itself.
        generation: the same within `generate` of a model; None without one.
    """

    subject: str
    machine: str
    provenance: Provenance
    rows: tuple[Row, ...]
    read_bandwidth: float | None
    token_costs: tuple[TokenCost, ...]
    generation: GenerationCost | None = None

    @property
    def failed(self) -> bool:
        return any(row.failed is not None for row in self.rows)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_bandwidth(rows: tuple[Row, ...]) -> float | None:
    """GB/s of the column that only streams the encoder."""
    columns = (row.column(READ) for row in rows)
    return next((c.bytes_read / c.measured.value / 1e6 for c in columns if c is not None and c.bytes_read), None)


def token_costs(rows: tuple[Row, ...], bandwidth: float | None) -> tuple[TokenCost, ...]:
    """Of every column of `token_step` that reads a known number of bytes of the encoder, the bare reading aside."""
    return tuple(
        TokenCost(column.name, column.bytes_read, column.bytes_read / bandwidth / 1e6, column.measured.value)
        for row in rows
        for column in row.columns
        if bandwidth and row.group == "token_step" and column.bytes_read is not None and column.name != READ
    )


def machine() -> str:
    """What the numbers depend on beside the code."""
    library = torch.ops.dspa.cpu_capability() if available()["cpu"] == "available" else "no C++ library"
    return (
        f"{processor_name()}, {torch.get_num_threads()} threads, {library}, torch {torch.__version__}, "
        f"Python {platform.python_version()}"
    )
