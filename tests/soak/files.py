"""Mutated files of every kind, loaded and used: only errors of the package, or right results.

A case is a number: it seeds the choice of the file, of the mutation and of its place, so that a failure is repeated by
its number alone. Half of the mutations know the checksums and compute them again.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import json
import math
import random
import resource
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import tiny_collection as tiny
import torch
from fsrl_cases import tiny_fsrl_policy
from tiny_models import tiny_tokenizer
from torch import Tensor

import dspa
from dspa.errors import DspaError
from dspa.kernels import EditList, adapter_step, lookup, token_step
from dspa.methods import conditional_map, steering_policy, vector_policy
from dspa.methods.fsrl import policy as fsrl_policy
from dspa.offline.density_store import DensityStore
from dspa.offline.preferences import load_preferences
from dspa.util.records import CHECKSUM, encode_record
from soak.deadline import Deadline

SLOWEST = 2.0  # seconds a load may take
LARGEST = 2**30  # bytes a load may add to the process

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 2**31 - 1, 2**31, 2**62, -(2**63), 10**30, 10**400, 0.0, -0.0, 0.5, 1e-300, 1e308,
    "", "a", "no", "NaN", "../../etc/passwd", "\x00", "\ud800", "x" * 10**5, [], [[]], [1, "a"], {}, {"a": 1},
    [0] * 1000,
)  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A kind of folder or file: how it is made, which of its files are mutated, and how it is loaded and used.

    `use` returns what is compared with the result of the file that was not mutated.
    """

    name: str
    make: Callable[[Path], None]
    use: Callable[[Path], Any]


def _tiny_saes() -> tuple[Any, Any]:
    return tiny.tiny_sae(tiny.D_SAE_IN, 1), tiny.tiny_sae(tiny.D_SAE_OUT, 2)


def _store(folder: Path) -> None:
    densities = tiny.random_densities(9, tiny.D_SAE_IN, tiny.D_SAE_OUT, 0)
    tiny.write_store(folder, densities, saes=_tiny_saes())


def _policy(folder: Path) -> None:
    _store(folder / "store")
    fitted = conditional_map.ConditionalDifferenceMap.fit(folder / "store", entries_per_side=3)
    shutil.rmtree(folder / "store")
    dspa.SteeringPolicy(fitted, *_tiny_saes(), k_prompt=5, k_diff=3).save_pretrained(folder)


def _map(folder: Path) -> None:
    _store(folder / "store")
    fitted = conditional_map.ConditionalDifferenceMap.fit(folder / "store", entries_per_side=3)
    shutil.rmtree(folder / "store")
    fitted.save(folder)


def _ridge(folder: Path) -> None:
    _store(folder / "store")
    fitted = conditional_map.ConditionalDifferenceMap.fit(
        folder / "store", entries_per_side=3, estimator="ridge", features=8
    )
    shutil.rmtree(folder / "store")
    fitted.save(folder)


def _fsrl(folder: Path) -> None:
    tiny_fsrl_policy(dtype=torch.float32, masked_latents=(3,)).save_pretrained(folder)


def _vector(folder: Path) -> None:
    dspa.VectorPolicy(torch.arange(16.0), 2, 0.5, model=tiny.FINGERPRINT).save_pretrained(folder)


