"""The operations that `dspa bench` measures: each a row of times, checked first."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dspa.bench.adapter import AdapterCase, adapter_ways, eager_way
from dspa.bench.cases import LISTS, NEEDS_MAXIMUM, Case
from dspa.bench.density_check import check_counts
from dspa.bench.eager import EncoderDecoder, as_delta, plain_sae, with_error_term
from dspa.bench.measurements import Column, Row
from dspa.bench.timing import Way, timed
from dspa.errors import InvalidInputError
from dspa.kernels import SaeWeights, StepMode, available, encode_density
from dspa.kernels.token_step import work_of

READ = "read W_enc"
READ_ADAPTER = "read W_a"
EAGER = "eager with error term"
DELTA = "eager delta"
PRODUCT = "matrix product alone"
EAGER_DENSITY = "eager encode and count"
EAGER_PRODUCTS, EAGER_ADAPTER_PRODUCTS = 3, 4  # of a row with a matrix of the SAE: encode, adapter, decode twice
ROWS_TRIED = 8
SHORTEST_LIMIT = 0.05  # seconds of a call that are never too long
OURS: tuple[tuple[str, StepMode, str], ...] = (
    ("dense", "dense", NEEDS_MAXIMUM),
    ("lazy, none active", "lazy", "none active"),
    ("lazy, all certainly zero", "lazy", "all certainly zero"),
    ("lazy, needs M_t", "lazy", NEEDS_MAXIMUM),
    ("screened", "screened", NEEDS_MAXIMUM),
)
"""Columns of `token_step`: their names, modes and lists."""


@dataclass(frozen=True, eq=False)
class Subject:
    """What is measured, and how.

    Attributes:
        case: the output SAE with its tokens and lists.
        input_sae: the SAE that reads prompts; None for a policy without one.
        tokens: tokens of a prompt, for `encode_density`.
        backend: a kernel backend's name, or "auto".
        seconds: how long each operation is timed.
        at_least: samples of each way, at least.
    """

    case: Case
    input_sae: SaeWeights | None
    tokens: int
    backend: str
    seconds: float
    at_least: int = 7

    @property
    def device(self) -> str:
        return str(self.case.hidden.device)

    @property
    def seconds_a_call(self) -> float:
        """How long a call may take, for enough of them to be timed beside the other ways."""
        return max(SHORTEST_LIMIT, self.seconds / self.at_least)

    def timed(self, ways: list[Way], reference: str) -> tuple[Column, ...]:
        return timed(ways, reference, seconds=self.seconds, at_least=self.at_least, device=self.device)


@dataclass(frozen=True)
class Operation:
    """An operation by name. `measure` returns None where the subject has nothing to measure it on."""

    name: str
    measure: Callable[[Subject], Row | None]


# --- token_step -------------------------------------------------------------------------------------------------------


def measure_token_step(subject: Subject) -> Row:
    """`token_step` by mode, beside the eager edit and the bare reading of the encoder."""
    case = subject.case
    name = str(case.shape)
    lists = tuple(kind for kind in LISTS if kind in case.lists)
    try:
        case.check(("dense", "lazy", "screened"), lists)
        dtypes, left_out = eager_dtypes(case.sae, EAGER_PRODUCTS * len(case.hidden), subject.seconds_a_call)
        eager = eager_ways(case, dtypes)
        ways = [read_way(case.sae.W_enc), *eager, *our_ways(case)]
        reference = eager[0].name if eager else "dense"
        return Row(name, "token_step", subject.timed(ways, reference), reference, left_out=left_out)
    except AssertionError as failure:
        return failed_row(name, "token_step", failure)


def read_way(weights: Tensor, name: str = READ) -> Way:
    """Only streams a matrix: what a pass over it cannot beat."""
    if weights.device.type == "cpu" and available()["cpu"] == "available":
        return Way(name, lambda: torch.ops.dspa.stream_read(weights), weights.nbytes)
    words = weights.view(torch.int32).view(-1) if weights.nbytes % 4 == 0 else weights.view(-1)
    return Way(name, lambda: words.max(), weights.nbytes)


def our_ways(case: Case) -> list[Way]:
    """Every mode on the lists that show it, with the bytes it reads."""
    return [
        Way(name, lambda lists=lists, mode=mode: case.step(lists, mode), bytes_read(case, lists, mode))
        for name, mode, lists in OURS
        if lists in case.lists
    ]


def eager_ways(case: Case, dtypes: list[torch.dtype]) -> list[Way]:
    """The eager edit with error term and as a delta, in each dtype. None for an SAE that normalizes its input."""
    latents = padded_latents(case, NEEDS_MAXIMUM)
    ways = []
    for dtype in dtypes:
        sae = plain_sae(in_dtype(case.sae, dtype))
        if sae is None:
            return []
        suffix = "" if dtype == case.shape.dtype else f", {name_of(dtype)}"
        ways += _eager_pair(sae, case.hidden.to(dtype), latents, case.alpha, suffix)
    return ways


def eager_dtypes(sae: SaeWeights, products: int, seconds_a_call: float) -> tuple[list[torch.dtype], str]:
    """The dtypes that the eager form is timed in, and which was left out. On a CPU that is float32 as well, which is
    faster without matrix units for 16 bits. Without instructions for them, 16 bits are hundreds of times slower, and
    left out where a call would take too long.

    Args:
        sae: in the dtype of the operation.
        products: of one row with a matrix of the SAE's shape, in a call.
        seconds_a_call: what is too long.
    """
    if sae.device.type != "cpu" or sae.dtype.itemsize != 2:
        return [sae.dtype], ""
    row = torch.ones(1, sae.d_model, dtype=sae.dtype)
    encoder = sae.W_enc.T.contiguous()
    row.matmul(encoder)
    start = time.perf_counter()
    row.matmul(encoder)
    alone = time.perf_counter() - start
    together = torch.ones(min(products, ROWS_TRIED), sae.d_model, dtype=sae.dtype)
    if alone <= seconds_a_call:  # rows share what is read, where there are instructions
        start = time.perf_counter()
        together.matmul(encoder)
        alone = (time.perf_counter() - start) / len(together)
    expected = products * alone
    if expected <= seconds_a_call:
        return [sae.dtype, torch.float32], ""
    return [torch.float32], f"plain torch in {name_of(sae.dtype)}, about {expected:.2g} s a call on this CPU"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _eager_pair(sae: EncoderDecoder, hidden: Tensor, latents: Tensor, alpha: float, suffix: str) -> list[Way]:
    return [
        Way(f"{EAGER}{suffix}", lambda: with_error_term(sae, hidden, latents, alpha)),
        Way(f"{DELTA}{suffix}", lambda: as_delta(sae, hidden, latents, alpha)),
    ]


def padded_latents(case: Case, lists: str) -> Tensor:
    """`[batch, k]` int64 latents of the lists, short lists filled up with their own first entry, or with latent 0."""
    edits = case.lists[lists]
    latents = edits.latents.long()
    return torch.where(edits.valid(), latents, latents[:, :1])


def in_dtype(sae: SaeWeights, dtype: torch.dtype) -> SaeWeights:
    """The SAE with its matrices in another dtype."""
    if sae.dtype == dtype:
        return sae
    decoder = None if sae.W_dec is None else sae.W_dec.to(dtype)
    return replace(sae, W_enc=sae.W_enc.to(dtype), W_dec=decoder)


def bytes_read(case: Case, lists: str, mode: StepMode) -> int | None:
    """What one step reads of the encoder or its codes, in the steady state: counted in the kernel on a CPU; on a GPU
    the whole encoder for what needs M_t, and else unknown."""
    case.step(lists, mode)
    before = work_of(case.sae)
    case.step(lists, mode)
    after = work_of(case.sae)
    if after.tokens > before.tokens:
        return after.encoder_bytes - before.encoder_bytes
    return case.sae.W_enc.nbytes if lists == NEEDS_MAXIMUM else None


# --- adapter_step -----------------------------------------------------------------------------------------------------


def measure_adapter_step(subject: Subject) -> Row:
    """`adapter_step` of FSRL by mode, beside the eager form and the bare reading of the adapter's weight."""
    adapters = AdapterCase(subject.case)
    name = str(subject.case.shape)
    try:
        adapters.check()
        products = EAGER_ADAPTER_PRODUCTS * len(adapters.case.hidden)
        dtypes, left_out = eager_dtypes(adapters.case.sae, products, subject.seconds_a_call)
        eager = eager_adapter_ways(adapters, dtypes)
        ways = [read_way(adapters.adapter.weight, READ_ADAPTER), *eager, *adapter_ways(adapters)]
        reference = eager[0].name if eager else "dense"
        return Row(name, "adapter_step", subject.timed(ways, reference), reference, left_out=left_out)
    except AssertionError as failure:
        return failed_row(name, "adapter_step", failure)


