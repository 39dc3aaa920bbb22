"""The conditional-difference map against method.md, section 2, in numpy; its folder; its memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import tiny_collection as tiny
import torch
from altered_records import change_record, tensors_file
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_collection import one_thread  # noqa: F401
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import dspa
from dspa import ConditionalDifferenceMap
from dspa.errors import CorruptFileError, DspaError, InvalidInputError
from dspa.methods.conditional_map import BLOCK_BYTES, FOLDER

GATE_RULES = ("ge", "positive_ge")
PERCENTILES = (0, 50, 90, 100)
UNEVEN = (1, 3, 5, 6, 7, 9)  # lengths whose densities are rounded


# --- the reference ----------------------------------------------------------------------------------------------------


def gates(densities: tiny.Densities, percentile: float, rule: str) -> tuple[Any, tiny.Matrix]:
    """g `[n, d_sae_in]` and tau."""
    rho = densities.prompt.density
    tau = np.percentile(rho, percentile, axis=0)
    g = rho >= tau
    return (g & (rho > 0) if rule == "positive_ge" else g), tau


def full_map(densities: tiny.Densities, percentile: float, rule: str) -> tiny.Matrix:
    """A, before sparsification."""
    g, _ = gates(densities, percentile, rule)
    D, N = densities.difference, len(g)
    A = np.zeros((g.shape[1], D.shape[1]))
    for k in range(N):
        A += np.outer(g[k], D[k])
    return A / N


def kept_per_row(A: tiny.Matrix, n: int) -> Any:
    """Each row's own n largest and n smallest by value, ties to the lower column, zeros dropped."""
    kept = np.zeros(A.shape, dtype=bool)
    for i, row in enumerate(A):
        columns = range(len(row))
        kept[i, sorted(columns, key=lambda j: (-row[j], j))[:n]] = True
        kept[i, sorted(columns, key=lambda j: (row[j], j))[:n]] = True
    return kept & (A != 0)


def kept_global_tau(A: tiny.Matrix, n: int) -> Any:
    """Appendix B, literally."""
    magnitudes = []
    for row in A:
        a, b = sorted(row, reverse=True)[min(n, len(row)) - 1], sorted(row)[min(n, len(row)) - 1]
        magnitudes += [abs(entry) for entry in row if entry >= a or entry <= b]
    return (np.abs(A) >= min(magnitudes)) & (A != 0)


KEPT: dict[str, Callable[[tiny.Matrix, int], Any]] = {
    "per_row": kept_per_row,
    "global_tau": kept_global_tau,
    "none": lambda A, n: A != 0,
}


def assert_fitted(
    found: ConditionalDifferenceMap, densities: tiny.Densities, percentile: float, rule: str, sparsify: str, n: int
) -> None:
    """Everything in a map, to the last bit. For densities that are exact in binary."""
    g, tau = gates(densities, percentile, rule)
    A = full_map(densities, percentile, rule)
    expected = np.where(KEPT[sparsify](A, n), A, 0).astype(np.float32)
    assert found.to_dense().dtype == torch.float32
    assert (found.to_dense().numpy() == expected).all()
    assert found.matrix.nonzeros == (expected != 0).sum()
    assert (found.gate_counts.numpy() == g.sum(axis=0)).all()
    assert (found.gate_thresholds.numpy() == tau).all()
    assert (found.mean_difference.numpy() == densities.difference.mean(axis=0).astype(np.float32)).all()
    assert (found.always_on().numpy() == g.all(axis=0)).all()


# --- against the equation ---------------------------------------------------------------------------------------------


