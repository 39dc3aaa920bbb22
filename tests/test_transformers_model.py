"""Finding decoder layers by structure, and telling models apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import D_MODEL, FAMILIES, LAYERS, VOCAB, Family, tiny_model, tiny_sae
from torch import Tensor, nn
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from dspa.errors import InvalidInputError, MismatchError
from dspa.transformers_model import (
    ModelFingerprint,
    check_sae_fits,
    decoder_stack,
    device_of,
    hidden_of,
    text_config,
    with_hidden,
)

SHAPE: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": D_MODEL, "num_hidden_layers": LAYERS}
WIDE: dict[str, Any] = {**SHAPE, "intermediate_size": 32, "num_attention_heads": 4}


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB, n_embd=D_MODEL, n_layer=LAYERS, n_head=4))


def gpt_neox() -> nn.Module:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**WIDE))


def opt() -> nn.Module:
    return OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=32, num_attention_heads=4, word_embed_proj_dim=D_MODEL))


def mixtral_with_as_many_experts_as_layers() -> nn.Module:
    return MixtralForCausalLM(MixtralConfig(**WIDE, num_key_value_heads=2, num_local_experts=LAYERS))


def gemma3_with_vision() -> nn.Module:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**WIDE, "num_key_value_heads": 2, "head_dim": 8}
    config = Gemma3Config(text_config=text, vision_config={**vision, "image_size": 28, "patch_size": 14})  # type: ignore[arg-type]
    return Gemma3ForConditionalGeneration(config)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_of_each_family(family: Family) -> None:
    model = tiny_model(family)
    stack = decoder_stack(model)
    assert stack.module is model.get_submodule("model")
    assert stack.layers is model.get_submodule("model.layers")


@pytest.mark.parametrize(
    ("build", "path"),
    [
        (gpt2, "transformer.h"),
        (gpt_neox, "gpt_neox.layers"),
        (opt, "model.decoder.layers"),
        (mixtral_with_as_many_experts_as_layers, "model.layers"),
        (gemma3_with_vision, "model.language_model.layers"),
    ],
)
def test_the_layers_of_other_architectures(build: Callable[[], nn.Module], path: str) -> None:
    model = build()
    stack = decoder_stack(model)
    assert stack.layers is model.get_submodule(path)
    assert stack.module is model.get_submodule(path.rpartition(".")[0])
    assert len(stack.layers) == ModelFingerprint.from_model(model).num_hidden_layers


class Wrapper(nn.Module):
    def __init__(self, **modules: nn.Module) -> None:
        super().__init__()
        self.config = tiny_model().config
        for name, module in modules.items():
            self.add_module(name, module)


@pytest.mark.parametrize(
    ("model", "found"),
    [
        (Wrapper(), 0),
        (Wrapper(first=tiny_model(), second=tiny_model()), 2),
        (Wrapper(mlps=nn.ModuleList(nn.Linear(2, 2) for _ in range(LAYERS))), 0),
    ],
)
def test_no_stack_or_two_are_refused(model: nn.Module, found: int) -> None:
    with pytest.raises(InvalidInputError, match=f"Wrapper has {found} lists of {LAYERS} decoder layers; expected one"):
        decoder_stack(model)


def test_a_stack_inside_a_wrapper() -> None:
    inner = tiny_model()
    assert decoder_stack(Wrapper(inner=inner)).layers is inner.get_submodule("model.layers")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_fingerprint_holds_the_shape(family: Family) -> None:
    fingerprint = ModelFingerprint.from_model(tiny_model(family))
    assert asdict(fingerprint) == {
        "model_type": {"gemma3": "gemma3_text"}.get(family, family),
        "hidden_size": D_MODEL,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "vocab_size": VOCAB,
        "intermediate_size": 40,
        "num_key_value_heads": 2,
        "head_dim": 8,
    }


def test_other_weights_have_the_same_fingerprint() -> None:
    ModelFingerprint.from_model(tiny_model(seed=0)).check(tiny_model(seed=1, dtype=torch.float32))


def test_fields_that_differ_are_named() -> None:
    with pytest.raises(MismatchError) as error:
        ModelFingerprint.from_model(tiny_model("llama")).check(tiny_model("mistral", vocab_size=70))
    message = str(error.value)
    assert "model_type mistral (expected llama)" in message
    assert f"vocab_size 70 (expected {VOCAB})" in message
    assert "hidden_size" not in message
    assert "\n" not in message


@pytest.mark.parametrize("model", [nn.Linear(2, 2), SimpleNamespace(config=None)])
def test_what_is_no_transformers_model_is_refused(model: Any) -> None:
    for ask in (text_config, ModelFingerprint.from_model, decoder_stack):
        with pytest.raises(InvalidInputError, match="has no transformers configuration"):
            ask(model)


def test_a_configuration_without_a_shape_is_refused() -> None:
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda decoder: SimpleNamespace(vocab_size=9)))
    with pytest.raises(InvalidInputError, match="hidden_size, num_hidden_layers"):
        ModelFingerprint.from_model(model)


@pytest.mark.parametrize(
    ("layer", "d_model", "message"),
    [
        (0, D_MODEL, None),
        (LAYERS - 1, D_MODEL, None),
        (LAYERS, D_MODEL, "input layer is 4; this model's layers are 0 to 3"),
        (-1, D_MODEL, "input layer is -1; this model's layers are 0 to 3"),
        (0, 32, "the input SAE has d_model 32; expected the model's hidden size 24"),
    ],
)
def test_an_sae_fits_or_not(layer: int, d_model: int, message: str | None) -> None:
    fingerprint = ModelFingerprint.from_model(tiny_model())
    if message is None:
        check_sae_fits(tiny_sae(d_model=d_model), "input", layer, fingerprint)
        return
    with pytest.raises(MismatchError) as error:
        check_sae_fits(tiny_sae(d_model=d_model), "input", layer, fingerprint)
    assert str(error.value) == message


@pytest.mark.parametrize("wrap", [lambda h: h, lambda h: (h,), lambda h: (h, "cache", None)])
def test_layer_outputs_keep_their_form(wrap: Callable[[Tensor], Any]) -> None:
    hidden, other = torch.zeros(1, 2, 3), torch.ones(1, 2, 3)
    output = wrap(hidden)
    assert hidden_of(output) is hidden
    replaced = with_hidden(output, other)
    assert hidden_of(replaced) is other
    assert type(replaced) is type(output)
    if isinstance(output, tuple):
        assert replaced[1:] == output[1:]


def test_the_device_of_a_layer() -> None:
    assert device_of(decoder_stack(tiny_model()).layers[0]) == torch.device("cpu")
    assert device_of(nn.Linear(2, 2, device="meta")) == torch.device("cpu")


@pytest.mark.parametrize("named", ["cpu", torch.device("cpu"), "cuda:1"])
def test_the_device_of_a_layer_whose_weights_are_elsewhere(named: Any) -> None:
    """Accelerate says where they are brought to."""
    layer = nn.Sequential(nn.Linear(2, 2, device="meta"))
    layer[0]._hf_hook = SimpleNamespace(execution_device=named)  # type: ignore[assignment]
    assert device_of(layer) == torch.device(named)
