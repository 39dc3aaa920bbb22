"""FLOPs counted by running models without weights, against the formulas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma2Config, LlamaConfig, MistralConfig, Qwen3Config

from dspa.errors import InvalidInputError
from dspa.flops.alignment import (
    AlignmentAssumptions,
    alignment_costs,
    collection_reference,
    collection_stages,
    rahf_scit,
)
from dspa.flops.counter import (
    PUBLISHED_MODELS,
    PublishedModel,
    count_collection,
    count_inference,
    counted_alignment,
    load_config,
    meta_model,
    model_shape,
)
from dspa.flops.inference import InferenceAssumptions
from dspa.flops.shapes import SteeringShape
from dspa.offline.batching import BatchLimits, TripleLengths
from dspa.offline.preferences import PreferenceTriple

PARAMETERS = {"gemma-2-2b": 2_614_341_888, "gemma-2-9b": 9_241_705_984, "qwen3-8b": 8_190_735_360}
LEAST_RATIO = {"gemma-2-2b": 9.5, "gemma-2-9b": 8.3, "qwen3-8b": 15.0}
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
}
CONFIGS = {
    "gemma2": Gemma2Config(**SIZES, sliding_window=24),
    "llama": LlamaConfig(**SIZES),
    "mistral": MistralConfig(**SIZES, sliding_window=24),
    "qwen3": Qwen3Config(**SIZES),
}

LONG = ("llama", "mistral")
NAMES = [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in CONFIGS]


def triple(prompt: int, chosen: int, rejected: int) -> PreferenceTriple:
    return PreferenceTriple((1,) * prompt, (1,) * chosen, (1,) * rejected, chosen, rejected, "counted")


@pytest.mark.long
@pytest.mark.parametrize(
    "published",
    [PUBLISHED_MODELS[0], *(pytest.param(model, marks=pytest.mark.long) for model in PUBLISHED_MODELS[1:])],
    ids=lambda model: model.config,
)
def test_collection_on_the_published_models(published: PublishedModel) -> None:
    """p = c = r = 1000: within 2 % of the formula, and the ratio to RAHF-SCIT, attention and SAEs in."""
    model = meta_model(load_config(published.config))
    shape = model_shape(model, published.label)
    assert shape.parameters == PARAMETERS[published.config]
    steering, a = SteeringShape(published.input_layer, published.output_layer), AlignmentAssumptions()
    counted = count_collection(model, [triple(1000, 1000, 1000)], steering, BatchLimits())
    reference = collection_reference(shape, steering, a)
    assert counted.total() / reference.total() == pytest.approx(1, abs=0.02)
    assert counted.sae == reference.sae
    assert counted.attention / reference.attention == pytest.approx(1, abs=0.01)
    ratio = rahf_scit(shape.parameters, a, shape).flops.total() / counted.total()
    print(f"{published.label}: {counted.total() / reference.total():.4f} of the formula, ratio {ratio:.3f}")
    assert ratio >= LEAST_RATIO[published.config]


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_every_method_counts_as_its_formula(name: str) -> None:
    """The formulas charge an embedding that is only looked up, and the counter does not, so it is taken out of P."""
    model = meta_model(CONFIGS[name])
    shape = model_shape(model, name)
    a = AlignmentAssumptions(20, 18, 12, rahf_tokens=16, rahf_step2_tokens=12, fsrl_d_sae=128, chunk=8)
    steering = SteeringShape(1, 3, 48, 80)
    modelled = alignment_costs(shape, steering, a, parameters=shape.matrix_weights)
    for formula, counted in zip(modelled, counted_alignment(model, steering, a), strict=True):
        assert counted.method == formula.method
        assert counted.flops.sae == formula.flops.sae
        if formula.method != "FSRL":  # whose formula charges the model's own P
            assert counted.flops.linear == pytest.approx(formula.flops.linear, rel=1e-12)
        assert counted.flops.attention == pytest.approx(formula.flops.attention, rel=0.15)  # rotary frequencies


@pytest.mark.long
@pytest.mark.parametrize("name", NAMES)
def test_batches_of_unequal_triples_count_as_their_plan(name: str) -> None:
    model = meta_model(CONFIGS[name])
    triples = [triple(5 + n % 7, 3 + n % 5, 9 - n % 4) for n in range(20)]
    steering, limits = SteeringShape(1, 3, 48, 80), BatchLimits(triples=6, chunk=4)
    lengths = [TripleLengths(len(t.prompt), len(t.chosen), len(t.rejected)) for t in triples]

    stages = collection_stages(model_shape(model, name), steering, lengths, limits)
    counted = count_collection(model, triples, steering, limits)
    assert counted.linear == sum(stage.flops.linear for stage in stages)
    assert counted.sae == sum(stage.flops.sae for stage in stages)
    assert counted.attention == pytest.approx(sum(stage.flops.attention for stage in stages), rel=0.15)


def test_prefill_and_decode_step() -> None:
    model = meta_model(CONFIGS["qwen3"])
    shape = model_shape(model, "qwen3")
    counted = count_inference(model, InferenceAssumptions(prompt_tokens=30, context=50))
    blocks = sum(shape.block_weights)
    assert counted.prefill.linear == 2 * 30 * blocks + 2 * shape.head_weights
    assert counted.decode.linear == 2 * shape.matrix_weights
    assert counted.decode.attention == pytest.approx(shape.attention(1, 49, range(6), "square"), rel=0.01)


def test_counting_leaves_the_model_as_it_was() -> None:
    model = meta_model(CONFIGS["llama"])
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    list(counted_alignment(model, SteeringShape(1, 3), AlignmentAssumptions(4, 4, 4, 4, rahf_step2_tokens=4)))
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model.training
    assert all(parameter.device == torch.device("meta") for parameter in model.parameters())


# --- configurations ---------------------------------------------------------------------------------------------------


def test_a_configuration_from_a_file_a_folder_and_by_name(tmp_path: Path) -> None:
    CONFIGS["qwen3"].save_pretrained(tmp_path)
    for source in (str(tmp_path), str(tmp_path / "config.json")):
        config = load_config(source)
        assert (config.model_type, config.hidden_size) == ("qwen3", 64)
    assert load_config("Gemma-2-2B").num_hidden_layers == 26


@pytest.mark.parametrize("content", ["", "{", "{}", '{"model_type": "no such model"}', "[]"])
def test_a_file_that_is_no_configuration_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(content)
    with pytest.raises(InvalidInputError, match=r"^[^\n]+$"):
        load_config(str(path))


def test_a_missing_source_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"^no configuration at [^\n]+$"):
        load_config(str(tmp_path / "nothing"))


def test_a_mixture_of_experts_is_refused(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        **SIZES,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInputError, match="mixture of experts"):
        model_shape(meta_model(load_config(str(tmp_path / "config.json"))), "moe")
