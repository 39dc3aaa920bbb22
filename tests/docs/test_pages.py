"""What README.md, CONTRIBUTING.md and docs/ name exists: links, files, commands, options, Python names, sections."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path
from typing import Any

import pytest
import typer.main

import dspa
from dspa.cli import app

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
COMMANDS: dict[str, Any] = dict(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
FOLDERS = ("dspa", "csrc", "tests", "benchmarks", "docs", "examples")

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def prose(page: Path) -> str:
    """The text without fenced blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def code(page: Path) -> list[str]:
    """Code in the text, and the lines of shell blocks, continued lines joined."""
    shell = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    return [*re.findall(r"`([^`\n]+)`", prose(page)), *shell.splitlines()]


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def options_of(command: str) -> set[str]:
    return {name for parameter in COMMANDS[command].params for name in (*parameter.opts, *parameter.secondary_opts)}


def resolve(name: str) -> object:
    """What a dotted name stands for: modules first, then attributes."""
    found: Any = dspa
    for position, part in enumerate(name.split(".")[1:], start=2):
        if not hasattr(found, part):
            importlib.import_module(".".join(name.split(".")[:position]))
        found = getattr(found, part)
    return found


@each_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), target
        assert not anchor or anchor in anchors(file), target


@each_page
def test_files_exist(page: Path) -> None:
    for text in code(page):
        if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./]*", text):
            assert (ROOT / text).exists(), text


@each_page
def test_commands_and_their_options_exist(page: Path) -> None:
    for text in code(page):
        found = re.search(r"\bdspa\)? ([a-z]+)\b(.*)", text)
        if found is None or text.startswith("pip "):
            continue
        command, rest = found.groups()
        assert command in COMMANDS, text
        assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)) <= options_of(command) | {"--help"}, text


@each_page
def test_make_targets_exist(page: Path) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for text in code(page):
        for target in re.findall(r"\bmake ([a-z][a-z-]*)", text):
            assert target in targets, text


@each_page
def test_python_compiles_and_its_names_exist(page: Path) -> None:
    for block in blocks(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "dspa":
                for alias in node.names:
                    resolve(f"{node.module}.{alias.name}")
            if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("dspa."):
                name = re.match(r"dspa[\w.]*", ast.unparse(node))
                assert name is not None
                resolve(name.group().rstrip("."))
    for text in code(page):
        found = re.match(r"dspa(\.\w+)+", text)
        if found is not None:
            resolve(found.group())


@pytest.mark.parametrize(
    ("command", "page"),
    [
        ("demo", "usage.md"),
        ("collect", "usage.md"),
        ("fit", "usage.md"),
        ("generate", "usage.md"),
        ("explain", "usage.md"),
        ("audit", "usage.md"),
        ("eval", "usage.md"),
        ("serve", "usage.md"),
        ("tune", "usage.md"),
        ("compare", "usage.md"),
        ("flops", "flops.md"),
        ("bench", "benchmarks.md"),
    ],
)
def test_every_option_is_documented(command: str, page: str) -> None:
    text = (DOCS / page).read_text()
    if page == "usage.md":  # its line in the table of commands
        text = next(line for line in text.splitlines() if line.startswith(f"| `dspa {command}"))
    missing = {
        parameter.opts[0]
        for parameter in COMMANDS[command].params
        if parameter.param_type_name == "option" and not re.search(rf"`{parameter.opts[0]}\b(?!-)", text)
    }
    assert missing - {"--help"} == set()


def test_the_sections_that_the_code_cites_exist() -> None:
    sections = set(re.findall(r"^## (\d)\. ", (DOCS / "method.md").read_text(), re.MULTILINE))
    assert sections == set("1234567")
    cited = 0
    for file in (ROOT / "dspa").rglob("*.py"):
        for numbers in re.findall(r"\bmethod(?:\.md)?, sections? (\d(?:(?:, | and )\d)*)", file.read_text()):
            cited += 1
            assert set(re.findall(r"\d", numbers)) <= sections, file
    assert cited > 10


def test_every_public_name_is_in_the_reference() -> None:
    text = "\n".join(file.read_text() for file in (DOCS / "api").glob("*.md"))
    documented = set(re.findall(r"^::: dspa\.(?:\w+\.)*(\w+)$", text, re.MULTILINE))
    errors = {name for name in dspa.__all__ if isinstance(getattr(dspa, name), type) and name.endswith("Error")}
    assert set(dspa.__all__) - errors - {"kernels"} <= documented


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
