"""The stages of a study, in order. A stage that was interrupted goes on where it was; one that is done is skipped."""

from __future__ import annotations

import importlib
import json
import resource
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from dspa.util.files import write_atomically
from dspa.util.provenance import Provenance
from study.settings import Run


@dataclass(frozen=True)
class Stage:
    """One step of at most half an hour.

    Attributes:
        name: what `--stage` says.
        function: `module:function` of this package; called with the `Run`, and with `argument` if there is one.
        minutes: expected at full size on two cores.
        argument: a task.
    """

    name: str
    function: str
    minutes: int
    argument: str = ""

    def run(self, run: Run) -> None:
        module, function = self.function.split(":")
        arguments = (self.argument,) if self.argument else ()
        getattr(importlib.import_module(f"study.{module}"), function)(run, *arguments)


STAGES: tuple[Stage, ...] = (
    Stage("model", "model:prepare", 1),
    Stage("prompts", "prompts:write", 1),
    Stage("samples", "triples:sample", 12),
    Stage("triples", "triples:write", 1),
    Stage("texts", "sae_training:write_texts", 1),
    Stage("activations", "sae_training:collect_activations", 15),
    Stage("saes", "sae_training:train", 15),
    Stage("fit-conditional", "fits:fit", 10, "conditional"),
    Stage("fit-concise", "fits:fit", 10, "concise"),
    Stage("dpo-conditional", "fits:train_dpo", 20, "conditional"),
    Stage("dpo-concise", "fits:train_dpo", 20, "concise"),
    Stage("simpo-conditional", "fits:train_simpo", 16, "conditional"),
    Stage("simpo-concise", "fits:train_simpo", 16, "concise"),
    Stage("choose-conditional", "choice:choose", 12, "conditional"),
    Stage("choose-concise", "choice:choose", 12, "concise"),
    Stage("heldout-static-conditional", "heldout:measure_static", 10, "conditional"),
    Stage("heldout-static-concise", "heldout:measure_static", 10, "concise"),
    Stage("heldout-conditional", "heldout:measure", 16, "conditional"),
    Stage("heldout-concise", "heldout:measure", 16, "concise"),
    Stage("curve", "curve:measure", 12),
    Stage("costs", "costs:measure", 5),
    Stage("report", "report:write", 1),
)


def run_stages(run: Run, names: Sequence[str] = ()) -> None:
    """Runs the stages that are not done, all of them or those of some names."""
    for stage in STAGES:
        done = run.folder / "stages" / f"{stage.name}.json"
        if done.is_file() or (names and stage.name not in names):
            continue
        print(f"{time.strftime('%H:%M:%S')} {stage.name}", flush=True)
        started, processor = time.perf_counter(), time.process_time()
        stage.run(run)
        found = {
            "seconds": time.perf_counter() - started,
            "processor_seconds": time.process_time() - processor,
            "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
            "provenance": asdict(Provenance.here()),
        }
        done.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(done, json.dumps(found).encode())
        print(f"{time.strftime('%H:%M:%S')} {stage.name}: {found['seconds']:.0f} s", flush=True)
