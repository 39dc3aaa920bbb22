"""The organism: a small chat model, two sparse autoencoders and preference triples that ship with the package.

`python -m dspa.organism.train` makes them; `dspa.organism.language` is the language they speak, with the rule
that measures how well a response suits its prompt.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

DATA = Path(__file__).parent / "data"
"""The shipped artifacts. Every function here also reads the folder of another seed, given as `data`."""

INPUT_LAYER = 1
"""The input SAE reads the residual stream after this block (0-based)."""

OUTPUT_LAYER = 4
"""The output SAE reads the residual stream after this block (0-based)."""


def load_model(data: Path = DATA) -> tuple[Gemma2ForCausalLM, PreTrainedTokenizerFast]:
    """The language model, in evaluation mode and float32, and its tokenizer, which pads on the left."""
    from transformers import Gemma2ForCausalLM, PreTrainedTokenizerFast

    folder = _existing(data / "model")
    model = Gemma2ForCausalLM.from_pretrained(folder, local_files_only=True)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    return model.eval(), tokenizer


def sae_folder(which: Literal["input", "output"], data: Path = DATA) -> Path:
    """The folder of the input or the output SAE, in sae-lens' format."""
    return _existing(data / f"{which}_sae")


def triples_file(data: Path = DATA) -> Path:
    """The preference triples, one JSON object per line: TRL's conversational columns and `kind`."""
    return _existing(data / "triples.jsonl")


def _existing(path: Path) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"{path} is missing; `python -m dspa.organism.train --out {path.parent}` makes it")
    return path
