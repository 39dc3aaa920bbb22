"""A policy on the hub: what is uploaded, what the card says, and that it comes back as it was. No hub is asked."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
import torch
from altered_records import tensors_file
from huggingface_hub.errors import HfHubHTTPError
from naive_generation import generate
from tiny_models import prompts, tiny_model, tiny_policy

from dspa.errors import DspaError
from dspa.methods.model_card import AUDITED_LATENTS
from dspa.methods.steering_policy import SteeringPolicy
from dspa.online.steering import steer
from dspa.sae.metadata import SaeMetadata

NEURONPEDIA_ID = "gemma-2-2b/24-gemmascope-res-16k"


@pytest.fixture
def policy() -> SteeringPolicy:
    policy = tiny_policy(tiny_model("llama"))
    metadata = SaeMetadata(release="a-release", sae_id="layer_2", model_name="a-model", neuronpedia_id=NEURONPEDIA_ID)
    return replace(policy, output_sae=replace(policy.output_sae, metadata=metadata))


class FakeHub:
    """Takes uploads into a folder, as HfApi would to a repository."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.created: dict[str, Any] = {}

    def create_repo(self, api: Any, repo_id: str, **options: Any) -> None:
        self.created[repo_id] = {**options, "token": api.token}

    def upload_folder(
        self, api: Any, *, repo_id: str, folder_path: str, commit_message: str, delete_patterns: list[str]
    ) -> Any:
        assert repo_id in self.created
        for pattern in delete_patterns:
            for path in (self.folder / repo_id).glob(pattern):
                path.unlink()
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        return SimpleNamespace(commit_url=f"https://hub/{repo_id}/commit/1", message=commit_message)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub(tmp_path)
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda api, *a, **k: hub.create_repo(api, *a, **k))
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", lambda api, **k: hub.upload_folder(api, **k))
    return hub


def test_what_is_uploaded_comes_back(policy: SteeringPolicy, hub: FakeHub) -> None:
    assert policy.push_to_hub("me/mine", private=True, token="t") == "https://hub/me/mine/commit/1"
    assert hub.created == {"me/mine": {"private": True, "exist_ok": True, "token": "t"}}
    folder = hub.folder / "me/mine"
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", tensors_file(folder).name]
    loaded = SteeringPolicy.from_pretrained(folder)
    density = torch.rand(3, policy.input_sae.d_sae, generator=torch.Generator().manual_seed(0))
    assert torch.equal(loaded.select(density).latents, policy.select(density).latents)
    assert loaded.output_sae.metadata.neuronpedia_id == NEURONPEDIA_ID
    assert (folder / "README.md").read_text() == policy.model_card("me/mine")


def test_a_second_upload_replaces_the_tensors_of_the_first(policy: SteeringPolicy, hub: FakeHub) -> None:
    policy.push_to_hub("me/mine")
    earlier = tensors_file(hub.folder / "me/mine")
    conditional_map = policy.conditional_map
    changed = replace(conditional_map, mean_difference=-conditional_map.mean_difference)
    replace(policy, conditional_map=changed).push_to_hub("me/mine")
    assert tensors_file(hub.folder / "me/mine") != earlier
    loaded = SteeringPolicy.from_pretrained(hub.folder / "me/mine").conditional_map
    assert torch.equal(loaded.mean_difference, changed.mean_difference)


def test_a_refusal_of_the_hub_is_one_line(policy: SteeringPolicy, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        response: Any = httpx.Response(403, request=httpx.Request("GET", "http://x"))
        raise HfHubHTTPError("403 Forbidden\nmore", response=response)

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", refuse)
    with pytest.raises(DspaError) as error:
        policy.push_to_hub("me/mine")
    assert "cannot be uploaded to me/mine: 403 Forbidden" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line",
    [
        "library_name: dspa",
        "# me/mine",
        'dspa.SteeringPolicy.from_pretrained("me/mine")',
        "| alpha | 0.5 |",
        "| edit | both |",
        "| k_prompt, k_diff | 5, 12 |",
        "| output SAE | after layer 2: a-release layer_2, trained on a-model, jumprelu, 56 latents |",
        "| input SAE | after layer 1: source not recorded, jumprelu, 40 latents |",
        "| counted tokens | BOS not counted, template counted, EOS counted |",
        "and 36 more latents.",
    ],
)
def test_the_card_names_every_choice(policy: SteeringPolicy, line: str) -> None:
    assert line in policy.model_card("me/mine")
    assert policy.model_card("me/mine").startswith("---\n")


def test_the_audit_by_the_map(policy: SteeringPolicy) -> None:
    """Counted again from the dense map."""
    dense = policy.conditional_map.to_dense().double()
    lines = [line for line in policy.model_card("me/mine").splitlines() if NEURONPEDIA_ID in line]
    assert len(lines) == AUDITED_LATENTS
    for latent, line in enumerate(lines):  # every row of this map names every latent: ties go by number
        mean = dense[:, latent].mean()
        link = f"[{latent}](https://www.neuronpedia.org/{NEURONPEDIA_ID}/{latent})"
        assert line == f"| {link} | {dense.shape[0]}, mean {mean:+.4f} |"


def test_the_audit_by_what_was_edited(policy: SteeringPolicy) -> None:
    model = tiny_model("llama")
    with steer(model, policy) as steering:
        generate(model, prompts((6, 5)), 6)
        summary = steering.summary()
    card = policy.model_card("me/mine", summary)
    assert f"on 2 prompts: {summary.tokens_edited} of 12 tokens were edited" in card
    first = summary.latents[0]
    assert f"| [{first.latent}](https://www.neuronpedia.org/{NEURONPEDIA_ID}/{first.latent}) | {first.tokens} |" in card
    assert "Not measured on prompts" not in card