@pytest.mark.product
@pytest.mark.parametrize("rule", GATE_RULES)
@pytest.mark.parametrize("percentile", PERCENTILES)
@pytest.mark.parametrize("sparsify", KEPT)
def test_the_map_is_the_equation(tmp_path: Path, sparsify: Any, percentile: float, rule: Any) -> None:
    densities = tiny.random_densities(32, 20, 60, seed=1)
    store = tiny.write_store(tmp_path, densities, per_shard=5)
    options: dict[str, Any] = {"gate_percentile": percentile, "gate_rule": rule, "sparsify": sparsify}
    found = ConditionalDifferenceMap.fit(store, **options)
    assert_fitted(found, densities, percentile, rule, sparsify, 16)
    assert asdict(found.options) == {
        **options,
        "entries_per_side": 16,
        "estimator": "mean_difference",
        "features": 64,
        "penalty": 1.0,
    }
    assert found.run == store.run


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    triples=st.integers(1, 12),
    d_sae_in=st.integers(1, 9),
    d_sae_out=st.integers(1, 12),
    active=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    percentile=st.one_of(st.sampled_from(PERCENTILES), st.floats(0, 100)),
    rule=st.sampled_from(GATE_RULES),
    sparsify=st.sampled_from(list(KEPT)),
    n=st.integers(1, 14),
    per_shard=st.integers(1, 13),
    block_bytes=st.sampled_from([1, 300, 2**20]),
)
def test_small_maps(
    seed: int,
    triples: int,
    d_sae_in: int,
    d_sae_out: int,
    active: float,
    percentile: float,
    rule: Any,
    sparsify: Any,
    n: int,
    per_shard: int,
    block_bytes: int,
) -> None:
    """Few lengths and few latents: ties, rows of zeros, rows shorter than the extremes. A number of triples that is no
    power of two leaves one rounding, which the package may make on its grid of 2^-48."""
    densities = tiny.random_densities(triples, d_sae_in, d_sae_out, seed, (1, 2), active)
    with TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("dspa.methods.conditional_map.BLOCK_BYTES", block_bytes)
        found = ConditionalDifferenceMap.fit(
            tiny.write_store(Path(folder), densities, per_shard),
            gate_percentile=percentile,
            gate_rule=rule,
            sparsify=sparsify,
            entries_per_side=n,
        )
    assert_fitted(found, densities, percentile, rule, sparsify, n)


@pytest.mark.parametrize("seed", range(6))
def test_the_map_where_densities_are_rounded(tmp_path: Path, seed: int) -> None:
    """Values to a float32 ulp of the float64 equation. What cancels exactly is 0, though its summands are rounded."""
    densities = tiny.random_densities(50, 30, 50, seed, UNEVEN, 0.2)
    found = ConditionalDifferenceMap.fit(tiny.write_store(tmp_path, densities), sparsify="none").to_dense().numpy()
    A = full_map(densities, 90, "ge")
    assert (np.abs(found - A) <= np.spacing(np.abs(A).astype(np.float32)) / 2 + 2.0**-49).all()
    assert (found[np.abs(A) < 1e-14] == 0).all()
    assert (np.abs(found[found != 0]) > 1 / (50 * 7 * 9 * 5 * 2 + 1)).all()  # no fraction of these lengths is smaller


def test_what_cancels_is_dropped(tmp_path: Path) -> None:
    """1/3 + 1/3 + 1/3 - 1 and 0.1 + 0.2 - 0.3 in float64 leave dust that is no entry."""
    tokens, ones = np.array([10, 10, 10, 3, 3, 3, 1]), np.ones((7, 1), dtype=np.int64)
    chosen = np.array([[1, 0], [2, 0], [0, 0], [0, 1], [0, 1], [0, 1], [0, 0]])
    rejected = np.array([[0, 0], [0, 0], [3, 0], [0, 0], [0, 0], [0, 0], [0, 1]])
    part = tiny.Part(ones, np.ones(7, dtype=np.int64))
    densities = tiny.Densities(part, tiny.Part(chosen, tokens), tiny.Part(rejected, tokens))
    assert full_map(densities, 90, "ge")[0, 0] != 0
    found = ConditionalDifferenceMap.fit(tiny.write_store(tmp_path, densities, per_shard=7))
    assert found.matrix.nonzeros == 0
    assert (found.mean_difference == 0).all()


@pytest.mark.long
@pytest.mark.parametrize("block_bytes", [1, 8 * 60 * 7, 8 * 60 * 19, 2**28])
@pytest.mark.parametrize("per_shard", [1, 7, 40])
def test_blocks_and_shards_do_not_change_a_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_bytes: int, per_shard: int
) -> None:
    densities = tiny.random_densities(40, 20, 60, 15, UNEVEN, 0.2)
    whole = ConditionalDifferenceMap.fit(tiny.write_store(tmp_path / "whole", densities, 40))
    monkeypatch.setattr("dspa.methods.conditional_map.BLOCK_BYTES", block_bytes)
    found = ConditionalDifferenceMap.fit(tiny.write_store(tmp_path / "blocks", densities, per_shard))
    for name, tensor in whole.tensors().items():
        assert torch.equal(found.tensors()[name], tensor), name


