"""What every test can rely on: Triton interprets its kernels where there is no GPU, and child processes find the
helpers that stand beside the tests. Products of parameters are reduced to pairs of values here, see `pairwise.py`."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from pairwise import pytest_addoption, pytest_collection_modifyitems  # noqa: F401

TESTS = Path(__file__).parent
HELPERS = [str(TESTS), str(TESTS / "kernels")]

os.environ["PYTHONPATH"] = os.pathsep.join([*HELPERS, *filter(None, [os.environ.get("PYTHONPATH")])])
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton looks at it once, when it is imported
