"""Models that were not simply loaded: adapters, quantized weights, weights on disk, weights split over processes."""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from naive_generation import generate, is_clean, naive_generate
from quanto_on_cpu import quanto_without_compiling
from tiny_models import layer_of, prompts, randomize, tiny_model, tiny_policy
from torch import nn
from transformers import AutoModelForCausalLM

from dspa.errors import InvalidInputError
from dspa.online.steering import steer

COUNT = 8
LENGTHS = (6, 4)


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """The shapes here are so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------------------------------ adapters


def with_lora(model: Any) -> Any:
    peft = pytest.importorskip("peft", reason="adapters need peft")
    targets = ["q_proj", "v_proj", "down_proj"]
    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=targets)).eval()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in wrapped.named_parameters():
        if "lora" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    return wrapped


@pytest.mark.product
@pytest.mark.parametrize("attach_to", ["wrapper", "model inside"])
@pytest.mark.parametrize("call", ["wrapper", "model inside"])
@pytest.mark.parametrize("cache", [{}, {"cache_implementation": "static"}], ids=["dynamic", "static"])
def test_a_model_with_an_adapter(attach_to: str, call: str, cache: dict[str, Any]) -> None:
    model, rows = tiny_model("llama"), prompts(LENGTHS)
    without_adapter = generate(copy.deepcopy(model), rows, COUNT)
    wrapped = with_lora(model)
    policy = tiny_policy(model)
    expected, unsteered = naive_generate(model, policy, rows, COUNT), generate(model, rows, COUNT)
    chosen = {"wrapper": wrapped, "model inside": model}
    with steer(chosen[attach_to], policy):
        assert generate(chosen[call], rows, COUNT, **cache) == expected
    assert generate(wrapped, rows, COUNT) == unsteered
    assert unsteered not in (expected, without_adapter)
    assert is_clean(wrapped)


@pytest.mark.parametrize("kind", ["PromptTuningConfig", "PrefixTuningConfig"])
def test_an_adapter_with_virtual_tokens_is_refused(kind: str) -> None:
    """It puts columns before the prompt, of which `generate` does not tell; also when it comes after the policy."""
    peft = pytest.importorskip("peft", reason="adapters need peft")
    model, (prompt,) = tiny_model("llama"), prompts((6,))
    policy, line = tiny_policy(model), rf"adapter 'default' puts virtual tokens before the prompt \({kind}\)"
    with steer(model, policy):
        wrapped = peft.get_peft_model(model, getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
        with pytest.raises(InvalidInputError, match=line):
            wrapped.to(torch.float64).generate(input_ids=torch.tensor([prompt]), max_new_tokens=2)
    with pytest.raises(InvalidInputError, match=line):
        steer(wrapped, policy)
    assert is_clean(wrapped)


def test_an_adapter_that_is_switched_off_and_merged_while_steered() -> None:
    model, rows = tiny_model("llama"), prompts(LENGTHS)
    policy = tiny_policy(model)
    without_adapter = naive_generate(copy.deepcopy(model), policy, rows, COUNT)
    wrapped = with_lora(model)
    with_adapter = naive_generate(model, policy, rows, COUNT)
    with steer(wrapped, policy):
        with wrapped.disable_adapter():
            assert generate(wrapped, rows, COUNT) == without_adapter
        assert generate(wrapped, rows, COUNT) == with_adapter
        wrapped.merge_adapter()
        assert generate(wrapped, rows, COUNT) == with_adapter


# --------------------------------------------------------------------------------------------------- quantized weights


def torchao_int8(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """8-bit weights, by torchao."""
    torchao = pytest.importorskip("torchao.quantization", reason="8-bit weights need torchao")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())


def quanto_int4(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit weights, by optimum-quanto."""
    quanto = quanto_without_compiling(monkeypatch)
    quanto.quantize(model, weights=quanto.qint4)
    quanto.freeze(model)


