"""Ctrl-C at every line of attaching, detaching, selecting and generating.

Each run of a scenario is interrupted at one line event in the package's files. Afterwards the model has to be free and,
once nothing is attached, to generate what it generated before anything was attached, to the last bit.
"""

from __future__ import annotations

import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from naive_generation import is_clean
from tiny_models import prompts, tiny_model, tiny_policy
from torch import Tensor

import dspa
from dspa.online.steering import Steering, steer
from soak.deadline import Deadline

PACKAGE = str(Path(dspa.__file__).parent)
ENTRIES = ("remove", "__exit__")
"""Functions that an interrupt can end before their first statement has run: then nothing was done, and they are called
again. No Python code can protect its own first line."""


class Interrupt:
    """Raises KeyboardInterrupt at the n-th line event inside the package."""

    def __init__(self, at: int) -> None:
        self.at = at
        self.seen = 0
        self.place: tuple[str, str, int] | None = None
        self.on_entry = False

    def __enter__(self) -> Interrupt:
        sys.settrace(self._call)
        return self

    def __exit__(self, *error: object) -> None:
        sys.settrace(None)

    def _call(self, frame: FrameType, event: str, argument: object) -> Any:
        return self._line if frame.f_code.co_filename.startswith(PACKAGE) else None

    def _line(self, frame: FrameType, event: str, argument: object) -> Any:
        if event == "line":
            self.seen += 1
            if self.seen == self.at:
                code = frame.f_code
                self.place = (Path(code.co_filename).name, code.co_name, frame.f_lineno)
                self.on_entry = code.co_name in ENTRIES and frame.f_lineno <= _first_statement(code)
                sys.settrace(None)
                raise KeyboardInterrupt
        return self._line


def _first_statement(code: CodeType) -> int:
    """The line of a function's first statement."""
    lines = sorted({line for _, _, line in code.co_lines() if line is not None and line > code.co_firstlineno})
    return lines[0]


class Subject:
    """A model with two policies, and what it generates with each and with none."""

    def __init__(self) -> None:
        self.model: Any = tiny_model("llama", dtype=torch.float32)
        dtype = torch.float32
        self.policies = {
            "a": tiny_policy(self.model, dtype=dtype),
            "b": tiny_policy(self.model, dtype=dtype, alpha=0.1, seed=1),
        }
        self.inputs = torch.tensor(prompts((4,)))
        self.plain = self.generate()
        with steer(self.model, self.policies["a"]):
            self.steered = self.generate()
        assert not torch.equal(self.plain, self.steered)

    def generate(self) -> Tensor:
        out = self.model.generate(
            self.inputs,
            attention_mask=torch.ones_like(self.inputs),
            max_new_tokens=2,
            do_sample=False,
            return_dict_in_generate=True,
            output_logits=True,
        )
        return torch.stack(out.logits)

    def generate_elsewhere(self) -> Tensor:
        """In another thread, where a steering comes and goes first if nothing is attached: what a lock that was left
        behind would stop."""
        found: list[Tensor] = []

        def run() -> None:
            if is_clean(self.model):
                steer(self.model, self.policies["a"]).remove()
            found.append(self.generate())

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(60)
        assert found, "a generate call in another thread does not return, or fails"
        return found[0]


def attach(subject: Subject) -> tuple[Steering | None, Callable[[], object]]:
    return None, lambda: steer(subject.model, subject.policies, select="a")


def detach(subject: Subject) -> tuple[Steering | None, Callable[[], object]]:
    steering = steer(subject.model, subject.policies["a"])
    return steering, steering.remove


def leave(subject: Subject) -> tuple[Steering | None, Callable[[], object]]:
    steering = steer(subject.model, subject.policies["a"])
    steering.remove()

    def run() -> None:
        with steering:
            pass

    return steering, run


def select(subject: Subject) -> tuple[Steering | None, Callable[[], object]]:
    steering = steer(subject.model, subject.policies, select="b")
    return steering, lambda: steering.select("a")


def generating(subject: Subject) -> tuple[Steering | None, Callable[[], object]]:
    steering = steer(subject.model, subject.policies["a"])
    return steering, subject.generate


SCENARIOS = {f.__name__: f for f in (attach, detach, leave, select, generating)}


def interrupted(subject: Subject, name: str, at: int) -> Interrupt | None:
    """Runs a scenario with an interrupt, and checks the model; None if the scenario has fewer lines."""
    steering, run = SCENARIOS[name](subject)
    interrupt = Interrupt(at)
    result: Any = None
    try:
        with interrupt:
            result = run()
    except KeyboardInterrupt:
        pass
    where = f"{name}, interrupted at {interrupt.place}"
    if interrupt.place is None:
        for each in (steering, result):
            if isinstance(each, Steering):
                each.remove()
        return None
    if name == "generating":
        assert torch.equal(subject.generate(), subject.steered), where
        assert torch.equal(subject.generate_elsewhere(), subject.steered), where
    if name in ("attach", "detach", "leave"):
        assert is_clean(subject.model) or interrupt.on_entry, where
    if steering is not None:
        if name == "select":
            steering.select("a")
            assert torch.equal(subject.generate(), subject.steered), where
        steering.remove()
    assert is_clean(subject.model), where
    assert torch.equal(subject.generate_elsewhere(), subject.plain), where
    if steering is not None:
        with steering:
            if name == "select":
                steering.select("a")
            assert torch.equal(subject.generate(), subject.steered), where
        assert is_clean(subject.model), where
    return interrupt


def run(every: int = 1, *, until: Deadline | None = None) -> dict[str, int]:
    """Interrupts each scenario at every line, or at every so many, and counts."""
    torch.set_num_threads(1)
    subject, until = Subject(), until or Deadline()
    counts: dict[str, int] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in SCENARIOS:
            at, found, on_entry = 1, 0, 0
            while not until.passed and (interrupt := interrupted(subject, name, at)) is not None:
                found += 1
                on_entry += interrupt.on_entry
                at += every
            counts[f"interrupts, {name}"] = found
            if on_entry:
                counts[f"of these on entry, and called again ({name})"] = on_entry
    return counts
