"""What programs share that measure on the organism's validation prompts, at one number of triples, and go on where
their file ends."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from head_to_head import MOST_TRIPLES, TRIPLES_SEED, Bench, Settings

import dspa
from dspa.organism import load_model, sae_folder
from dspa.organism.language import draw_triples
from dspa.util.provenance import Provenance

Report = dict[str, Any]
Run = Callable[[Bench, int, Path, Path], Report]  # the organism, triples, the file, the folder of trained adapters


def opened(out: Path, bench: Bench, triples: int) -> Report:
    """What the file holds, with the settings, the provenance and the rows of this run."""
    report: Report = json.loads(out.read_text()) if out.is_file() else {}
    settings = {"triples": triples, "prompts": bench.settings.validation_prompts, "seed": bench.settings.seed}
    if report and report["settings"] != settings:
        raise SystemExit(f"{out} holds results of other settings: {report['settings']}; expected {settings}")
    report.setdefault("rows", {})
    return report | {"settings": settings, "provenance": asdict(Provenance.here())}


def study(
    description: str | None, run: Run, lines: Callable[[Report], list[str]], arguments: Sequence[str] | None
) -> None:
    """Reads the command line, runs, and prints lines."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; what it holds is kept")
    parser.add_argument("--triples", type=int, default=250)
    parser.add_argument("--prompts", type=int, default=240, help="validation prompts")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--adapters", type=Path, help="folder in which trained adapters are kept for a later run")
    options = parser.parse_args(arguments)
    model, tokenizer = load_model()
    saes = [dspa.SparseAutoencoder.from_sae_lens(sae_folder(which)) for which in ("input", "output")]
    drawn = draw_triples(np.random.default_rng(TRIPLES_SEED), MOST_TRIPLES)
    torch.set_grad_enabled(True)
    with tempfile.TemporaryDirectory() as folder:
        settings = Settings(0, options.prompts, options.seed)
        bench = Bench(model, tokenizer, saes[0], saes[1], settings, drawn, Path(folder))
        report = run(bench, options.triples, options.out, options.adapters or Path(folder) / "adapters")
    print("\n".join(lines(report)))