def test_ties_go_to_the_lower_column(tmp_path: Path) -> None:
    """One triple and an open gate: A is D. Written out by hand, with two entries a side."""
    chosen = [4, 0, 2, 4, 0, 4, 0, 0, 1]
    rejected = [0, 3, 2, 0, 1, 0, 3, 3, 0]  # D = 1, -3/4, 0, 1, -1/4, 1, -3/4, -3/4, 1/4
    four = np.array([4])
    densities = tiny.Densities(
        tiny.Part(np.array([[1]]), four), tiny.Part(np.array([chosen]), four), tiny.Part(np.array([rejected]), four)
    )
    found = ConditionalDifferenceMap.fit(tiny.write_store(tmp_path, densities), entries_per_side=2)
    assert found.matrix.columns.tolist() == [0, 1, 3, 6]
    assert found.matrix.values.tolist() == [1, -0.75, 1, -0.75]


@pytest.mark.parametrize(("rule", "count", "first_row"), [("ge", 4, [0.5, -0.5]), ("positive_ge", 1, [0.25, 0.0])])
def test_a_gate_whose_threshold_is_0(tmp_path: Path, rule: Any, count: int, first_row: list[float]) -> None:
    """Literally always on; with positive_ge only where the latent is active."""
    one = np.ones(4, dtype=np.int64)
    prompt = np.array([[1], [0], [0], [0]])
    chosen, rejected = np.array([[1, 0], [1, 0], [0, 0], [0, 0]]), np.array([[0, 0], [0, 1], [0, 1], [0, 0]])
    densities = tiny.Densities(tiny.Part(prompt, one), tiny.Part(chosen, one), tiny.Part(rejected, one))
    found = ConditionalDifferenceMap.fit(tiny.write_store(tmp_path, densities), gate_percentile=50, gate_rule=rule)
    assert found.gate_thresholds.tolist() == [0]
    assert found.gate_counts.tolist() == [count]
    assert found.to_dense().tolist() == [first_row]
    assert found.always_on().tolist() == [count == 4]


def test_an_always_open_row_is_the_mean_difference(tmp_path: Path) -> None:
    densities = tiny.random_densities(21, 12, 30, 3, UNEVEN, 0.3)
    densities.prompt.counts[:, ::2] = 0
    found = ConditionalDifferenceMap.fit(tiny.write_store(tmp_path, densities), gate_percentile=90, sparsify="none")
    assert 0 < found.always_on().sum() < 12
    for row in found.to_dense()[found.always_on()]:
        assert torch.equal(row, found.mean_difference)


