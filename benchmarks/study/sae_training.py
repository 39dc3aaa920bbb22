"""The two SAEs: what they are trained on, sae-lens' own trainer, and how good they are."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from dspa.errors import DspaError, InvalidInputError
from dspa.util.files import make_folder, read_safetensors, write_atomically
from dspa.util.progress import track
from study import model, prompts
from study.settings import SHARDS, Run
from study.triples import load_samples, read_lines

Which = Literal["input", "output"]

PROSE_TOKENS = 128  # of a piece of prose, without BOS
TEXTS_AT_ONCE = 64
TOKENS_PER_PART = 32_768
HELD_BACK = 0.02  # the share of texts that no SAE is trained on; they measure it
LEAST_HELD_BACK = 4  # texts
BATCH_TOKENS = 2048
EPOCHS = 2
LEARNING_RATE = 1e-3
LAYERS_WHY = (
    "The published input layers are at 0.26 to 0.28 of the depth, 9 of 30 is at 0.33. The output layer is at 0.7: what "
    "is added there still passes through nine blocks, and the last ones mostly choose the token."
)


@dataclass(frozen=True)
class Text:
    """A text for SAEs.

    Attributes:
        source: "answers" of the model itself, or "manuals".
        ids: its tokens, BOS first.
        skipped: leading tokens that are read but not trained on: BOS, and a prompt that another text has as well.
    """

    source: str
    ids: tuple[int, ...]
    skipped: int

    @property
    def kept(self) -> int:
        return len(self.ids) - self.skipped


@dataclass(frozen=True)
class SaeQuality:
    """What an SAE does to texts that it was not trained on.

    Attributes:
        layer: the block after which it reads the residual stream, from 0.
        l0: mean number of active latents a token.
        explained_variance: 1 minus the squared error over the variance.
        dead_latents: latents that are active on no token of these texts.
        cross_entropy: of the model, in nats a token.
        cross_entropy_spliced: with the SAE's reconstruction in place of the residual stream.
        cross_entropy_zeroed: with zeros in its place.
        tokens: that this was measured on.
        seconds: the training took.
    """

    layer: int
    l0: float
    explained_variance: float
    dead_latents: int
    cross_entropy: float
    cross_entropy_spliced: float
    cross_entropy_zeroed: float
    tokens: int
    seconds: float

    @property
    def cross_entropy_recovered(self) -> float:
        """1 where splicing costs nothing, 0 where it is as bad as zeros."""
        lost = self.cross_entropy_zeroed - self.cross_entropy_spliced
        return lost / (self.cross_entropy_zeroed - self.cross_entropy)

    def as_record(self) -> dict[str, Any]:
        return {**asdict(self), "cross_entropy_recovered": self.cross_entropy_recovered}


def write_texts(run: Run) -> None:
    """Writes `sae_tokens` tokens of text: the model's samples, and manuals for the rest, in random order."""
    tokenizer = model.load_tokenizer(run)
    texts = list(_until(_answers(run, tokenizer), run.settings.sae_tokens))
    missing = run.settings.sae_tokens - sum(text.kept for text in texts)
    texts += _until(_prose(tokenizer), missing)
    found = sum(text.kept for text in texts)
    if found < run.settings.sae_tokens:
        raise InvalidInputError(f"this machine has text of {found} tokens; lower sae_tokens")
    order = np.random.default_rng(run.settings.seed).permutation(len(texts))
    write_atomically(run.texts, "".join(json.dumps(asdict(texts[at])) + "\n" for at in order).encode())


def collect_activations(run: Run, shard: str) -> None:
    """Writes the residual stream after both layers on the training texts, every other part of it; parts that are there
    are kept."""
    folder = make_folder(run.activations)
    chat_model, _ = model.load(run)
    reader = ResidualReader(chat_model, (run.settings.input_layer, run.settings.output_layer))
    parts = list(enumerate(_parts(load_texts(run)[0])))[int(shard) :: SHARDS]
    for number, part in track(parts, "Reading", enabled=True, unit=f"{TOKENS_PER_PART} tokens each"):
        file = folder / f"part-{number:04}.safetensors"
        if not file.is_file():
            inner, outer = reader.read(part)
            write_atomically(file, safetensors.torch.save({"input": inner.half(), "output": outer.half()}))


