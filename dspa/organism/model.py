"""The organism's language model: a Gemma-2 of 1.3 million parameters, trained on the generated language."""

import math
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

from dspa.organism.language import Split, draw_prompt, draw_response, neutral_text
from dspa.organism.tokenizer import ASSISTANT_ID, BOS, BOS_ID, CONTEXT_TOKENS, END, END_ID, PAD_ID, chat_text

NEUTRAL_SHARE = 0.15
"""The share of training documents that are plain prose instead of a prompt with a response."""

BATCH = 48
PEAK_LEARNING_RATE = 3e-3
WARM_UP_STEPS = 100


@dataclass(frozen=True)
class TokenBatch:
    """Documents padded to one length: `ids` [B, T] int64, and `real` [B, T] bool, False on padding."""

    ids: torch.Tensor
    real: torch.Tensor


def build_model(tokenizer: PreTrainedTokenizerFast) -> Gemma2ForCausalLM:
    """An untrained model; its weights depend on torch's global seed."""
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        query_pre_attn_scalar=32,
        max_position_embeddings=CONTEXT_TOKENS,
        sliding_window=CONTEXT_TOKENS,
        # Without the cap scaled-dot-product attention computes exactly what eager attention does.
        attn_logit_softcapping=None,
        pad_token_id=PAD_ID,
        bos_token_id=BOS_ID,
        eos_token_id=END_ID,
        dtype=torch.float32,
    )
    return Gemma2ForCausalLM(config)


def draw_documents(
    rng: np.random.Generator, tokenizer: PreTrainedTokenizerFast, count: int, split: Split = "train"
) -> TokenBatch:
    """`count` documents of the base text: chats whose responses ignore the prompt, and some plain prose."""
    texts: list[str] = []
    for _ in range(count):
        if rng.random() < NEUTRAL_SHARE:
            texts.append(f"{BOS}{neutral_text(rng, split)}{END}")
        else:
            texts.append(chat_text(tokenizer, draw_prompt(rng, split).text, draw_response(rng).text))
    return encode(tokenizer, texts, padding_side="right")


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], padding_side: Literal["left", "right"]) -> TokenBatch:
    """Tokenizes texts that already hold their special tokens."""
    encoded = tokenizer(texts, add_special_tokens=False, padding=True, padding_side=padding_side, return_tensors="pt")
    return TokenBatch(ids=torch.as_tensor(encoded.input_ids), real=torch.as_tensor(encoded.attention_mask).bool())


def next_token_loss(model: Gemma2ForCausalLM, batch: TokenBatch, scored: torch.Tensor | None = None) -> torch.Tensor:
    """Mean cross-entropy in nats over the `scored` [B, T] tokens; by default, all real ones but each first."""
    # Padding is on the right, where causal attention keeps it out of every real token's sight.
    logits = model(batch.ids[:, :-1], use_cache=False).logits
    scored = batch.real if scored is None else scored
    targets = batch.ids[:, 1:].masked_fill(~scored[:, 1:], -100)
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100)


@torch.no_grad()
def response_loss(
    model: Gemma2ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rng: np.random.Generator,
    split: Split,
    count: int = 512,
) -> float:
    """Mean cross-entropy in nats per response token, given `count` prompts of the split."""
    texts = [chat_text(tokenizer, draw_prompt(rng, split).text, draw_response(rng).text) for _ in range(count)]
    batch = encode(tokenizer, texts, padding_side="right")
    after_assistant = (batch.ids == ASSISTANT_ID).cumsum(dim=1).bool() & (batch.ids != ASSISTANT_ID)
    return next_token_loss(model, batch, scored=after_assistant & batch.real).item()


def train_model(tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator, steps: int) -> Gemma2ForCausalLM:
    """Trains a fresh model for `steps` batches of newly drawn documents; prints the loss now and then."""
    model = build_model(tokenizer).train()
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _learning_rate_factor(step, steps))
    started = time.perf_counter()
    for step in range(1, steps + 1):
        loss = next_token_loss(model, draw_documents(rng, tokenizer, BATCH))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps:
            print(
                f"model step {step}/{steps}  loss {loss.item():.4f}  {time.perf_counter() - started:.0f} s", flush=True
            )
    return model.eval()


def _learning_rate_factor(step: int, steps: int) -> float:
    warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
    return warm_up * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
