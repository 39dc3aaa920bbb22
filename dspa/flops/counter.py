"""FLOPs counted by running the model under `torch.utils.flop_counter`: on the meta device, which has shapes but no
numbers and so needs neither weights nor memory, or on real weights.

The counter sees matrix products. Attention is run in its eager form, so that every pair of query and key of a call is
counted, masked or not; that is "square" in `dspa.flops.shapes`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from dspa.errors import InvalidInputError
from dspa.flops.alignment import AlignmentAssumptions, fsrl_layer
from dspa.flops.inference import InferenceAssumptions
from dspa.flops.quantities import COLLECTED, DPO, FSRL, PUBLISHED, RAHF, Flops, MethodCost, Stage
from dspa.flops.shapes import ModelShape, SteeringShape
from dspa.offline.batching import BatchLimits, TripleLengths, plan_groups
from dspa.offline.preferences import PreferenceTriple
from dspa.offline.prefix_forward import SharedPrefixForward
from dspa.transformers_model import decoder_stack, device_of, hidden_of, text_config
from dspa.util.records import read_json

CONFIGS = Path(__file__).parent / "data" / "configs"
"""Configurations of the published models; their sizes are public, their weights are not needed."""

ATTENTION_OPERATIONS = ("bmm", "baddbmm", "scaled_dot_product")


@dataclass(frozen=True)
class PublishedModel:
    """A model the method was published with, and where it reads and edits."""

    config: str
    label: str
    input_layer: int
    output_layer: int


PUBLISHED_MODELS = (
    PublishedModel("gemma-2-2b", "Gemma-2-2B", 7, 24),
    PublishedModel("gemma-2-9b", "Gemma-2-9B", 9, 39),
    PublishedModel("qwen3-8b", "Qwen3-8B", 9, 18),
)


# --- configurations and shapes ----------------------------------------------------------------------------------------


def load_config(source: str) -> Any:
    """A transformers configuration.

    Args:
        source: a published model's name (`gemma-2-2b`), a configuration file, a model folder, or a hub id.

    Raises:
        InvalidInputError: if there is none, or it is not a language model's.
    """
    shipped = CONFIGS / f"{source.lower()}.json"
    path = shipped if shipped.is_file() else Path(source)
    try:
        if path.is_file():
            record = read_json(path)
            config = AutoConfig.for_model(record.pop("model_type"), **record)
        else:
            config = AutoConfig.from_pretrained(source)
    except KeyError as error:
        raise InvalidInputError(f"{source} has no {error}; expected a transformers configuration") from error
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()
        raise InvalidInputError(f"no configuration at {source!r}: {reason[0] if reason else error!r}") from error
    return config.get_text_config(decoder=True)


def meta_model(config: Any) -> nn.Module:
    """The model of a configuration on the meta device, in evaluation mode.

    Raises:
        InvalidInputError: if transformers has no language model for it.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="eager")
    except (ValueError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InvalidInputError(f"no language model of type {config.model_type!r}: {reason}") from error
    return model.eval()


def model_shape(model: Any, name: str) -> ModelShape:
    """The sizes of a transformers model, on whatever device.

    Raises:
        InvalidInputError: for a mixture of experts, whose tokens do not all meet the same weights.
    """
    config = text_config(model)
    layers = decoder_stack(model).layers
    if any(parameter.ndim > 2 or "expert" in path for path, parameter in layers.named_parameters()):
        raise InvalidInputError(f"{name} is a mixture of experts; its FLOPs per token are not those of its parameters")
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    key_heads = getattr(config, "num_key_value_heads", None) or heads
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * len(layers)
    return ModelShape(
        name=name,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        d_model=config.hidden_size,
        block_weights=tuple(sum(p.numel() for p in layer.parameters() if p.ndim == 2) for layer in layers),
        qkv_weights=config.hidden_size * head_dim * (heads + 2 * key_heads),
        head_weights=model.get_output_embeddings().weight.numel(),
        query_width=heads * head_dim,
        key_width=key_heads * head_dim,
        windows=tuple(window if kind == "sliding_attention" else None for kind in kinds),
    )


# --- counting ---------------------------------------------------------------------------------------------------------


def count(run: Callable[[], object]) -> Flops:
    """FLOPs of a call: matrix products as linear, batched ones and fused attention as attention."""
    with _counter() as counter:
        run()
    return _by_term(counter)


def count_collection(
    model: Any, triples: Sequence[PreferenceTriple], steering: SteeringShape, limits: BatchLimits
) -> Flops:
    """FLOPs of collecting the densities of triples in one shard: the forward pass that `dspa.collect` runs, and a
    product of every vector it returns with an encoder."""
    forward = SharedPrefixForward(
        decoder_stack(model), text_config(model), steering.input_layer, steering.output_layer, frozenset()
    )
    widths = {"prompt": steering.d_sae_in, "chosen": steering.d_sae_out, "rejected": steering.d_sae_out}
    lengths = [TripleLengths(len(t.prompt), len(t.chosen), len(t.rejected)) for t in triples]
    counted = Flops()
    with torch.no_grad():
        for group in plan_groups(lengths, limits, forward.shares):
            segments = forward.segments(triples, group, limits)
            while True:
                with _counter() as counter:
                    segment = next(segments, None)
                counted += _by_term(counter)
                if segment is None:
                    break
                hidden = segment.hidden.to("meta")  # shapes are enough for this product
                encoder = torch.empty(hidden.shape[1], widths[segment.part], dtype=hidden.dtype, device="meta")
                counted += Flops(sae=count(lambda h=hidden, w=encoder: h @ w).linear)
    return counted


def count_forward(model: Any, tokens: int) -> Flops:
    """FLOPs of a whole forward pass over one sequence, logits of every token included."""
    with torch.no_grad():
        return count(lambda: model(**_inputs(model, tokens)))


def count_training(model: Any, tokens: int) -> Flops:
    """FLOPs of forward and backward over one sequence, all parameters trained."""
    with torch.enable_grad():
        return count(lambda: model(**_inputs(model, tokens)).logits.sum().backward())


def count_fsrl(model: Any, tokens: int, layer: int, d_sae: int) -> Flops:
    """FLOPs of forward and backward over one sequence with a frozen model and SAE, and an adapter that is trained."""
    stack = decoder_stack(model)
    parameter = next(stack.layers[layer].parameters())
    matrix: dict[str, Any] = {"size": (d_sae, text_config(model).hidden_size), "dtype": parameter.dtype}
    encoder, decoder, adapter = (torch.empty(**matrix, device=parameter.device) for _ in range(3))
    adapter.requires_grad_()

    def edit(module: nn.Module, args: object, output: Any) -> Any:
        hidden = hidden_of(output)
        features = torch.relu(hidden @ encoder.T)
        steered = torch.relu(features + torch.relu(hidden @ adapter.T))
        edited = hidden + (steered - features) @ decoder
        return edited if isinstance(output, Tensor) else (edited, *output[1:])

    trained = [p for p in model.parameters() if p.requires_grad]
    handle = stack.layers[layer].register_forward_hook(edit)
    try:
        for p in trained:
            p.requires_grad_(False)
        with torch.enable_grad():
            counted = count(lambda: model(**_inputs(model, tokens)).logits.sum().backward())
    finally:
        handle.remove()
        for p in trained:
            p.requires_grad_(True)
    in_sae = 5 * 2.0 * tokens * d_sae * text_config(model).hidden_size
    return Flops(counted.linear - in_sae, counted.attention, in_sae)


@dataclass(frozen=True)
class CountedInference:
    """Counted FLOPs of one request's prompt and of one decode step after it, batch 1."""

    prefill: Flops
    decode: Flops


def count_inference(model: Any, i: InferenceAssumptions) -> CountedInference:
    """Prefill of the prompt (the head on its last token), and a decode step with `context` tokens in view."""
    with torch.no_grad():
        prefill = count(lambda: model(**_inputs(model, i.prompt_tokens), logits_to_keep=1))
        inputs = _inputs(model, max(1, i.context - 1))
        model(**inputs, logits_to_keep=1)
        token = inputs["input_ids"][:, :1]
        decode = count(lambda: model(input_ids=token, past_key_values=inputs["past_key_values"], use_cache=True))
    return CountedInference(prefill, decode)


def counted_alignment(model: Any, steering: SteeringShape, a: AlignmentAssumptions) -> Iterator[MethodCost]:
    """Every method of `dspa.flops.alignment.alignment_costs`: each step is counted once, and multiplied by how often it
    is made."""
    forward = functools.cache(lambda tokens: count_forward(model, tokens))
    training = functools.cache(lambda tokens: count_training(model, tokens))
    layer = fsrl_layer(model_shape(model, "the model"), a)
    adapter = functools.cache(lambda tokens: count_fsrl(model, tokens, layer, a.fsrl_d_sae))

    def method(name: str, **stages: Flops) -> MethodCost:
        return MethodCost(name, "counted", tuple(Stage(stage, flops) for stage, flops in stages.items()))

    ids = (0,) * max(a.prompt_tokens, a.chosen_tokens, a.rejected_tokens)
    prompt, chosen, rejected = ids[: a.prompt_tokens], ids[: a.chosen_tokens], ids[: a.rejected_tokens]
    triple = PreferenceTriple(prompt, chosen, rejected, len(chosen), len(rejected), "counted")
    collected = count_collection(model, [triple], steering, BatchLimits(chunk=a.chunk))
    yield method(COLLECTED, **{"one triple": collected})

    names = ("forward x", "forward x + y+", "forward x + y-")
    yield method(PUBLISHED, **{n: forward(t) for n, t in zip(names, (a.prompt_tokens, *a.sequences), strict=True)})

    step1 = training(a.rahf_tokens) * (a.rahf_examples * a.rahf_passes)
    step2 = forward(a.rahf_step2_tokens) * a.rahf_frozen_passes + training(a.rahf_step2_tokens)
    step2 *= a.rahf_steps_per_triple * a.rahf_batch
    yield method(RAHF, **{"step 1: two models": step1, "step 2: distillation": step2})

    policy = sum(map(training, a.sequences), Flops()) * a.dpo_epochs
    reference = sum(map(forward, a.sequences), Flops()) * (1 if a.dpo_cached_reference else a.dpo_epochs)
    yield method(DPO, **{"policy: forward and backward": policy, "reference: forward": reference})

    trained = sum(map(adapter, a.sequences), Flops()) * a.fsrl_epochs
    yield method(FSRL, **{"forward and backward": trained})


def _inputs(model: Any, tokens: int) -> dict[str, Any]:
    """A sequence and an empty cache; with a cache, no model looks at the ids' values for the mask."""
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=device_of(model))
    return {"input_ids": ids, "past_key_values": DynamicCache(config=text_config(model)), "use_cache": True}


def _counter() -> FlopCounterMode:
    """Torch's counter, and the product of a matrix with one vector, which it leaves out."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mv: _mv_flops})


def _mv_flops(matrix: Sequence[int], vector: Sequence[int], *args: object, **kwargs: object) -> int:
    return 2 * matrix[0] * matrix[1]


def _by_term(counter: FlopCounterMode) -> Flops:
    linear = attention = 0
    for operation, flops in counter.get_flop_counts().get("Global", {}).items():
        if any(name in str(operation) for name in ATTENTION_OPERATIONS):
            attention += flops
        else:
            linear += flops
    return Flops(float(linear), float(attention))
