"""The shipped artifacts: small, no pickle, readable by transformers and sae-lens, as good as their card says."""

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2ForCausalLM, PreTrainedTokenizerFast

from dspa.organism import DATA, INPUT_LAYER, OUTPUT_LAYER, load_model, sae_folder, triples_file
from dspa.organism.language import KINDS, MAX_RESPONSE_TOKENS, draw_prompts, parse, reward
from dspa.organism.model import encode, response_loss
from dspa.organism.sentences import NOUNS, TEMPLATES
from dspa.organism.tokenizer import build_tokenizer, chat_text

LAYERS: dict[Literal["input", "output"], int] = {"input": INPUT_LAYER, "output": OUTPUT_LAYER}


@pytest.fixture(scope="module")
def organism() -> tuple[Gemma2ForCausalLM, PreTrainedTokenizerFast]:
    return load_model()


@pytest.fixture(scope="module")
def triples() -> list[dict[str, Any]]:
    return [json.loads(line) for line in triples_file().read_text(encoding="utf-8").splitlines()]


def test_files_are_small_and_hold_no_pickle() -> None:
    files = [path for path in DATA.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 8_000_000
    assert {path.suffix for path in files} <= {".json", ".jsonl", ".safetensors", ".md", ".jinja"}
    assert (DATA / "README.md").exists()


def test_a_missing_file_is_named_with_the_command_that_makes_it(tmp_path: Path) -> None:
    for load in (load_model, triples_file):
        with pytest.raises(FileNotFoundError, match=r"dspa\.organism\.train"):
            load(tmp_path)
    with pytest.raises(FileNotFoundError, match="input_sae"):
        sae_folder("input", tmp_path)


def test_transformers_loads_model_and_tokenizer_by_their_auto_classes(
    organism: tuple[Gemma2ForCausalLM, PreTrainedTokenizerFast],
) -> None:
    model, tokenizer = organism
    auto_model = AutoModelForCausalLM.from_pretrained(DATA / "model", local_files_only=True)
    auto_tokenizer = AutoTokenizer.from_pretrained(DATA / "model", local_files_only=True)
    assert type(auto_model) is type(model)
    assert auto_model.dtype == torch.float32
    assert auto_tokenizer.get_vocab() == tokenizer.get_vocab() == build_tokenizer().get_vocab()
    assert auto_tokenizer.padding_side == "left"
    text = chat_text(tokenizer, "What is a teabag?", "So yeah, you know.")
    for other in (auto_tokenizer, build_tokenizer()):
        assert chat_text(other, "What is a teabag?", "So yeah, you know.") == text
        assert other(text).input_ids == tokenizer(text).input_ids
    assert model.config.vocab_size == len(tokenizer)
    assert model.config.num_hidden_layers > OUTPUT_LAYER


@pytest.mark.long
def test_new_nouns_and_templates_do_not_disturb_the_responses(
    organism: tuple[Gemma2ForCausalLM, PreTrainedTokenizerFast],
) -> None:
    train, heldout = (response_loss(*organism, np.random.default_rng(1), split) for split in ("train", "heldout"))
    assert train < 0.6
    assert heldout == pytest.approx(train, rel=0.05)


@pytest.mark.long
def test_model_answers_heldout_prompts_in_whole_sentences(
    organism: tuple[Gemma2ForCausalLM, PreTrainedTokenizerFast],
) -> None:
    model, tokenizer = organism
    prompts = draw_prompts(np.random.default_rng(2), "heldout", 192)
    inputs = encode(tokenizer, [chat_text(tokenizer, prompt.text) for prompt in prompts], padding_side="left")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        output: Any = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            inputs.ids, attention_mask=inputs.real.long(), do_sample=True, top_k=0, max_new_tokens=MAX_RESPONSE_TOKENS
        )
    texts = tokenizer.batch_decode(output[:, inputs.ids.shape[1] :], skip_special_tokens=True)
    parsed = [parse(text) for text in texts]
    assert np.mean([answer.malformed > 0 for answer in parsed]) < 0.15
    assert 8 < np.mean([len(answer.moves) for answer in parsed]) < 10
    rewards = np.array([reward(prompt.kind, answer.moves) for prompt, answer in zip(prompts, parsed, strict=True)])
    assert abs(rewards.mean()) < 4 * rewards.std() / len(rewards) ** 0.5


@pytest.mark.long
@pytest.mark.parametrize("which", ["input", pytest.param("output", marks=pytest.mark.long)])
def test_saes_load_with_sae_lens_and_are_sparse_and_faithful(
    which: Literal["input", "output"], organism: tuple[Gemma2ForCausalLM, PreTrainedTokenizerFast]
) -> None:
    from sae_lens import SAE

    from dspa.organism.sae_training import LATENTS, TARGET_L0, measure_sae, residual_activations

    sae = SAE.load_from_disk(sae_folder(which))
    model, tokenizer = organism
    layer = LAYERS[which]
    assert sae.cfg.architecture() == "jumprelu"
    assert sae.cfg.metadata.hook_name == f"blocks.{layer}.hook_resid_post"
    assert sae.cfg.normalize_activations == "none"
    assert (sae.cfg.d_in, sae.cfg.d_sae) == (model.config.hidden_size, LATENTS)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(LATENTS))
    assert all(torch.isfinite(weight).all() for weight in sae.state_dict().values())

    activations = residual_activations(model, tokenizer, np.random.default_rng(3), (layer,), 20_000, "heldout")
    quality = measure_sae(sae, activations[layer])
    assert abs(quality.l0 - TARGET_L0) < 4
    assert quality.unexplained < 0.2
    assert quality.dead < 0.2 * LATENTS


def test_triples_have_the_columns_of_trl(triples: list[dict[str, Any]]) -> None:
    assert len(triples) >= 500
    for row in triples:
        assert set(row) == {"prompt", "chosen", "rejected", "kind"}
        assert [message["role"] for message in row["prompt"]] == ["user"]
        for column in ("chosen", "rejected"):
            assert [message["role"] for message in row[column]] == ["assistant"]
    assert {row["kind"] for row in triples[:250]} == set(KINDS)


def test_triples_are_ordered_by_the_rule_and_matched_in_length(
    triples: list[dict[str, Any]], organism: tuple[Gemma2ForCausalLM, PreTrainedTokenizerFast]
) -> None:
    _, tokenizer = organism
    for row in triples:
        chosen, rejected = row["chosen"][0]["content"], row["rejected"][0]["content"]
        assert parse(chosen).malformed == parse(rejected).malformed == 0
        assert reward(row["kind"], parse(chosen).moves) > reward(row["kind"], parse(rejected).moves)
        assert len(tokenizer.tokenize(chosen)) == len(tokenizer.tokenize(rejected))


@pytest.mark.parametrize("other", ["validation", "heldout"])
def test_no_noun_or_template_of_another_split_is_in_a_triple(
    other: Literal["validation", "heldout"], triples: list[dict[str, Any]]
) -> None:
    prompts = [row["prompt"][0]["content"] for row in triples]
    text = " ".join(message["content"] for row in triples for key in row if key != "kind" for message in row[key])
    assert not [noun for noun in NOUNS[other] if noun in text]
    train = [template for kind in KINDS for template in TEMPLATES[kind]["train"]]
    known = {template.format(noun=noun) for template in train for noun in NOUNS["train"]}
    # Every prompt is two training templates with a training noun, and so holds no other template.
    for prompt in prompts:
        cuts = [index for index, letter in enumerate(prompt) if letter == " "]
        assert any(prompt[:cut] in known and prompt[cut + 1 :] in known for cut in cuts), prompt
