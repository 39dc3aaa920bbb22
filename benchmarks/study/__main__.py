"""python -m study [--quick] [--stage NAME ...]: runs what of the study is not done."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

import torch

from study.settings import FULL, QUICK, Run
from study.stages import STAGES, run_stages


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="study", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="every stage at toy size")
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="the folder of all runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch, where one stage runs alone")
    parser.add_argument("--jobs", type=int, default=2, help="stages that run beside each other, with one thread each")
    parser.add_argument("--stage", action="append", default=[], choices=[stage.name for stage in STAGES])
    options = parser.parse_args(arguments)
    settings = QUICK if options.quick else FULL
    torch.set_num_threads(options.threads)
    run_stages(Run(settings, options.runs / settings.name), options.stage, jobs=options.jobs)


if __name__ == "__main__":
    main()
