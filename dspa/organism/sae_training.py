"""The organism's two sparse autoencoders, trained with sae-lens on the model's residual stream."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sae_lens import SAE
from sae_lens.config import SAETrainerConfig
from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
from sae_lens.saes.sae import SAEMetadata
from sae_lens.training.sae_trainer import SAETrainer
from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

from dspa.organism.language import Split
from dspa.organism.model import BATCH, draw_documents

LATENTS = 512
TARGET_L0 = 16
BATCH_TOKENS = 1024


@dataclass(frozen=True)
class SAEQuality:
    """What an SAE does to activations it was not trained on."""

    l0: float
    """Mean number of active latents per token."""
    unexplained: float
    """Squared reconstruction error over the activations' variance."""
    dead: int
    """Latents that are active on no token of the sample."""


@torch.no_grad()
def residual_activations(
    model: Gemma2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    layers: tuple[int, ...],
    tokens: int,
    split: Split = "train",
) -> dict[int, torch.Tensor]:
    """The residual stream after each of `layers` on newly drawn base text, without BOS and padding.

    Returns one [tokens, d_model] float32 tensor per layer; row i is the same token in all of them.
    """
    collected: dict[int, list[torch.Tensor]] = {layer: [] for layer in layers}
    count = 0
    while count < tokens:
        batch = draw_documents(rng, tokenizer, BATCH, split)
        kept = batch.real & (batch.ids != tokenizer.bos_token_id)
        # hidden_states[0] is the embedding, so entry l + 1 is the stream after block l.
        hidden_states = model.model(batch.ids, use_cache=False, output_hidden_states=True).hidden_states
        for layer in layers:
            collected[layer].append(hidden_states[layer + 1][kept])
        count += int(kept.sum())
    return {layer: torch.cat(rows)[:tokens] for layer, rows in collected.items()}


def train_sae(activations: torch.Tensor, layer: int, rng: np.random.Generator, steps: int) -> JumpReLUTrainingSAE:
    """A JumpReLU SAE on `activations` [N, d_model], read from the residual stream after block `layer`.

    It trains on activations scaled to mean norm sqrt(d_model); the scale is folded into the weights at the end, and
    so are the decoder norms: the result reads raw activations and its decoder rows have unit norm.
    """
    d_model = activations.shape[1]
    scale = d_model**0.5 / activations.norm(dim=1).mean().item()
    sae = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            d_in=d_model,
            d_sae=LATENTS,
            normalize_activations="expected_average_only_in",
            jumprelu_init_threshold=0.5,
            jumprelu_bandwidth=1.0,
            jumprelu_sparsity_loss_mode="quadratic",
            target_l0=TARGET_L0,
            l0_coefficient=0.5,
            l0_warm_up_steps=steps // 5,
            pre_act_loss_coefficient=3e-3,
            decoder_init_norm=1.0,
            metadata=SAEMetadata(
                model_name="dspa-organism", hook_name=f"blocks.{layer}.hook_resid_post", prepend_bos=True
            ),
        )
    )
    sae.b_dec.data.copy_(activations.mean(dim=0) * scale)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * BATCH_TOKENS,
            train_batch_size_samples=BATCH_TOKENS,
            lr=2e-3,
            lr_end=2e-4,
            lr_warm_up_steps=steps // 20,
            lr_decay_steps=steps // 4,
            dead_feature_window=200,
        ),
        sae,
        _shuffled_batches(activations, rng),
    )
    trainer.activation_scaler.scaling_factor = scale
    trainer.fit()
    sae.fold_W_dec_norm()
    return sae


@torch.no_grad()
def measure_sae(sae: SAE, activations: torch.Tensor) -> SAEQuality:
    """Sparsity and reconstruction on `activations` [N, d_model]."""
    latents = sae.encode(activations)
    error = (sae.decode(latents) - activations).pow(2).sum()
    variance = (activations - activations.mean(dim=0)).pow(2).sum()
    active = latents > 0
    return SAEQuality(
        l0=active.sum(dim=1).float().mean().item(),
        unexplained=(error / variance).item(),
        dead=int((~active.any(dim=0)).sum()),
    )


def save_sae(sae: JumpReLUTrainingSAE, folder: Path) -> None:
    """Writes the inference form in sae-lens' format, to be read with `SAE.load_from_disk`."""
    sae.save_inference_model(folder)


def _shuffled_batches(activations: torch.Tensor, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    while True:
        order = torch.from_numpy(rng.permutation(len(activations)))
        yield from (activations[rows] for rows in order.split(BATCH_TOKENS) if len(rows) == BATCH_TOKENS)