def train(run: Run, which: Which) -> None:
    """Trains an SAE if it is not there yet, and measures it."""
    folder, layer = (
        (run.input_sae, run.settings.input_layer) if which == "input" else (run.output_sae, run.settings.output_layer)
    )
    if folder.is_dir():
        return
    chat_model, _ = model.load(run)
    started = time.perf_counter()
    sae = train_sae(load_activations(run, which), run, layer)
    partial = make_folder(run.folder / f"{which}_sae.partial")
    sae.save_inference_model(partial)
    quality = measure(chat_model, partial, layer, load_texts(run)[1], time.perf_counter() - started)
    write_atomically(partial / "quality.json", json.dumps(quality.as_record(), indent=1).encode())
    partial.rename(folder)


def write_report(run: Run) -> None:
    """Writes what was measured of both SAEs, also on the model's answers alone, and what they were trained on."""
    report: dict[str, Any] = {}
    answers = [text for text in load_texts(run)[1] if text.source == "answers"]
    chat_model, _ = model.load(run)
    for folder in (run.input_sae, run.output_sae):
        whole = report[folder.name] = json.loads((folder / "quality.json").read_text())
        if answers:
            quality = measure(chat_model, folder, whole["layer"], answers, whole["seconds"])
            report[f"{folder.name}, answers alone"] = quality.as_record()
    texts = read_lines(run.texts)
    kept = {
        source: sum(len(text["ids"]) - text["skipped"] for text in texts if text["source"] == source)
        for source in ("answers", "manuals")
    }
    report |= {"tokens": kept, "epochs": EPOCHS, "latents": run.settings.latents, "why": LAYERS_WHY}
    write_atomically(run.sae_report, (json.dumps(report, indent=1) + "\n").encode())


