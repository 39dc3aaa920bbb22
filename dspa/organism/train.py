"""Makes the organism's artifacts: `python -m dspa.organism.train [--seed S] [--out FOLDER]`.

The same seed, thread count and library versions produce the same files.
"""

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import Gemma2ForCausalLM, GenerationConfig, PreTrainedTokenizerFast

from dspa.organism import DATA, INPUT_LAYER, OUTPUT_LAYER, load_model
from dspa.organism.language import (
    KINDS,
    MAX_RESPONSE_TOKENS,
    MOVES,
    Triple,
    draw_prompts,
    draw_triples,
    parse,
    reward,
)
from dspa.organism.model import encode, response_loss, train_model
from dspa.organism.sae_training import (
    LATENTS,
    SAEQuality,
    measure_sae,
    residual_activations,
    save_sae,
    train_sae,
)
from dspa.organism.tokenizer import BOS_ID, END_ID, PAD_ID, build_tokenizer, chat_text

MEASURED_PROMPTS = 1008
MEASURED_TOKENS = 50_000


@dataclass(frozen=True)
class ModelQuality:
    """What the model does on the validation split."""

    loss: float
    """Cross-entropy per response token of base text, in nats."""
    malformed: float
    """The share of sampled responses with a sentence that is none of the language's."""
    reward: float
    """Mean reward of sampled responses."""
    reward_error: float
    """Half of the 95 % interval of `reward`."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    started = time.perf_counter()
    torch.set_num_threads(options.threads)
    streams = np.random.SeedSequence(options.seed).spawn(4)
    model_rng, sae_rng, triples_rng, measuring_rng = (np.random.default_rng(stream) for stream in streams)

    tokenizer = build_tokenizer()
    torch.manual_seed(options.seed)
    if options.keep_model:
        model, _ = load_model(options.out)
    else:
        model = train_model(tokenizer, model_rng, options.model_steps)
        _save_model(model, tokenizer, options.out / "model")
    _save_triples(draw_triples(triples_rng, options.triples), options.out / "triples.jsonl")

    layers = (INPUT_LAYER, OUTPUT_LAYER)
    training = residual_activations(model, tokenizer, sae_rng, layers, options.sae_tokens)
    unseen = residual_activations(model, tokenizer, measuring_rng, layers, MEASURED_TOKENS, "validation")
    saes: dict[str, SAEQuality] = {}
    torch.manual_seed(options.seed)
    for name, layer in (("input", INPUT_LAYER), ("output", OUTPUT_LAYER)):
        sae = train_sae(training[layer], layer, sae_rng, options.sae_steps)
        save_sae(sae, options.out / f"{name}_sae")
        saes[name] = measure_sae(sae, unseen[layer])
        print(f"{name} SAE: {saes[name]}", flush=True)

    torch.manual_seed(options.seed)
    quality = measure_model(model, tokenizer, measuring_rng)
    print(quality, flush=True)
    minutes = (time.perf_counter() - started) / 60
    card = _model_card(options, quality, saes, sum(p.numel() for p in model.parameters()), minutes)
    (options.out / "README.md").write_text(card, encoding="utf-8")
    print(f"wrote {options.out} after {minutes:.0f} min", flush=True)


@torch.no_grad()
def measure_model(
    model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, rng: np.random.Generator
) -> ModelQuality:
    """Samples a response to each of `MEASURED_PROMPTS` validation prompts, at temperature 1, and scores them."""
    prompts = draw_prompts(rng, "validation", MEASURED_PROMPTS)
    rewards: list[int] = []
    malformed = 0
    for first in range(0, len(prompts), 126):
        batch = prompts[first : first + 126]
        inputs = encode(tokenizer, [chat_text(tokenizer, prompt.text) for prompt in batch], padding_side="left")
        output = torch.as_tensor(
            model.generate(  # pyright: ignore[reportAttributeAccessIssue]
                inputs.ids,
                attention_mask=inputs.real.long(),
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=MAX_RESPONSE_TOKENS,
            )
        )
        texts = tokenizer.batch_decode(output[:, inputs.ids.shape[1] :], skip_special_tokens=True)
        for prompt, text in zip(batch, texts, strict=True):
            parsed = parse(text)
            rewards.append(reward(prompt.kind, parsed.moves))
            malformed += parsed.malformed > 0
    return ModelQuality(
        loss=response_loss(model, tokenizer, rng, "validation"),
        malformed=malformed / len(prompts),
        reward=float(np.mean(rewards)),
        reward_error=float(1.96 * np.std(rewards) / len(rewards) ** 0.5),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m dspa.organism.train",
        description="Train the organism's model and SAEs, draw its triples, and write them with a model card.",
    )
    parser.add_argument("--seed", type=int, default=0, help="everything random follows from it (default: 0)")
    parser.add_argument("--out", type=Path, default=DATA, help="folder to write (default: the package's own data)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads for torch (default: 2)")
    parser.add_argument("--model-steps", type=int, default=800, help="batches for the model (default: 800)")
    parser.add_argument("--keep-model", action="store_true", help="do not train the model but load it from --out")
    parser.add_argument("--sae-steps", type=int, default=2000, help="batches for each SAE (default: 2000)")
    parser.add_argument("--sae-tokens", type=int, default=400_000, help="activations the SAEs see (default: 400000)")
    parser.add_argument("--triples", type=int, default=600, help="preference triples (default: 600)")
    return parser


def _save_model(model: Gemma2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.generation_config = GenerationConfig(
        bos_token_id=BOS_ID,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _save_triples(triples: Sequence[Triple], file: Path) -> None:
    with file.open("w", encoding="utf-8") as lines:
        for triple in triples:
            row = {
                "prompt": [{"role": "user", "content": triple.prompt.text}],
                "chosen": [{"role": "assistant", "content": triple.chosen.text}],
                "rejected": [{"role": "assistant", "content": triple.rejected.text}],
                "kind": triple.prompt.kind,
            }
            lines.write(json.dumps(row) + "\n")


def _model_card(
    options: argparse.Namespace,
    model: ModelQuality,
    saes: dict[str, SAEQuality],
    parameters: int,
    minutes: float,
) -> str:
    rows = "\n".join(
        f"| {name} | {layer} | {sae.l0:.1f} | {100 * sae.unexplained:.1f} % | {sae.dead} of {LATENTS} |"
        for (name, sae), layer in zip(saes.items(), (INPUT_LAYER, OUTPUT_LAYER), strict=True)
    )
    return f"""# The organism, seed {options.seed}

