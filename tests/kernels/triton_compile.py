"""Compiling the Triton kernels ahead of time, for GPUs that need not be present: their registers and memory.

    python tests/kernels/triton_compile.py --architecture sm_90 --every-combination

prints one JSON object a line. It compiles the same code as a launch: the operations run on tensors without data, and
their launches are recorded instead of run.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any, cast, get_args
from unittest import mock

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature

from dspa.kernels.adapter_step.triton import adapter_step
from dspa.kernels.adapter_weights import AdapterActivation, AdapterWeights
from dspa.kernels.backends.interface import StepMode
from dspa.kernels.encode_density.triton import encode_density
from dspa.kernels.lookup.triton import lookup
from dspa.kernels.token_step import encoder_codes
from dspa.kernels.token_step.triton import token_step, token_step_with_lookup
from dspa.kernels.triton_common import launch
from dspa.kernels.triton_common.configurations import ENCODE_DENSITY, TOKEN_STEP
from dspa.kernels.triton_common.launch import Launch, parts_of
from dspa.kernels.types import CsrMap, EditList, TokenStats
from dspa.sae.weights import Activation, InputNormalization, SaeWeights

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ACTIVATIONS: tuple[Activation, ...] = ("jumprelu", "gated", "topk")  # those that are code of their own
NORMALIZATIONS: tuple[InputNormalization, ...] = get_args(InputNormalization)
LOW_PRECISION = (torch.bfloat16, torch.float16, torch.float32)
MODES = ("dense", "lazy", "lookup", "screened")
ADAPTERS: dict[str, tuple[AdapterActivation, bool]] = {  # with the mode: activation and clip
    "dense": ("soft_threshold", True),
    "lazy": ("soft_threshold", False),
    "lookup": ("jump_relu", True),
    "screened": ("jump_relu", False),
}
WIDE = (32, 64)  # batches with a tile of their own, where products are plain
_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Case:
    """The settings that select the code of a kernel.

    Attributes:
        activation, normalization, subtract_b_dec: of the SAE.
        hidden, weights: dtypes.
        mode: of `token_step`: "dense", "lazy", "screened", or "lookup" for lazy with the lookup in the same launch. The
            version of the adapter goes with it, see `ADAPTERS`.
        optional: whether there are flags, counters, an alpha for each row, a compact decoder and decoder norms.
        shape: d_model and d_sae.
    """

    activation: Activation
    normalization: InputNormalization
    subtract_b_dec: bool
    hidden: torch.dtype
    weights: torch.dtype
    mode: str
    optional: bool
    shape: tuple[int, int]

    def __str__(self) -> str:
        dtypes = "-".join(str(dtype).removeprefix("torch.") for dtype in (self.hidden, self.weights))
        bias = "-subtract_b_dec" if self.subtract_b_dec else ""
        shape = "x".join(str(size) for size in self.shape)
        options = "-optional" if self.optional else ""
        return f"{self.activation}-{self.normalization}{bias}-{dtypes}-{self.mode}{options}-{shape}"


@dataclass(frozen=True)
class Compiled:
    """The resources of one kernel.

    Attributes:
        kernel, case, architecture: which kernel.
        registers: of a thread; on an AMD GPU its vector registers and the scalar ones of its wave.
        stack_bytes: memory of a thread for what does not fit into registers; 0 if nothing is spilled.
        shared_bytes: shared memory of a program.
        products_from_shared: how many of its instructions multiply on the tensor cores while the program goes on, with
            both factors in shared memory (sm_90).
        copies_ahead: groups of copies into shared memory that are still under way where the next one is needed.
        copying_ahead: device functions with a loop that copies to shared memory what later rounds of it need.
        multiplying_ahead: whether a product on tensor cores is under way while a loop goes on (sm_90).
        is_plain: whether factors are multiplied as they are loaded.
    """

    kernel: str
    case: str
    architecture: str
    registers: int
    stack_bytes: int
    shared_bytes: int
    products_from_shared: int
    copies_ahead: int
    copying_ahead: list[str]
    multiplying_ahead: bool
    is_plain: bool


def entries(architecture: str) -> list[tuple[int, int]]:
    """Every shape with an entry of its own in the tables of block sizes."""
    return sorted({*TOKEN_STEP[architecture], *ENCODE_DENSITY[architecture]})


@contextmanager
def recording(architecture: str) -> Iterator[list[Launch]]:
    """Within it, launches are recorded instead of run, with the block sizes of an architecture."""
    recorded: list[Launch] = []
    with (
        mock.patch.object(launch, "architecture", return_value=architecture),
        mock.patch.object(Launch, "run", autospec=True, side_effect=recorded.append),
        mock.patch.object(encoder_codes, "scores_never_fall", return_value=True),  # of tensors without data
    ):
        yield recorded


def every_case(architecture: str) -> Iterator[Case]:
    """Every value of each field with every other, at every shape of the table."""
    for shape in entries(architecture):
        for activation, normalization, subtract, hidden, weights, mode, optional in itertools.product(
            ACTIVATIONS,
            NORMALIZATIONS,
            (False, True),
            LOW_PRECISION,
            LOW_PRECISION,
            MODES,
            (False, True),
        ):
            yield Case(activation, normalization, subtract, hidden, weights, mode, optional, shape)


def spanning_cases(architecture: str) -> Iterator[Case]:
    """Every dtype at every shape of the table, on sm_90 with every other. The other fields take turns, so that the
    architectures together have every pair of values of any two fields."""
    first = sum(len(entries(earlier)) for earlier in itertools.takewhile(architecture.__ne__, TARGETS))
    for turn, shape in enumerate(entries(architecture), first):
        for (i, hidden), (j, weights) in itertools.product(enumerate(LOW_PRECISION), repeat=2):
            if architecture != "sm_90" and i != j:
                continue
            yield Case(
                ACTIVATIONS[(i + j + turn) % 3],
                NORMALIZATIONS[(i + 2 * j + turn // 3) % 3],
                (i + turn // 2) % 2 == 1,
                hidden,
                weights,
                MODES[(i + turn) % 4],
                (j + turn) % 2 == 1,
                shape,
            )


def is_plain(case: Case) -> bool:
    """Whether the encoder input is the hidden state itself, in the dtype of the weights."""
    is_itself = case.normalization == "none" and not case.subtract_b_dec
    return is_itself and parts_of(case.hidden, case.weights, True) == 0


def launches_of(case: Case, architecture: str) -> list[Launch]:
    """The launches of the operations, on tensors without data."""

    def tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    d_model, d_sae = case.shape
    gated = case.activation == "gated"
    sae = SaeWeights(
        W_enc=tensor(d_sae, d_model, dtype=case.weights),
        b_enc=tensor(d_sae),
        threshold=tensor(d_sae),
        activation=case.activation,
        W_dec=tensor(d_sae, d_model, dtype=case.weights),
        b_dec=tensor(d_model),
        decoder_rows=tensor(d_sae, dtype=torch.int32) if case.optional else None,
        k=64 if case.activation == "topk" else None,
        subtract_b_dec=case.subtract_b_dec,
        normalization=case.normalization,
        decoder_norm=tensor(d_sae) if case.optional and not gated else None,
        magnitude_scale=tensor(d_sae) if gated else None,
        magnitude_bias=tensor(d_sae) if gated else None,
    )
    batch, k = 16, 16
    hidden = tensor(batch, d_model, dtype=case.hidden)
    enabled = tensor(batch, dtype=torch.bool) if case.optional else None
    stats = TokenStats.zeros(batch, d_sae, "meta") if case.optional else None
    alpha = tensor(batch) if case.optional else 0.2
    density = tensor(batch, d_sae)
    conditional_map = CsrMap(tensor(d_sae + 1, dtype=torch.int64), tensor(4096, dtype=torch.int32), tensor(4096), d_sae)
    with recording(architecture) as made:
        if case.mode == "lookup":
            token_step_with_lookup(
                hidden, sae, density, conditional_map, 32, k, "ablate", False, alpha, enabled, stats, "lazy"
            )
            lookup(density, conditional_map, 32, k, "both", True)
        else:
            edits = EditList.empty(batch, k, "meta")
            token_step(hidden, sae, edits, alpha, enabled, stats, cast(StepMode, case.mode))
        for wide in WIDE if is_plain(case) else ():
            rows = tensor(wide, d_model, dtype=case.hidden)
            token_step(rows, sae, EditList.empty(wide, k, "meta"), 0.2, None, None, "lazy")
        encode_density(hidden, tensor(3, dtype=torch.int64), sae)
        activation, clip = ADAPTERS[case.mode]
        adapter = AdapterWeights(
            weight=tensor(d_sae, d_model, dtype=case.weights),
            bias=tensor(d_sae),
            threshold=tensor(d_sae),
            activation=activation,
            clip=clip and case.activation != "topk",
        )
        adapter_step(hidden, sae, adapter, enabled, stats, None, None)
    return made


def compile_launch(made: Launch, case: Case, architecture: str) -> Compiled:
    """Compiles a kernel as a launch on that architecture would."""
    target, kernel = TARGETS[architecture], made.kernel
    backend = make_backend(target)
    binder = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, options = binder(**made.arguments, **made.options, debug=False)
    options, signature, constants, attributes = kernel._pack_args(backend, made.options, bound, specialization, options)
    source = triton.compiler.ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=target, options=options.__dict__)
    registers, stack = resources_of(binary)
    text = binary.asm.get("ptx", "")
    products = re.findall(r"wgmma\.mma_async[\w.]* \{[^}]*\}, %rd\d+, %rd\d+,", text)
    pending = [int(groups) for groups in re.findall(r"cp\.async\.wait_group\s+(\d+)", text)]
    return Compiled(
        kernel.__name__,
        str(case),
        architecture,
        registers,
        stack,
        binary.metadata.shared,
        len(products),
        max(pending, default=0),
        *loops_of(binary.asm["ttgir"]),
        is_plain(case),
    )


def loops_of(text: str) -> tuple[list[str], bool]:
    """From Triton's code for a GPU: `copying_ahead` and `multiplying_ahead` of `Compiled`."""
    locations = dict(re.findall(r"^#(loc\d*) = (.*)$", text, re.MULTILINE))

    def function_at(location: str) -> str:
        """The innermost function of a location, which may be named, and inlined where it was called."""
        found = re.search(r'"([^"]+\.py)":(\d+)', locations[location])
        if found is None:
            return function_at(re.findall(r"#(loc\d*)", locations[location])[0])
        return function_around(found[1], int(found[2]))

    copying, is_multiplying, loops = set[str](), False, list[int]()
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        while loops and indent <= loops[-1] and line.lstrip().startswith("}"):
            loops.pop()
        if loops and "ttg.async_copy_global_to_local" in line:
            copying.add(function_at(re.findall(r"loc\(#(loc\d*)\)", line)[-1]))
        is_multiplying |= bool(loops) and re.search(r"warp_group_dot_wait .*pendings = [1-9]", line) is not None
        if "scf.for " in line:
            loops.append(indent)
    return sorted(copying), is_multiplying