def eager_adapter_ways(adapters: AdapterCase, dtypes: list[torch.dtype]) -> list[Way]:
    """The eager form in each dtype. None for an SAE that normalizes its input."""
    case, ways = adapters.case, []
    for dtype in dtypes:
        sae = plain_sae(in_dtype(case.sae, dtype))
        if sae is None:
            return []
        ways.append(eager_way(sae, adapters, dtype))
    return ways


# --- encode_density ---------------------------------------------------------------------------------------------------


def measure_encode_density(subject: Subject) -> Row | None:
    """`encode_density` of two segments, beside the matrix product alone and the eager form, which keeps all
    activations."""
    sae = subject.input_sae
    if sae is None:
        return None
    name = f"{sae.d_model}x{sae.d_sae}-{name_of(sae.dtype)}-{subject.tokens} tokens"
    rng = torch.Generator().manual_seed(1)
    hidden = torch.randn(subject.tokens, sae.d_model, generator=rng).to(sae.device, sae.dtype)
    offsets = torch.tensor([0, subject.tokens // 3, subject.tokens], device=sae.device)
    try:
        check_counts(encode_density(hidden, offsets, sae, backend=subject.backend), hidden, offsets, sae)
    except AssertionError as failure:
        return failed_row(name, "encode_density", failure)
    ways: list[Way] = []
    dtypes, left_out = eager_dtypes(sae, subject.tokens, subject.seconds_a_call)
    for dtype in dtypes:
        suffix = "" if dtype == sae.dtype else f", {name_of(dtype)}"
        ways += _density_pair(in_dtype(sae, dtype), hidden.to(dtype), offsets, suffix)
    ways.append(Way("encode_density", lambda: encode_density(hidden, offsets, sae, backend=subject.backend)))
    reference = ways[0].name
    return Row(name, "encode_density", subject.timed(ways, reference), reference, left_out=left_out)


def _density_pair(sae: SaeWeights, hidden: Tensor, offsets: Tensor, suffix: str) -> list[Way]:
    plain = plain_sae(replace(sae, W_dec=None, decoder_rows=None))
    encoder = sae.W_enc.T.contiguous()
    bounds = offsets.tolist()

    @torch.no_grad()
    def count() -> Tensor:
        active = (plain.encode(hidden) if plain is not None else hidden @ encoder) > 0
        return torch.stack([active[start:end].sum(dim=0) for start, end in itertools.pairwise(bounds)])

    return [Way(f"{EAGER_DENSITY}{suffix}", count), Way(f"{PRODUCT}{suffix}", lambda: hidden @ encoder)]


# --- the list ---------------------------------------------------------------------------------------------------------

OPERATIONS = (
    Operation("token_step", measure_token_step),
    Operation("encode_density", measure_encode_density),
    Operation("adapter_step", measure_adapter_step),
)


def chosen_operations(names: list[str] | None) -> tuple[Operation, ...]:
    """Those of the names; all without names.

    Raises:
        InvalidInputError: for a name that is none.
    """
    known = {operation.name: operation for operation in OPERATIONS}
    for name in names or ():
        if name not in known:
            raise InvalidInputError(f"operation is {name!r}; expected one of {', '.join(known)}")
    return tuple(known[name] for name in names or known)


def failed_row(name: str, group: str, failure: AssertionError) -> Row:
    return Row(name, group, (), failed=(str(failure).strip() or "check failed").splitlines()[0])
