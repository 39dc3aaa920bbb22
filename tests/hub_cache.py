"""A Hugging Face hub cache on disk: small weights under the names and in the formats of the real repositories.

Nothing here touches the network. To read such a cache, either start a process with `offline_environment(cache)`, or
call `use_hub_cache(cache, monkeypatch)`: huggingface_hub reads its environment variables once, at import, and looks its
constants up at every call.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import Tensor

GEMMA_SCOPE_RELEASE = "gemma-scope-2b-pt-res-canonical"
GEMMA_SCOPE_REPO = "google/gemma-scope-2b-pt-res"
GEMMA_SCOPE_AVERAGE_L0 = {7: 69, 24: 73}  # of the canonical 16k SAE of a layer

QWEN3_REPO = "adamkarvonen/qwen3-8b-saes"


def offline_environment(cache: Path) -> dict[str, str]:
    """This process' environment, with the hub at `cache` (an HF_HOME) and no network."""
    return os.environ | {"HF_HOME": str(cache), "HF_HUB_CACHE": str(cache / "hub"), "HF_HUB_OFFLINE": "1"}


def use_hub_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point this process' huggingface_hub at `cache` (an HF_HOME), without network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def write_repo(cache: Path, repo_id: str, files: dict[str, bytes], repo_type: str = "model") -> Path:
    """Write `files` (by path) as the main revision of a repository and return its snapshot folder."""
    repository = cache / "hub" / f"{repo_type}s--{repo_id.replace('/', '--')}"
    commit = hashlib.sha1(repo_id.encode()).hexdigest()  # any 40 hex digits; the same for every call on a repository
    for name in ("refs", "blobs", f"snapshots/{commit}"):
        (repository / name).mkdir(parents=True, exist_ok=True)
    (repository / "refs/main").write_text(commit)
    for path, content in files.items():
        blob = repository / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = repository / "snapshots" / commit / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return repository / "snapshots" / commit


def random_weights(d_model: int, d_sae: int, seed: int) -> dict[str, Tensor]:
    """float32 weights of a small SAE with unit decoder rows, in sae-lens' names and orientation."""
    generator = torch.Generator().manual_seed(seed)
    W_dec = torch.nn.functional.normalize(torch.randn(d_sae, d_model, generator=generator), dim=-1)
    return {
        "W_enc": W_dec.T.contiguous() + 0.1 * torch.randn(d_model, d_sae, generator=generator) / d_model**0.5,
        "W_dec": W_dec,
        "b_enc": 0.1 * torch.randn(d_sae, generator=generator),
        "b_dec": 0.1 * torch.randn(d_model, generator=generator),
        "threshold": 0.5 + torch.rand(d_sae, generator=generator),
    }


def write_gemma_scope(cache: Path, layer: int, d_model: int, d_sae: int, seed: int) -> dict[str, Tensor]:
    """Gemma Scope's `params.npz` for `layer_{layer}/width_16k/canonical` (layers 7 and 24); returns the weights."""
    weights = random_weights(d_model, d_sae, seed)
    arrays: dict[str, Any] = {name.replace("W_", "w_"): tensor.numpy() for name, tensor in weights.items()}
    file = io.BytesIO()
    np.savez(file, **arrays)
    folder = f"layer_{layer}/width_16k/average_l0_{GEMMA_SCOPE_AVERAGE_L0[layer]}"
    write_repo(cache, GEMMA_SCOPE_REPO, {f"{folder}/params.npz": file.getvalue()})
    return weights


def write_qwen3_batchtopk(
    cache: Path, layer: int, d_model: int, d_sae: int, seed: int
) -> tuple[str, dict[str, Tensor]]:
    """dictionary_learning's `ae.pt` and `config.json` of a BatchTopK SAE; returns its folder and the weights."""
    weights = random_weights(d_model, d_sae, seed)
    weights["threshold"] = torch.full((d_sae,), 0.75)
    state = {
        "encoder.weight": weights["W_enc"].T.contiguous(),
        "decoder.weight": weights["W_dec"].T.contiguous(),
        "encoder.bias": weights["b_enc"],
        "b_dec": weights["b_dec"],
        "k": torch.tensor(80),
        "threshold": torch.tensor(0.75),
    }
    file = io.BytesIO()
    torch.save(state, file)
    trainer = {
        "dict_class": "BatchTopKSAE",
        "activation_dim": d_model,
        "dict_size": d_sae,
        "k": 80,
        "layer": layer,
        "lm_name": "Qwen/Qwen3-8B",
    }
    config = {"trainer": trainer, "buffer": {"ctx_len": 1024}}
    folder = f"saes_Qwen_Qwen3-8B_batch_top_k/resid_post_layer_{layer}/trainer_2"
    files = {f"{folder}/ae.pt": file.getvalue(), f"{folder}/config.json": json.dumps(config).encode()}
    write_repo(cache, QWEN3_REPO, files)
    return folder, weights


def sae_lens_files(weights: dict[str, Tensor], config: dict[str, object]) -> dict[str, bytes]:
    """sae-lens' own two files."""
    return {"cfg.json": json.dumps(config).encode(), "sae_weights.safetensors": save(weights)}