@pytest.mark.parametrize("epsilon", [0.0, 0.05, 0.3, 2.0])
def test_deviation_probability(tmp_path: Path, epsilon: float) -> None:
    densities = tiny.random_densities(40, 25, 5, 3)
    found = ConditionalDifferenceMap.fit(tiny.write_store(tmp_path, densities))
    counts = found.gate_counts.numpy()
    assert len(set(counts.tolist())) > 3
    expected = np.minimum(1, 2 * np.exp(-counts * epsilon**2 / 2))
    assert np.allclose(found.deviation_probability(epsilon).numpy(), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"gate_percentile": -1}, "gate_percentile is -1; expected 0 to 100"),
        ({"gate_percentile": 100.5}, "gate_percentile is 100.5"),
        ({"gate_percentile": float("nan")}, "gate_percentile is nan"),
        ({"gate_rule": "gt"}, "gate_rule is 'gt'; expected one of ge, positive_ge"),
        ({"sparsify": "row"}, "sparsify is 'row'; expected one of per_row, global_tau, none"),
        ({"entries_per_side": 0}, "entries_per_side is 0; expected at least 1"),
    ],
)
def test_options_out_of_range(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    store = tiny.write_store(tmp_path, tiny.random_densities(3, 4, 4, 0))
    with pytest.raises(InvalidInputError, match=f"^{words}"):
        ConditionalDifferenceMap.fit(store, **options)


# --- on disk ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> ConditionalDifferenceMap:
    folder = tmp_path_factory.mktemp("store")
    tiny.write_store(folder, tiny.random_densities(30, 12, 9, 0, UNEVEN), per_shard=7)
    return ConditionalDifferenceMap.fit(folder, gate_percentile=70.5, gate_rule="positive_ge", entries_per_side=3)


def test_saved_and_loaded(tmp_path: Path, fitted: ConditionalDifferenceMap) -> None:
    assert fitted.save(tmp_path / "map") == tmp_path / "map"
    loaded = ConditionalDifferenceMap.load(tmp_path / "map")
    assert (loaded.run, loaded.options) == (fitted.run, fitted.options)
    assert loaded.tensors().keys() == fitted.tensors().keys()
    for name, tensor in fitted.tensors().items():
        assert loaded.tensors()[name].dtype == tensor.dtype
        assert torch.equal(loaded.tensors()[name], tensor), name
    names = sorted(path.name for path in (tmp_path / "map").iterdir())
    assert names == [tensors_file(tmp_path / "map").name, "config.json"]
    loaded.save(tmp_path / "again")
    assert tiny.folder_bytes(tmp_path / "again") == tiny.folder_bytes(tmp_path / "map")


def with_entry(tensor: Tensor, position: int, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor[position] = value
    return tensor


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("columns", lambda t: with_entry(t, 0, -1)),
        ("columns", lambda t: with_entry(t, -1, 9)),
        ("columns", lambda t: with_entry(t, 1, int(t[0]))),
        ("columns", lambda t: t.long()),
        ("columns", lambda t: t[:-1]),
        ("columns", lambda t: t[:, None]),
        ("columns", None),
        ("row_offsets", lambda t: with_entry(t, 0, 1)),
        ("row_offsets", lambda t: with_entry(t, 3, int(t[-1]) + 1)),
        ("row_offsets", lambda t: with_entry(t, -1, int(t[-1]) + 1)),
        ("row_offsets", lambda t: with_entry(t, 2, -1)),
        ("row_offsets", lambda t: t[:-1]),
        ("row_offsets", lambda t: t.int()),
        ("row_offsets", None),
        ("values", lambda t: with_entry(t, 0, float("nan"))),
        ("values", lambda t: with_entry(t, 0, float("inf"))),
        ("values", lambda t: t.int()),
        ("values", lambda t: t[:-1]),
        ("values", None),
        ("gate_counts", lambda t: t[:-1]),
        ("gate_counts", lambda t: with_entry(t, 0, 31)),
        ("gate_counts", lambda t: with_entry(t, 0, -1)),
        ("gate_counts", lambda t: t.double()),
        ("gate_counts", None),
        ("gate_thresholds", lambda t: with_entry(t, 0, float("nan"))),
        ("gate_thresholds", lambda t: with_entry(t, 0, 1.5)),
        ("gate_thresholds", lambda t: t.float()),
        ("gate_thresholds", None),
        ("mean_difference", lambda t: with_entry(t, 0, float("nan"))),
        ("mean_difference", lambda t: with_entry(t, 0, 1.5)),
        ("mean_difference", lambda t: t.reshape(3, 3)),
        ("mean_difference", None),
    ],
)
def test_tensors_out_of_bounds_are_refused_though_the_checksum_is_right(
    tmp_path: Path, fitted: ConditionalDifferenceMap, name: str, change: Callable[[Tensor], Tensor] | None
) -> None:
    tensors = fitted.tensors()
    tensors = {k: v for k, v in tensors.items() if k != name} | ({name: change(tensors[name])} if change else {})
    FOLDER.write(tmp_path, fitted.config(), tensors)
    with pytest.raises(CorruptFileError, match=r"^[^\n]+$"):
        ConditionalDifferenceMap.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("run"),
        lambda c: c.pop("fit"),
        lambda c: c.update(run=None),
        lambda c: c.update(fit=[1]),
        lambda c: c["run"].pop("model"),
        lambda c: c["run"].update(d_sae_in=13),
        lambda c: c["run"].update(d_sae_in="12"),
        lambda c: c["run"].update(d_sae_in=-1),
        lambda c: c["run"].update(d_sae_out=8),
        lambda c: c["run"].update(d_sae_out=10),
        lambda c: c["run"].update(input_layer=None),
        lambda c: c["fit"].update(gate_percentile=101),
        lambda c: c["fit"].update(gate_percentile="p"),
        lambda c: c["fit"].update(gate_rule="gt"),
        lambda c: c["fit"].update(surplus=1),
        lambda c: c.update(format_version=9),
    ],
)
def test_a_configuration_that_does_not_fit_is_refused(
    tmp_path: Path, fitted: ConditionalDifferenceMap, change: Callable[[dict[str, Any]], object]
) -> None:
    fitted.save(tmp_path)
    change_record(tmp_path / "config.json", change)
    with pytest.raises(CorruptFileError, match=r"^[^\n]+$"):
        ConditionalDifferenceMap.load(tmp_path)


@pytest.mark.parametrize("length", [0, 1, 8, 100, -1])
def test_a_truncated_map_is_refused(tmp_path: Path, fitted: ConditionalDifferenceMap, length: int) -> None:
    fitted.save(tmp_path)
    file = tensors_file(tmp_path)
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(CorruptFileError, match=r"^\S*conditional_map-\w+\.safetensors was truncated or altered[^\n]*$"):
        ConditionalDifferenceMap.load(tmp_path)


def test_no_map_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is not a conditional_map folder"):
        ConditionalDifferenceMap.load(tmp_path)


