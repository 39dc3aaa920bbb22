"""Which policies an engine serves, and which blocks of the prefix cache their requests share."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import tiny_model, tiny_policy

from dspa import VectorPolicy
from dspa.errors import CorruptFileError, InvalidInputError
from dspa.online.policy_groups import alike
from dspa.vllm_plugin.prefix_keys import block_key
from dspa.vllm_plugin.settings import EngineSettings, ServedPolicy, named_sources, read_policies, requested_policy


@pytest.mark.parametrize(
    ("environment", "configured", "found"),
    [
        (None, None, {}),
        ("", {}, {}),
        ("a=/x, b=/y=z,", None, {"a": "/x", "b": "/y=z"}),
        ("a=/x", {"b": "/y"}, {"a": "/x", "b": "/y"}),
        ("a=/x", {"a": "/x"}, {"a": "/x"}),
        ("/x", None, "expected NAME=FOLDER"),
        ("a b=/x", None, "expected letters"),
        ("a=/x", {"a": "/y"}, "give each its own"),
        (None, ["a=/x"], "expected NAME: FOLDER"),
        (None, {"a@b": "/x"}, "expected letters"),
    ],
)
def test_policies_are_named(environment: str | None, configured: Any, found: dict[str, str] | str) -> None:
    if isinstance(found, str):
        with pytest.raises(InvalidInputError, match=found):
            named_sources(environment, configured)
    else:
        assert named_sources(environment, configured) == found


@pytest.mark.parametrize(
    ("extra_args", "found"),
    [
        (None, None),
        ({"other": 1}, None),
        ({"dspa": "a"}, "a"),
        ({"dspa": "c"}, InvalidInputError),
        ({"dspa": 3}, InvalidInputError),
        ({"dspa": "/a/folder"}, InvalidInputError),
    ],
)
def test_a_request_names_a_policy_that_is_served(extra_args: Any, found: Any) -> None:
    if found is InvalidInputError:
        with pytest.raises(InvalidInputError, match="expected one of a, b"):
            requested_policy(extra_args, {"a": 1, "b": 2})
    else:
        assert requested_policy(extra_args, {"a": 1, "b": 2}) == found


def test_settings_reach_other_processes_as_json(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    policy = tiny_policy(model, dtype=torch.float32)
    policies = {
        "a": policy,
        "weaker": policy.with_options(alpha=0.1),
        "other": tiny_policy(model, dtype=torch.float32, seed=3),
        "bos": tiny_policy(model, dtype=torch.float32, uncounted_token_ids=()),
        "v": VectorPolicy(torch.ones(24), layer=3),
    }
    settings = read_policies({name: str(each.save_pretrained(tmp_path / name)) for name, each in policies.items()})
    assert settings.layers == (1, 2, 3)
    assert EngineSettings.from_json(settings.as_json()) == settings
    served = settings.policies
    assert served["a"].reading == served["weaker"].reading
    assert len({served[name].reading for name in ("a", "other", "bos", "v")}) == 4
    assert len({each.fingerprint for each in served.values()}) == len(policies)
    loaded: dict[str, Any] = settings.load(torch.device("cpu"))
    assert loaded.keys() == policies.keys()
    assert loaded["a"].input_sae is loaded["weaker"].input_sae
    assert loaded["a"].input_sae is not loaded["other"].input_sae
    density = torch.rand(2, loaded["a"].input_sae.d_sae, generator=torch.Generator().manual_seed(0))
    for name in ("a", "weaker", "other"):
        assert alike(loaded[name].select(density), policies[name].select(density))  # type: ignore[union-attr]
    elsewhere: Any = settings.load(torch.device("meta"))["a"]  # looked up where prompts are read
    assert elsewhere.conditional_map.matrix.values.is_meta


@pytest.mark.parametrize("changed", ["alpha", "edit_positions", "removed"])
def test_policies_are_those_that_the_engine_was_started_with(tmp_path: Path, changed: str) -> None:
    """A worker loads them minutes later, or days."""
    policy = tiny_policy(tiny_model("llama", dtype=torch.float32), dtype=torch.float32)
    folder = policy.save_pretrained(tmp_path / "a")
    settings = read_policies({"a": str(folder)})
    settings.load(torch.device("cpu"))
    shutil.rmtree(folder)
    if changed == "removed":
        with pytest.raises(InvalidInputError):
            settings.load(torch.device("cpu"))
        return
    options: Any = {"alpha": 0.1} if changed == "alpha" else {"edit_positions": "generated"}
    policy.with_options(**options).save_pretrained(folder)
    with pytest.raises(CorruptFileError, match="not the one that vLLM was started with"):
        settings.load(torch.device("cpu"))
    assert read_policies({"a": str(folder)}).token != settings.token


def test_equal_policies_are_the_same_in_any_folder(tmp_path: Path) -> None:
    policy = tiny_policy(tiny_model("llama", dtype=torch.float32), dtype=torch.float32)
    here, there = (policy.save_pretrained(tmp_path / node) for node in ("a", "b"))
    assert read_policies({"a": str(here)}).token == read_policies({"a": str(there)}).token
    assert read_policies({"a": str(here)}).token != read_policies({"b": str(here)}).token


def test_configurations_that_no_policy_was_read_for_are_refused() -> None:
    assert EngineSettings.from_json(None) is None
    with pytest.raises(InvalidInputError, match="EngineArgs"):
        EngineSettings.from_json({"a": "/folder"})


def test_an_edit_of_all_positions_by_the_whole_prompt_is_refused(tmp_path: Path) -> None:
    model = tiny_model("llama", dtype=torch.float32)
    folder = tiny_policy(model, dtype=torch.float32, edit_positions="all").save_pretrained(tmp_path / "a")
    with pytest.raises(InvalidInputError, match="in pieces"):
        read_policies({"a": str(folder)})


OWN = "fingerprint 10"  # belongs to the policy and to prompts of 10 tokens


@pytest.mark.parametrize(
    ("positions", "reading", "end", "key"),
    [
        ("from_last_prompt", "r", 8, "r"),
        ("from_last_prompt", "r", 9, "r"),
        ("from_last_prompt", "r", 10, OWN),
        ("from_last_prompt", "r", 16, OWN),
        ("from_last_prompt", None, 9, None),
        ("from_last_prompt", None, 10, OWN),
        ("generated", "r", 10, "r"),
        ("generated", "r", 11, OWN),
        ("generated", None, 10, None),
        ("all", None, 9, "fingerprint"),
        ("all", None, 10, OWN),
    ],
)
def test_blocks_are_shared_where_no_edit_reaches(
    positions: Any, reading: str | None, end: int, key: str | None
) -> None:
    policy = ServedPolicy("folder", "fingerprint", positions, 2, None if reading is None else 1, reading)
    assert block_key(policy, 10, end) == key
