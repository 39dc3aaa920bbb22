"""`dspa eval`: lm-eval's tasks on a model under a policy, beside the model as it is."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

from dspa.errors import InvalidInputError
from dspa.evaluation.lm_eval_model import SteeredLM
from dspa.methods.policy import Policy
from dspa.methods.saved_policy import load_policy
from dspa.online.summary import SteeringSummary
from dspa.transformers_model import load_language_model


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate; the fields are the options of `dspa eval`."""

    model: str
    tasks: Sequence[str]
    policy: str | None = None
    alpha: float | None = None
    compare: bool = True
    include_path: Path | None = None
    limit: int | None = None
    num_fewshot: int | None = None
    batch_size: str = "8"
    apply_chat_template: bool = False
    dtype: str = "auto"
    device: str = "cpu"


@dataclass(frozen=True)
class Metric:
    """One number of one task.

    Attributes:
        task: the task or group.
        metric: as lm-eval names it, with its filter where it has one.
        unsteered, steered: the value; None where it was not evaluated.
        unsteered_error, steered_error: its standard error; None where lm-eval computes none.
    """

    task: str
    metric: str
    unsteered: float | None
    steered: float | None
    unsteered_error: float | None
    steered_error: float | None


@dataclass(frozen=True)
class Evaluation:
    """What `dspa eval` prints.

    Attributes:
        metrics: by task.
        summary: what was edited meanwhile; None without a policy.
    """

    metrics: list[Metric]
    summary: SteeringSummary | None

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "metrics": [asdict(metric) for metric in self.metrics],
            "summary": None if self.summary is None else asdict(self.summary),
        }


def run_eval(options: EvalOptions) -> Evaluation:
    """Evaluates.

    Raises:
        InvalidInputError: if the model, the policy or a task cannot be found.
        MismatchError: if the policy belongs to another model.
    """
    if not re.fullmatch(r"auto(:\d+(\.\d+)?)?|[1-9]\d*", options.batch_size):
        raise InvalidInputError(f"batch size is {options.batch_size!r}; expected a positive number or auto")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    manager, unknown = _task_manager(options.tasks, options.include_path)
    if unknown or not options.tasks:
        raise InvalidInputError(
            f"task {unknown[0]!r} is not known to lm-eval; its own file's folder can be given with --include-path"
            if unknown
            else "no task was given; pass --tasks NAME"
        )
    changed = {} if options.alpha is None else {"alpha": options.alpha}
    policy = None if options.policy is None else load_policy(options.policy, **changed)
    model, tokenizer = load_language_model(options.model, options.dtype, options.device)

    def evaluated(under: Policy | None) -> tuple[dict[str, Any], SteeringSummary | None]:
        scored = SteeredLM(model, under, tokenizer=tokenizer, batch_size=options.batch_size)
        try:
            evaluate: Any = lm_eval.simple_evaluate  # its decorator hides its signature
            run = evaluate(
                scored,
                tasks=list(options.tasks),
                task_manager=manager,
                limit=options.limit,
                num_fewshot=options.num_fewshot,
                apply_chat_template=options.apply_chat_template,
                log_samples=False,
            )
            return run["results"], None if scored.steering is None else scored.steering.summary()
        finally:
            scored.remove()

    unsteered = evaluated(None)[0] if policy is None or options.compare else {}
    steered, summary = ({}, None) if policy is None else evaluated(policy)
    return Evaluation(_metrics(unsteered, steered), summary)


def _task_manager(tasks: Sequence[str], include_path: Path | None) -> tuple[TaskManager, list[str]]:
    """What knows the tasks, and the tasks it does not know. Reading lm-eval's own thousands takes many seconds, so the
    files given are tried alone first."""
    own = None if include_path is None else str(include_path)
    unknown: list[str] = []
    manager = TaskManager(include_path=own, include_defaults=False)
    for defaults in (False, True):
        if defaults:
            manager = TaskManager(include_path=own)
        unknown = [task for task in tasks if task not in manager.all_tasks and not Path(task).is_file()]
        if not unknown:
            break
    return manager, unknown


def _metrics(unsteered: dict[str, Any], steered: dict[str, Any]) -> list[Metric]:
    metrics = []
    for task, values in (steered or unsteered).items():
        for name, value in values.items():
            metric, _, filtered = name.partition(",")
            if metric.endswith("_stderr") or not isinstance(value, (int, float)) or "," not in name:
                continue
            error = f"{metric}_stderr,{filtered}"
            shown = metric if filtered == "none" else f"{metric} ({filtered})"
            metrics.append(
                Metric(
                    task,
                    shown,
                    _number(unsteered.get(task, {}).get(name)),
                    _number(steered.get(task, {}).get(name)),
                    _number(unsteered.get(task, {}).get(error)),
                    _number(steered.get(task, {}).get(error)),
                )
            )
    return metrics


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and value == value else None


def print_evaluation(console: Any, evaluation: Evaluation) -> None:
    """As a table."""
    from rich.table import Table

    table = Table("task", "metric", "unsteered", "steered", title="lm-eval")
    for metric in evaluation.metrics:
        table.add_row(
            metric.task,
            metric.metric,
            _with_error(metric.unsteered, metric.unsteered_error),
            _with_error(metric.steered, metric.steered_error),
        )
    console.print(table)
    if evaluation.summary is not None:
        console.print(str(evaluation.summary))


def _with_error(value: float | None, error: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" + ("" if error is None else f" ± {error:.4f}")
