"""Models, SAEs, policies and a tokenizer small enough for a test: random weights, seeded, made in milliseconds.

The latents of the SAEs are active on about a third of the tokens and their decoder rows are long, so that the edits of
a policy really happen and change what a model says.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from dspa.kernels import CsrMap
from dspa.methods.conditional_map import ConditionalDifferenceMap, FitOptions
from dspa.methods.steering_policy import SteeringPolicy
from dspa.offline.density_store import CollectionRun
from dspa.sae.autoencoder import SparseAutoencoder
from dspa.sae.metadata import SaeMetadata
from dspa.transformers_model import ModelFingerprint

Family = Literal[
    "gemma2",
    "gemma3",
    "qwen3",
    "llama",
    "mistral",
    "qwen2",
    "qwen3_moe",
    "mixtral",
    "phi3",
    "olmo2",
    "smollm3",
    "gpt_neox",
    "gpt2",
    "falcon",
]
SaeKind = Literal["jumprelu", "topk", "gated"]

FAMILIES: tuple[Family, ...] = ("gemma2", "gemma3", "qwen3", "llama", "mistral")
ALL_FAMILIES: tuple[Family, ...] = get_args(Family)
SAE_KINDS: tuple[SaeKind, ...] = ("jumprelu", "topk", "gated")

VOCAB, D_MODEL, LAYERS = 61, 24, 4
D_SAE_IN, D_SAE_OUT = 40, 56
INPUT_LAYER, OUTPUT_LAYER = 1, 2
PAD, BOS, EOS = 0, 1, 2
SLIDING_WINDOW = 6  # shorter than what is generated, so that caches do slide

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %} {{ message['role'] }} {{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} assistant{% endif %}"
)

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 40,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": None,
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "num_experts": 4}
_FAMILIES: dict[Family, tuple[type[Any], type[Any], dict[str, Any]]] = {
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"sliding_window": SLIDING_WINDOW}),
    "gemma3": (Gemma3TextConfig, Gemma3ForCausalLM, {"sliding_window": SLIDING_WINDOW}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": SLIDING_WINDOW}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"moe_intermediate_size": 16, **_EXPERTS}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"sliding_window": None, "num_local_experts": 4, **_EXPERTS}),
    "phi3": (Phi3Config, Phi3ForCausalLM, {"num_attention_heads": 3, "num_key_value_heads": 3}),
    "olmo2": (Olmo2Config, Olmo2ForCausalLM, {}),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {}),
    "gpt_neox": (GPTNeoXConfig, GPTNeoXForCausalLM, {}),
    "gpt2": (GPT2Config, GPT2LMHeadModel, {"n_positions": 256, "n_inner": 40}),
    "falcon": (FalconConfig, FalconForCausalLM, {"ffn_hidden_size": 40, "head_dim": "absent"}),
}
_NOT_IN_FLOAT64 = ("gemma2", "qwen3_moe", "mixtral")
_LAYERS_AT: dict[str, str] = {"gpt_neox": "gpt_neox.layers", "gpt2": "transformer.h", "falcon": "transformer.h"}


def tiny_model(
    family: Family = "qwen3", *, dtype: torch.dtype | None = None, seed: int = 0, **config: Any
) -> PreTrainedModel:
    """A random-weight model in evaluation mode that ends no sequence of its own accord.

    It computes in float64 unless told, except Gemma 2 (the eager attention of transformers has no float64 softmax, and
    gives NaN on padding) and mixtures of experts (their matrix products have no float64).
    """
    dtype = dtype or (torch.float32 if family in _NOT_IN_FLOAT64 else torch.float64)
    config_class, model_class, own = _FAMILIES[family]
    shape = {name: value for name, value in {**_SHAPE, **own, **config}.items() if value != "absent"}
    model = model_class(config_class(**shape))
    randomize(model, seed)
    return model.to(dtype).eval()


def layer_of(model: torch.nn.Module, index: int) -> torch.nn.Module:
    """A decoder layer of one of these models."""
    family: Any = model.config.model_type  # type: ignore[union-attr]
    return model.get_submodule(f"{_LAYERS_AT.get(family, 'model.layers')}.{index}")  # type: ignore[arg-type]


def randomize(model: torch.nn.Module, seed: int) -> None:
    """Gives every weight matrix unit gain, and every vector a size of its own, so that every layer matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2:
                parameter.copy_(noise if "embed" in name else noise / parameter.shape[1] ** 0.5)
            else:
                parameter.add_(0.2 * noise)


