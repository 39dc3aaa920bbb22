"""What nvcc makes of the CUDA sources: no spills, no local memory, and the instructions that were meant."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent.parent / "csrc"))

import compile_cuda  # pyright: ignore[reportMissingImports]

NVCC = compile_cuda.find_nvcc()
ARCHITECTURES = compile_cuda.DEFAULT_ARCHITECTURES.split(";")

pytestmark = [
    pytest.mark.compilers,
    pytest.mark.skipif(NVCC is None, reason="there is no nvcc on the PATH or in CUDA_HOME"),
]

# How many instantiations of each there are.
KERNELS = {
    "token_step_kernel": 9,  # three dtypes; one row, eight rows, and rows that are not whole 16 bytes
    "token_step_ring_kernel": 3,
    "density_inputs_kernel": 1,
    "density_matrix_kernel": 6,
    "density_warpgroup_kernel": 6,
    "density_number_kernel": 6,
    "density_topk_kernel": 1,
    "lookup_kernel": 4,
    "adapter_fire_kernel": 9,  # as token_step_kernel
    "adapter_change_kernel": 6,
    "adapter_decode_kernel": 6,
}

# Kernels that are empty but for these architectures.
ONLY_FOR = {"token_step_ring_kernel": ("90a", "100"), "density_warpgroup_kernel": ("90a",)}


def is_empty(name: str, architecture: str) -> bool:
    """Whether the kernel of this mangled name has nothing to do on sm_`architecture`."""
    return any(kernel in name and architecture not in served for kernel, served in ONLY_FOR.items())


@dataclass(frozen=True)
class Kernel:
    """One kernel for one architecture, as the assembler reports it."""

    name: str
    architecture: str
    stack_bytes: int
    spilled_bytes: int


def kernels_in(report: str) -> list[Kernel]:
    found = []
    entry = re.compile(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
        re.DOTALL,
    )
    for name, architecture, stack, stores, loads in entry.findall(report):
        found.append(Kernel(name, architecture, int(stack), int(stores) + int(loads)))
    return found


@pytest.fixture(scope="module")
def compiled() -> list[compile_cuda.Compiled]:
    assert NVCC is not None
    return compile_cuda.compile_sources(NVCC, ARCHITECTURES)


@pytest.fixture(scope="module")
def kernels(compiled: list[compile_cuda.Compiled]) -> list[Kernel]:
    return [kernel for source in compiled for kernel in kernels_in(source.report)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_is_compiled(kernels: list[Kernel], architecture: str) -> None:
    names = [kernel.name for kernel in kernels if kernel.architecture == f"sm_{architecture}"]
    assert {name: sum(name in mangled for mangled in names) for name in KERNELS} == KERNELS
    assert len(names) == sum(KERNELS.values())


def test_no_kernel_spills_or_uses_local_memory(kernels: list[Kernel]) -> None:
    assert [kernel for kernel in kernels if kernel.stack_bytes or kernel.spilled_bytes] == []


def test_a_spill_would_be_seen(tmp_path: Path) -> None:
    assert NVCC is not None
    source = tmp_path / "spills.cu"
    source.write_text(
        'extern "C" __global__ void __launch_bounds__(1024) spills(float* x) {\n'
        "  float y[200];\n"
        "  for (int i = 0; i < 200; ++i) y[i] = x[i * 1024 + threadIdx.x];\n"
        "  for (int i = 0; i < 200; ++i) x[(int)y[i] * 1024 + threadIdx.x] = y[(int)y[i]];\n"
        "}\n"
    )
    command = [NVCC, "-Xptxas", "-v", "-arch=sm_90", "-cubin", str(source), "-o", str(tmp_path / "spills.cubin")]
    report = subprocess.run(command, capture_output=True, text=True, check=True)
    assert kernels_in(report.stdout + report.stderr)[0].stack_bytes > 0


def test_no_product_of_a_warpgroup_waits_for_the_one_before(compiled: list[compile_cuda.Compiled]) -> None:
    """The assembler says so where it had to put waits between them."""
    for source in compiled:
        assert "wgmma" not in source.report
        assert "Performance Loss" not in source.report


# ---- machine code ----------------------------------------------------------------------------------------------------


def find_cuobjdump() -> str | None:
    """The disassembler: CUDA's own, or the one that comes with triton."""
    beside = Path(NVCC).parent / "cuobjdump" if NVCC else None
    if beside is not None and beside.exists():
        return str(beside)
    found = shutil.which("cuobjdump")
    if found is None:
        in_triton = Path(pytest.importorskip("triton").__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        found = str(in_triton) if in_triton.exists() else None
    return found


@pytest.fixture(scope="module")
def machine_code(compiled: list[compile_cuda.Compiled]) -> dict[tuple[str, str], list[str]]:
    """The instructions of each kernel, by architecture and mangled name."""
    cuobjdump = find_cuobjdump()
    if cuobjdump is None:
        pytest.skip("there is no cuobjdump, neither CUDA's nor triton's")
    code: dict[tuple[str, str], list[str]] = {}
    for source in compiled:
        dump = subprocess.run([cuobjdump, "-sass", str(source.object_file)], capture_output=True, text=True, check=True)
        architecture, instructions = "", []
        for line in dump.stdout.splitlines():
            if found := re.match(r"\s*arch = (\w+)", line):
                architecture = found[1]
            elif found := re.match(r"\s*Function : (\w+)", line):
                instructions = code.setdefault((architecture, found[1]), [])
            elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
                instructions.append(found[1])
    return code


def test_no_instruction_touches_local_memory(machine_code: dict[tuple[str, str], list[str]]) -> None:
    assert len(machine_code) == len(ARCHITECTURES) * sum(KERNELS.values())
    for (architecture, kernel), instructions in machine_code.items():
        empty = is_empty(kernel, architecture.removeprefix("sm_"))
        assert ("EXIT" in instructions[:3]) if empty else len(instructions) > 100, (architecture, kernel)
        assert not [name for name in instructions if name.startswith(("LDL", "STL"))], (architecture, kernel)


def test_the_weights_are_loaded_16_bytes_at_a_time(machine_code: dict[tuple[str, str], list[str]]) -> None:
    """Eight such loads for the rows of the pass and eight for a listed row, none of which stays in the first cache, and
    three for hidden states, which may. Of decoder rows there are eight loads, of 16 or of 8 bytes."""
    for (architecture, name), instructions in machine_code.items():
        if "token_step_kernel" not in name:
            continue
        if name.endswith("Lb0EEEvNS0_9TokenStepE"):  # rows are not whole 16 bytes
            continue
        loads = [load for load in instructions if load.startswith("LDG") and ".128" in load]
        streaming = [load for load in loads if ".NA" in load]
        assert len(streaming) >= 16, (architecture, name)
        assert len(loads) - len(streaming) >= 3, (architecture, name)
        halves = [load for load in instructions if load.startswith("LDG") and ".64" in load]
        assert len(halves if "Float32" not in name else loads) >= 8, (architecture, name)


# What is meant to be in the machine code of a kernel, wherever it is not empty.
MEANT = {
    "token_step_ring_kernel": ("UBLKCP", "SYNCS.PHASECHK.TRANS64.TRYWAIT", "LDG.E.128"),
    "density_matrix_kernel": ("HMMA.16816.F32", "LDSM.16.M88.4", "LDGSTS.E.BYPASS"),
    "density_warpgroup_kernel": ("HGMMA.64x256x16.F32", "UTMALDG.2D.MULTICAST", "USETMAXREG"),
}


@pytest.mark.parametrize("kernel", MEANT)
def test_the_instructions_that_were_meant(machine_code: dict[tuple[str, str], list[str]], kernel: str) -> None:
    found = 0
    for (architecture, name), instructions in machine_code.items():
        if kernel not in name or is_empty(name, architecture.removeprefix("sm_")):
            continue
        found += 1
        for meant in MEANT[kernel]:
            assert any(instruction.startswith(meant) for instruction in instructions), (architecture, name, meant)
    assert found == len(ONLY_FOR.get(kernel, ARCHITECTURES)) * KERNELS[kernel]
