"""What is added up and compared: FLOPs by term, the cost of a method by stage, memory traffic, and a machine's limits.

The records of formulas, counts and measurements alike. Pure arithmetic: no tensor, no model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Mode = Literal["dense", "lazy", "screened"]
MODES: tuple[Mode, ...] = ("dense", "lazy", "screened")

COLLECTED, PUBLISHED, RAHF, DPO, FSRL = "DSPA as collected here", "DSPA as published", "RAHF-SCIT", "DPO", "FSRL"


@dataclass(frozen=True)
class Flops:
    """FLOPs by term."""

    linear: float = 0.0
    attention: float = 0.0
    sae: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.linear + other.linear, self.attention + other.attention, self.sae + other.sae)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.linear * factor, self.attention * factor, self.sae * factor)

    def total(self, attention: bool = True, sae: bool = True) -> float:
        return self.linear + (self.attention if attention else 0.0) + (self.sae if sae else 0.0)


@dataclass(frozen=True)
class Stage:
    """A step of a method, per preference triple."""

    name: str
    flops: Flops


@dataclass(frozen=True)
class MethodCost:
    """What aligning with a method costs, per preference triple.

    Attributes:
        method: its name.
        formula: the linear term, as it is published or as it is run.
        stages: what it consists of.
    """

    method: str
    formula: str
    stages: tuple[Stage, ...]

    @property
    def flops(self) -> Flops:
        return sum((stage.flops for stage in self.stages), Flops())


@dataclass(frozen=True)
class MeasuredRow:
    """A quantity counted while a model with weights ran, beside its formula."""

    what: str
    counted: Flops
    modelled: Flops


@dataclass(frozen=True)
class Work:
    """FLOPs, and bytes that go through memory."""

    flops: float
    bytes: float

    def seconds(self, machine: Machine) -> float:
        """The roofline's bound: whichever of arithmetic and memory takes longer."""
        return max(self.flops / machine.flops_per_second, self.bytes / machine.bytes_per_second)


@dataclass(frozen=True)
class Machine:
    """What a machine can do at most; measured, or from a data sheet.

    Attributes:
        name: processor or device.
        flops_per_second: of matrix products.
        bytes_per_second: of reading memory.
        steps: measured times of steering one token.
    """

    name: str
    flops_per_second: float
    bytes_per_second: float
    steps: tuple[MeasuredStep, ...] = ()


@dataclass(frozen=True)
class MeasuredStep:
    """Median time of one `token_step`, batch 1."""

    d_model: int
    d_sae: int
    mode: Mode
    seconds: float
