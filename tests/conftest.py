"""What every test can rely on: Triton interprets its kernels where there is no GPU, and child processes find the
helpers that stand beside the tests."""

from __future__ import annotations

import os
from pathlib import Path

import torch

TESTS = Path(__file__).parent
HELPERS = [str(TESTS), str(TESTS / "kernels")]

os.environ["PYTHONPATH"] = os.pathsep.join([*HELPERS, *filter(None, [os.environ.get("PYTHONPATH")])])
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # triton looks at it once, when it is imported