def _preferences(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": f"p {n}", "chosen": f"yes {n}", "rejected": f"no {n}"} for n in range(4)]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def _parquet(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    rows = {"prompt": ["p", "q"], "chosen": ["yes", "ja"], "rejected": ["no", "nein"]}
    pyarrow.parquet.write_table(pa.table(rows), folder / "prefs.parquet")


DENSITY = torch.rand(4, tiny.D_SAE_IN, generator=torch.Generator().manual_seed(0))
TOKENIZER: Any = tiny_tokenizer()
HIDDEN = torch.randn(4, tiny.D_MODEL, generator=torch.Generator().manual_seed(1))


def _use_policy(folder: Path) -> Any:
    policy = dspa.SteeringPolicy.from_pretrained(folder)
    edits = policy.select(DENSITY)
    matrix = policy.conditional_map.matrix
    options = (policy.k_prompt, policy.k_diff, policy.edit)
    again = lookup(DENSITY, matrix, *options, sign_guard=policy.sign_guard, backend="reference")
    assert _lists(edits) == _lists(again), "the backends select differently"
    hidden = HIDDEN.to(policy.output_sae.dtype)[:, : policy.output_sae.d_model].clone()
    token_step(hidden, policy.output_sae, edits, policy.alpha)
    return _lists(edits), hidden.tolist(), policy.input_layer, policy.output_layer, policy.uncounted_token_ids


def _use_map(folder: Path) -> Any:
    loaded = dspa.ConditionalDifferenceMap.load(folder)
    return loaded.to_dense().tolist(), loaded.always_on().tolist(), loaded.mean_difference.tolist(), loaded.run


def _use_ridge(folder: Path) -> Any:
    loaded = dspa.ConditionalDifferenceMap.load(folder)
    return _lists(loaded.select(DENSITY, 5, 3, "both")), loaded.gate_counts.tolist(), loaded.run


def _use_fsrl(folder: Path) -> Any:
    policy = dspa.FsrlPolicy.from_pretrained(folder)
    hidden = torch.randn(4, policy.sae.d_model, generator=torch.Generator().manual_seed(1)).to(policy.sae.dtype)
    adapter_step(hidden, policy.sae, policy.adapter)
    return hidden.tolist(), policy.layer, policy.scale, policy.masked_latents, policy.model


def _use_vector(folder: Path) -> Any:
    policy = dspa.VectorPolicy.from_pretrained(folder)
    return policy.vector.tolist(), policy.layer, policy.scale, policy.model, policy.uncounted_token_ids


def _use_store(folder: Path) -> Any:
    fitted = dspa.ConditionalDifferenceMap.fit(folder, entries_per_side=3)
    return fitted.to_dense().tolist(), DensityStore.open(folder).run


def _use_preferences(name: str) -> Callable[[Path], Any]:
    return lambda folder: len(load_preferences(str(folder / name), TOKENIZER, skip_bad=True, chat=False))


def _lists(edits: EditList) -> list[tuple[list[int], list[int]]]:
    return [(edits.augmented(row), edits.ablated(row)) for row in range(edits.batch)]


KINDS = (
    Kind("policy", _policy, _use_policy),
    Kind("conditional map", _map, _use_map),
    Kind("map by ridge", _ridge, _use_ridge),
    Kind("FSRL policy", _fsrl, _use_fsrl),
    Kind("vector policy", _vector, _use_vector),
    Kind("density store", _store, _use_store),
    Kind("preferences as JSON Lines", _preferences, _use_preferences("prefs.jsonl")),
    Kind("preferences as parquet", _parquet, _use_preferences("prefs.parquet")),
)
FOLDERS = {
    "policy": steering_policy.FOLDER,
    "conditional map": conditional_map.FOLDER,
    "map by ridge": conditional_map.FOLDER,
    "FSRL policy": fsrl_policy.FOLDER,
    "vector policy": vector_policy.FOLDER,
}


# --- mutations --------------------------------------------------------------------------------------------------------


def mutate_bytes(content: bytes, rng: random.Random) -> bytes:
    """Flips, cuts, repeats, inserts or overwrites some of it."""
    at = rng.randrange(len(content) + 1)
    length = rng.choice((1, 2, 8, 100, len(content)))
    kind = rng.randrange(6)
    if kind == 0 and content:
        bit = rng.randrange(8 * len(content))
        return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]
    if kind == 1:
        return content[:at]
    if kind == 2:
        return content[:at] + content[at + length :]
    if kind == 3:
        return content[:at] + content[at : at + length] * rng.choice((2, 3, 50)) + content[at + length :]
    if kind == 4:
        return content[:at] + rng.randbytes(min(length, 1000)) + content[at:]
    opening = rng.choice((b"[", b'{"a":', b"9", b" ", b"\xff", b'"'))
    return content[:at] + opening * rng.choice((1, 10, 10**4, 10**5)) + content[at:]


