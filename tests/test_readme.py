"""The README's example runs, unchanged, against a hub cache on disk with tiny weights under the real names."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from hub_cache import offline_environment, write_gemma_scope, write_repo
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import Gemma2Config, Gemma2ForCausalLM, PreTrainedTokenizerFast

README = Path(__file__).parent.parent / "README.md"
WORDS = """how do i keep basil alive on a kitchen windowsill ?
water it daily never move away from light yes no""".split()  # noqa: SIM905, reads as text
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def example() -> str:
    """The first Python block of the README."""
    found = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    return found.group(1)


def write_model(cache: Path, d_model: int) -> None:
    """Gemma-2-2B's depth at a tiny width, with a tokenizer of a few words."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    vocabulary = {word: i for i, word in enumerate([*specials, "user", "model", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        extra_special_tokens=["<start_of_turn>", "<end_of_turn>"],
        chat_template=GEMMA_TEMPLATE,
    )
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=len(tokenizer),
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=26,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    folder = cache / "made"
    model = Gemma2ForCausalLM(config)
    model.bfloat16()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    write_repo(cache, "google/gemma-2-2b-it", {file.name: file.read_bytes() for file in folder.iterdir()})


def write_ultrafeedback(cache: Path, rows: int) -> None:
    """A data set in UltraFeedback-binarized's columns and split names, one of its rows with an empty response."""

    def conversation(prompt: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]

    prompts = [f"how do i keep basil alive {WORDS[i % 10]} {WORDS[i % 7]} ?" for i in range(rows)]
    table = pa.table(
        {
            "prompt": prompts,
            "prompt_id": [str(i) for i in range(rows)],
            "chosen": [conversation(p, "water it daily" if i else "") for i, p in enumerate(prompts)],
            "rejected": [conversation(p, "never move it away from light") for p in prompts],
            "messages": [conversation(p, "water it daily") for p in prompts],
            "score_chosen": [8.0] * rows,
            "score_rejected": [4.0] * rows,
        }
    )
    content = io.BytesIO()
    pyarrow.parquet.write_table(table, content)
    card = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train_prefs\n    path: data/train_prefs-*\n"
        "  - split: test_prefs\n    path: data/test_prefs-*\n---\n"
    )
    files = {
        "README.md": card.encode(),
        "data/train_prefs-00000-of-00001.parquet": content.getvalue(),
        "data/test_prefs-00000-of-00001.parquet": content.getvalue(),
    }
    write_repo(cache, "HuggingFaceH4/ultrafeedback_binarized", files, repo_type="dataset")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cache = tmp_path_factory.mktemp("hub")
    write_model(cache, d_model=16)
    for layer in (7, 24):
        write_gemma_scope(cache, layer=layer, d_model=16, d_sae=64, seed=layer)
    write_ultrafeedback(cache, rows=12)
    return cache


@pytest.mark.long
def test_example_runs_unchanged(hub: Path, tmp_path: Path) -> None:
    code = example()
    assert len(code.splitlines()) <= 20
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=offline_environment(hub),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert re.search(r"prompts 1, tokens seen [1-9]\d*, edited [1-9]\d*", result.stdout), result.stdout
    assert len(list((tmp_path / "policy").glob("policy-*.safetensors"))) == 1
    assert (tmp_path / "densities" / "manifest.json").is_file()


def test_front_door_names_the_two_commands() -> None:
    text = README.read_text()
    assert text.index("make demo") < text.index("make test") < text.index("```python")
