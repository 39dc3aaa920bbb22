"""`dspa tune`: options as they are typed."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

from dspa.errors import InvalidInputError
from dspa.kernels import EditKind
from dspa.methods.conditional_map import Estimator, GateRule
from dspa.methods.steering_policy import SteeringPolicy
from dspa.offline.preferences import load_preferences
from dspa.sae.named import load_sae
from dspa.transformers_model import load_language_model
from dspa.tuning.objective import Guard, Reward
from dspa.tuning.report import TuningReport
from dspa.tuning.settings import TuningGrid
from dspa.tuning.tune import TuningOptions, tune
from dspa.util.texts import read_texts


@dataclass(frozen=True)
class TuneCommand:
    """What to tune; the fields are the options of `dspa tune`."""

    model: str
    policy: str
    preferences: str
    out: Path
    alpha: str = ""
    edit: str = ""
    k_prompt: str = ""
    k_diff: str = ""
    gate_percentile: str = ""
    gate_rule: str = ""
    estimator: str = ""
    features: str = ""
    penalty: str = ""
    entries_per_side: str = ""
    densities: Path | None = None
    output_sae: str | None = None
    reward: str | None = None
    margin: bool = True
    neutral: Path | None = None
    max_kl: float = 0.1
    max_perplexity: float = 1.05
    report_share: float = 0.5
    first: int = 8
    keep: float = 0.25
    full_grid: bool = False
    rank: bool = True
    folds: int = 5
    tries: int | None = None
    limit: int | None = None
    chat: bool | None = None
    max_new_tokens: int = 128
    batch_size: int = 32
    seed: int = 0
    dtype: str = "auto"
    device: str = "cpu"


def run_tune(command: TuneCommand, *, progress: bool) -> TuningReport:
    """Tunes.

    Raises:
        DspaError: as `dspa.tune`, and for words that cannot be read.
    """
    grid = _grid(command)
    options = TuningOptions(
        margin=command.margin,
        guard=Guard(command.max_kl, command.max_perplexity),
        report_share=command.report_share,
        first=command.first,
        keep=command.keep,
        full_grid=command.full_grid,
        rank=command.rank,
        folds=command.folds,
        tries=command.tries,
        max_new_tokens=command.max_new_tokens,
        rows_at_once=command.batch_size,
        seed=command.seed,
    )
    reward = None if command.reward is None else load_function(command.reward)
    neutral = [] if command.neutral is None else read_texts(command.neutral, "text")
    model, tokenizer = load_language_model(command.model, command.dtype, command.device)
    triples = load_preferences(command.preferences, tokenizer, limit=command.limit, chat=command.chat)
    return tune(
        model,
        tokenizer,
        SteeringPolicy.from_pretrained(command.policy),
        triples,
        out=command.out,
        grid=grid,
        densities=command.densities,
        output_sae=None if command.output_sae is None else load_sae(command.output_sae),
        reward=reward,
        neutral=neutral,
        options=options,
        progress=progress,
    )


def load_function(name: str) -> Reward:
    """The function that `FILE.py:NAME` or `MODULE:NAME` names.

    Raises:
        InvalidInputError: if there is none.
    """
    source, _, attribute = name.rpartition(":")
    try:
        if source.endswith(".py"):
            spec = importlib.util.spec_from_file_location(Path(source).stem, source)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(source)
        found = getattr(module, attribute)
    except Exception as error:  # whatever the user's file raises
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise InvalidInputError(
            f"{name!r} names no function ({type(error).__name__}: {reason}); expected FILE.py:NAME or MODULE:NAME"
        ) from error
    if not callable(found):
        raise InvalidInputError(f"{name!r} is a {type(found).__name__}; expected a function of prompt and response")
    return cast("Reward", found)


def _grid(command: TuneCommand) -> TuningGrid:
    """Fields that are not named have the grid's default."""
    values: dict[str, Any] = {}
    for name, kind, known in (
        ("alpha", float, None),
        ("edit", str, get_args(EditKind)),
        ("k_prompt", int, None),
        ("k_diff", int, None),
        ("gate_percentile", float, None),
        ("gate_rule", str, get_args(GateRule)),
        ("estimator", str, get_args(Estimator)),
        ("features", int, None),
        ("penalty", float, None),
        ("entries_per_side", int, None),
    ):
        words = getattr(command, name)
        if words:
            values[name] = _values(name, words, kind, known)
    return TuningGrid(**values)


def _values(name: str, words: str, kind: type, known: Sequence[str] | None) -> tuple[Any, ...]:
    found: list[Any] = []
    for word in words.split(","):
        try:
            found.append(kind(word.strip()))
        except ValueError as error:
            raise InvalidInputError(f"{name} has {word!r}; expected numbers, separated by commas") from error
        if known is not None and found[-1] not in known:
            raise InvalidInputError(f"{name} has {word!r}; expected some of {', '.join(known)}")
    return tuple(found)
