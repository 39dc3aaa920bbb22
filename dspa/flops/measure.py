"""What `dspa flops --measure` measures: FLOPs of a model with its weights under the counter, and what this machine's
memory and arithmetic do at most, with steering's token step beside it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dspa.errors import DspaError
from dspa.flops.alignment import collection_stages
from dspa.flops.counter import count, count_collection, count_forward, count_inference, model_shape
from dspa.flops.inference import InferenceAssumptions, steer_token
from dspa.flops.quantities import Flops, Machine, MeasuredRow, MeasuredStep
from dspa.flops.shapes import SteeringShape
from dspa.kernels import EditList, SaeWeights, token_step
from dspa.offline.batching import BatchLimits, TripleLengths
from dspa.offline.preferences import PreferenceTriple
from dspa.util.machine import processor_name

REPEATS = 7
BANDWIDTH_BYTES = 2**28
MATRIX_SIZE = 1024
STEP_WIDTHS = (4096, 16384, 65536)


def measure_counts(
    model: Any, name: str, triples: Sequence[PreferenceTriple], steering: SteeringShape, i: InferenceAssumptions
) -> Iterator[MeasuredRow]:
    """Counts on a model that is run, each beside its formula for the same lengths."""
    shape = model_shape(model, name)
    limits = BatchLimits()
    lengths = [TripleLengths(len(t.prompt), len(t.chosen), len(t.rejected)) for t in triples]
    stages = collection_stages(shape, steering, lengths, limits)
    modelled = sum((stage.flops for stage in stages), Flops())
    yield MeasuredRow(
        f"collecting {len(triples)} triples", count_collection(model, triples, steering, limits), modelled
    )

    tokens = [n for t in lengths for n in (t.prompt, t.prompt + t.chosen, t.prompt + t.rejected)]
    sae = Flops(sae=modelled.sae)  # the same vectors are encoded
    plain = sum((count_forward(model, n) * tokens.count(n) for n in sorted(set(tokens))), sae)
    layers = range(shape.layers)
    linear = 2.0 * shape.matrix_weights * sum(tokens)
    attention = sum(shape.attention(n, 0, layers, "square") for n in tokens)
    yield MeasuredRow(
        f"the same by three whole passes each ({plain.total() / modelled.total():.2f} times ours)",
        plain,
        sae + Flops(linear, attention),
    )

    counted = count_inference(model, i)
    blocks = 2.0 * sum(shape.block_weights)
    head = 2.0 * shape.head_weights
    yield MeasuredRow(
        f"prefill of {i.prompt_tokens} tokens",
        counted.prefill,
        Flops(blocks * i.prompt_tokens + head, shape.attention(i.prompt_tokens, 0, layers, "square")),
    )
    yield MeasuredRow(
        f"decode step at {i.context} tokens of context",
        counted.decode,
        Flops(blocks + head, shape.attention(1, max(1, i.context - 1), layers, "square")),
    )

    token = _SteeredToken.random(shape.d_model, steering.d_sae_out, torch.device("cpu"))
    steered = count(lambda: token.steer(token.hidden, "reference"))
    yield MeasuredRow(
        "steering one token, dense",
        Flops(sae=steered.total()),
        Flops(sae=steer_token(shape, steering, replace(i, edited_latents=1), "dense").flops),
    )


def measure_machine(d_model: int, device: str = "cpu", widths: Sequence[int] = STEP_WIDTHS) -> Machine:
    """The most seen of memory bandwidth and matrix-product rate, and the median of the dense token step for some SAE
    widths (batch 1, bfloat16).

    Raises:
        DspaError: if the result of the token step is wrong; it is then not timed.
    """
    on = torch.device(device)
    data = torch.ones(BANDWIDTH_BYTES // 4, device=on)
    copy = torch.empty_like(data)
    moved = ((data.nbytes, data.sum), (2 * data.nbytes, lambda: copy.copy_(data)))
    bandwidth = max(size / min(_seconds(move, on)) for size, move in moved)
    rates = []
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(MATRIX_SIZE, MATRIX_SIZE, dtype=dtype, device=on)
        rates.append(2.0 * MATRIX_SIZE**3 / min(_seconds(lambda m=matrix: m @ m, on)))
    steps = tuple(_measure_step(d_model, width, on) for width in widths)
    return Machine(_name(on), max(rates), bandwidth, steps)


def _measure_step(d_model: int, d_sae: int, device: torch.device) -> MeasuredStep:
    case = _SteeredToken.random(d_model, d_sae, device)
    expected, found = case.hidden.clone(), case.hidden.clone()
    case.steer(expected, "reference")
    case.steer(found)
    if torch.equal(expected, case.hidden) or not torch.allclose(found, expected, rtol=1e-3, atol=1e-3):
        raise DspaError(f"the token step at d_sae = {d_sae} differs from the reference; run the kernel tests")
    scratch = case.hidden.clone()

    def step() -> None:
        scratch.copy_(case.hidden)
        case.steer(scratch)

    return MeasuredStep(d_model, d_sae, "dense", statistics.median(_seconds(step, device)))


@dataclass(frozen=True, eq=False)
class _SteeredToken:
    """A token `[1, d_model]`, an SAE of which 1 in 500 latents is active on it, and a list of which one is."""

    hidden: Tensor
    sae: SaeWeights
    edits: EditList

    @classmethod
    def random(cls, d_model: int, d_sae: int, device: torch.device) -> _SteeredToken:
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(1, d_model, generator=generator)
        W_enc = torch.empty(d_sae, d_model, dtype=torch.bfloat16)
        z = torch.empty(d_sae)
        for rows, products in zip(W_enc.split(4096), z.split(4096), strict=True):
            rows.copy_(torch.randn(rows.shape, generator=generator) / d_model**0.5)
            products.copy_(rows.float() @ hidden[0])
        highest = z.topk(max(2, d_sae // 500))
        listed = [int(highest.indices[-2]), *z.topk(15, largest=False).indices.tolist()]
        decoder_rows = torch.full((d_sae,), -1, dtype=torch.int32)
        decoder_rows[listed] = torch.arange(len(listed), dtype=torch.int32)
        sae = SaeWeights(
            W_enc=W_enc,
            b_enc=torch.zeros(d_sae),
            threshold=highest.values[-1].expand(d_sae).contiguous(),
            activation="jumprelu",
            W_dec=torch.randn(len(listed), d_model, generator=generator).bfloat16(),
            decoder_rows=decoder_rows,
        )
        return cls(hidden.to(device), sae.to(device), EditList.from_lists([[]], [listed]).to(device))

    def steer(self, hidden: Tensor, backend: str = "auto") -> None:
        token_step(hidden, self.sae, self.edits, 0.2, mode="dense", backend=backend)


def _seconds(run: Callable[[], object], device: torch.device) -> list[float]:
    """Times of some calls after one that does not count."""

    def once() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    once()
    return [once() for _ in range(REPEATS)]


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{processor_name()}, {threads} thread{'s' if threads > 1 else ''}"