@cache
def function_around(path: str, line: int) -> str:
    """The function of a file that a line belongs to."""
    functions = [node for node in ast.walk(ast.parse(Path(path).read_text())) if isinstance(node, ast.FunctionDef)]
    return next(node.name for node in functions if node.lineno <= line <= (node.end_lineno or line))


def resources_of(binary: Any) -> tuple[int, int]:
    """Registers and bytes of stack of a thread."""
    if "amdgcn" in binary.asm:
        text = binary.asm["amdgcn"]
        names = ("vgpr_count", "sgpr_count", "private_segment_fixed_size")
        found = [re.findall(rf"\.{name}:\s+(\d+)", text) for name in names]
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(binary.asm["cubin"])
            file.flush()
            command = [str(_NVIDIA_TOOLS / "cuobjdump"), "-res-usage", file.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found = [re.findall(rf"{name}:(\d+)", text) for name in ("REG", "STACK")]
    assert all(found), text
    *registers, stack = (max(int(number) for number in numbers) for numbers in found)
    return sum(registers), stack


def main() -> None:
    """Compiles the selected kernels. Must run without TRITON_INTERPRET."""
    parser = argparse.ArgumentParser(description="Compile the Triton kernels ahead of time.")
    parser.add_argument("--architecture", choices=sorted(TARGETS), action="append", help="default: all")
    parser.add_argument("--every-combination", action="store_true", help="not only the few that span all of them")
    arguments = parser.parse_args()
    for architecture in arguments.architecture or TARGETS:
        cases = every_case(architecture) if arguments.every_combination else spanning_cases(architecture)
        for case in cases:
            for made in launches_of(case, architecture):
                print(json.dumps(asdict(compile_launch(made, case, architecture))), flush=True)


if __name__ == "__main__":
    sys.exit(main())