def tiny_sae(
    kind: SaeKind = "jumprelu",
    *,
    layer: int = OUTPUT_LAYER,
    d_model: int = D_MODEL,
    d_sae: int = D_SAE_OUT,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> SparseAutoencoder:
    """A random SAE. The topk one subtracts its decoder bias, the others do not."""
    generator = torch.Generator().manual_seed(seed)
    small = torch.float64 if dtype == torch.float64 else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors: dict[str, Tensor] = {
        "W_enc": (random(d_sae, d_model) / d_model**0.5).to(dtype),
        "W_dec": (1.5 * random(d_sae, d_model) / d_model**0.5).to(dtype),
        "b_enc": (0.1 * random(d_sae)).to(small),
        "b_dec": (0.3 * random(d_model)).to(small),
        "threshold": (0.4 * random(d_sae).abs() if kind == "jumprelu" else torch.zeros(d_sae)).to(small),
    }
    if kind == "gated":
        tensors["magnitude_scale"] = random(d_sae).exp().to(small)
        tensors["magnitude_bias"] = (0.3 * random(d_sae)).to(small)
    return SparseAutoencoder(
        activation=kind,
        k=d_sae // 3 if kind == "topk" else None,
        subtract_b_dec=kind == "topk",
        metadata=SaeMetadata(layer=layer, architecture=kind),
        **tensors,  # type: ignore[arg-type]
    )


def tiny_run(
    model: torch.nn.Module,
    input_sae: SparseAutoencoder,
    output_sae: SparseAutoencoder,
    *,
    input_layer: int = INPUT_LAYER,
    output_layer: int = OUTPUT_LAYER,
    uncounted_token_ids: tuple[int, ...] = (BOS,),
) -> CollectionRun:
    """The record of a collection that never took place."""
    return CollectionRun(
        model=ModelFingerprint.from_model(model),
        input_layer=input_layer,
        output_layer=output_layer,
        input_sae=input_sae.encoder_only().fingerprint(),
        output_sae=output_sae.encoder_only().fingerprint(),
        d_sae_in=input_sae.d_sae,
        d_sae_out=output_sae.d_sae,
        triples="none",
        triple_count=10,
        triples_per_shard=10,
        triples_per_batch=10,
        count_bos=not uncounted_token_ids,
        count_template=True,
        count_eos=True,
        uncounted_token_ids=uncounted_token_ids,
        dtype="float32",
    )


def tiny_map(run: CollectionRun, *, seed: int = 0) -> ConditionalDifferenceMap:
    """A random map with an entry for every pair of latents, so that scores have no zeros and no ties."""
    generator = torch.Generator().manual_seed(seed)
    entries = run.d_sae_in * run.d_sae_out
    matrix = CsrMap(
        row_offsets=torch.arange(0, entries + 1, run.d_sae_out),
        columns=torch.arange(run.d_sae_out, dtype=torch.int32).repeat(run.d_sae_in),
        values=(torch.rand(entries, generator=generator) - 0.5).clone(),
        d_sae_out=run.d_sae_out,
    )
    return ConditionalDifferenceMap(
        matrix=matrix.check(),
        gate_counts=torch.ones(run.d_sae_in, dtype=torch.int64),
        gate_thresholds=torch.zeros(run.d_sae_in, dtype=torch.float64),
        mean_difference=torch.rand(run.d_sae_out, generator=generator) - 0.5,
        run=run,
        options=FitOptions(),
    )


def tiny_policy(
    model: torch.nn.Module,
    kind: SaeKind = "jumprelu",
    *,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    input_layer: int = INPUT_LAYER,
    output_layer: int = OUTPUT_LAYER,
    uncounted_token_ids: tuple[int, ...] = (BOS,),
    **options: Any,
) -> SteeringPolicy:
    """A policy by random SAEs and a random map; `options` are those of `SteeringPolicy`.

    The few prompt latents it reads (`k_prompt`) make its edit lists depend on every counted token of the prompt.
    """
    d_model = ModelFingerprint.from_model(model).hidden_size
    input_sae = tiny_sae(kind, layer=input_layer, d_model=d_model, d_sae=D_SAE_IN, dtype=dtype, seed=2 * seed)
    output_sae = tiny_sae(kind, layer=output_layer, d_model=d_model, d_sae=D_SAE_OUT, dtype=dtype, seed=2 * seed + 1)
    run = tiny_run(
        model,
        input_sae,
        output_sae,
        input_layer=input_layer,
        output_layer=output_layer,
        uncounted_token_ids=uncounted_token_ids,
    )
    defaults: dict[str, Any] = {"k_prompt": 5, "k_diff": 12, "alpha": 0.5, "edit": "both"}
    return SteeringPolicy(tiny_map(run, seed=seed), input_sae, output_sae, **{**defaults, **options})


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word: `w3` to `w60`, beside the roles of a chat."""
    words = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS, "user": 3, "assistant": 4}
    words |= {f"w{index}": index for index in range(len(words), VOCAB)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        padding_side="left",
        chat_template=CHAT_TEMPLATE,
    )


def prompts(lengths: tuple[int, ...], *, seed: int = 0) -> list[list[int]]:
    """Prompts of the given lengths, each beginning with BOS and otherwise free of special tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [[BOS, *torch.randint(5, VOCAB, (length - 1,), generator=generator).tolist()] for length in lengths]


def left_padded(rows: list[list[int]]) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask` of prompts of different lengths."""
    width = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
