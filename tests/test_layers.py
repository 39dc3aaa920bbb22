"""Imports point down, never in a circle, and every module has a room: read from the source, lazy imports included."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "dspa"

# From the top down. A room may import from itself and from rooms below its own line.
LAYERS = (
    ("cli", "__main__"),
    ("auditing", "bench", "evaluation", "flops", "organism", "serving", "tuning", "vllm_plugin"),
    ("online",),
    ("methods",),
    ("offline",),
    ("transformers_model",),
    ("kernels",),
    ("sae",),
    ("util",),
    ("errors",),
)
SIDEWAYS = {("bench", "organism"), ("flops", "organism")}  # a command of one measures on the model of the other
ALLOWED_ANYWHERE = {""}  # the package itself: its version and its public names


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported_by(module: str) -> set[str]:
    """The modules of the package that a module's source imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "dspa"}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "dspa":
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in MODULES else node.module)
    return found - {module}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def layer_of(room: str) -> int:
    return next(index for index, rooms in enumerate(LAYERS) if room in rooms)


def test_every_module_has_a_room() -> None:
    rooms = {room_of(module) for module in MODULES} - ALLOWED_ANYWHERE
    assert rooms <= {room for layer in LAYERS for room in layer}


@pytest.mark.parametrize("module", [module for module in MODULES if room_of(module)])
def test_imports_point_down(module: str) -> None:
    room = room_of(module)
    for target in imported_by(module):
        other = room_of(target)
        if other in (*ALLOWED_ANYWHERE, room) or (room, other) in SIDEWAYS:
            continue
        assert layer_of(other) > layer_of(room), f"{module} imports {target}"


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = {module: {target for target in imported_by(module) if room_of(target)} for module in MODULES}
    finished: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join((*path[path.index(module) :], module))
        if module not in finished:
            for target in sorted(graph.get(module, ())):
                visit(target, (*path, module))
            finished.add(module)

    for module in graph:
        visit(module, ())


def test_online_sees_methods_through_one_module() -> None:
    """The protocol: whatever a method is, the code that steers has no other name for it."""
    for module in MODULES:
        if room_of(module) == "online":
            assert {m for m in imported_by(module) if room_of(m) == "methods"} <= {"dspa.methods.policy"}, module


def test_kernels_know_no_model_and_no_file() -> None:
    libraries = re.compile(r"^\s*(?:import|from) (transformers|safetensors|huggingface_hub|sae_lens|datasets)\b", re.M)
    for module, path in MODULES.items():
        if room_of(module) in ("kernels", "methods"):
            found = libraries.findall(path.read_text())
            assert not found or (module, found) == ("dspa.methods.hub", ["huggingface_hub"] * len(found)), module


@pytest.mark.parametrize("module", MODULES)
def test_no_file_is_longer_than_500_lines(module: str) -> None:
    tables = {"dspa.organism.sentences"}  # one job: the language's sentences
    assert module in tables or len(MODULES[module].read_text().splitlines()) <= 500