def mutate_record(record: Any, rng: random.Random) -> Any:
    """Changes, removes, adds or moves one value somewhere in it."""
    record = copy.deepcopy(record)
    holders = []

    def walk(node: Any) -> None:
        if isinstance(node, (dict, list)) and node:
            holders.append(node)
            for child in node.values() if isinstance(node, dict) else node:
                walk(child)

    walk(record)
    if not holders:
        return rng.choice(HOSTILE)
    holder = rng.choice(holders)
    key = rng.choice(list(holder)) if isinstance(holder, dict) else rng.randrange(len(holder))
    kind = rng.randrange(5)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, dict):
        holder[rng.choice(("surplus", "", "kind", "run", "sha256", "\u00e9"))] = rng.choice(HOSTILE)
    elif kind == 2 and type(holder[key]) in (int, float):
        holder[key] = rng.choice((holder[key] + 1, holder[key] - 1, -holder[key], holder[key] * 2, float(holder[key])))
    elif kind == 3:
        other = rng.choice(holders)
        holder[key] = copy.deepcopy(rng.choice(list(other.values()) if isinstance(other, dict) else other))
    else:
        holder[key] = copy.deepcopy(rng.choice(HOSTILE))
    return record


DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int8, torch.int32, torch.int64, torch.bool, torch.uint8)
EXTREMES = (0, 1, -1, 2, 10**6, -(2**31), 2**31 - 1, 2**62, -(2**63), math.nan, math.inf, -math.inf, 1e30)


def mutate_tensors(tensors: dict[str, Tensor], rng: random.Random) -> dict[str, Tensor]:
    """Removes, adds, renames, converts, reshapes, cuts or overwrites one tensor."""
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    name = rng.choice(sorted(tensors))
    tensor = tensors[name]
    kind = rng.randrange(8)
    if kind == 0:
        del tensors[name]
    elif kind == 1:
        tensors[rng.choice(("surplus", "input_sae.k", "output_sae.metadata", name + "x", "a.b.c"))] = tensor.clone()
    elif kind == 2:
        tensors[name] = tensor.to(rng.choice(DTYPES))
    elif kind == 3:
        tensors[name] = rng.choice((tensor.flatten(), tensor[None], tensor.flatten()[:1].reshape(()), tensor[:0]))
    elif kind == 4:
        tensors[name] = torch.cat([tensor, tensor])
    elif kind == 5:
        tensors[name] = tensor[:-1].contiguous()
    elif tensor.numel():
        flat = tensor.flatten()
        for _ in range(rng.choice((1, 1, 2, 5))):
            value = rng.choice(EXTREMES)
            if not tensor.is_floating_point():
                limits = torch.iinfo(tensor.dtype) if tensor.dtype != torch.bool else None
                value = 0 if isinstance(value, float) else value
                value = value if limits is None else max(limits.min, min(limits.max, value))
            flat[rng.randrange(len(flat))] = value
        tensors[name] = flat.reshape(tensor.shape)
    return tensors


def _signed(record: dict[str, Any]) -> bytes:
    record = {key: value for key, value in record.items() if key != CHECKSUM}
    try:
        return encode_record(record)
    except ValueError:  # NaN and the like have no checksum
        return json.dumps({**record, CHECKSUM: "0" * 64}).encode()


