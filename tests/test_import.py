"""`import dspa` is cheap and brings nothing along that steering with a saved policy does not need."""

from __future__ import annotations

import statistics
import subprocess
import sys

import pytest

import dspa

HEAVY = ("sae_lens", "datasets", "matplotlib", "transformer_lens", "pyarrow", "pandas", "wandb", "plotly")
REPEATS = 3
LIMIT = 1.3


def run(program: str) -> str:
    """What a fresh interpreter prints."""
    finished = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, timeout=120)
    return finished.stdout.strip()


@pytest.mark.parametrize(
    "program",
    [
        "import dspa",
        "import dspa; [getattr(dspa, name) for name in dspa.__all__]",
        "from dspa import *",
        "import dspa; dspa.kernels.available()",
    ],
)
def test_nothing_heavy_is_imported(program: str) -> None:
    modules = run(f"{program}\nimport sys; print(*sorted({{name.partition('.')[0] for name in sys.modules}}))").split()
    assert "dspa" in modules
    assert not set(HEAVY) & set(modules)


def test_import_alone_loads_neither_torch_nor_transformers() -> None:
    loaded = run("import dspa, sys; print(*[name for name in ('torch', 'transformers') if name in sys.modules])")
    assert loaded == ""


@pytest.mark.parametrize("name", dspa.__all__)
def test_every_public_name_is_there(name: str) -> None:
    value = getattr(dspa, name)
    assert value is getattr(dspa, name)
    assert getattr(value, "__name__", name).removeprefix("dspa.") == name
    assert name in dir(dspa)


def test_public_names_are_sorted_and_others_are_refused() -> None:
    assert sorted(dspa.__all__) == dspa.__all__
    with pytest.raises(AttributeError, match="module 'dspa' has no attribute 'nothing'"):
        _ = dspa.nothing


def test_import_takes_hardly_longer_than_torch_and_transformers() -> None:
    """Medians of interleaved fresh processes, in processor time, so that a busy machine does not decide. That
    `import dspa` alone costs next to nothing, a test above says."""
    programs = {
        "baseline": "import torch, transformers",
        "used": "import dspa; dspa.steer; dspa.SteeringPolicy",
    }
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(REPEATS):
        for name, program in programs.items():
            taken = run(f"import time; start = time.process_time()\n{program}\nprint(time.process_time() - start)")
            seconds[name].append(float(taken))
    ratios = {
        name: statistics.median(times) / statistics.median(seconds["baseline"]) for name, times in seconds.items()
    }
    print(ratios)
    assert max(ratios.values()) <= LIMIT, ratios
