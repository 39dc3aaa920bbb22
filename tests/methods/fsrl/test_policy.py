"""An FSRL policy: what it refuses, that a saved one is the same one, and the original code's files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from altered_records import change_record
from fsrl_cases import tiny_adapter, tiny_fsrl_policy
from safetensors.torch import save_file
from tiny_models import D_MODEL, D_SAE_OUT, OUTPUT_LAYER, prompts, tiny_model, tiny_sae
from torch import Tensor

import dspa
from dspa import FsrlPolicy
from dspa.errors import CorruptFileError, InvalidInputError, MismatchError
from dspa.kernels import EditList, TokenStats
from dspa.methods.fsrl.adapter_edit import AdapterEdit, AdapterEditor
from dspa.methods.fsrl.original_format import load_original_adapter
from dspa.methods.fsrl.policy import OPTIONS
from dspa.transformers_model import ModelFingerprint

CPU = torch.device("cpu")


def editor(edit: AdapterEdit) -> AdapterEditor:
    found = edit.editor({"a": edit}, CPU, "reference", None)
    assert isinstance(found, AdapterEditor)
    found.begin_prompt(["a", "a"])
    return found


def states(positions: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(2, positions, D_MODEL, dtype=torch.float64, generator=generator)


def v_of(policy: FsrlPolicy, h: Tensor) -> Tensor:
    """v of method.md, section 6, for soft_threshold, with the options of the policy."""
    y = h @ policy.adapter.weight.T + policy.adapter.bias
    v = policy.scale * y.sign() * (y.abs() - policy.adapter.threshold).relu()
    v[..., list(policy.masked_latents)] = 0
    if policy.steering_fraction is not None:
        least = v.abs().sort(dim=-1, descending=True).values[..., int(D_SAE_OUT * policy.steering_fraction) - 1]
        v = v * (v.abs() >= least[..., None])
    return v


@pytest.mark.parametrize(
    "options",
    [{}, {"scale": 0.3}, {"scale": 0.0}, {"masked_latents": tuple(range(0, D_SAE_OUT, 2))}, {"steering_fraction": 0.2}],
    ids=str,
)
@pytest.mark.parametrize("positions", [1, 3])
def test_the_editor_does_what_the_options_say(options: dict[str, Any], positions: int) -> None:
    policy, h = tiny_fsrl_policy(clip=False, **options), states(positions)
    assert policy.sae.W_dec is not None
    expected = h + v_of(policy, h) @ policy.sae.W_dec
    edited, stats = h.clone(), TokenStats.zeros(2, D_SAE_OUT)
    enabled = torch.ones(2, positions, dtype=torch.bool)
    enabled[1, 0] = False
    expected[1, 0] = h[1, 0]
    found = editor(policy.intervention)
    found.edit(edited, enabled, [stats] * positions)
    torch.testing.assert_close(edited, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.differentiable_edit(h, enabled), expected, rtol=1e-12, atol=1e-12)
    assert stats.seen.tolist() == [positions, positions - 1]
    assert stats.edited.tolist() == ([0, 0] if policy.scale == 0 else [positions, positions - 1])
    assert int(stats.latent_edits.sum()) == int((v_of(policy, h)[enabled] != 0).sum())


def test_positions_counted_apart_are_edited_alike() -> None:
    """A pass of several positions, of which one is not counted, equals one position at a time."""
    edit, together, apart = tiny_fsrl_policy().intervention, states(4), states(4)
    counters = [TokenStats.zeros(2, D_SAE_OUT), TokenStats.zeros(2, D_SAE_OUT)]
    found = editor(edit)
    found.edit(together, None, [counters[0], None, counters[1], counters[1]])
    for position in range(4):
        found.edit(apart[:, position : position + 1], None, [None])
    assert torch.equal(together, apart)
    assert [each.seen.tolist() for each in counters] == [[1, 1], [2, 2]]


@pytest.mark.parametrize("clip", [True, False])
def test_description_of_an_edit(clip: bool) -> None:
    policy, h = tiny_fsrl_policy(clip=clip), states(1)
    (first, second) = editor(policy.intervention).describe(h[:, 0], torch.tensor([True, False]))
    assert second is None
    assert first is not None
    f, v = policy.sae.encode(h[0, 0]), v_of(policy, h[0, 0])
    after = (f + v).relu() if clip else f + v
    changed = {change.latent: change for change in first.changes}
    assert sorted(changed) == (after != f).nonzero().flatten().tolist()
    for latent, change in changed.items():
        assert (change.before, change.after) == pytest.approx((float(f[latent]), float(after[latent])), abs=1e-12)


def test_latents_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="select must return None"):
        editor(tiny_fsrl_policy().intervention).set_selection(EditList.empty(1, 1), torch.tensor([0]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scale": -1.0}, "scale is -1.0; expected a finite number >= 0"),
        ({"scale": float("inf")}, "scale is inf"),
        ({"steering_fraction": 0.0}, "steering_fraction is 0.0; expected a number in (0, 1]"),
        ({"masked_latents": (3, D_SAE_OUT)}, f"masked latent {D_SAE_OUT} is not one of 0 to {D_SAE_OUT - 1}"),
        ({"edit_positions": "some"}, "edit_positions is 'some'"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError) as error:
        tiny_fsrl_policy(**options)
    assert message in str(error.value)


def test_an_sae_that_does_not_fit_is_refused() -> None:
    adapter = tiny_adapter()
    with pytest.raises(MismatchError, match=r"the adapter is \(56, 24\); expected"):
        FsrlPolicy(adapter, tiny_sae(d_sae=40), OUTPUT_LAYER)
    with pytest.raises(InvalidInputError, match="every decoder row"):
        FsrlPolicy(adapter, tiny_sae().encoder_only(), OUTPUT_LAYER)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ["soft_threshold", "relu", "jump_relu"])
def test_a_saved_policy_is_the_same_policy(activation: str, dtype: torch.dtype, tmp_path: Path) -> None:
    policy = tiny_fsrl_policy(
        activation,
        clip=dtype != torch.float32,
        dtype=dtype,
        scale=0.5,
        model=ModelFingerprint.from_model(tiny_model()),
        edit_positions="from_last_prompt",
        uncounted_token_ids=(1, 3),
        masked_latents=(0, 7),
        steering_fraction=0.5,
    )
    loaded = FsrlPolicy.from_pretrained(policy.save_pretrained(tmp_path))
    for name in ("weight", "bias", "threshold"):
        assert torch.equal(getattr(loaded.adapter, name), getattr(policy.adapter, name))
    assert (loaded.adapter.activation, loaded.adapter.clip) == (policy.adapter.activation, policy.adapter.clip)
    assert loaded.sae.fingerprint() == policy.sae.fingerprint()
    for name in ("layer", "model", *OPTIONS):
        assert getattr(loaded, name) == getattr(policy, name)
    assert FsrlPolicy.from_pretrained(tmp_path, scale=2.0, masked_latents=()).scale == 2.0


@pytest.mark.parametrize(
    "change",
    [
        {"layer": "2"},
        {"scale": None},
        {"clip": 1},
        {"activation": "gelu"},
        {"steering_fraction": "half"},
        {"masked_latents": [10**6]},
        {"uncounted_token_ids": 3},
        {"edit_positions": "some"},
        {"model": {}},
        {"sae": {}},
    ],
    ids=str,
)
def test_a_spoilt_configuration_is_refused_in_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    tiny_fsrl_policy().save_pretrained(tmp_path)
    change_record(tmp_path / "config.json", lambda record: record.update(change))
    with pytest.raises(CorruptFileError, match=r"does not hold a whole (FSRL policy|fsrl_policy)") as error:
        FsrlPolicy.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    tiny_fsrl_policy().save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="option 'alpha' is not known"):
        FsrlPolicy.from_pretrained(tmp_path, alpha=1.0)


def test_the_card_names_the_class_and_the_settings() -> None:
    card = tiny_fsrl_policy(masked_latents=(1, 2)).model_card("me/adapter")
    assert 'dspa.FsrlPolicy.from_pretrained("me/adapter")' in card
    assert "2509.12934" in card
    assert "| masked latents | 2 |" in card


def test_a_saved_policy_steers_generate_in_two_lines(tmp_path: Path) -> None:
    model: Any = tiny_model()
    tiny_fsrl_policy(dtype=torch.float64).save_pretrained(tmp_path)
    tokens = torch.tensor(prompts((6,)))
    plain = model.generate(tokens, max_new_tokens=6)
    with dspa.steer(model, dspa.FsrlPolicy.from_pretrained(tmp_path)):
        steered = model.generate(tokens, max_new_tokens=6)
    assert not torch.equal(plain, steered)
    assert torch.equal(model.generate(tokens, max_new_tokens=6), plain)


# ------------------------------------------------------------------------------------------------- the original format


def original_files(folder: Path, activation: str, *, gain: bool = False, flags: bool = False) -> dict[str, Tensor]:
    """Files as `SAEAdapter.save_adapter` writes them, and their tensors."""
    adapter = tiny_adapter(activation, dtype=torch.float32)
    tensors = {"adapter_linear.weight": adapter.weight, "adapter_linear.bias": adapter.bias}
    if activation == "soft_threshold":
        tensors["soft_threshold"] = adapter.threshold
    elif activation == "jump_relu":
        tensors["log_threshold"] = (adapter.threshold + 0.01).log()
    if gain:
        tensors["steering_magnitude"] = torch.linspace(-0.5, 1.5, D_SAE_OUT)
    config: dict[str, Any] = {"base_sae_release": "a-release", "base_sae_id": "layer_2/an-sae"}
    if not flags:
        config |= {"activation_type": activation, "model_name": "tiny", "use_steering_magnitude": gain}
    elif activation != "relu":
        config[f"use_{activation}"] = True
    save_file(tensors, folder / "adapter_weights.safetensors")
    (folder / "fsrl_adapter_config.json").write_text(json.dumps(config))
    return tensors


@pytest.mark.parametrize("flags", [False, True], ids=["named", "by old flags"])
@pytest.mark.parametrize("gain", [False, True], ids=["no gain", "a gain per latent"])
@pytest.mark.parametrize("activation", ["soft_threshold", "relu", "jump_relu"])
def test_adapters_of_the_original_code(activation: str, gain: bool, flags: bool, tmp_path: Path) -> None:
    tensors = original_files(tmp_path, activation, gain=gain, flags=flags)
    sae = tiny_sae(dtype=torch.float32)
    policy = load_original_adapter(tmp_path, sae, clip=False)
    assert (policy.layer, policy.edit_positions, policy.uncounted_token_ids) == (OUTPUT_LAYER, "all", ())
    h = states(3).float()
    y = h @ tensors["adapter_linear.weight"].T + tensors["adapter_linear.bias"]
    if activation == "soft_threshold":
        v = y.sign() * (y.abs() - tensors["soft_threshold"]).relu()
    elif activation == "relu":
        v = y.relu()
    else:
        v = y.relu() * (y.relu() > tensors["log_threshold"].exp())
    if gain:
        v = v * tensors["steering_magnitude"].clamp(0, 1)
    assert sae.W_dec is not None
    edited = h.clone()
    editor(policy.intervention).edit(edited, None, [None] * 3)
    torch.testing.assert_close(edited, h + v @ sae.W_dec, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda folder: (folder / "fsrl_adapter_config.json").unlink(), InvalidInputError, "is missing"),
        (lambda folder: (folder / "fsrl_adapter_config.json").write_text("{"), CorruptFileError, "cannot be read"),
        (
            lambda folder: (folder / "fsrl_adapter_config.json").write_text('{"activation_type": "gelu"}'),
            CorruptFileError,
            "gelu",
        ),
        (lambda folder: (folder / "adapter_weights.safetensors").write_bytes(b"no"), CorruptFileError, "safetensors"),
        (
            lambda folder: save_file({"x": torch.zeros(1)}, folder / "adapter_weights.safetensors"),
            CorruptFileError,
            "does not hold a whole adapter",
        ),
    ],
    ids=["no configuration", "no JSON", "unknown activation", "no tensors", "other tensors"],
)
def test_spoilt_files_of_the_original_code_are_refused(
    spoil: Any, error: type[Exception], message: str, tmp_path: Path
) -> None:
    original_files(tmp_path, "soft_threshold")
    spoil(tmp_path)
    with pytest.raises(error, match=message):
        load_original_adapter(tmp_path, tiny_sae(dtype=torch.float32))


def test_the_layer_has_to_be_known(tmp_path: Path) -> None:
    original_files(tmp_path, "relu")
    sae = tiny_sae(dtype=torch.float32)
    unknown = replace(sae, metadata=replace(sae.metadata, layer=None))
    with pytest.raises(InvalidInputError, match="pass layer="):
        load_original_adapter(tmp_path, unknown)
    assert load_original_adapter(tmp_path, unknown, layer=1).layer == 1
