"""The stages of a study, in order. A stage that was interrupted goes on where it was; one that is done is skipped.

Stages of one group, as those of the two tasks, do not need each other: with more than one job they run beside each
other, in processes with one thread each. Two such processes do more than two threads of one.
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import resource
import time
import traceback
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dspa.util.files import make_folder, write_atomically
from dspa.util.provenance import Provenance
from study.settings import QUICK, SHARDS, TASKS, Run


@dataclass(frozen=True)
class Stage:
    """One step of at most half an hour.

    Attributes:
        name: what `--stage` says.
        function: `module:function` of this package; called with the `Run`, and with `argument` if there is one.
        minutes: expected at full size on two cores.
        argument: a task, a shard or an SAE.
        group: stages with the same one follow each other, and do not need each other; "" for a stage by itself.
        alone: it times something; nothing runs beside it at full size.
    """

    name: str
    function: str
    minutes: int
    argument: str = ""
    group: str = ""
    alone: bool = False

    def run(self, run: Run) -> None:
        module, function = self.function.split(":")
        arguments = (self.argument,) if self.argument else ()
        getattr(importlib.import_module(f"study.{module}"), function)(run, *arguments)

    def record(self, run: Run) -> Path:
        """What the stage took; it is done if this is there."""
        return run.folder / "stages" / f"{self.name}.json"

    def interrupted(self, run: Run) -> Path:
        """What its passes took that failed or were interrupted, but for one that was killed."""
        return run.folder / "stages" / f"{self.name}.interrupted"


STAGES: tuple[Stage, ...] = (
    Stage("model", "model:prepare", 1),
    Stage("prompts", "prompts:write", 1),
    *(Stage(f"samples-{shard}", "triples:sample", 9, str(shard), "samples") for shard in range(SHARDS)),
    Stage("triples", "triples:write", 1),
    Stage("texts", "sae_training:write_texts", 1),
    *(
        Stage(f"activations-{shard}", "sae_training:collect_activations", 14, str(shard), "activations")
        for shard in range(SHARDS)
    ),
    Stage("sae-input", "sae_training:train", 24, "input", "saes"),
    Stage("sae-output", "sae_training:train", 24, "output", "saes"),
    Stage("sae-report", "sae_training:write_report", 3, group="fits"),
    *(Stage(f"fit-{task}", "fits:fit", 7, task, "fits") for task in TASKS),
    *(Stage(f"dpo-{task}", "fits:train_dpo", 6, task, "fits") for task in TASKS),
    *(Stage(f"simpo-{task}", "fits:train_simpo", 3, task, "fits") for task in TASKS),
    *(Stage(f"choose-{task}", "choice:choose", 14, task, "choice") for task in TASKS),
    Stage("costs", "costs:measure", 8, group="chosen", alone=True),
    *(Stage(f"heldout-{task}", "heldout:measure", 26, task, "chosen") for task in TASKS),
    *(Stage(f"heldout-static-{task}", "heldout:measure_static", 17, task, "chosen") for task in TASKS),
    *(Stage(f"diagnosis-{task}", "diagnosis:measure", 6, task, "chosen") for task in TASKS),
    *(Stage(f"curve-{task}", "curve:measure", 5, task, "chosen") for task in TASKS),
    Stage("report", "report:write", 1),
)

IMPORTED = (
    "transformers.models.llama.modeling_llama",
    "trl",
    "peft",
    "sae_lens",
)
"""What the server of processes imports once; most stages need it, and each would take seconds for it."""


def run_stages(run: Run, names: Sequence[str] = (), *, jobs: int = 1) -> None:
    """Runs the stages that are not done, all of them or those of some names.

    Raises:
        SystemExit: if the folder holds a study of other sizes, or a stage fails in a process of its own; what the
            process wrote says why.
    """
    _check_settings(run)
    quick = run.settings.name == QUICK.name
    for _, group in itertools.groupby(STAGES, key=lambda stage: stage.group or stage.name):
        waiting = [stage for stage in group if not stage.record(run).is_file() and (not names or stage.name in names)]
        here = [stage for stage in waiting if stage.alone and not quick]
        together = [stage for stage in waiting if stage not in here]
        if jobs == 1 or len(together) == 1:
            here, together = [*here, *together], []
        for stage in here:
            _run_here(run, stage)
        if together:
            _run_beside_each_other(run, together, jobs)


def _check_settings(run: Run) -> None:
    """Writes the sizes at the first call; what is in the folder was made with them."""
    now = json.loads(json.dumps(asdict(run.settings)))
    if not run.settings_file.is_file():
        write_atomically(make_folder(run.folder) / run.settings_file.name, json.dumps(now, indent=1).encode())
    before = json.loads(run.settings_file.read_text())
    if differing := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
        raise SystemExit(
            f"{run.folder} holds a study with other settings ({', '.join(differing)}); choose another folder by --runs"
        )


def _run_here(run: Run, stage: Stage) -> None:
    print(f"{time.strftime('%H:%M:%S')} {stage.name}", flush=True)
    make_folder(stage.record(run).parent)
    file = stage.interrupted(run)
    before = json.loads(file.read_text()) if file.is_file() else {"passes": 0, "seconds": 0.0, "processor_seconds": 0.0}
    started, processor = time.perf_counter(), time.process_time()

    def spent() -> dict[str, float]:
        """In all passes."""
        return {
            "passes": before["passes"] + 1,
            "seconds": before["seconds"] + time.perf_counter() - started,
            "processor_seconds": before["processor_seconds"] + time.process_time() - processor,
        }

    try:
        stage.run(run)
    except BaseException:
        write_atomically(file, json.dumps(spent()).encode())
        raise
    found = {
        **spent(),
        "threads": torch.get_num_threads(),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "provenance": asdict(Provenance.here()),
    }
    write_atomically(stage.record(run), json.dumps(found).encode())
    file.unlink(missing_ok=True)
    print(f"{time.strftime('%H:%M:%S')} {stage.name}: {found['seconds']:.0f} s", flush=True)


def _run_beside_each_other(run: Run, stages: Sequence[Stage], jobs: int) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(IMPORTED))
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        running = {stage.name: pool.submit(_run_with_one_thread, run, stage) for stage in stages}
        try:
            wait(running.values())
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # or else those that have not begun would run
            raise
    failed = {name: error for name, future in running.items() if (error := future.exception()) is not None}
    for error in failed.values():
        traceback.print_exception(error)
    if failed:
        raise SystemExit(f"stage {', '.join(failed)} failed; what is done is kept, and `make study` goes on there")


def _run_with_one_thread(run: Run, stage: Stage) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # of what it starts
    torch.set_num_threads(1)
    _run_here(run, stage)