def test_the_map_file_is_safetensors(tmp_path: Path, fitted: ConditionalDifferenceMap) -> None:
    fitted.save(tmp_path)
    read = safetensors.torch.load_file(tensors_file(tmp_path))
    assert read.keys() == fitted.tensors().keys()


def test_a_map_that_cannot_be_written(tmp_path: Path, fitted: ConditionalDifferenceMap) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DspaError, match="cannot be used as a folder"):
        fitted.save(tmp_path / "file")


# --- memory -----------------------------------------------------------------------------------------------------------

FIT_AND_MEASURE = """
import json, sys
from pathlib import Path
import numpy as np, torch
from dspa.methods import conditional_map
from dspa.offline.density_store import DensityShard, DensityStore, SparseCounts
import tiny_collection as tiny

folder, d_sae_in, d_sae_out, triples, block_bytes = sys.argv[1], *map(int, sys.argv[2:])
conditional_map.BLOCK_BYTES = block_bytes
store = DensityStore.create_or_resume(folder, tiny.collection_run(triples, d_sae_in, d_sae_out, triples))
generator = np.random.default_rng(0)

def part(width, active):
    counts = np.zeros((triples, width), dtype=np.int64)
    for row in counts:
        row[generator.choice(width, active, replace=False)] = generator.integers(1, 33, active)
    return SparseCounts.from_dense(torch.from_numpy(counts), torch.full((triples,), 32))

store = store.append(DensityShard(part(d_sae_in, 100), part(d_sae_out, 300), part(d_sae_out, 300)), 0)
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 2**10 for line in lines if line.startswith("VmHWM"))

before = peak()
fitted = conditional_map.ConditionalDifferenceMap.fit(store)
print(json.dumps({"growth": peak() - before, "nonzeros": fitted.matrix.nonzeros}))
"""


def measure(folder: Path, d_sae_in: int, d_sae_out: int, block_bytes: int) -> dict[str, int]:
    """By how many bytes a fit raises the peak of a process of its own, and the map's nonzeros."""
    numbers = map(str, (d_sae_in, d_sae_out, 6, block_bytes))
    arguments = [sys.executable, "-c", FIT_AND_MEASURE, str(folder), *numbers]
    # Blocks as large as those of a real fit have memory of their own, which is returned; the small ones here would
    # share the heap, and leave it in pieces.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(2**20)}
    run = subprocess.run(arguments, check=True, cwd=Path(__file__).parent, capture_output=True, env=environment)
    return json.loads(run.stdout)


@pytest.mark.long
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the peak of memory")
@pytest.mark.parametrize(
    ("d_sae_in", "d_sae_out", "block_bytes"),
    [
        (4096, 8192, 8 * 2**20),  # dense it would take 128 MiB in float32
        pytest.param(65536, 65536, BLOCK_BYTES, marks=pytest.mark.slow),  # 16 GiB
    ],
)
def test_fitting_takes_less_than_the_dense_map(tmp_path: Path, d_sae_in: int, d_sae_out: int, block_bytes: int) -> None:
    """In any dtype: in float32 it is the smallest."""
    measured = measure(tmp_path, d_sae_in, d_sae_out, block_bytes)
    print(measured)
    assert block_bytes <= measured["growth"] < d_sae_in * d_sae_out * 4
    assert measured["nonzeros"] == d_sae_in * 32  # every row was fitted


class LargestTensor(TorchDispatchMode):
    """Keeps the number of elements of the largest tensor any torch operation gives."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.untyped_storage().nbytes() // tensor.element_size())
        return result


@pytest.mark.long
@pytest.mark.parametrize("sparsify", ["per_row", "global_tau"])
def test_no_tensor_is_larger_than_a_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sparsify: Any) -> None:
    """So a map of any width never exists dense, neither in one dtype nor in another."""
    rows, width = 8, 640
    monkeypatch.setattr("dspa.methods.conditional_map.BLOCK_BYTES", 8 * rows * width)
    store = tiny.write_store(tmp_path, tiny.random_densities(rows, width, width, 0, active=0.01), per_shard=rows)
    with LargestTensor() as largest:
        found = ConditionalDifferenceMap.fit(store, sparsify=sparsify, entries_per_side=1)
    assert found.matrix.nonzeros >= width
    assert rows * width <= largest.elements <= max(2 * rows * width, found.matrix.nonzeros)
    assert largest.elements < width * width / 5


def test_replacing_a_field_keeps_the_rest(fitted: ConditionalDifferenceMap) -> None:
    changed = replace(fitted, mean_difference=torch.zeros(9))
    assert changed.matrix is fitted.matrix
    assert dspa.ConditionalDifferenceMap is ConditionalDifferenceMap
