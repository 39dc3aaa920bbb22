"""Checkpoints of a training run: parameters, the optimiser's state and the history, without pickle."""

from __future__ import annotations

import math
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dspa.errors import CorruptFileError, InvalidInputError, MismatchError
from dspa.methods.fsrl.records import EvaluationRecord, StepRecord
from dspa.util.files import TensorFolder

PREFIX = "checkpoint-"


@dataclass(frozen=True)
class _Config:
    """`config.json`."""

    run: dict[str, Any]
    step: int
    best_step: int
    stopped: bool
    steps: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    optimizer: dict[str, dict[str, Any]]


FOLDER = TensorFolder("fsrl_checkpoint", 1, _Config)


@dataclass(eq=False)
class TrainingState:
    """Where a run is.

    Attributes:
        step: finished steps.
        best_step: the step of the best evaluation.
        stopped: whether it ended early.
        steps, evaluations: the history.
        tensors: of a loaded checkpoint: the parameters, and as `best.<name>` those of the best evaluation.
        optimizer: of a loaded checkpoint: for each parameter, the optimiser's tensors and numbers.
    """

    step: int = 0
    best_step: int = 0
    stopped: bool = False
    steps: list[StepRecord] = field(default_factory=list)
    evaluations: list[EvaluationRecord] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    optimizer: dict[int, dict[str, Any]] = field(default_factory=dict)

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Loads the saved state into a fresh optimiser."""
        current = optimizer.state_dict()
        optimizer.load_state_dict({"state": self.optimizer, "param_groups": current["param_groups"]})


def save(
    out: Path, run: dict[str, Any], state: TrainingState, tensors: dict[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    """Writes a checkpoint, and then removes older ones.

    Raises:
        DspaError: if it cannot be written.
    """
    numbers: dict[str, dict[str, Any]] = {}
    tensors = dict(tensors)
    for index, values in optimizer.state_dict()["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{index}.{name}"] = value
            else:
                numbers.setdefault(str(index), {})[name] = value
    config = {
        "run": run,
        "step": state.step,
        "best_step": state.best_step,
        "stopped": state.stopped,
        "steps": [asdict(record) for record in state.steps],
        "evaluations": [_without_nan(asdict(record)) for record in state.evaluations],
        "optimizer": numbers,
    }
    newest = out / f"{PREFIX}{state.step}"
    FOLDER.write(newest, config, tensors)
    for older in _checkpoints(out):
        if older != newest:
            shutil.rmtree(older, ignore_errors=True)


def load_newest(out: Path, run: dict[str, Any]) -> TrainingState | None:
    """The newest checkpoint that is whole; None if there is none.

    Raises:
        MismatchError: if it belongs to another run.
    """
    for folder in sorted(_checkpoints(out), key=_step_of, reverse=True):
        try:
            config, tensors = FOLDER.read(folder)
        except (CorruptFileError, InvalidInputError):
            continue  # written when the run was killed
        _check_run(folder, config.run, run)
        optimizer: dict[int, dict[str, Any]] = {int(index): dict(v) for index, v in config.optimizer.items()}
        parameters: dict[str, Tensor] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".", 2)
                optimizer.setdefault(int(index), {})[name] = tensor
            else:
                parameters[key] = tensor
        return TrainingState(
            config.step,
            config.best_step,
            config.stopped,
            [StepRecord(**record) for record in config.steps],
            [EvaluationRecord(**_with_nan(record)) for record in config.evaluations],
            parameters,
            optimizer,
        )
    return None


def _check_run(folder: Path, found: dict[str, Any], run: dict[str, Any]) -> None:
    def flat(values: dict[str, Any]) -> dict[str, Any]:
        listed = {**{k: v for k, v in values.items() if k != "options"}, **values["options"]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in listed.items()}

    ours, theirs = flat(run), flat(found)
    differing = [name for name in ours if ours[name] != theirs.get(name)]
    if differing:
        raise MismatchError(
            f"{folder} belongs to a run with other {', '.join(differing)}; use another folder, or remove it"
        )


def _checkpoints(out: Path) -> list[Path]:
    return [each for each in out.glob(f"{PREFIX}*") if each.name.removeprefix(PREFIX).isdigit()]


def _step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def _without_nan(record: dict[str, Any]) -> dict[str, Any]:
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in record.items()}


def _with_nan(record: dict[str, Any]) -> dict[str, Any]:
    return {name: math.nan if value is None else value for name, value in record.items()}
