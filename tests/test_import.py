"""`import dspa` is cheap and brings nothing along that steering with a saved policy does not need."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import dspa

HEAVY = {"sae_lens", "datasets", "matplotlib", "transformer_lens", "pyarrow", "pandas", "wandb", "plotly"}
DECLARED = {"numpy", "safetensors", "huggingface_hub"}
PROGRAM = """
import json, sys
loaded = {}
def note(stage):
    loaded[stage] = sorted({name.partition(".")[0] for name in sys.modules})
import dspa
note("the package")
import torch, transformers
note("torch and transformers")
dspa.steer; dspa.SteeringPolicy
note("steering")
from dspa import *
dspa.kernels.available()
note("every name and backend")
print(json.dumps(loaded))
"""


@pytest.fixture(scope="module")
def loaded() -> dict[str, set[str]]:
    """The packages that a fresh interpreter has loaded, after each stage of the program."""
    finished = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True)
    return {stage: set(names) for stage, names in json.loads(finished.stdout).items()}


def test_import_alone_loads_neither_torch_nor_transformers(loaded: dict[str, set[str]]) -> None:
    assert "dspa" in loaded["the package"]
    assert not {"torch", "transformers"} & loaded["the package"]


def test_steering_loads_no_package_beside_torch_and_transformers(loaded: dict[str, set[str]]) -> None:
    """But what they load themselves later, all of it small."""
    assert loaded["steering"] - loaded["torch and transformers"] - set(sys.stdlib_module_names) <= {"dspa", *DECLARED}


def test_nothing_heavy_is_ever_imported(loaded: dict[str, set[str]]) -> None:
    assert "torch" in loaded["every name and backend"]
    assert not HEAVY & loaded["every name and backend"]


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
