"""Tests that run vLLM are collected where it is installed; `make test-vllm` makes such an environment."""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from vllm_plugin.engines import Case

collect_ignore = [] if importlib.util.find_spec("vllm") else ["test_answers.py", "test_offline.py", "test_server.py"]

os.environ["VLLM_NO_USAGE_STATS"] = "1"  # nothing is sent anywhere
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")  # two engines at once would be bound to the same cores


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Case:
    from vllm_plugin.engines import tiny_case

    return tiny_case("llama", tmp_path_factory.mktemp("llama"))