@pytest.mark.parametrize("quantized", [torchao_int8, quanto_int4])
@pytest.mark.parametrize("use_cache", [True, False])
def test_quantized_weights(
    quantized: Callable[[nn.Module, pytest.MonkeyPatch], None], use_cache: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = tiny_model("llama", dtype=torch.float32, hidden_size=128, intermediate_size=128), prompts(LENGTHS)
    ids = torch.tensor(rows[:1])
    exact = model(ids).logits
    quantized(model, monkeypatch)
    assert not torch.equal(model(ids).logits, exact)
    policy = tiny_policy(model, dtype=torch.float32)
    expected, unsteered = naive_generate(model, policy, rows, COUNT), generate(model, rows, COUNT)
    with steer(model, policy):
        assert generate(model, rows, COUNT, use_cache=use_cache) == expected
    assert unsteered != expected


# --------------------------------------------------------------------------------------------- weights somewhere else


@pytest.mark.parametrize("offloaded", [("input",), ("output",), ("input", "output", "others")], ids=" and ".join)
def test_weights_on_disk(offloaded: tuple[str, ...], tmp_path: Path) -> None:
    """Accelerate brings a layer's weights in when it runs; in between, its parameters have no values."""
    pytest.importorskip("accelerate", reason="weights on disk need accelerate")
    model, rows = tiny_model("llama"), prompts(LENGTHS)
    policy = tiny_policy(model)
    expected, unsteered = naive_generate(model, policy, rows, COUNT), generate(model, rows, COUNT)
    model.save_pretrained(tmp_path / "model")
    place = {1: "input", 2: "output"}
    device_map = {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.norm": "cpu",
        "lm_head": "cpu",
        **{f"model.layers.{i}": "disk" if place.get(i, "others") in offloaded else "cpu" for i in range(4)},
    }
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload", dtype=torch.float64
    )
    assert {parameter.device.type for parameter in loaded.parameters()} == {"cpu", "meta"}
    with steer(loaded, policy) as steering:
        assert generate(loaded, rows, COUNT) == expected
    assert steering.summary().tokens_seen == 2 * COUNT
    assert generate(loaded, rows, COUNT) == unsteered
    assert layer_of(loaded, 1) is not None


@pytest.mark.long
def test_weights_split_over_two_processes(tmp_path: Path) -> None:
    """Tensor parallelism: every process steers, and all of them edit alike."""
    model: Any = tiny_model("llama", dtype=torch.float32, num_key_value_heads=4)
    randomize(model, seed=0)
    rows = prompts(LENGTHS)
    policy = tiny_policy(model, dtype=torch.float32)
    expected = naive_generate(model, policy, rows, COUNT)
    model.save_pretrained(tmp_path / "model")
    policy.save_pretrained(tmp_path / "policy")
    (tmp_path / "script.py").write_text(TENSOR_PARALLEL)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    folders = os.pathsep.join([str(Path(__file__).parents[1]), *sys.path])
    result = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "PYTHONPATH": folders, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    found = [(tmp_path / f"rank{rank}").read_text() for rank in range(2)]
    assert found == [repr((expected, 2 * COUNT, True))] * 2
    assert expected != generate(model, rows, COUNT)


TENSOR_PARALLEL = f"""
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from naive_generation import generate
from tiny_models import prompts
from transformers import AutoModelForCausalLM
from dspa.methods.steering_policy import SteeringPolicy
from dspa.online.steering import steer

folder = Path(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(folder / "model", tp_plan="auto", dtype=torch.float32)
split = model.model.layers[0].mlp.down_proj.weight.shape != torch.Size([24, 40])
split = split or "DTensor" in type(model.model.layers[0].mlp.down_proj.weight.data).__name__
with steer(model, SteeringPolicy.from_pretrained(folder / "policy")) as steering:
    steered = generate(model, prompts({LENGTHS}), {COUNT})
(folder / f"rank{{dist.get_rank()}}").write_text(repr((steered, steering.summary().tokens_seen, bool(split))))
dist.destroy_process_group()
"""
