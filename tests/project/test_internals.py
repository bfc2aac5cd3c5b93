"""docs/comfyui_internals.md names all that the pack uses of ComfyUI, and all that it names is there."""

import ast
import importlib
import inspect
import os
import re
from pathlib import Path
from typing import Any

import pytest

from workbench import ROOT
from workbench.bootstrap import comfyui_path

TABLE = ROOT / "docs" / "comfyui_internals.md"
UNET = "diffusionmodules.openaimodel.UNetModel"
COMFYUI = ("comfy", "comfy_api", "comfy_execution", "folder_paths", "execution", "server", "latent_preview")


def rows() -> dict[str, list[str]]:
    """The table: file to its other cells, names and purpose."""
    cells = [[cell.strip() for cell in line.split("|")] for line in TABLE.read_text("utf-8").splitlines()]
    return {row[1].strip("`"): row[2:4] for row in cells if len(row) == 5 and row[1].startswith("`")}


def named() -> dict[str, set[str]]:
    """The table: file to the names it uses."""
    return {file: set(re.findall(r"`([^`]+)`", names)) for file, (names, _) in rows().items()}


def used(path: Path) -> set[str]:
    """Dotted names of ComfyUI that a file uses: what it imports, and attributes of modules it imports."""
    tree = ast.parse(path.read_text("utf-8"))
    modules: set[str] = set()
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names if alias.name.split(".")[0] in COMFYUI}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and (node.module or "").split(".")[0] in COMFYUI:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        name = _dotted(node)
        if name and name not in modules and name.rpartition(".")[0] in modules:
            found.add(name)
    return found


def _dotted(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute):
        before = _dotted(node.value)
        return before and f"{before}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def all_used() -> dict[str, set[str]]:
    """Every file of the pack that uses something of ComfyUI."""
    files = [*(ROOT / "moma_modules").rglob("*.py"), *(ROOT / "nodes").rglob("*.py"), ROOT / "__init__.py"]
    uses = {path.relative_to(ROOT).as_posix(): used(path) for path in sorted(files)}
    return {name: found for name, found in uses.items() if found}


def write_names(uses: dict[str, set[str]]) -> None:
    """Put the names into the table; what each is for is left to a person."""
    known, text = rows(), TABLE.read_text("utf-8")
    lines = [
        f"| `{file}` | {', '.join(f'`{name}`' for name in sorted(names))} | {known.get(file, ['', ''])[1]} |"
        for file, names in uses.items()
    ]
    start, end = text.index("| `"), text.rindex("|\n") + 2
    TABLE.write_text(text[:start] + "\n".join(lines) + "\n" + text[end:], "utf-8")


def test_all_that_is_used_of_comfyui_is_named() -> None:
    """Set UPDATE_SNAPSHOT=1 to put the names into the table; then say what they are for."""
    uses = all_used()
    if os.environ.get("UPDATE_SNAPSHOT"):
        write_names(uses)
    listed = named()
    missing = [f"{file}: {name}" for file in uses for name in sorted(uses[file] - listed.get(file, set()))]
    gone = [f"{file}: {name}" for file in listed for name in sorted(listed[file] - uses.get(file, set()))]
    assert not missing, f"{TABLE.name} does not name these (UPDATE_SNAPSHOT=1 adds them): {missing}"
    assert not gone, f"{TABLE.name} names what is not used any more (UPDATE_SNAPSHOT=1 removes it): {gone}"
    unexplained = [file for file, (_, purpose) in rows().items() if not purpose]
    assert not unexplained, f"{TABLE.name} does not say what these need ComfyUI for: {unexplained}"


@pytest.mark.parametrize("name", sorted(set().union(*named().values())))
def test_it_is_there_in_this_comfyui(name: str) -> None:
    assert _found(name) is not None


@pytest.mark.parametrize("part", ["attention.BasicTransformerBlock", "attention.SpatialTransformer", UNET])
def test_a_forward_of_the_unet_is_neither_replayed_nor_in_memory_that_ends_with_it(part: str) -> None:
    """ComfyUI's compiler does both to other models since 0.34; see "Newer releases" in the table's page."""
    module, _, name = part.rpartition(".")
    source = inspect.getsource(getattr(importlib.import_module(f"comfy.ldm.modules.{module}"), name))
    assert not [word for word in ("malloc_graph", "malloc_scope", "enable_graph", "CUDAGraph") if word in source]


def _names_of_the_server() -> set[str]:
    """What ComfyUI's server.py defines and imports; before 0.20 it can be imported in a running server only."""
    nodes = ast.walk(ast.parse((comfyui_path() / "server.py").read_text("utf-8")))
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


def _found(name: str) -> Any:
    module, _, attribute = name.rpartition(".")
    if module == "server":
        return attribute if attribute in _names_of_the_server() else None
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError:
        return importlib.import_module(name)
