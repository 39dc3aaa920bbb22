"""`dspa bench`: from its options to a report and its page."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dspa.bench.cases import NEEDS_MAXIMUM, Case, Shape
from dspa.bench.generation import load_model, measure_generation, worst_case_policy
from dspa.bench.operations import Subject, chosen_operations, failed_row
from dspa.bench.page import to_html
from dspa.bench.report import BenchReport, machine, read_bandwidth, token_costs
from dspa.errors import InvalidInputError
from dspa.kernels import available
from dspa.methods.steering_policy import SteeringPolicy
from dspa.transformers_model import text_config
from dspa.util.files import write_atomically
from dspa.util.progress import track
from dspa.util.provenance import Provenance

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
PROMPT_THRESHOLD = 2.5  # of unit variance: 1 latent in 160 is active, about as many as in a trained SAE
ALPHA_OF_NO_EDIT = 0.2  # a policy with alpha 0 edits nothing; its SAEs are measured at the published strength
NEW_TOKENS, GENERATE_ROUNDS = 9, 4


@dataclass(frozen=True)
class BenchOptions:
    """The options of `dspa bench`.

    Attributes:
        d_model, d_sae, dtype: shape of a random SAE; not used with a policy.
        batch: rows of a step.
        tokens: tokens of a prompt, for `encode_density`.
        policy: folder or hub id of a policy whose SAEs are measured.
        model, model_dtype: a model whose generated tokens are measured.
        operations: names of those to measure; None for all.
        backend, device: where.
        seconds, at_least: how long an operation is timed, and its samples at least.

    Raises:
        InvalidInputError: for a value out of range, or a backend or device that is not there.
    """

    d_model: int = 2304
    d_sae: int = 16384
    dtype: str = "bfloat16"
    batch: int = 1
    tokens: int = 256
    policy: str | None = None
    model: str | None = None
    model_dtype: str = "auto"
    operations: list[str] | None = None
    backend: str = "auto"
    device: str = "cpu"
    seconds: float = 12.0
    at_least: int = 7

    def __post_init__(self) -> None:
        for name, least in (("d_model", 2), ("d_sae", 64), ("batch", 1), ("tokens", 3), ("at_least", 2)):
            if getattr(self, name) < least:
                raise InvalidInputError(f"{name} is {getattr(self, name)}; expected at least {least}")
        if self.dtype not in DTYPES:
            raise InvalidInputError(f"dtype is {self.dtype!r}; expected one of {', '.join(DTYPES)}")
        if self.model_dtype not in ("auto", *DTYPES):
            raise InvalidInputError(f"model_dtype is {self.model_dtype!r}; expected one of auto, {', '.join(DTYPES)}")
        if not self.seconds > 0:
            raise InvalidInputError(f"seconds is {self.seconds}; expected more than 0")
        status = {"auto": "available", **available()}
        if status.get(self.backend) != "available":
            reason = status.get(self.backend, f"expected one of {', '.join(status)}")
            raise InvalidInputError(f"backend {self.backend!r} cannot be measured: {reason}")
        kind = self.device.partition(":")[0]
        if kind not in ("cpu", "cuda"):
            raise InvalidInputError(f"device is {self.device!r}; expected cpu, cuda or cuda:N")
        if kind == "cuda" and not torch.cuda.is_available():
            raise InvalidInputError(f"device is {self.device!r}, but torch finds no CUDA GPU; use --device cpu")


def run_bench(options: BenchOptions, *, html: Path | None = None, progress: bool = False) -> BenchReport:
    """Measures what the options say, and writes the page.

    Args:
        options: what to measure.
        html: where the page goes; None for no page.
        progress: whether to draw a progress bar.

    Raises:
        InvalidInputError: for an option that cannot be used, or a page without matplotlib.
        MismatchError: if the policy was made for another model.
        DspaError: if a file cannot be read or written.
    """
    operations = chosen_operations(options.operations)
    policy = None if options.policy is None else SteeringPolicy.from_pretrained(options.policy)
    model = None if options.model is None else load_model(options.model, options.model_dtype, options.device)
    if model is not None and policy is None and text_config(model).hidden_size != options.d_model:
        raise InvalidInputError(
            f"the hidden states of {options.model} are {text_config(model).hidden_size} wide; expected d_model = "
            f"{options.d_model}, pass --d-model"
        )
    subject, name = _random_subject(options) if policy is None else _policy_subject(options, policy)
    measured = [o.measure(subject) for o in track(operations, "Measuring", enabled=progress, unit="operations")]
    rows = tuple(row for row in measured if row is not None)
    bandwidth = read_bandwidth(rows)
    report = BenchReport(name, machine(), Provenance.here(), rows, bandwidth, token_costs(rows, bandwidth))
    if model is not None:
        report = _with_generation(report, model, options, policy)
    if html is not None:
        write_atomically(html, to_html(report).encode())
    return report


def _random_subject(options: BenchOptions) -> tuple[Subject, str]:
    shape = Shape(options.d_model, options.d_sae, DTYPES[options.dtype], options.batch)
    case = Case(shape, options.backend, options.device)
    if NEEDS_MAXIMUM not in case.lists:
        raise InvalidInputError(f"d_sae is {options.d_sae}; too few latents for an edit that needs M_t, expected more")
    input_sae = replace(case.sae, threshold=torch.full_like(case.sae.threshold, PROMPT_THRESHOLD))
    return _subject(options, case, input_sae), f"Random SAE, {shape}"


def _policy_subject(options: BenchOptions, policy: SteeringPolicy) -> tuple[Subject, str]:
    sae, alpha = policy.output_sae.to(options.device), policy.alpha or ALPHA_OF_NO_EDIT
    case = Case.from_sae(sae, options.batch, alpha, options.backend)
    return _subject(options, case, policy.input_sae.to(options.device)), f"Policy {options.policy}, {case.shape}"


def _subject(options: BenchOptions, case: Case, input_sae: Any) -> Subject:
    return Subject(case, input_sae, options.tokens, options.backend, options.seconds, options.at_least)


def _with_generation(
    report: BenchReport, model: Any, options: BenchOptions, policy: SteeringPolicy | None
) -> BenchReport:
    """With the cost of a generated token: under the policy, or one that needs M_t for nearly every token."""
    name = Path(str(options.model)).name
    layer = text_config(model).num_hidden_layers // 2
    try:
        cost = measure_generation(
            model,
            name,
            policy or worst_case_policy(model, layer, options.d_sae, options.device),
            backend=options.backend,
            bandwidth=report.read_bandwidth,
            new_tokens=NEW_TOKENS,
            rounds=GENERATE_ROUNDS,
        )
    except AssertionError as failure:
        return replace(report, rows=(*report.rows, failed_row(name, "generate", failure)))
    return replace(report, generation=cost)
