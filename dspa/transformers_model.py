"""What this package reads of a transformers model: its decoder layers, its shape, and what distinguishes it from
another. Found by structure, not by a list of model names."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from dspa.errors import InvalidInputError, MismatchError
from dspa.sae.weights import SaeWeights

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


PerLayer = int | tuple[int | None, ...] | None  # of all layers, or of each; None where there is no such field


@dataclass(frozen=True)
class ModelFingerprint:
    """The fields of a model's configuration that decide whether a policy belongs to it. A fine-tuned model has the
    fingerprint of the model it was tuned from."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: PerLayer
    vocab_size: int
    intermediate_size: PerLayer = None
    num_key_value_heads: PerLayer = None
    head_dim: PerLayer = None

    @classmethod
    def from_model(cls, model: nn.Module) -> ModelFingerprint:
        """The fingerprint of a transformers model.

        Raises:
            InvalidInputError: if the model has no configuration that says how wide and deep it is.
        """
        return cls.from_config(text_config(model))

    @classmethod
    def from_config(cls, config: Any) -> ModelFingerprint:
        """The fingerprint of a language model with a transformers configuration.

        Raises:
            InvalidInputError: if it does not say how wide and deep the model is.
        """
        found: dict[str, Any] = {field.name: getattr(config, field.name, None) for field in fields(cls)}
        values: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in found.items()
        }
        missing = [name for name in ("hidden_size", "num_hidden_layers", "vocab_size") if values[name] is None]
        if missing:
            raise InvalidInputError(f"the model's configuration has no {', '.join(missing)}; expected a language model")
        return cls(**values)

    def check(self, model: nn.Module | ModelFingerprint) -> None:
        """Raises MismatchError, naming the fields that differ, if a model has another fingerprint."""
        found = asdict(model if isinstance(model, ModelFingerprint) else ModelFingerprint.from_model(model))
        differing = [
            f"{name} {found[name]} (expected {value})" for name, value in asdict(self).items() if found[name] != value
        ]
        if differing:
            raise MismatchError(f"this was made for another model: found {', '.join(differing)}; use that model")


def load_language_model(name: str, dtype: str = "auto", device: str = "cpu") -> tuple[Any, Any]:
    """A causal language model in evaluation mode, and its tokenizer.

    Args:
        name: a folder or hub id.
        dtype: auto, float32, bfloat16 or float16.
        device: cpu, cuda, cuda:1, ...

    Raises:
        InvalidInputError: if they cannot be loaded, or the device is not there.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise InvalidInputError(f"dtype is {dtype!r}; expected auto, float32, bfloat16 or float16")
    check_device(device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
        model.to(device)
    except (OSError, ValueError, RuntimeError, AssertionError) as error:
        reason = str(error).strip().splitlines()
        raise InvalidInputError(f"model {name!r} cannot be loaded: {reason[0] if reason else error!r}") from error
    return model.eval(), tokenizer


def check_device(device: str) -> None:
    """Raises InvalidInputError if torch does not know a device, or has none of that kind or number here."""
    try:
        wanted = torch.device(device)
        torch.empty(0, device=wanted)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises the latter
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise InvalidInputError(f"device {device!r} cannot be used: {reason}") from error


@dataclass(frozen=True, eq=False)
class DecoderStack:
    """The module that runs the decoder layers, and the layers themselves."""

    module: nn.Module
    layers: nn.ModuleList


def text_config(model: nn.Module) -> PreTrainedConfig:
    """The configuration of the language model inside a transformers model.

    Raises:
        InvalidInputError: if it has none.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "get_text_config"):
        raise InvalidInputError(f"{type(model).__name__} has no transformers configuration; pass a transformers model")
    return config.get_text_config(decoder=True)


def decoder_stack(model: nn.Module) -> DecoderStack:
    """The decoder layers of a model: the one list of as many modules as the configuration names layers.

    Raises:
        InvalidInputError: if there is no such list, or more than one.
    """
    depth = text_config(model).num_hidden_layers
    found = [
        DecoderStack(module, child)
        for module in model.modules()
        for child in module.children()
        if isinstance(child, nn.ModuleList) and len(child) == depth and callable(getattr(child[0], "forward", None))
    ]
    stacks = [stack for stack in found if any("attn" in n or "attention" in n for n, _ in stack.layers.named_modules())]
    if len(stacks) != 1:
        raise InvalidInputError(
            f"{type(model).__name__} has {len(stacks)} lists of {depth} decoder layers; expected one"
        )
    return stacks[0]


HOOKS_ATTRIBUTE = "_dspa_hooks"  # of the module that runs the decoder layers: what observes them


def is_steered(model: nn.Module) -> bool:
    """Whether policies are attached to a model."""
    hooks: Any = vars(decoder_stack(model).module).get(HOOKS_ATTRIBUTE)
    return hooks is not None and bool(hooks.observers)


def check_layer_fits(which: str, layer: int, fingerprint: ModelFingerprint) -> None:
    """Raises MismatchError if a model has no such decoder layer; `which` says in the message what the layer is for."""
    if not 0 <= layer < fingerprint.num_hidden_layers:
        raise MismatchError(
            f"{which} layer is {layer}; this model's layers are 0 to {fingerprint.num_hidden_layers - 1}"
        )


def check_sae_fits(sae: SaeWeights, which: str, layer: int, fingerprint: ModelFingerprint) -> None:
    """Raises MismatchError if an SAE cannot belong to a layer of a model.

    Args:
        sae: the SAE.
        which: "input" or "output", for the message.
        layer: the decoder layer after which it reads, from 0.
        fingerprint: the model.
    """
    check_layer_fits(which, layer, fingerprint)
    if sae.d_model != fingerprint.hidden_size:
        raise MismatchError(
            f"the {which} SAE has d_model {sae.d_model}; expected the model's hidden size {fingerprint.hidden_size}"
        )


def hidden_of(output: Tensor | tuple[Any, ...]) -> Tensor:
    """The hidden states `[B, T, d_model]` in what a decoder layer returns: a tensor in some transformers releases, a
    tuple that starts with it in others."""
    return output if isinstance(output, Tensor) else output[0]


def with_hidden(output: Tensor | tuple[Any, ...], hidden: Tensor) -> Tensor | tuple[Any, ...]:
    """A decoder layer's output with other hidden states, in the form it came in."""
    return hidden if isinstance(output, Tensor) else (hidden, *output[1:])


def dtype_of(module: nn.Module) -> torch.dtype:
    """The dtype of a layer's hidden states, as far as its weights tell: that of its first floating-point parameter, or
    else torch's default."""
    return next((each.dtype for each in module.parameters() if each.is_floating_point()), torch.get_default_dtype())


def device_of(module: nn.Module) -> torch.device:
    """Where a layer computes: where its weights are, or where accelerate brings them from memory or disk."""
    device = next(module.parameters()).device
    if device.type != "meta":
        return device
    for part in module.modules():
        execution_device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if execution_device is not None:
            return torch.device(execution_device)
    return torch.device("cpu")