def mutate(kind: Kind, folder: Path, rng: random.Random) -> str:
    """Mutates one file; returns how: "bytes", "checksums" where the checksums are right afterwards, or "odd"."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != ".lock")
    path = rng.choice(files)
    way = rng.choice(("bytes", "bytes", "record", "tensors", "odd") if len(files) > 1 else ("bytes", "record", "odd"))
    record_file = next((file for file in files if file.suffix == ".json"), None)
    if way == "record" and record_file is not None:
        record_file.write_bytes(_signed(mutate_record(json.loads(record_file.read_text()), rng)))
        return "checksums"
    if way == "tensors" and record_file is not None:
        file = rng.choice([file for file in files if file.suffix == ".safetensors"])
        content = file.read_bytes()
        notes = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")]).get("__metadata__")
        if rng.random() < 0.7:
            changed = safetensors.torch.save(mutate_tensors(safetensors.torch.load(content), rng), notes)
        else:  # the header itself
            changed = mutate_bytes(content, rng)
        checksum = hashlib.sha256(changed).hexdigest()
        record = json.loads(record_file.read_text())
        if kind.name in FOLDERS:
            file.unlink()
            file = folder / FOLDERS[kind.name].tensors_name(checksum)
            record["sha256"] = checksum
        else:
            next(shard for shard in record["shards"] if shard["file"] == file.name)["sha256"] = checksum
        file.write_bytes(changed)
        record_file.write_bytes(_signed(record))
        return "checksums"
    if way == "odd":
        other = rng.choice(files)
        path.unlink()
        rng.choice(
            (
                lambda: None,
                path.mkdir,
                lambda: path.symlink_to(path),
                lambda: path.symlink_to("/dev/zero"),
                lambda: path.write_bytes(b""),
                lambda: other.exists() and path.write_bytes(other.read_bytes()),
            )
        )()
        return "odd"
    path.write_bytes(mutate_bytes(path.read_bytes(), rng))
    return "bytes"


def check_message(case: str, message: str) -> None:
    assert "\n" not in message, f"{case}: {message!r} is not one line"
    assert len(message) < 2000, f"{case}: {message[:200]!r}... is too long"


# --- the campaign -----------------------------------------------------------------------------------------------------


def run(cases: int, root: Path, *, first: int = 0, until: Deadline | None = None) -> dict[str, int]:
    """Runs so many cases, or as many as fit into the time, and counts how they ended.

    Raises:
        AssertionError: for a case that ended in another way; it names the case.
    """
    torch.set_num_threads(1)
    importlib.import_module("datasets")  # some preference files need it; its first import is no load's time
    originals: dict[str, tuple[dict[str, bytes], Any]] = {}
    for kind in KINDS:
        folder = root / "original" / kind.name
        kind.make(folder)
        originals[kind.name] = tiny.folder_bytes(folder), kind.use(folder)
    counts: Counter[str] = Counter()
    slowest, grown, until = 0.0, 0, until or Deadline()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for case in range(first, first + cases):
        if until.passed:
            break
        rng = random.Random(case)
        kind = KINDS[rng.randrange(len(KINDS))]
        contents, expected = originals[kind.name]
        folder = root / "case"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        way = mutate(kind, folder, rng)
        began = time.monotonic()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = kind.use(folder)
        except DspaError as error:
            check_message(f"case {case} ({kind.name})", str(error))
            ending = "refused"
        except BaseException as error:
            raise AssertionError(f"case {case} ({kind.name}, {way}) ended in {error!r}") from error
        else:
            ending = "the same" if result == expected else "another that is whole"
            if way != "checksums" and not kind.name.startswith("preferences"):
                assert ending == "the same", f"case {case} ({kind.name}, {way}) was accepted and means another thing"
        took = time.monotonic() - began
        assert took < SLOWEST, f"case {case} ({kind.name}, {way}) took {took:.1f} s"
        slowest = max(slowest, took)
        counts[f"loads, {ending}"] += 1
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
        assert grown < LARGEST, f"case {case} ({kind.name}, {way}) took {grown} bytes"
    counts["loads"] = sum(counts.values())
    counts["slowest load, ms"] = round(1000 * slowest)
    counts["memory the loads added, MiB"] = grown // 2**20
    return dict(counts)
