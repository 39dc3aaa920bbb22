"""Policies: what they select, their folder, and everything that must not come back out of one."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import hub_cache
import numpy as np
import pytest
import tiny_collection as tiny
import torch
from altered_records import change_record, config_fields, tensors_file
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny_collection import one_thread  # noqa: F401
from torch import Tensor

from dspa import ConditionalDifferenceMap, StaticPolicy, SteeringPolicy
from dspa.errors import CorruptFileError, DspaError, InvalidInputError, MismatchError
from dspa.kernels import CsrMap, EditKind, EditList, token_step
from dspa.methods.conditional_map import FitOptions
from dspa.methods.steering_policy import FOLDER
from dspa.sae.autoencoder import SparseAutoencoder

D_IN, D_OUT = 30, 60
EDITS: tuple[EditKind, ...] = get_args(EditKind)
DEFAULTS = {"k_prompt": 6, "k_diff": 4, "alpha": 0.3, "edit": "both"}


def saes(dtype: torch.dtype = torch.float32) -> tuple[SparseAutoencoder, SparseAutoencoder]:
    return tiny.tiny_sae(D_IN, 1, layer=1, dtype=dtype), tiny.tiny_sae(D_OUT, 2, layer=2, dtype=dtype)


def make_policy(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> SteeringPolicy:
    pair = saes(dtype)
    store = tiny.write_store(folder, tiny.random_densities(20, D_IN, D_OUT, 0, active=0.1), saes=pair)
    fitted = ConditionalDifferenceMap.fit(store, entries_per_side=3)
    return SteeringPolicy(fitted, *pair, **(DEFAULTS | options))


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> SteeringPolicy:
    return make_policy(tmp_path_factory.mktemp("store"))


def random_density(rows: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    density = torch.rand(rows, D_IN, generator=generator) * (torch.rand(rows, D_IN, generator=generator) < 0.3)
    density[0] = 0
    return density


def as_lists(edits: EditList) -> tuple[list[Any], list[Any], list[Any]]:
    return edits.latents.tolist(), edits.signs.tolist(), edits.counts.tolist()


# --- selection --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("sign_guard", [False, True])
def test_select_is_section_3(policy: SteeringPolicy, edit: EditKind, sign_guard: bool) -> None:
    A, density = policy.conditional_map.to_dense().numpy(), random_density(40)
    found = replace(policy, edit=edit, sign_guard=sign_guard).select(density)
    for row in range(len(density)):
        prompt = sorted(range(D_IN), key=lambda i, row=row: (-density[row, i].item(), i))[:6]
        s = np.zeros(D_OUT, dtype=np.float32)
        for i in sorted(prompt):
            s = s + A[i]
        up = sorted(range(D_OUT), key=lambda j, s=s: (-s[j], j))[:4] if edit != "ablate" else []
        down = sorted(range(D_OUT), key=lambda j, s=s: (s[j], j))[:4] if edit != "augment" else []
        if sign_guard:
            up, down = [j for j in up if s[j] > 0], [j for j in down if s[j] < 0]
        twice = set(up) & set(down)
        assert found.augmented(row) == [j for j in up if j not in twice]
        assert found.ablated(row) == [j for j in down if j not in twice]


@settings(max_examples=200, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    nonzeros=st.integers(0, 12),
    k_prompt=st.integers(0, 5),
    k_diff=st.integers(0, 9),
    edit=st.sampled_from(EDITS),
    sign_guard=st.booleans(),
    values=st.sampled_from([(-1.0, 1.0), (1.0,), (-1.0,), (-1.0, -0.0, 0.0, 1.0)]),
)
def test_nothing_is_selected_that_is_not_selectable(
    seed: int, nonzeros: int, k_prompt: int, k_diff: int, edit: EditKind, sign_guard: bool, values: tuple[float, ...]
) -> None:
    """Small maps with few entries: most scores are 0, and what is selected beyond the map goes by index."""
    d_in, d_out = 5, 9
    generator = np.random.default_rng(seed)
    dense = np.zeros((d_in, d_out), dtype=np.float32)
    entries = np.sort(generator.choice(d_in * d_out, nonzeros, replace=False))
    rows, columns = np.divmod(entries, d_out)
    dense[rows, columns] = generator.choice(values, nonzeros)
    offsets = torch.tensor(np.concatenate([[0], np.bincount(rows, minlength=d_in).cumsum()]), dtype=torch.int64)
    matrix = CsrMap(offsets, torch.tensor(columns).int(), torch.from_numpy(dense[rows, columns]), d_out).check()
    pair = tiny.tiny_sae(d_in, 1), tiny.tiny_sae(d_out, 2)
    fitted = ConditionalDifferenceMap(
        matrix,
        torch.ones(d_in, dtype=torch.int64),
        torch.zeros(d_in, dtype=torch.float64),
        torch.zeros(d_out),
        tiny.collection_run(3, d_in, d_out, 3, pair),
        FitOptions(),
    )
    policy = SteeringPolicy(fitted, *pair, k_prompt=k_prompt, k_diff=k_diff, edit=edit, sign_guard=sign_guard)
    selectable = policy.selectable_latents()
    assert selectable.tolist() == sorted(set(selectable.tolist()))
    density = torch.from_numpy(generator.random((60, d_in)) * (generator.random((60, d_in)) < 0.5)).float()
    density[0] = 0
    density[1] = 1
    whole = policy.select(density)
    for row in range(60):
        assert set(whole.augmented(row) + whole.ablated(row)) <= set(selectable.tolist())
    compact = replace(policy, output_sae=policy.output_sae.with_decoder_rows(selectable))
    assert as_lists(compact.select(density)) == as_lists(whole)
    assert compact.output_sae.W_dec is not None
    assert len(compact.output_sae.W_dec) == len(selectable)


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"k_prompt": -1}, InvalidInputError, "k_prompt is -1; expected 0 to d_sae_in = 30"),
        ({"k_prompt": 31}, InvalidInputError, "k_prompt is 31; expected 0 to d_sae_in = 30"),
        ({"k_diff": 61}, InvalidInputError, "k_diff is 61; expected 0 to d_sae_out = 60"),
        ({"alpha": -0.1}, InvalidInputError, "alpha is -0.1; expected a finite float32 >= 0"),
        ({"alpha": float("nan")}, InvalidInputError, "alpha is nan"),
        ({"alpha": float("inf")}, InvalidInputError, "alpha is inf"),
        ({"edit": "amplify"}, InvalidInputError, "edit is 'amplify'; expected one of ablate, augment, both"),
        ({"edit_positions": "last"}, InvalidInputError, "edit_positions is 'last'; expected one of from_last_prompt"),
        ({"input_sae": tiny.tiny_sae(D_IN, 3)}, MismatchError, "the input SAE is not the one the map was collected"),
        ({"output_sae": tiny.tiny_sae(D_OUT, 3)}, MismatchError, "the output SAE is not the one the map was collected"),
        ({"output_sae": tiny.tiny_sae(D_OUT + 1, 2)}, MismatchError, "the output SAE has 61 latents; expected 60"),
        ({"input_sae": tiny.tiny_sae(D_OUT, 2)}, MismatchError, "the input SAE has 60 latents; expected 30"),
        ({"output_sae": saes()[1].encoder_only()}, InvalidInputError, "the output SAE has no decoder"),
    ],
)
def test_options_that_cannot_be(
    policy: SteeringPolicy, options: dict[str, Any], error: type[DspaError], words: str
) -> None:
    with pytest.raises(error, match=rf"^{words}[^\n]*$"):
        replace(policy, **options)


def test_the_prompt_must_be_read_before_it_is_edited(policy: SteeringPolicy) -> None:
    fitted = policy.conditional_map
    swapped = replace(fitted, run=replace(fitted.run, input_layer=3))
    with pytest.raises(InvalidInputError, match="input_layer 3 comes after output_layer 2"):
        replace(policy, conditional_map=swapped)
    same = replace(fitted, run=replace(fitted.run, input_layer=2))
    assert replace(policy, conditional_map=same).input_layer == 2


def test_replace_changes_one_option(policy: SteeringPolicy) -> None:
    changed = replace(policy, alpha=0.05)
    assert (changed.alpha, policy.alpha) == (0.05, 0.3)
    for name in ("conditional_map", "input_sae", "output_sae", "k_prompt", "k_diff", "edit", "edit_positions"):
        assert getattr(changed, name) is getattr(policy, name)
    assert (policy.model, policy.input_layer, policy.output_layer) == (tiny.FINGERPRINT, 1, 2)
    assert policy.uncounted_token_ids == tiny.UNCOUNTED


# --- the folder -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("edit", EDITS)
def test_saved_and_loaded_it_does_the_same_to_the_last_bit(tmp_path: Path, dtype: torch.dtype, edit: EditKind) -> None:
    policy = make_policy(tmp_path / "store", dtype, edit=edit, sign_guard=True, edit_positions="all")
    assert policy.save_pretrained(tmp_path / "policy") == tmp_path / "policy"
    loaded = SteeringPolicy.from_pretrained(tmp_path / "policy")
    for name in ("k_prompt", "k_diff", "alpha", "edit", "sign_guard", "edit_positions", "model", "uncounted_token_ids"):
        assert getattr(loaded, name) == getattr(policy, name), name
    assert loaded.conditional_map.run == policy.conditional_map.run
    assert loaded.conditional_map.options == policy.conditional_map.options
    assert loaded.input_sae.metadata == policy.input_sae.metadata
    assert loaded.output_sae.metadata == policy.output_sae.metadata

    density, edited = random_density(32), 0
    hidden = torch.randn(32, tiny.D_MODEL, generator=torch.Generator().manual_seed(1)).to(dtype)
    for before, after in (
        (replace(policy, sign_guard=guard), replace(loaded, sign_guard=guard)) for guard in (False, True)
    ):
        lists = before.select(density)
        assert as_lists(after.select(density)) == as_lists(lists)
        expected, found = hidden.clone(), hidden.clone()
        token_step(expected, before.output_sae, lists, before.alpha)
        token_step(found, after.output_sae, lists, after.alpha)
        assert torch.equal(found, expected)
        edited += int((expected != hidden).any(dim=1).sum())
    assert edited > 8
    assert torch.equal(loaded.input_sae.encode(hidden), policy.input_sae.encode(hidden))

    rows = loaded.output_sae.W_dec
    assert rows is not None
    assert len(rows) == len(policy.selectable_latents()) < D_OUT
    assert loaded.input_sae.W_dec is None
    loaded.save_pretrained(tmp_path / "again")
    assert tiny.folder_bytes(tmp_path / "again") == tiny.folder_bytes(tmp_path / "policy")


@pytest.fixture(scope="module")
def saved(policy: SteeringPolicy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return policy.save_pretrained(tmp_path_factory.mktemp("policy"))


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    for name, content in tiny.folder_bytes(saved).items():
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_the_folder_holds_two_files_a_card_and_no_pickle(saved: Path) -> None:
    files = tiny.folder_bytes(saved)
    config = json.loads(files["config.json"])
    name = f"policy-{config['sha256'][:16]}.safetensors"
    assert sorted(files) == ["README.md", "config.json", name]
    assert config["kind"] == "policy"
    header = int.from_bytes(files[name][:8], "little")
    assert all(isinstance(v, dict) for v in json.loads(files[name][8 : 8 + header]).values())
    assert not any(content.startswith((b"PK", b"\x80")) for content in files.values())


def test_one_sae_for_both_layers(tmp_path: Path) -> None:
    """Its tensors go to disk twice, though they are the same memory."""
    sae = tiny.tiny_sae(D_IN, 1)
    store = tiny.write_store(tmp_path / "store", tiny.random_densities(9, D_IN, D_IN, 0), saes=(sae, sae))
    policy = SteeringPolicy(ConditionalDifferenceMap.fit(store, entries_per_side=2), sae, sae, k_prompt=3, k_diff=2)
    loaded = SteeringPolicy.from_pretrained(policy.save_pretrained(tmp_path / "policy"))
    assert as_lists(loaded.select(random_density(5))) == as_lists(policy.select(random_density(5)))


@pytest.mark.parametrize(
    "options",
    [
        {"alpha": 0.7},
        {"k_prompt": 2},
        {"k_diff": 3},
        {"k_diff": 0},
        {"edit": "augment"},
        {"sign_guard": True},
        {"edit_positions": "generated"},
        {"alpha": 0, "edit": "ablate"},
    ],
    ids=str,
)
def test_options_changed_at_load(saved: Path, policy: SteeringPolicy, options: dict[str, Any]) -> None:
    loaded, expected = SteeringPolicy.from_pretrained(saved, **options), replace(policy, **options)
    for name in ("k_prompt", "k_diff", "alpha", "edit", "sign_guard", "edit_positions"):
        assert getattr(loaded, name) == getattr(expected, name)
    assert as_lists(loaded.select(random_density(9))) == as_lists(expected.select(random_density(9)))


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"k_dif": 3}, InvalidInputError, "option 'k_dif' is not known; expected one of k_prompt, k_diff, alpha"),
        ({"conditional_map": 3}, InvalidInputError, "option 'conditional_map' is not known"),
        ({"alpha": -1}, InvalidInputError, "alpha is -1"),
        ({"k_prompt": 99}, InvalidInputError, "k_prompt is 99"),
        ({"k_diff": 5}, MismatchError, r"k_diff = 5 may select 1 latents whose decoder rows were not saved; "),
        ({"k_diff": 9}, MismatchError, r"k_diff = 9 may select 5 latents whose decoder rows were not saved; "),
    ],
)
def test_options_refused_at_load(saved: Path, options: dict[str, Any], error: type[DspaError], words: str) -> None:
    with pytest.raises(error, match=rf"^{words}[^\n]*$"):
        SteeringPolicy.from_pretrained(saved, **options)


# --- a folder that is off ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensors", "config.json"])
@pytest.mark.parametrize("share", [0, 0.3, 0.9, 0.999])
def test_a_truncated_file_is_refused(folder: Path, kind: str, share: float) -> None:
    name = tensors_file(folder).name if kind == "tensors" else kind
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(share * len(content))])
    with pytest.raises(CorruptFileError, match=rf"^\S*{name} [^\n]*$"):
        SteeringPolicy.from_pretrained(folder)


@pytest.mark.parametrize("position", [0, 9, 200, -1, -3000])
def test_an_altered_byte_is_found(folder: Path, position: int) -> None:
    file = tensors_file(folder)
    content = bytearray(file.read_bytes())
    content[position] ^= 4
    file.write_bytes(content)
    with pytest.raises(CorruptFileError, match=r"^\S*policy-\w+\.safetensors was truncated or altered[^\n]*$"):
        SteeringPolicy.from_pretrained(folder)


def with_entry(position: int | tuple[int, int], value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor[position] = value
        return tensor

    return change


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "change", "error"),
    [
        ("conditional_map.columns", with_entry(0, D_OUT), CorruptFileError),
        ("conditional_map.columns", with_entry(-1, 2**31 - 1), CorruptFileError),
        ("conditional_map.columns", with_entry(0, -1), CorruptFileError),
        ("conditional_map.columns", lambda t: t.flip(0), CorruptFileError),
        ("conditional_map.columns", lambda t: t.long(), CorruptFileError),
        ("conditional_map.row_offsets", with_entry(1, 10**9), CorruptFileError),
        ("conditional_map.row_offsets", with_entry(1, -1), CorruptFileError),
        ("conditional_map.row_offsets", with_entry(-1, 0), CorruptFileError),
        ("conditional_map.row_offsets", lambda t: t[:-1], CorruptFileError),
        ("conditional_map.values", with_entry(0, NAN), CorruptFileError),
        ("conditional_map.values", lambda t: t[1:], CorruptFileError),
        ("conditional_map.gate_counts", None, CorruptFileError),
        ("conditional_map.values", None, CorruptFileError),
        ("output_sae.decoder_rows", with_entry(3, 10**6), CorruptFileError),
        ("output_sae.decoder_rows", with_entry(3, -2), CorruptFileError),
        ("output_sae.decoder_rows", lambda t: torch.full_like(t, -1), MismatchError),
        ("output_sae.decoder_rows", lambda t: t.long(), CorruptFileError),
        ("output_sae.decoder_rows", lambda t: t[:-1], CorruptFileError),
        ("output_sae.decoder_rows", None, CorruptFileError),
        ("output_sae.W_dec", with_entry((1, 2), NAN), CorruptFileError),
        ("output_sae.W_dec", lambda t: t[:-1], CorruptFileError),
        ("output_sae.W_dec", lambda t: t[:, :-1].contiguous(), CorruptFileError),
        ("output_sae.W_dec", lambda t: t.double(), CorruptFileError),
        ("output_sae.W_dec", None, CorruptFileError),
        ("output_sae.W_enc", with_entry((0, 0), INF), CorruptFileError),
        ("output_sae.W_enc", with_entry((0, 0), 1.5), MismatchError),
        ("output_sae.W_enc", lambda t: t[:-1], CorruptFileError),
        ("output_sae.W_enc", lambda t: t[:0], CorruptFileError),
        ("output_sae.W_enc", None, CorruptFileError),
        ("output_sae.threshold", with_entry(0, NAN), CorruptFileError),
        ("output_sae.b_dec", None, CorruptFileError),
        ("input_sae.b_enc", with_entry(0, NAN), CorruptFileError),
        ("input_sae.b_enc", with_entry(0, 7), MismatchError),
        ("input_sae.threshold", None, CorruptFileError),
        ("input_sae.W_enc", lambda t: t.int(), CorruptFileError),
        ("input_sae.surplus", lambda t: torch.zeros(3), CorruptFileError),
        ("input_sae.metadata", lambda t: torch.zeros(3), CorruptFileError),
    ],
)
def test_tensors_that_do_not_fit_are_refused_though_the_checksum_is_right(
    folder: Path, name: str, change: Callable[[Tensor], Tensor] | None, error: type[DspaError]
) -> None:
    tensors = load_file(tensors_file(folder))
    given = tensors.pop(name, torch.zeros(1))
    if change is not None:
        tensors[name] = change(given)
    FOLDER.write(folder, config_fields(folder), tensors)
    with pytest.raises(error, match=r"^[^\n]+$"):
        SteeringPolicy.from_pretrained(folder)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda c: c.update(kind="conditional_map"), InvalidInputError),
        (lambda c: c.update(format_version=0), CorruptFileError),
        (lambda c: c.pop("k_diff"), CorruptFileError),
        (lambda c: c.update(k_diff="4"), CorruptFileError),
        (lambda c: c.update(k_diff=4.0), CorruptFileError),
        (lambda c: c.update(k_prompt=None), CorruptFileError),
        (lambda c: c.update(k_prompt=-1), InvalidInputError),
        (lambda c: c.update(alpha="0.2"), CorruptFileError),
        (lambda c: c.update(alpha=True), CorruptFileError),
        (lambda c: c.update(alpha=-0.1), InvalidInputError),
        (lambda c: c.update(alpha=1e308), InvalidInputError),
        (lambda c: c.update(alpha=10**400), InvalidInputError),
        (lambda c: c.update(k_diff=10**30), InvalidInputError),
        (lambda c: c.update(sign_guard="no"), CorruptFileError),
        (lambda c: c.update(edit=["both"]), CorruptFileError),
        (lambda c: c.update(edit="none"), CorruptFileError),
        (lambda c: c.pop("conditional_map"), CorruptFileError),
        (lambda c: c.update(conditional_map=[]), CorruptFileError),
        (lambda c: c.update(conditional_map="x"), CorruptFileError),
        (lambda c: c["conditional_map"].pop("fit"), CorruptFileError),
        (lambda c: c["conditional_map"]["run"].update(d_sae_in=D_IN + 1), CorruptFileError),
        (lambda c: c["conditional_map"]["run"].update(d_sae_out=D_OUT + 1), CorruptFileError),
        (lambda c: c["conditional_map"]["run"].update(input_sae="0"), MismatchError),
        (lambda c: c["conditional_map"]["run"].update(input_layer=3), InvalidInputError),
        (lambda c: c["conditional_map"]["run"].update(input_layer="1"), CorruptFileError),
        (lambda c: c.pop("output_sae"), CorruptFileError),
        (lambda c: c.update(output_sae=None), CorruptFileError),
        (lambda c: c["output_sae"].pop("metadata"), CorruptFileError),
        (lambda c: c["output_sae"].pop("activation"), CorruptFileError),
        (lambda c: c["output_sae"].update(activation="softmax"), CorruptFileError),
        (lambda c: c["output_sae"].update(activation="topk"), CorruptFileError),
        (lambda c: c["output_sae"].update(activation="relu"), MismatchError),
        (lambda c: c["output_sae"].update(normalization="l3"), CorruptFileError),
        (lambda c: c["output_sae"].update(k=0, activation="topk"), CorruptFileError),
        (lambda c: c["output_sae"].update(k="3", activation="topk"), CorruptFileError),
        (lambda c: c["output_sae"].update(subtract_b_dec=False), MismatchError),
        (lambda c: c["output_sae"].pop("k"), CorruptFileError),
        (lambda c: c["output_sae"]["metadata"].update(surplus=1), CorruptFileError),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    folder: Path, change: Callable[[dict[str, Any]], object], error: type[DspaError]
) -> None:
    change_record(folder / "config.json", change)
    with pytest.raises(error, match=r"^[^\n]+$"):
        SteeringPolicy.from_pretrained(folder)


def test_a_map_wider_than_the_sae_is_refused(folder: Path) -> None:
    """Consistent in itself, so that every check of the map passes."""
    tensors = load_file(tensors_file(folder))
    tensors["conditional_map.mean_difference"] = torch.zeros(D_OUT + 5)
    tensors["conditional_map.columns"][int(tensors["conditional_map.row_offsets"][1]) - 1] = D_OUT + 4
    config = config_fields(folder)
    config["conditional_map"]["run"]["d_sae_out"] = D_OUT + 5
    FOLDER.write(folder, config, tensors)
    with pytest.raises(MismatchError, match="the output SAE has 60 latents; expected 65 as in the map"):
        SteeringPolicy.from_pretrained(folder)


# --- the hub ----------------------------------------------------------------------------------------------------------


def load_offline(cache: Path, source: str) -> tuple[str, str]:
    """What a process without network says to a policy's name: its edit lists, or the error."""
    program = (
        "import sys, dspa, torch\n"
        "try:\n"
        "    policy = dspa.SteeringPolicy.from_pretrained(sys.argv[1], alpha=0.5)\n"
        "    edits = policy.select(torch.eye(policy.input_sae.d_sae))\n"
        "    print(policy.alpha, edits.latents.tolist())\n"
        "except dspa.InvalidInputError as error:\n"
        "    print(error, file=sys.stderr)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, source],
        env=hub_cache.offline_environment(cache),
        cwd=cache,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return run.stdout.strip(), run.stderr.strip()


@pytest.mark.long
def test_a_policy_from_the_hub_cache_without_network(tmp_path: Path, saved: Path, policy: SteeringPolicy) -> None:
    hub_cache.write_repo(tmp_path, "someone/policy", tiny.folder_bytes(saved))
    output, errors = load_offline(tmp_path, "someone/policy")
    assert errors == ""
    assert output == f"0.5 {policy.select(torch.eye(D_IN)).latents.tolist()}"


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("someone/nothing", r"no policy at someone/nothing: no such folder, and the hub says: \S[^\n]*"),
        ("not/a/hub/name", r"no policy at not/a/hub/name: no such folder, and the hub says: \S[^\n]*"),
        ("someone/other", r"\S*someone\S* is not a policy folder: config\.json is missing"),
    ],
)
def test_no_policy_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str) -> None:
    hub_cache.write_repo(tmp_path, "someone/other", {"README.md": b"not a policy"})
    hub_cache.use_hub_cache(tmp_path, monkeypatch)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidInputError, match=f"^{words}$"):
        SteeringPolicy.from_pretrained(source)