Made by `python -m dspa.organism.train --seed {options.seed}` in {minutes:.0f} minutes on {options.threads} CPU threads:
{options.model_steps} steps for the model, {options.sae_steps} steps and {options.sae_tokens} tokens for each SAE,
torch {torch.__version__}.

- `model/`: a chat model of the Gemma-2 architecture with {parameters / 1e6:.2f} million parameters, float32, and its
  tokenizer. It was trained on generated text only: prompts of {len(KINDS)} kinds, responses made of {len(MOVES)} moves,
  and some plain prose.
- `input_sae/`, `output_sae/`: JumpReLU SAEs with {LATENTS} latents, trained and stored with sae-lens.
- `triples.jsonl`: {options.triples} preference triples; chosen and rejected have the same number of tokens.

The nouns and the sentence templates of the validation and heldout splits occur in none of these texts.
Everything below was measured on the validation split.

| model | |
|---|---|
| loss per response token | {model.loss:.3f} nats |
| sampled responses with a malformed sentence | {100 * model.malformed:.1f} % of {MEASURED_PROMPTS} |
| mean reward of sampled responses | {model.reward:+.2f} ± {model.reward_error:.2f} |

| SAE | after block | mean active latents | unexplained variance | dead latents |
|---|---|---|---|---|
{rows}
"""


if __name__ == "__main__":
    main()
