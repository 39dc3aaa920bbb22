"""Counters of policies for `/metrics`: written by the process that computes, read by the one that serves."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dspa.vllm_plugin.continuous import PolicyCounts

FOLDER_VARIABLE = "DSPA_VLLM_COUNTERS"  # of the environment, for the processes that compute
INTERVAL = 1.0  # seconds between two writings
HELP = {
    "seen": "Tokens at positions that a policy edits.",
    "edited": "Tokens whose hidden state a policy changed.",
    "nonfinite": "Tokens that a policy left alone because of NaN or Inf.",
}


def publish(folder: Path, engine: int, counts: Callable[[], Mapping[str, PolicyCounts]]) -> threading.Thread:
    """From now on writes the counters of an engine to a file of the folder, whole, whenever they have changed."""

    def run() -> None:
        written: Mapping[str, PolicyCounts] = {}
        while folder.is_dir():
            found = counts()
            if found != written and write_counts(folder, engine, found):
                written = found
            stop.wait(INTERVAL)

    stop = threading.Event()
    thread = threading.Thread(target=run, name="dspa-counters", daemon=True)
    thread.start()
    return thread


def write_counts(folder: Path, engine: int, counts: Mapping[str, PolicyCounts]) -> bool:
    """Replaces the file of an engine. Returns whether it could: the server may have gone, or the disk be full."""
    new = folder / f"{engine}.new"
    try:
        new.write_text(json.dumps({name: asdict(each) for name, each in counts.items()}))
        os.replace(new, folder / f"{engine}.json")
    except OSError:
        return False
    return True


class PolicyCollector:
    """What prometheus asks for the counters, added up over the engines of a server."""

    def __init__(self, folder: Path, policies: Sequence[str]) -> None:
        self._folder = folder
        self._policies = tuple(policies)

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily

        engines = [json.loads(path.read_text()) for path in sorted(self._folder.glob("*.json"))]
        for name, text in HELP.items():
            family = CounterMetricFamily(f"dspa_tokens_{name}", text, labels=["policy"])
            for policy in self._policies:
                family.add_metric([policy], sum(engine.get(policy, {}).get(name, 0) for engine in engines))
            yield family