def test_a_folder_without_a_policy(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"is not a policy folder: config\.json is missing"):
        SteeringPolicy.from_pretrained(tmp_path)


# --- static policies --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("k_diff", [0, 1, 5])
def test_the_static_edit_is_the_extremes_of_the_mean_difference(
    policy: SteeringPolicy, edit: EditKind, k_diff: int
) -> None:
    mean = policy.conditional_map.mean_difference.tolist()
    static = StaticPolicy.from_mean_difference(replace(policy, edit=edit, k_diff=k_diff, edit_positions="all"))
    up = sorted(range(D_OUT), key=lambda j: (-mean[j], j))[:k_diff] if edit != "ablate" else []
    down = sorted(range(D_OUT), key=lambda j: (mean[j], j))[:k_diff] if edit != "augment" else []
    edits = static.select(torch.zeros(3, 0))
    for row in range(3):
        assert (edits.augmented(row), edits.ablated(row)) == (up, down)
    for name in ("model", "output_layer", "output_sae", "alpha", "uncounted_token_ids"):
        assert getattr(static, name) == getattr(policy, name)
    assert (static.edit_positions, static.observation, static.intervention.layer) == ("all", None, 2)


def test_a_static_list_for_each_row(policy: SteeringPolicy) -> None:
    static = StaticPolicy.with_edits(policy, EditList.from_lists([[1], []], [[2], [3, 4]]))
    edits = static.select(torch.zeros(2, 0))
    assert (edits.augmented(0), edits.ablated(0)) == ([1], [2])
    assert (edits.augmented(1), edits.ablated(1)) == ([], [3, 4])
    with pytest.raises(InvalidInputError, match="there are 2 edit lists for 3 rows; expected 1 or 3"):
        static.select(torch.zeros(3, 0))
    assert replace(static, alpha=0.9).alpha == 0.9


def test_loading_twice_gives_equal_folders(saved: Path) -> None:
    with TemporaryDirectory() as other:
        SteeringPolicy.from_pretrained(str(saved)).save_pretrained(other)
        assert tiny.folder_bytes(Path(other)) == tiny.folder_bytes(saved)


def test_static_policy_checks_its_lists(policy: SteeringPolicy) -> None:
    width = policy.output_sae.d_sae
    with pytest.raises(InvalidInputError, match=f"expected 0 to {width - 1}"):
        StaticPolicy.with_edits(policy, EditList.from_lists([[]], [[width]]))
    sparse = StaticPolicy.with_edits(policy, EditList.from_lists([[]], [[0]]))
    with pytest.raises(MismatchError, match="decoder row"):
        replace(sparse, output_sae=policy.output_sae.with_decoder_rows(torch.tensor([1])))


def test_static_policy_in_both_directions_lists_a_latent_once(policy: SteeringPolicy) -> None:
    flat = replace(policy.conditional_map, mean_difference=torch.zeros_like(policy.conditional_map.mean_difference))
    static = StaticPolicy.from_mean_difference(replace(policy, conditional_map=flat, edit="both"))
    assert int(static.edits.counts) == 0