def train_sae(activations: Tensor, run: Run, layer: int) -> Any:
    """A BatchTopK SAE on `activations` `[N, d_model]`, by sae-lens; it is saved as a JumpReLU SAE.

    It trains on activations of mean norm sqrt(d_model); the trainer folds the scale into the weights at the end.
    """
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.training.sae_trainer import SAETrainer

    settings = run.settings
    torch.manual_seed(settings.seed)
    tokens, d_model = activations.shape
    batch = min(BATCH_TOKENS, tokens // 4)
    steps = EPOCHS * (tokens // batch)
    scale = d_model**0.5 / float(activations.float().norm(dim=1).mean())
    metadata = SAEMetadata(
        model_name="SmolLM2-135M-Instruct", hook_name=f"blocks.{layer}.hook_resid_post", prepend_bos=True
    )
    sae = BatchTopKTrainingSAE(
        BatchTopKTrainingSAEConfig(
            d_in=d_model,
            d_sae=settings.latents,
            k=settings.target_l0,
            topk_threshold_lr=min(1.0, max(0.01, 10 / steps)),  # a running mean that has to arrive in so many steps
            normalize_activations="expected_average_only_in",
            metadata=metadata,
        )
    )
    sae.b_dec.data.copy_(activations.float().mean(dim=0) * scale)
    trainer = SAETrainer(
        SAETrainerConfig(
            total_training_samples=steps * batch,
            train_batch_size_samples=batch,
            lr=LEARNING_RATE,
            lr_end=LEARNING_RATE / 10,
            lr_warm_up_steps=max(1, steps // 20),
            lr_decay_steps=max(1, steps // 3),
            dead_feature_window=max(1, steps // 10),
        ),
        sae,
        _shuffled_batches(activations, batch, np.random.default_rng([settings.seed, layer])),
    )
    trainer.activation_scaler.scaling_factor = scale
    trainer.fit()
    return sae


@torch.no_grad()
def measure(chat_model: Any, folder: Path, layer: int, texts: list[Text], seconds: float) -> SaeQuality:
    """How good the SAE in a folder is, on texts it was not trained on, as sae-lens computes it."""
    from sae_lens import SAE

    sae: Any = SAE.load_from_disk(folder)
    reader = ResidualReader(chat_model, (layer,))
    active = torch.zeros(sae.cfg.d_sae, dtype=torch.bool)
    states, error, l0, tokens = [], 0.0, 0, 0
    for batch in _batches(texts):
        stream = reader.read(batch)[0]
        latents = sae.encode(stream)
        active |= (latents > 0).any(dim=0)
        error += float((sae.decode(latents) - stream).double().pow(2).sum())
        l0 += int((latents > 0).sum())
        tokens += len(stream)
        states.append(stream)
    stream = torch.cat(states).double()
    variance = float((stream - stream.mean(dim=0)).pow(2).sum())
    plain, spliced, zeroed = (
        _cross_entropy(chat_model, layer, change, texts)
        for change in (None, lambda x: sae.decode(sae.encode(x)), torch.zeros_like)
    )
    return SaeQuality(
        layer, l0 / tokens, 1 - error / variance, int((~active).sum()), plain, spliced, zeroed, tokens, seconds
    )


class ResidualReader:
    """Reads the residual stream after some layers; nothing above the last of them is computed."""

    def __init__(self, chat_model: Any, layers: tuple[int, ...]) -> None:
        self._body: Any = chat_model.model
        self._layers = layers

    @torch.no_grad()
    def read(self, texts: list[Text]) -> list[Tensor]:
        """For each layer `[kept tokens, d_model]`; row i is the same token in all of them."""
        found: list[list[Tensor]] = [[] for _ in self._layers]
        for batch in _batches(texts):
            ids, mask, kept = _padded(batch)
            for rows, states in zip(found, self._states(ids, mask), strict=True):
                rows.append(states[kept])
        return [torch.cat(rows) for rows in found]

    def _states(self, ids: Tensor, mask: Tensor) -> list[Tensor]:
        """For each layer `[B, T, d_model]`."""
        whole = self._body.layers
        states: dict[int, Tensor] = {}

        def kept_as(layer: int) -> Callable[[nn.Module, Any, Any], None]:
            return lambda _module, _inputs, output: states.update({layer: _stream(output)})

        hooks = [whole[layer].register_forward_hook(kept_as(layer)) for layer in self._layers]
        self._body.layers = whole[: max(self._layers) + 1]
        try:
            self._body(ids, attention_mask=mask, use_cache=False)
        finally:
            self._body.layers = whole
            for hook in hooks:
                hook.remove()
        return [states[layer] for layer in self._layers]


def load_texts(run: Run) -> tuple[list[Text], list[Text]]:
    """The texts that SAEs are trained on, and those that are held back."""
    texts = [Text(record["source"], tuple(record["ids"]), record["skipped"]) for record in read_lines(run.texts)]
    held_back = max(LEAST_HELD_BACK, round(HELD_BACK * len(texts)))
    return texts[held_back:], texts[:held_back]


def load_activations(run: Run, which: Which) -> Tensor:
    """`[tokens, d_model]` float16.

    Raises:
        DspaError: if one is not finite: the residual stream has values that float16 cannot hold.
    """
    parts = [read_safetensors(file)[which] for file in sorted(run.activations.glob("part-*.safetensors"))]
    activations = torch.cat(parts)
    if not bool(torch.isfinite(activations).all()):
        raise DspaError(f"the residual stream of the {which} layer has values beyond float16")
    return activations


def _answers(run: Run, tokenizer: Any) -> Iterator[Text]:
    """A chat for each sample of a prompt. The prompt is trained on with the first of them only."""
    by_id = {prompt.id: prompt for prompt in prompts.load(run, "train")}
    seen: set[str] = set()
    for sample in load_samples(run):
        chat = [*by_id[sample.prompt_id].chat, {"role": "assistant", "content": sample.text}]
        prompt = tokenizer.apply_chat_template(chat[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        ids = [*prompt, *tokenizer(sample.text, add_special_tokens=False).input_ids]
        ids += [tokenizer.eos_token_id] if sample.ended else []
        if len(ids) > len(prompt):
            yield Text("answers", tuple(ids), len(prompt) if sample.prompt_id in seen else 1)
        seen.add(sample.prompt_id)


def _prose(tokenizer: Any) -> Iterator[Text]:
    """Pieces of the manuals that a Python installation has: the language reference and what packages say of
    themselves."""
    for document in _manuals():
        ids = tokenizer(document, add_special_tokens=False).input_ids
        for start in range(0, len(ids) - PROSE_TOKENS, PROSE_TOKENS):
            yield Text("manuals", (tokenizer.bos_token_id, *ids[start : start + PROSE_TOKENS]), 1)


def _manuals() -> Iterator[str]:
    from pydoc_data.topics import topics

    yield from (text for _, text in sorted(topics.items()))
    packages: dict[str, Any] = {each.metadata["Name"]: each.metadata for each in distributions()}
    for _, metadata in sorted(packages.items()):
        description = metadata.get("Description") or metadata.get_payload()
        if isinstance(description, str):
            yield description
    yield from _docstrings()


def _docstrings() -> Iterator[str]:
    """Of the modules of the standard library and of torch, from their sources."""
    import ast
    import sysconfig

    for root in (Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent):
        for file in sorted(root.rglob("*.py")):
            if root != Path(torch.__file__).parent and "site-packages" in file.parts:
                continue
            try:
                tree = ast.parse(file.read_text())
            except (SyntaxError, UnicodeDecodeError, ValueError):
                continue
            nodes = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes)]
            yield "\n\n".join(each for each in found if each)


def _until(texts: Iterator[Text], tokens: int) -> Iterator[Text]:
    """Texts until so many tokens are there."""
    kept = 0
    while kept < tokens and (text := next(texts, None)) is not None:
        kept += text.kept
        yield text


def _parts(texts: list[Text]) -> Iterator[list[Text]]:
    part: list[Text] = []
    for text in texts:
        part.append(text)
        if sum(each.kept for each in part) >= TOKENS_PER_PART:
            yield part
            part = []
    if part:
        yield part


def _batches(texts: list[Text]) -> Iterator[list[Text]]:
    by_length = sorted(texts, key=lambda text: len(text.ids))
    yield from (by_length[start : start + TEXTS_AT_ONCE] for start in range(0, len(texts), TEXTS_AT_ONCE))


def _padded(texts: list[Text]) -> tuple[Tensor, Tensor, Tensor]:
    """`[B, T]` each: ids, attention mask, and which positions are kept; padded on the right."""
    width = max(len(text.ids) for text in texts)
    ids = torch.tensor([[*text.ids, *[0] * (width - len(text.ids))] for text in texts])
    position, length = torch.arange(width), torch.tensor([len(text.ids) for text in texts])[:, None]
    skipped = torch.tensor([text.skipped for text in texts])[:, None]
    return ids, (position < length).long(), (position >= skipped) & (position < length)


@torch.no_grad()
def _cross_entropy(chat_model: nn.Module, layer: int, change: Any, texts: list[Text]) -> float:
    """Nats a kept token, with the residual stream of kept positions and those between them and BOS changed."""
    total, count = 0.0, 0
    body: Any = chat_model

    def splice(_module: nn.Module, _inputs: Any, output: Any) -> Any:
        stream = _stream(output)
        changed = torch.cat([stream[:, :1], change(stream[:, 1:])], dim=1)  # BOS is what attention rests on
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    hook = None if change is None else body.model.layers[layer].register_forward_hook(splice)
    try:
        for batch in _batches(texts):
            ids, mask, kept = _padded(batch)
            logits = body(ids, attention_mask=mask, use_cache=False).logits[:, :-1]
            kept = kept[:, 1:]
            total += float(nn.functional.cross_entropy(logits[kept], ids[:, 1:][kept], reduction="sum"))
            count += int(kept.sum())
    finally:
        if hook is not None:
            hook.remove()
    return total / count


def _stream(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _shuffled_batches(activations: Tensor, batch: int, rng: np.random.Generator) -> Iterator[Tensor]:
    for _ in itertools.count():
        order = torch.from_numpy(rng.permutation(len(activations)))
        yield from (activations[rows].float() for rows in order.split(batch) if len(rows) == batch)
